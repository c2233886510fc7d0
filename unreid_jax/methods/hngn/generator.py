"""Generators of hard negatives: from an anchor and a negative proxy, near both.

Both answer alike: anchors [b, d] and negative proxies [b, m, d], all of unit
length, to generated negatives [b, m, d] of unit length. Only training needs
them.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from unreid_jax.memory import normalize


class Generator(nn.Module):
  """A network that moves the proxy, from nearly not at all when it is new.

  Attributes:
    width: the width of the two hidden layers.
    noise: how many dimensions the noise in its input has, standard normal.
    radius: the length of the largest move, before the result is normalised: the
      trust region; 0 sets no limit.
  """

  width: int = 1024
  noise: int = 64
  radius: float = 0.0

  @nn.compact
  def __call__(
    self, anchors: Float[Array, "b d"], proxies: Float[Array, "b m d"], key
  ) -> Float[Array, "b m d"]:
    (b, m, d), dtype = proxies.shape, proxies.dtype
    dense = functools.partial(nn.Dense, param_dtype=dtype)
    anchors = jnp.broadcast_to(anchors[:, None], proxies.shape)
    noise = jax.random.normal(key, (b, m, self.noise), dtype)
    x = jnp.concatenate([anchors, proxies, noise], axis=-1)
    x = nn.gelu(nn.LayerNorm(param_dtype=dtype)(dense(self.width)(x)))
    x = nn.gelu(dense(self.width)(x))
    small = nn.initializers.variance_scaling(1e-4, "fan_in", "truncated_normal")
    move = dense(d, kernel_init=small)(x)
    if self.radius:
      squared = jnp.sum(jnp.square(move), axis=-1, keepdims=True)
      longest = jnp.maximum(squared, self.radius**2)
      move *= self.radius * jax.lax.rsqrt(longest)
    return normalize(proxies + move)


def interpolate(
  anchors: Float[Array, "b d"],
  proxies: Float[Array, "b m d"],
  amount: Float[Array, ""] | float,
) -> Float[Array, "b m d"]:
  """No network: the negative lies on the way from the proxy to the anchor.

  Args:
    anchors: the anchors' features.
    proxies: the negative proxies of each anchor.
    amount: the share of the way, from 0 to 1.

  Source: the support samples of Zhang et al., ISE (CVPR 2022), from the other
  end: theirs go from the anchor towards the nearest centroid and keep the
  anchor's label.
  """
  return normalize(proxies + amount * (anchors[:, None] - proxies))
