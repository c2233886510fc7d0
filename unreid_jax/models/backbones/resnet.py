"""ResNet and its IBN-a form, as in torchvision but with a last stride of 1."""

import functools
import re
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from unreid_jax import UserError
from unreid_jax.models.backbones import dotted
from unreid_jax.models.conv import Conv, max_pool
from unreid_jax.models.norm import GhostBatchNorm, InstanceBatchNorm

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
# The number of blocks in each stage, and whether they are bottlenecks.
_DEPTHS = {
  18: ((2, 2, 2, 2), False),
  34: ((3, 4, 6, 3), False),
  50: ((3, 4, 6, 3), True),
  101: ((3, 4, 23, 3), True),
  152: ((3, 8, 36, 3), True),
}
# Places in the nn.Sequential of Cluster Contrast, SpCL and HHCL.
PLACES = {"0": "conv1", "1": "bn1"}
PLACES |= {str(i + 3): f"layer{i}" for i in range(1, 5)}


class ResNet(nn.Module):
  """Images to a feature map, 16 times smaller, or 32 with a last stride of 2.

  He et al., CVPR 2016, in torchvision's "v1.5" form (the stride is on the
  3x3 convolution). The last stage keeps its resolution, as in every re-ID
  code base since Luo et al., CVPRW 2019 ("bag of tricks").
  """

  mean, std = MEAN, STD

  depth: int = 50  # a key of _DEPTHS
  ibn: bool = False  # whether bn1 in each block of stages 1 to 3 is IBN-a
  last_stride: int = 1  # 2: as for ImageNet
  pad_pool: bool = True  # whether the first pooling is padded by 1 on each side
  width: float = 1.0  # times the channels; 64 * width becomes a multiple of 8
  norm: Callable[..., nn.Module] = GhostBatchNorm
  dtype: str = "float32"  # of the computation; parameters keep theirs

  @property
  def stride(self) -> int:
    return 16 * self.last_stride

  @nn.compact
  def __call__(
    self, x: Float[Array, "b H W 3"], train: bool
  ) -> Float[Array, "b h w c"]:
    stages, bottleneck = _DEPTHS[self.depth]
    strides = (1, 2, 2, self.last_stride)
    base = 8 * max(1, round(8 * self.width))
    x = Conv(base, 7, 2, name="conv1")(x.astype(jnp.dtype(self.dtype)))
    x = nn.relu(self.norm(name="bn1")(x, train))
    x = max_pool(x, self.pad_pool)
    for i, num_blocks in enumerate(stages):
      for j in range(num_blocks):
        x = Block(
          channels=base * 2**i,
          stride=strides[i] if j == 0 else 1,
          bottleneck=bottleneck,
          project=j == 0 and (i > 0 or bottleneck),
          ibn=self.ibn and i < 3,
          norm=self.norm,
          name=f"layer{i + 1}_{j}",
        )(x, train)
    return x

  @staticmethod
  def torch_key(key: str) -> str:
    """To torchvision's "layer1.0.conv1.weight", which IBN-Net has as well.

    Cluster Contrast, SpCL and HHCL save "base.4.0.conv1.weight", Unsup_ReID
    "CNN.layer1.0.conv1.weight", OpenUnReID and fast-reid put "backbone." in
    front of it.

    Raises:
      UserError: the network is MMT's, which has one layer less, or one of
        torchreid's with one more.
    """
    key = re.sub(r"^(CNN|backbone)\.", "", key)
    if key.startswith("base.3."):
      raise UserError(
        f"its {key} is of a network without a ReLU after the first batch norm, "
        "such as MMT's: no encoder here is built like that"
      )
    if re.match(r"fc\.\d", key):  # a classifier has no number
      raise UserError(
        f"its {key} is of an embedding layer, as in torchreid's "
        "resnet50_fc512, which no ResNet here has"
      )
    return re.sub(r"^base\.([014567])", lambda found: PLACES[found[1]], key)

  @staticmethod
  def torch_name(path: tuple[str, ...]) -> str:
    """From ("layer1_0", "downsample_0", "kernel") to torchvision's name."""
    return dotted(path)


class Block(nn.Module):
  """A residual block: two 3x3 convolutions, or 1x1, 3x3, 1x1."""

  channels: int
  stride: int
  bottleneck: bool
  project: bool
  ibn: bool
  norm: Callable[..., nn.Module]

  @nn.compact
  def __call__(
    self, x: Float[Array, "b H W C"], train: bool
  ) -> Float[Array, "b h w c"]:
    channels, stride = self.channels, self.stride
    out = 4 * channels if self.bottleneck else channels
    convs = [(out, 3, stride), (out, 3, 1)]
    if self.bottleneck:
      convs = [(channels, 1, 1), (channels, 3, stride), (out, 1, 1)]
    shortcut = x
    if self.project:
      shortcut = Conv(out, 1, stride, name="downsample_0")(x)
      shortcut = self.norm(name="downsample_1")(shortcut, train)
    for i, options in enumerate(convs, 1):
      x = Conv(*options, name=f"conv{i}")(x)
      if self.ibn and i == 1:
        x = InstanceBatchNorm(self.norm, name="bn1")(x, train)
      else:
        x = self.norm(name=f"bn{i}")(x, train)
      if i < len(convs):
        x = nn.relu(x)
    return nn.relu(x + shortcut)


ARCHS = {
  f"resnet{depth}{suffix}": functools.partial(ResNet, depth, bool(suffix))
  for suffix in ("", "_ibn_a")
  for depth in _DEPTHS
}
# For the scores of others' weights.
ARCHS |= {
  "resnet50_fastreid": functools.partial(ResNet, 50, pad_pool=False),
  "resnet50_ibn_a_fastreid": functools.partial(
    ResNet, 50, True, pad_pool=False
  ),
  "resnet50_torchreid": functools.partial(ResNet, 50, last_stride=2),
}
