"""A backbone is one file here, with `ARCHS`: names and what builds them.

A value of `ARCHS` is a function of width (a multiplier of all channels), norm
(makes a batch norm, as `norm.GhostBatchNorm` does) and dtype (the name of the
computation's dtype), which returns a `Backbone`. It may take drop_path,
remat and last_stride, too, see `models.make`. `archs` finds the files.
"""

import importlib
import pkgutil
import re
from collections.abc import Callable
from typing import NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Tokens(NamedTuple):
  """A feature map, and a class token or another feature of the whole image."""

  maps: Float[Array, "b h w c"]
  token: Float[Array, "b c"]


class Backbone(Protocol):
  """What the module of a backbone has.

  Pretrained weights expect images that are normalised by its mean and std.
  """

  mean: tuple[float, float, float]  # of each channel, for pixels of 0..1
  std: tuple[float, float, float]
  stride: int  # rows of the image to one of the feature map

  def __call__(
    self, x: Float[Array, "b H W 3"], train: bool
  ) -> Float[Array, "b h w c"] | Tokens:
    """From normalised images to a feature map.

    Of what it drops at random in training, the key is make_rng("drop_path"),
    with which an image's row is mixed: its number in x, plus the variable
    "first" of the collection "batch", 0 if there is none, as x may be a part
    of the batch.
    """

  def torch_key(self, key: str) -> str:
    """A key of a PyTorch state dict, as the original code base spells it.

    Others wrap the network and save, say, "base.0.weight" for "conv1.weight".
    The key of another part just loses such a prefix; "module." is gone before.
    A key of another network may be refused by a UserError.
    """

  @staticmethod
  def torch_name(path: tuple[str, ...]) -> str:
    """("layer1_0", "conv1", "kernel") to PyTorch's "layer1.0.conv1.kernel".

    The last part stays: that it is a weight in PyTorch is up to the caller. Of
    the arrays themselves, only a "kernel" has another order of axes there.
    """

  def torch_state(
    self, state: dict[str, np.ndarray], size: tuple[int, int] | None
  ) -> dict[str, np.ndarray]:
    """A state dict, named as above, as images of this size need it.

    Optional: a backbone whose weights fit images of any size has none.
    """


def drop_images(
  block: nn.Module, x: Float[Array, "b ..."], train: bool, first: Array | int
) -> Float[Array, "b ..."]:
  """What a block adds, but zeros for some images: stochastic depth.

  Each image has a key of its own, by its row in the batch, so that it is
  treated alike in a batch and in a part of it that begins at row `first`.

  Source: Huang et al., ECCV 2016; as in timm, what stays is scaled up.
  """
  if not train or not block.drop_path:
    return x
  key, keep = block.make_rng("drop_path"), 1 - block.drop_path
  draw = lambda row: jax.random.bernoulli(jax.random.fold_in(key, row), keep)
  stays = jax.vmap(draw)(first + jnp.arange(len(x), dtype=jnp.int32))
  return jnp.where(stays.reshape(-1, *(1,) * (x.ndim - 1)), x / keep, 0)


def dotted(path: tuple[str, ...]) -> str:
  """("layer1_0", "conv1", "kernel") to "layer1.0.conv1.kernel"."""
  return re.sub(r"_(\d)", r".\1", ".".join(path))


def archs() -> dict[str, Callable]:
  """What builds each architecture, by name, from all files of the package."""
  names = [module.name for module in pkgutil.iter_modules(__path__)]
  modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
  return {arch: make for m in modules for arch, make in m.ARCHS.items()}
