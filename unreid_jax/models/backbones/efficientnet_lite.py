"""EfficientNet-Lite 0 to 4, with a last stride of 1."""

import functools
import itertools
import math
import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from unreid_jax import UserError
from unreid_jax.models.backbones import dotted, drop_images
from unreid_jax.models.conv import Conv, DepthwiseConv
from unreid_jax.models.norm import GhostBatchNorm

# The factors of each size's channels and blocks.
_FACTORS = ((1.0, 1.0), (1.0, 1.1), (1.1, 1.2), (1.2, 1.4), (1.4, 1.8))
# The blocks of each stage, the size of their kernel, the first one's stride,
# and their channels.
_STAGES = (
  (1, 3, 1, 16),
  (2, 3, 2, 24),
  (2, 5, 2, 40),
  (3, 3, 2, 80),
  (3, 5, 1, 112),
  (4, 5, 2, 192),
  (1, 3, 1, 320),
)
_LAST = 5  # the last stage with a stride
# Names of layers in efficientnet_lite_pytorch, and timm's for them.
_OUTER = {"bn0": "bn1", "bn1": "bn2", "fc": "classifier"}
_FIRST = {"depthwise_conv": "conv_dw", "project_conv": "conv_pw"}
_FIRST |= {"bn1": "bn1", "bn2": "bn2"}
_INNER = {"expand_conv": "conv_pw", "bn0": "bn1", "depthwise_conv": "conv_dw"}
_INNER |= {"bn1": "bn2", "project_conv": "conv_pwl", "bn2": "bn3"}


class EfficientNetLite(nn.Module):
  """Images to a feature map of 1280 channels, 16 times smaller.

  Liu et al., "Higher accuracy on vision models with EfficientNet-Lite", 2020:
  EfficientNet (Tan and Le, ICML 2019) without squeeze-and-excitation and with
  ReLU6, whose stem, head and outer stages are the same in all sizes. Padding,
  batch norm and the range of colours are those of tensorflow/tpu, which the
  published weights need.
  """

  # The authors scale pixels of 0..255 by (x - 127) / 128.
  mean, std = (127 / 255,) * 3, (128 / 255,) * 3

  size: int = 0  # 0 to 4
  last_stride: int = 1  # 2: as for ImageNet, 32 times smaller
  drop_path: float = 0.0  # the probability that an image skips the last block
  width: float = 1.0  # times all channels, which become multiples of 8
  norm: Callable[..., nn.Module] = GhostBatchNorm
  dtype: str = "float32"  # of the computation; parameters keep theirs

  @property
  def stride(self) -> int:
    return 16 * self.last_stride

  @nn.compact
  def __call__(
    self, x: Float[Array, "b H W 3"], train: bool
  ) -> Float[Array, "b h w c"]:
    norm = functools.partial(self.norm, epsilon=1e-3, own=0.99)
    factor, _ = _FACTORS[self.size]
    channels = lambda n: _multiple_of_8(n * self.width)
    x = x.astype(jnp.dtype(self.dtype))
    x = Conv(channels(32), 3, 2, same=True, name="conv_stem")(x)
    x = relu6(norm(name="bn1")(x, train))
    first = self.get_variable("batch", "first", 0)
    # As in timm, the probability grows from 0 in the first block.
    drops = iter(np.arange(0, 1, 1 / sum(self._depths())) * self.drop_path)
    for i, (num_blocks, (_, size, stride, out)) in enumerate(
      zip(self._depths(), _STAGES, strict=True)
    ):
      stride = self.last_stride if i == _LAST else stride
      for j in range(num_blocks):
        x = Block(
          out=channels(_multiple_of_8(out * factor)),
          size=size,
          stride=1 if j else stride,
          expand=6 if i else 1,
          norm=norm,
          drop_path=float(next(drops)),
          name=f"blocks_{i}_{j}",
        )(x, train, first)
    x = Conv(channels(1280), 1, name="conv_head")(x)
    return relu6(norm(name="bn2")(x, train))

  @nn.nowrap
  def _depths(self) -> list[int]:
    """The number of blocks in each stage."""
    factor = _FACTORS[self.size][1]
    first, *inner, last = (num for num, *_ in _STAGES)
    return [first, *(math.ceil(num * factor) for num in inner), last]

  @nn.nowrap
  def torch_key(self, key: str) -> str:
    """To timm's "blocks.1.0.conv_dw.weight".

    efficientnet_lite_pytorch counts the blocks of all stages in a row, and
    calls this one "_blocks.1._depthwise_conv.weight".

    Raises:
      UserError: a layer that this network does not have. Without it, a larger
        size or EfficientNet-B0 would be read as far as its layers fit.
    """
    original = key
    depths = enumerate(self._depths())
    places = [f"{i}.{j}" for i, num in depths for j in range(num)]
    if found := re.fullmatch(r"_blocks\.(\d+)\._(\w+)(.*)", key):
      number, layer, rest = int(found[1]), found[2], found[3]
      place = dict(enumerate(places)).get(number, number)
      layer = (_INNER if number else _FIRST).get(layer, layer)
      key = f"blocks.{place}.{layer}{rest}"
    elif found := re.fullmatch(r"_(\w+)(.*)", key):
      key = _OUTER.get(found[1], found[1]) + found[2]
    found = re.fullmatch(r"blocks\.(.*)\.(\w+)\.\w+", key)
    if found and (found[1] not in places or found[2] not in _INNER.values()):
      raise UserError(
        f"its {original} is of another network: set encoder.arch to the file's"
      )
    return key

  @staticmethod
  def torch_name(path: tuple[str, ...]) -> str:
    """From ("blocks_1_0", "conv_dw", "kernel") to timm's name."""
    return dotted(path)


class Block(nn.Module):
  """Expand by a 1x1 convolution, filter each channel, project: MBConv."""

  out: int
  size: int
  stride: int
  expand: int
  norm: Callable[..., nn.Module]
  drop_path: float = 0.0

  @nn.compact
  def __call__(
    self, x: Float[Array, "b H W C"], train: bool, first: Int[ArrayLike, ""] = 0
  ) -> Float[Array, "b h w c"]:
    shortcut, num = x, itertools.count(1)
    norm = lambda x: self.norm(name=f"bn{next(num)}")(x, train)
    if self.expand > 1:
      x = Conv(self.expand * x.shape[-1], 1, name="conv_pw")(x)
      x = relu6(norm(x))
    x = DepthwiseConv(self.size, self.stride, name="conv_dw")(x)
    x = relu6(norm(x))
    last = "conv_pwl" if self.expand > 1 else "conv_pw"
    x = norm(Conv(self.out, 1, name=last)(x))
    is_residual = self.stride == 1 and x.shape == shortcut.shape
    return drop_images(self, x, train, first) + shortcut if is_residual else x


def relu6(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """min(max(x, 0), 6), whose gradient at 0 and at 6 is 0 as in PyTorch."""
  low, high = x.dtype.type(0), x.dtype.type(6)
  if not all(isinstance(n, int) for n in x.shape):  # jax2onnx cannot clamp it
    return jnp.minimum(jnp.maximum(x, low), high)
  return jax.lax.clamp(low, x, high)


def _multiple_of_8(channels: float) -> int:
  """The nearest multiple of 8, or the next one: at most 10 % are lost."""
  near = max(8, int(channels + 4) // 8 * 8)
  return near + 8 * (near < 0.9 * channels)


ARCHS = {
  f"efficientnet_lite{size}": functools.partial(EfficientNetLite, size)
  for size in range(len(_FACTORS))
}
