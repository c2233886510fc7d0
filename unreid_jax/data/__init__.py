"""Images, identities and cameras of a dataset, ready for the device."""

import importlib
import pkgutil
from collections.abc import Collection
from typing import Annotated, Literal

import numpy as np
from PIL import Image

from unreid_jax import values
from unreid_jax.data import cache, datasets, folder, images, synthetic
from unreid_jax.data.images import Dataset, Split
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
      a directory of crops, whose names or sub-folders are cameras: a train
      split without identities (pid -1); or one that holds the folders query,
      gallery and, to train, train: see `folder.splits_in`.
    cache_dir: the folder of the cache; ~/.cache/unreid_jax if empty.
    on_corrupt: "skip": a damaged image is left out.
    version: "detected" or "labeled" for CUHK03-NP, "V1" or "V2" for MSMT17.
    seed: the random seed from which the synthetic set is drawn.
    splits: the splits to decode or draw; the others are None.

  Raises:
    UserError: the set is missing or is not laid out as expected.
  """
  given = {"name": name, "height": height, "width": width, "seed": seed}
  values.check(values.fields(load), given | {"on_corrupt": on_corrupt})
  if name == "synthetic":
    return _synthetic(height, width, seed, splits)
  cache_dir = cache_dir or "~/.cache/unreid_jax"
  cache_dir = values.expand(cache_dir, "dataset.cache_dir")
  options = {"height": height, "width": width, "on_corrupt": on_corrupt}
  try:  # every file is looked at before the first is read
    files = _list_files(name, root, version)
    files = {split: files[split] for split in files.keys() & set(splits)}
    states = {split: images.fingerprint(files[split]) for split in files}
  except OSError as error:
    raise images.unreadable(error.filename or root, error) from None

  def read(split):
    if split not in files:
      return None
    where = {"cache_dir": cache_dir, "name": f"{name}-{split}"}
    return cache.load_split(files[split], states[split], **where, **options)

  return Dataset(*map(read, Dataset._fields))


def _list_files(name, root, version):
  """The files of each split that a set has."""
  if name == "folder":
    return folder.splits_in(root)
  return builder(name).list_files(root, version)


def builder(name: str) -> type:
  """The TFDS builder of a published set."""
  module = importlib.import_module(f"unreid_jax.data.datasets.{name}")
  builders = {x.name: x for x in module.layout.Builder.__subclasses__()}
  return builders[name]


def _synthetic(height, width, seed, splits) -> Dataset:
  def resized(split):
    rows = map(Image.fromarray, split.images)
    rows = [images.resize(row, height, width) for row in rows]
    return split._replace(images=np.stack(rows))

  dataset = synthetic.make(seed, splits=splits)
  return Dataset(*(split and resized(split) for split in dataset))
