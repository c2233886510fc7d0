"""Encoders: images to unit features."""

import functools
import inspect
from typing import Annotated, Literal

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from unreid_jax import UserError, values
from unreid_jax.models import backbones
from unreid_jax.models.heads import Neck, Stripes
from unreid_jax.models.norm import GhostBatchNorm
from unreid_jax.values import BelowOne, Count, CountOrZero, Positive


class Encoder(nn.Module):
  """A backbone and a head; see `make`."""

  backbone: nn.Module  # a `backbones.Backbone`
  head: nn.Module

  def __call__(
    self, images: Float[Array, "b h w 3"], train: bool = False
  ) -> Float[Array, "b d"] | dict[str, Float[Array, "b ..."]]:
    return self.head(self.backbone(images, train), train)


def make(
  arch: Annotated[str, values.OneOf(backbones.archs)],
  width: Positive,
  head: Literal["neck", "stripes"],
  pooling: Literal["avg", "gem", "token"],
  bn_group_size: CountOrZero,
  bn_running: Literal["first", "mean"],
  embedding_dim: Count,
  stripe_dim: Count,
  num_stripes: Count,
  dtype: Literal["float32", "bfloat16", "float64"],
  drop_path: BelowOne = 0.0,  # cards of earlier versions end here
  remat: bool = False,
  bn_momentum: BelowOne = 0.0,
  last_stride: Literal[1, 2] = 1,
) -> Encoder:
  """Builds an encoder; the defaults for runs stand in configs/default.py.

  It returns unit features, in float32 or, for dtype "float64", in float64:
  [b, d] with the head "neck"; {"global": [b, embedding_dim], "local":
  [b, num_stripes, stripe_dim]} with the head "stripes".

  Args:
    arch: the name of a backbone, such as "resnet50" or "resnet50_ibn_a".
    width: what all channels of the backbone are multiplied by.
    head: "neck" as in Cluster Contrast, or "stripes" as in Pang et al.
    pooling: the average, GeM with a learnable power, or the class token of a
      vision transformer, or OSNet's own feature.
    bn_group_size, bn_running: see `norm.GhostBatchNorm`.
    embedding_dim, stripe_dim, num_stripes: sizes of the head "stripes".
    dtype: the dtype of the backbone's computation.
    drop_path: the probability that an image skips the last block of a vision
      transformer or an EfficientNet-Lite in training; it grows from 0 in the
      first block.
    remat: whether the blocks of a vision transformer are computed once more for
      the gradient, instead of kept.
    bn_momentum: the weight of the old running statistics; 0: the backbone's
      own, .99 of an EfficientNet-Lite and .9 elsewhere.
    last_stride: of a ResNet or an EfficientNet-Lite; 2, as for ImageNet, has
      feature maps of half the height and width.

  Raises:
    UserError: an unknown arch, one without such blocks, or "float64" while JAX
      has 32 bits only.
  """
  values.check(values.fields(make), {"arch": arch})
  if dtype == "float64" and not jax.config.jax_enable_x64:
    raise UserError('encoder.dtype is "float64": set JAX_ENABLE_X64=1 for it')
  norm = functools.partial(
    GhostBatchNorm, bn_group_size, bn_running, momentum=bn_momentum
  )
  build = backbones.archs()[arch]
  options = {"drop_path": drop_path, "remat": remat, "last_stride": last_stride}
  off = {"drop_path": 0.0, "remat": False, "last_stride": 1}
  options = {key: x for key, x in options.items() if x != off[key]}
  for key in options.keys() - inspect.signature(build).parameters:
    raise UserError(f"{arch} has no {key}: set encoder.{key} to {off[key]}")
  backbone = build(width=width, norm=norm, dtype=dtype, **options)
  if head == "neck":
    return Encoder(backbone, Neck(pooling, norm))
  dims = embedding_dim, stripe_dim, num_stripes
  return Encoder(backbone, Stripes(pooling, norm, *dims))
