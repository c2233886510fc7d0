"""Images, identities and cameras of a dataset, ready for the device."""

import functools
import importlib
import pathlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from unreid_jax import UserError
from unreid_jax.data.images import (
  IMAGE_SUFFIXES,
  Dataset,
  File,
  Split,
  is_image,
  load_split,
  resize,
)

__all__ = ["Dataset", "Split", "load"]

_BUILDERS = {
  "market1501": "Market1501",
  "msmt17": "MSMT17",
  "cuhk03_np": "CUHK03NP",
  "dukemtmc": "DukeMTMCReID",
  "personx": "PersonX",
}


def load(
  name: str,
  *,
  height: int,
  width: int,
  root: str = "",
  cache_dir: str = "",
  on_corrupt: str = "error",
  version: str = "",
  seed: int = 0,
  track: Callable = lambda items, description, total: items,
) -> Dataset:
  """Reads a dataset, resized; decoded images are kept in a cache.

  Args:
    name: "synthetic", "folder", or a module of `data.datasets`.
    height: of every image, in pixels.
    width: likewise.
    root: the unpacked set, the folder that holds it, or its zip; for "folder"
      a directory of crops, whose first sub-folders are cameras, if there are
      any: these have no identities (pid -1), no queries and no gallery.
    cache_dir: ~/.cache/unreid_jax if empty. What it holds may be deleted, and
      is not used for a source that has changed since.
    on_corrupt: "error", or "skip" to leave out images that cannot be read.
    version: of CUHK03-NP "detected" or "labeled", of MSMT17 "V1" or "V2".
    seed: of the synthetic set.
    track: `track(iterable, description, total)` yields the items and draws a
      progress bar.

  Raises:
    UserError: the set is not there or not as expected; see the builders.
  """
  if name == "synthetic":
    return _synthetic(height, width, seed, track)
  if name not in ("folder", *_BUILDERS):
    known = ", ".join(("synthetic", "folder", *_BUILDERS))
    raise UserError(f'dataset.name is "{name}": set it to one of {known}')
  cache_dir = pathlib.Path(cache_dir or "~/.cache/unreid_jax").expanduser()
  if name == "folder":
    files = {"train": _list(root)}

    def open_reader(split):
      return lambda i: files[split][i].path.read_bytes()

  else:
    module = importlib.import_module(f"unreid_jax.data.datasets.{name}")
    builder = getattr(module, _BUILDERS[name])(
      root=root, version=version, data_dir=cache_dir / "tfds", track=track
    )
    files, open_reader = builder.files, builder.open_reader
  splits = {
    split: load_split(
      files[split],
      functools.partial(open_reader, split),
      cache_dir=cache_dir,
      name=f"{name}-{split}",
      height=height,
      width=width,
      on_corrupt=on_corrupt,
      track=track,
    )
    for split in files
  }
  return Dataset(*map(splits.get, Dataset._fields))


def _synthetic(height, width, seed, track) -> Dataset:
  from unreid_jax.data import synthetic  # also run as a script

  dataset = synthetic.make(seed, track=track)
  return Dataset(
    *(
      split._replace(
        images=np.stack(
          [
            resize(Image.fromarray(image), height, width)
            for image in split.images
          ]
        )
      )
      for split in dataset
    )
  )


def _list(root: str) -> list[File]:
  """Every image below a folder; the first sub-folder is its camera, from 1."""
  folder = pathlib.Path(root).expanduser()
  if not root or not folder.is_dir():
    raise UserError(
      f'dataset.root="{root}" is no folder: set it to a directory of crops'
    )
  paths = [p for p in folder.rglob("*") if is_image(p.name) and p.is_file()]
  if not paths:
    raise UserError(f"{folder} holds no image ({' '.join(IMAGE_SUFFIXES)})")
  names = sorted(path.relative_to(folder).as_posix() for path in paths)
  folders = ["/".join(name.split("/")[:-1][:1]) for name in names]
  cameras = {name: i for i, name in enumerate(sorted(set(folders)), 1)}
  return [
    File(name, -1, cameras[camera], folder / name)
    for name, camera in zip(names, folders, strict=True)
  ]
