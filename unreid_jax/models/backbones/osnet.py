"""OSNet, as in torchreid."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from unreid_jax.models.backbones import Tokens, dotted
from unreid_jax.models.backbones.resnet import MEAN, STD
from unreid_jax.models.conv import KAIMING, Conv, DepthwiseConv, max_pool
from unreid_jax.models.norm import GhostBatchNorm, widen

_CHANNELS = {"conv2": 256, "conv3": 384, "conv4": 512}
_FEATURES = 512  # in all widths


class OSNet(nn.Module):
  """Images to a feature map, 16 times smaller, and the authors' feature.

  Zhou et al., "Omni-Scale Feature Learning for Person Re-Identification", ICCV
  2019. In the place of a class token is what torchreid returns, and trackers
  use: the mean of the map through a layer "fc". "osnet_x0_5" of torchreid is
  "osnet_x1_0" here with half the width.
  """

  mean, std, stride = MEAN, STD, 16

  factor: float = 1.0  # times the channels of the map
  width: float = 1.0  # the same, once more
  norm: Callable[..., nn.Module] = GhostBatchNorm
  dtype: str = "float32"  # of the computation; parameters keep theirs

  @nn.compact
  def __call__(self, x: Float[Array, "b H W 3"], train: bool) -> Tokens:
    factor = max(1, round(16 * self.factor * self.width)) / 16
    layer = functools.partial(Layer, norm=self.norm)
    x = x.astype(jnp.dtype(self.dtype))
    x = max_pool(layer(int(64 * factor), 7, 2, name="conv1")(x, train))
    for name, channels in _CHANNELS.items():
      channels = int(channels * factor)
      for i in range(2):
        x = Block(channels, self.norm, name=f"{name}_{i}")(x, train)
      if name != "conv4":
        x = layer(channels, name=f"{name}_2_0")(x, train)
        x = _halve(x)
    x = layer(channels, name="conv5")(x, train)
    whole = widen(x).mean((1, 2))
    init = nn.initializers.normal(0.01)
    dense = nn.Dense(
      _FEATURES, dtype=whole.dtype, kernel_init=init, name="fc_0"
    )
    whole = self.norm(name="fc_1")(dense(whole), train)
    return Tokens(x, nn.relu(whole))

  @staticmethod
  def torch_key(key: str) -> str:
    """torchreid's own."""
    return key

  @staticmethod
  def torch_name(path: tuple[str, ...]) -> str:
    """From ("conv2_0", "conv2b_1", "conv1", "kernel") to torchreid's name."""
    return dotted(path)


class Layer(nn.Module):
  """A convolution and batch norm, with ReLU."""

  channels: int
  size: int = 1
  stride: int = 1
  relu: bool = True
  norm: Callable[..., nn.Module] = GhostBatchNorm

  @nn.compact
  def __call__(
    self, x: Float[Array, "b H W C"], train: bool
  ) -> Float[Array, "b h w c"]:
    x = Conv(self.channels, self.size, self.stride, name="conv")(x)
    x = self.norm(name="bn")(x, train)
    return nn.relu(x) if self.relu else x


class LightLayer(nn.Module):
  """A 1x1 convolution, then a 3x3 one of each channel alone."""

  norm: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Array:
    x = Conv(x.shape[-1], 1, name="conv1")(x)
    x = DepthwiseConv(3, name="conv2")(x)
    return nn.relu(self.norm(name="bn")(x, train))


class Block(nn.Module):
  """Streams of one to four light layers, each channel gated, beside a shortcut.

  The streams share the gate's weights.
  """

  channels: int
  norm: Callable[..., nn.Module]

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w C"], train: bool
  ) -> Float[Array, "b h w c"]:
    layer = functools.partial(Layer, norm=self.norm)
    inner = self.channels // 4
    start, shortcut = layer(inner, name="conv1")(x, train), x
    gate, total = Gate(name="gate"), 0
    for number, letter in enumerate("abcd", 1):
      stream = start
      for i in range(number):
        name = f"conv2{letter}" + (f"_{i}" if number > 1 else "")
        stream = LightLayer(self.norm, name=name)(stream, train)
      total += gate(stream)
    x = layer(self.channels, relu=False, name="conv3")(total, train)
    if shortcut.shape != x.shape:
      project = layer(self.channels, relu=False, name="downsample")
      shortcut = project(shortcut, train)
    return nn.relu(x + shortcut)


class Gate(nn.Module):
  """A weight in (0, 1) of each channel, from the means of all."""

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    conv = functools.partial(
      nn.Conv, kernel_size=(1, 1), dtype=x.dtype, kernel_init=KAIMING
    )
    channels = x.shape[-1]
    means = widen(x).mean((1, 2), keepdims=True).astype(x.dtype)
    hidden = nn.relu(conv(max(1, channels // 16), name="fc1")(means))
    return x * jax.nn.sigmoid(conv(channels, name="fc2")(hidden))


def _halve(x):
  """The mean of each 2x2 pixels; an odd row or column is left out."""
  b, h, w, c = x.shape
  squares = x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c)
  return widen(squares).mean((2, 4)).astype(x.dtype)


ARCHS = {
  f"osnet_x{str(factor).replace('.', '_')}": functools.partial(OSNet, factor)
  for factor in (1.0, 0.25)
}
