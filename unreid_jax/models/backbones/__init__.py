"""A backbone is one file here, with `ARCHS`: names and what builds them.

A value of `ARCHS` is a function of width (a multiplier of all channels),
bn_group_size and bn_running (see `norm.GhostBatchNorm`) and dtype (the name of
the dtype of the computation). It returns a flax module that is a `Backbone`.
`archs` finds the files by itself.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Protocol

from jaxtyping import Array, Float


class Backbone(Protocol):
  """What the module of a backbone has.

  Attributes:
    mean: the mean of each channel of its images, for pixels scaled to 0..1.
    std: the standard deviation of each channel. Pretrained weights expect
      images that are normalised by these two.
    stride: how many rows of the image there are to one of the feature map.
  """

  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  stride: int

  def __call__(
    self, x: Float[Array, "b H W 3"], train: bool
  ) -> Float[Array, "b h w c"]:
    """From normalised images to a feature map."""

  @staticmethod
  def torch_key(key: str) -> str:
    """A key of a PyTorch state dict, as the original code base spells it.

    Others wrap the network and save, say, "module.base.0.weight" instead of
    "conv1.weight". The key of another part just loses such a prefix.
    """

  @staticmethod
  def torch_name(path: tuple[str, ...]) -> str:
    """The PyTorch name of a variable, except that the last part stays.

    ("layer1_0", "conv1", "kernel") becomes "layer1.0.conv1.kernel": that a
    kernel is called weight in PyTorch is up to the caller.
    """


def archs() -> dict[str, Callable]:
  """What builds each architecture, by name, from all files of the package."""
  names = [module.name for module in pkgutil.iter_modules(__path__)]
  modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
  return {arch: make for m in modules for arch, make in m.ARCHS.items()}
