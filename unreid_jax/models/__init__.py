"""Encoders: images to unit features."""

import flax.linen as nn
from jaxtyping import Array, Float

from unreid_jax import UserError
from unreid_jax.models.heads import Neck, Stripes
from unreid_jax.models.resnet import DEPTHS, ResNet

_ARCHS = {
  f"resnet{depth}{suffix}": (depth, bool(suffix))
  for suffix in ("", "_ibn_a")
  for depth in DEPTHS
}


class Encoder(nn.Module):
  """A backbone and a head; see `make`."""

  backbone: nn.Module
  head: nn.Module

  def __call__(
    self, images: Float[Array, "b h w 3"], train: bool = False
  ) -> Float[Array, "b d"] | dict[str, Float[Array, "b ..."]]:
    return self.head(self.backbone(images, train), train)


def make(
  arch: str,
  width: float,
  head: str,
  pooling: str,
  bn_group_size: int,
  bn_running: str,
  embedding_dim: int,
  stripe_dim: int,
  num_stripes: int,
  dtype: str,
) -> Encoder:
  """Builds an encoder; the defaults for runs stand in configs/default.py.

  Its output is float32 and L2-normalised: features [b, d] of the head
  "neck"; {"global": [b, embedding_dim], "local": [b, num_stripes,
  stripe_dim]} of the head "stripes".

  Args:
    arch: resnet18, 34, 50, 101 or 152, optionally with the suffix _ibn_a.
    width: channel multiplier, for small machines.
    head: "neck" (Cluster Contrast) or "stripes" (selective contrastive).
    pooling: "avg" or "gem".
    bn_group_size: images per batch-norm group; 0: the whole batch.
    bn_running: groups behind the running statistics: "first" or "mean".
    embedding_dim: of the head "stripes", global branch.
    stripe_dim: of the head "stripes", each stripe.
    num_stripes: of the head "stripes".
    dtype: of the backbone's computation: "float32" or "bfloat16".

  Raises:
    UserError: an unknown name.
  """
  _check("arch", arch, _ARCHS)
  _check("head", head, ("neck", "stripes"))
  _check("pooling", pooling, ("avg", "gem"))
  _check("bn_running", bn_running, ("first", "mean"))
  _check("dtype", dtype, ("float32", "bfloat16"))
  depth, ibn = _ARCHS[arch]
  norm = {"bn_group_size": bn_group_size, "bn_running": bn_running}
  backbone = ResNet(depth=depth, ibn=ibn, width=width, dtype=dtype, **norm)
  if head == "neck":
    return Encoder(backbone, Neck(pooling, **norm))
  dims = (embedding_dim, stripe_dim, num_stripes)
  return Encoder(backbone, Stripes(pooling, *dims, **norm))


def _check(key: str, value: str, valid) -> None:
  if value not in valid:
    raise UserError(
      f"encoder.{key}={value!r} is unknown: choose one of {', '.join(valid)}"
    )
