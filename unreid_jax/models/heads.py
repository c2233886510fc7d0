"""From a feature map to unit features: pooling, neck, stripes."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from unreid_jax import UserError
from unreid_jax.memory import normalize
from unreid_jax.models.backbones import Tokens
from unreid_jax.models.conv import KAIMING
from unreid_jax.models.norm import GhostBatchNorm, widen

Maps = Float[Array, "b h w c"]


class Pool(nn.Module):
  """Average pooling, GeM (Radenovic et al., TPAMI 2018), or the class token.

  GeM is the generalised mean with a learnable power for all channels.
  """

  kind: str = "avg"

  @nn.compact
  def __call__(self, x: Maps | Tokens) -> Float[Array, "b c"]:
    if self.kind == "token":
      if not isinstance(x, Tokens):
        raise UserError(
          'encoder.pooling is "token", which vision transformers and OSNet '
          'have: set "avg" or "gem" for another encoder.arch'
        )
      return widen(x.token)
    x = widen(_maps(x))
    if self.kind == "avg":
      return x.mean((1, 2))
    p = self.param("p", nn.initializers.constant(3.0), (1,))
    return gem(x, p.astype(x.dtype))


def _maps(x):
  return x.maps if isinstance(x, Tokens) else x


def gem(x: Maps, p: Float[Array, " 1"]) -> Float[Array, "b c"]:
  """Generalised mean over the pixels: mean(max(x, 1e-6) ** p) ** (1 / p)."""
  x = jnp.maximum(x, 1e-6)
  # Relative to the maximum no power underflows, which made NaN gradients.
  top = jax.lax.stop_gradient(x.max((1, 2), keepdims=True))
  mean = ((x / top) ** p[0]).mean((1, 2))
  return top[:, 0, 0] * mean ** (1 / p[0])


class Neck(nn.Module):
  """Pooling, batch norm with a frozen bias, and unit length.

  Source: "BNNeck" of Luo et al., CVPRW 2019, as in Cluster Contrast.
  """

  pooling: str = "avg"
  norm: Callable[..., nn.Module] = GhostBatchNorm

  @nn.compact
  def __call__(self, x: Maps | Tokens, train: bool) -> Float[Array, "b d"]:
    x = Pool(self.pooling, name="pool")(x)
    return normalize(self.norm(train_bias=False, name="bn")(x, train))


class Stripes(nn.Module):
  """An embedding of the whole map, and one of each horizontal stripe.

  Each is pooled, then goes through a linear layer and batch norm, and gets unit
  length. Each stripe has weights of its own and is pooled by the average. All
  stripes have the same number of rows; those left over at the bottom count for
  the whole map only.

  Source: Pang et al., TOMM 2022 (End2End_AvgPooling in their code).
  """

  pooling: str = "avg"
  norm: Callable[..., nn.Module] = GhostBatchNorm
  embedding_dim: int = 2048
  stripe_dim: int = 256
  num_stripes: int = 8

  @nn.compact
  def __call__(
    self, x: Maps | Tokens, train: bool
  ) -> dict[str, Float[Array, "b ..."]]:
    whole, x = Pool(self.pooling, name="pool")(x), _maps(x)
    options = {"dtype": whole.dtype, "kernel_init": KAIMING}
    dense = nn.Dense(self.embedding_dim, **options, name="embedding")
    whole = self.norm(name="embedding_bn")(dense(whole), train)

    b, h, w, c = x.shape
    num, rows = self.num_stripes, h // self.num_stripes
    if not rows:
      raise UserError(
        f"the feature map has {h} rows, too few for {num} stripes: raise "
        "dataset.height or lower encoder.num_stripes"
      )
    parts = widen(x[:, : rows * num]).reshape(b, num, rows * w, c).mean(2)
    parts = StripeDense(self.stripe_dim, name="stripes")(parts)
    flat = parts.reshape(b, -1)
    parts = self.norm(name="stripes_bn")(flat, train).reshape(parts.shape)
    return {"global": normalize(whole), "local": normalize(parts)}


class StripeDense(nn.Module):
  """A linear layer for each stripe, initialised as PyTorch's nn.Linear."""

  features: int

  @nn.compact
  def __call__(self, x: Float[Array, "b s c"]) -> Float[Array, "b s d"]:
    bound = x.shape[-1] ** -0.5

    def uniform(key, shape):
      return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

    shape = (*x.shape[1:], self.features)
    kernel = self.param("kernel", uniform, shape).astype(x.dtype)
    bias = self.param("bias", uniform, shape[::2]).astype(x.dtype)
    return jnp.einsum("bsc,scd->bsd", x, kernel) + bias[None]
