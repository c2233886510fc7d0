"""Generators of hard negatives: from an anchor and a negative proxy, near both.

Both answer alike: anchors [b, d] and negative proxies [b, m, d], all of unit
length, to generated negatives [b, m, d] of unit length. Only training needs
them. A reconstruction; see unreid_jax/methods/hngn.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from unreid_jax.memory import normalize


class Generator(nn.Module):
  """A network that moves the proxy, from nearly not at all when it is new.

  Attributes:
    width: of the two hidden layers.
    noise: dimensions of the noise in its input, standard normal.
    radius: length of the largest move, before the result is normalised: the
      trust region; 0: none.
  """

  width: int = 1024
  noise: int = 64
  radius: float = 0.0

  @nn.compact
  def __call__(
    self, anchors: Float[Array, "b d"], proxies: Float[Array, "b m d"], key
  ) -> Float[Array, "b m d"]:
    b, m, d = proxies.shape
    anchors = jnp.broadcast_to(anchors[:, None], proxies.shape)
    noise = jax.random.normal(key, (b, m, self.noise))
    x = jnp.concatenate([anchors, proxies, noise], axis=-1)
    x = nn.gelu(nn.LayerNorm()(nn.Dense(self.width)(x)))
    x = nn.gelu(nn.Dense(self.width)(x))
    small = nn.initializers.variance_scaling(1e-4, "fan_in", "truncated_normal")
    move = nn.Dense(d, kernel_init=small)(x)
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
  """No network: that share of the way from the proxy to the anchor.

  Source: the support samples of Zhang et al., ISE (CVPR 2022), from the other
  end: theirs go from the anchor towards the nearest centroid and keep the
  anchor's label.
  """
  return normalize(proxies + amount * (anchors[:, None] - proxies))
