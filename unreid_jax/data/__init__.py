"""Images, identities and cameras of a dataset, ready for the device."""

import functools
import importlib
import pathlib
import pkgutil
from collections.abc import Collection
from typing import Annotated, Literal

import numpy as np
from PIL import Image

from unreid_jax import values
from unreid_jax.data import datasets, synthetic
from unreid_jax.data.images import Dataset, Split, files_in, load_split, resize
from unreid_jax.values import Count, CountOrZero, Free

__all__ = ["Dataset", "Split", "load", "names"]


def names() -> list[str]:
  """Every dataset that `load` knows."""
  modules = [module.name for module in pkgutil.iter_modules(datasets.__path__)]
  modules.remove("layout")  # what the others share
  return ["synthetic", "folder", *modules]


def load(
  name: Annotated[str, values.OneOf(names)],
  *,
  height: Count,
  width: Count,
  root: Free[str] = "",
  cache_dir: Free[str] = "",
  on_corrupt: Literal["error", "skip"] = "error",
  version: str = "",
  seed: CountOrZero = 0,
  splits: Collection[str] = Dataset._fields,
) -> Dataset:
  """Reads a dataset and resizes its images.

  Decoded images are kept in a cache, which may be deleted at any time. It is
  not used any more once the source has changed.

  Args:
    name: "synthetic", "folder", or a module of `data.datasets`.
    height, width: the size of every image, in pixels.
    root: the unpacked set, the folder that holds it, or its zip. For "folder",
      a directory of crops, in which each sub-folder is a camera: it has a train
      split only, without identities (pid -1).
    cache_dir: the folder of the cache; ~/.cache/unreid_jax if empty.
    on_corrupt: whether an image that cannot be read is left out.
    version: "detected" or "labeled" for CUHK03-NP, "V1" or "V2" for MSMT17.
    seed: the random seed from which the synthetic set is drawn.
    splits: the splits to decode or draw; the others are None.

  Raises:
    UserError: the set is missing or is not laid out as expected.
  """
  values.check(values.fields(load), {"name": name})
  if name == "synthetic":
    return _synthetic(height, width, seed, splits)
  cache_dir = pathlib.Path(cache_dir or "~/.cache/unreid_jax").expanduser()
  files, open_reader = _open(name, root, version, cache_dir / "tfds")
  options = {"height": height, "width": width, "on_corrupt": on_corrupt}
  options |= {"cache_dir": cache_dir}

  def read(split):
    open_split = functools.partial(open_reader, split)
    label = f"{name}-{split}"
    return load_split(files[split], open_split, name=label, **options)

  wanted = files.keys() & set(splits)
  return Dataset(*(read(x) if x in wanted else None for x in Dataset._fields))


def _open(name, root, version, data_dir):
  """The files of each split, and a function that opens a split's reader."""
  if name == "folder":
    files = files_in(root)
    return {"train": files}, lambda _: lambda i: files[i].path.read_bytes()
  module = importlib.import_module(f"unreid_jax.data.datasets.{name}")
  builders = {x.name: x for x in module.layout.Builder.__subclasses__()}
  builder = builders[name](root=root, version=version, data_dir=data_dir)
  return builder.files, builder.open_reader


def _synthetic(height, width, seed, splits) -> Dataset:
  def resized(split):
    images = [resize(Image.fromarray(x), height, width) for x in split.images]
    return split._replace(images=np.stack(images))

  dataset = synthetic.make(seed, splits=splits)
  return Dataset(*(split and resized(split) for split in dataset))
