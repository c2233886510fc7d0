"""A backbone is one file here, with `ARCHS`: names and what builds them.

A value of `ARCHS` is a function of width (a multiplier of all channels), norm
(makes a batch norm, as `norm.GhostBatchNorm` does) and dtype (the name of the
computation's dtype), which returns a `Backbone`. `archs` finds the files.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Protocol

from jaxtyping import Array, Float


class Backbone(Protocol):
  """What the module of a backbone has.

  Pretrained weights expect images that are normalised by its mean and std.
  """

  mean: tuple[float, float, float]  # of each channel, for pixels of 0..1
  std: tuple[float, float, float]
  stride: int  # rows of the image to one of the feature map

  def __call__(
    self, x: Float[Array, "b H W 3"], train: bool
  ) -> Float[Array, "b h w c"]:
    """From normalised images to a feature map."""

  def torch_key(self, key: str) -> str:
    """A key of a PyTorch state dict, as the original code base spells it.

    Others wrap the network and save, say, "module.base.0.weight" for
    "conv1.weight". The key of another part just loses such a prefix. A key of a
    larger network may be refused by a UserError.
    """

  @staticmethod
  def torch_name(path: tuple[str, ...]) -> str:
    """("layer1_0", "conv1", "kernel") to PyTorch's "layer1.0.conv1.kernel".

    The last part stays: that it is a weight in PyTorch is up to the caller.
    """


def archs() -> dict[str, Callable]:
  """What builds each architecture, by name, from all files of the package."""
  names = [module.name for module in pkgutil.iter_modules(__path__)]
  modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
  return {arch: make for m in modules for arch, make in m.ARCHS.items()}
