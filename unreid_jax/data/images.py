"""Decodes and resizes images once, into memory-mapped arrays in a cache."""

import concurrent.futures
import hashlib
import io
import json
import logging
import os
import pathlib
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from unreid_jax import UserError, progress

_Pixels = UInt8[np.ndarray, "h w 3"]
_AT_ONCE = 256  # images decoded between two looks at what went wrong
_UNFINISHED = ".unfinished"
_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


class Split(NamedTuple):
  """Images of one split, in the order of their sorted file names."""

  images: UInt8[np.ndarray, "n h w 3"]
  pids: Int32[np.ndarray, " n"]  # 0: a distractor; -1: unknown
  camids: Int32[np.ndarray, " n"]  # from 1, as in the file names
  names: tuple[str, ...]


class Dataset(NamedTuple):
  """The splits of a set; None: it has no such split, or it is not loaded."""

  train: Split | None
  query: Split | None
  gallery: Split | None


def is_image(name: str) -> bool:
  """Whether a file name is an image's, and not Thumbs.db or the like."""
  return name.lower().endswith(_SUFFIXES) and not name.startswith(".")


class File(NamedTuple):
  """An image file on disk or in a zip, not read yet."""

  name: str
  pid: int
  camid: int
  path: pathlib.Path | zipfile.Path


def fingerprint(files: Sequence[File]) -> str:
  """Sixteen hex digits that change when a file is added, renamed or changed.

  They are made from names, sizes and times of change (in a zip, checksums). It
  raises a UserError if a file is missing.
  """
  digest = hashlib.sha256()
  for *labels, path in files:
    try:
      if isinstance(path, zipfile.Path):
        info = path.root.getinfo(path.at)
        state = info.file_size, info.CRC
      else:
        info = path.stat()
        state = info.st_size, info.st_mtime_ns
    except (OSError, KeyError):
      raise UserError(f"{path} is missing: unpack the set again") from None
    digest.update(repr((*labels, state)).encode())
  return digest.hexdigest()[:16]


def resize(image: Image.Image, height: int, width: int) -> _Pixels:
  """RGB of that size, by Pillow's bicubic filter, as torchvision does it."""
  size = (width, height)
  return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC))


def load_split(
  files: Sequence[File],
  open_reader: Callable[[], Callable[[int], bytes]],
  *,
  cache_dir: str | os.PathLike,
  name: str,
  height: int,
  width: int,
  on_corrupt: Literal["error", "skip"] = "error",
) -> Split:
  """The images of some files, decoded into the cache unless they are there.

  An entry of the cache is a folder, which gets its name when it is complete:
  `name`, the size of the images in pixels, and the fingerprint of the files.

  If there is none, `open_reader` is called. It returns a function from a
  position in `files` to an encoded image, which several threads call at once.

  Raises:
    UserError: an image cannot be decoded; with "skip", none of them can.
  """
  entry = f"{name}-{height}x{width}-{fingerprint(files)}"
  folder = pathlib.Path(cache_dir, "images", entry)
  if not folder.exists():
    rows = _decode(files, open_reader(), height, width)
    rows = progress.track(rows, f"decode {name}", len(files))
    _write(folder, rows, (height, width, 3), on_corrupt)
  corrupt = dict(json.loads((folder / "corrupt.json").read_text()))
  if corrupt:
    first = next(iter(corrupt.values()))
    if on_corrupt == "error":
      raise _corrupt_error(first)
    logging.getLogger(__name__).warning(
      "%s: %d of %d images left out; the first: %s",
      name, len(corrupt), len(files), first,
    )  # fmt: skip
  kept = [file for i, file in enumerate(files) if i not in corrupt]
  names, pids, camids, _ = zip(*kept, strict=True)
  images = np.load(folder / "images.npy", mmap_mode="r")
  pids, camids = np.array([pids, camids], np.int32)
  return Split(images, pids, camids, names)


def files_in(root: str) -> list[File]:
  """Every image below a folder; the first sub-folder is its camera, from 1."""
  folder = pathlib.Path(root).expanduser()
  if not root or not folder.is_dir():
    fix = "set it to a directory of crops"
    raise UserError(f'dataset.root="{root}" is no folder: {fix}')
  paths = [p for p in folder.rglob("*") if is_image(p.name) and p.is_file()]
  if not paths:
    raise UserError(f"{folder} holds no image ({' '.join(_SUFFIXES)})")
  paths = sorted(path.relative_to(folder).as_posix() for path in paths)
  cameras = [path.partition("/")[0] if "/" in path else "" for path in paths]
  camids = (np.unique(cameras, return_inverse=True)[1] + 1).tolist()
  pairs = zip(paths, camids, strict=True)
  return [File(path, -1, camid, folder / path) for path, camid in pairs]


def _decode(files, read, height, width):
  """Yields each file's pixels, or a line that says why it has none."""

  def decode(i):
    try:
      with Image.open(io.BytesIO(read(i))) as image:
        return resize(image, height, width)
    except Image.UnidentifiedImageError:
      return f"{files[i].path} is not an image"
    except Exception as error:  # each of Pillow's formats has its own
      return f"{files[i].path} cannot be decoded ({error})"

  with concurrent.futures.ThreadPoolExecutor() as pool:
    for start in range(0, len(files), _AT_ONCE):
      yield from pool.map(decode, range(len(files))[start : start + _AT_ONCE])


def _write(folder, rows, shape, on_corrupt) -> None:
  """Writes an entry under a temporary name and renames it at the end."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  for other in folder.parent.glob(f"*{_UNFINISHED}"):  # of killed runs
    if time.time() - other.stat().st_mtime > 24 * 3600:
      shutil.rmtree(other, ignore_errors=True)
  new = pathlib.Path(tempfile.mkdtemp(_UNFINISHED, dir=folder.parent))
  try:
    corrupt = _write_rows(new / "images.npy", rows, shape, on_corrupt)
    (new / "corrupt.json").write_text(json.dumps(corrupt))
    new.rename(folder)
  except OSError:
    if not folder.exists():  # else another process was faster
      raise
  finally:
    shutil.rmtree(new, ignore_errors=True)


def _write_rows(path, rows, shape, on_corrupt) -> list[tuple[int, str]]:
  """Writes the images; returns (position, reason) of each that is missing."""
  corrupt, header = [], {"descr": "|u1", "fortran_order": False}
  write_header = np.lib.format.write_array_header_1_0
  with open(path, "wb") as file:
    write_header(file, header | {"shape": (0, *shape)})
    count = 0
    for i, row in enumerate(rows):
      if isinstance(row, str):
        corrupt.append((i, row))
        if on_corrupt == "error":
          raise _corrupt_error(row)
      else:
        file.write(row.tobytes())
        count += 1
    file.seek(0)  # both headers have the same length
    write_header(file, header | {"shape": (count, *shape)})
  if not count:
    raise _corrupt_error(f"no image can be read: {corrupt[0][1]}")
  return corrupt


def _corrupt_error(line: str) -> UserError:
  return UserError(
    f'{line}: replace or delete the file, or set dataset.on_corrupt="skip"'
  )
