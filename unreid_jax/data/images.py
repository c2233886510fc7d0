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
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from unreid_jax import UserError

_AT_ONCE = 256  # images decoded between two looks at what went wrong
_UNFINISHED = ".unfinished"
_DAY = 24 * 3600
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


class Split(NamedTuple):
  """Images of one split, in the order of their sorted file names.

  pids: 0 is a distractor, -1 unknown. camids: as in the names, from 1.
  """

  images: UInt8[np.ndarray, "n h w 3"]
  pids: Int32[np.ndarray, " n"]
  camids: Int32[np.ndarray, " n"]
  names: tuple[str, ...]


class Dataset(NamedTuple):
  """A train split and, where identities are known, queries and a gallery."""

  train: Split
  query: Split | None
  gallery: Split | None


def is_image(name: str) -> bool:
  """Whether a file name is an image's, and not Thumbs.db or the like."""
  return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


class File(NamedTuple):
  """An image file on disk or in a zip, not read yet."""

  name: str
  pid: int
  camid: int
  path: pathlib.Path | zipfile.Path


def fingerprint(files: Sequence[File]) -> str:
  """Sixteen hex digits that change when a file is added, moved or changed.

  Made from names, sizes and times of change, or in a zip from checksums.

  Raises:
    UserError: a file is missing.
  """
  digest = hashlib.sha256()
  for file in files:
    try:
      state = _state(file.path)
    except (OSError, KeyError):
      raise UserError(f"{file.path} is missing: unpack the set again") from None
    digest.update(repr((file.name, file.pid, file.camid, state)).encode())
  return digest.hexdigest()[:16]


def _state(path: pathlib.Path | zipfile.Path) -> tuple[int, int]:
  if isinstance(path, zipfile.Path):
    info = path.root.getinfo(path.at)
    return info.file_size, info.CRC
  info = path.stat()
  return info.st_size, info.st_mtime_ns


def resize(
  image: Image.Image, height: int, width: int
) -> UInt8[np.ndarray, "h w 3"]:
  """RGB, bicubic and antialiased, as Pillow and so torchvision do it."""
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
  on_corrupt: str = "error",
  track: Callable = lambda items, description, total: items,
) -> Split:
  """The images of some files, decoded into the cache unless they are there.

  The cache entry is a folder, renamed into place when it is complete; its name
  holds the size and the fingerprint of the files.

  Args:
    files: in the order of the split.
    open_reader: called if the cache has no entry; returns a function from a
      position in `files` to encoded bytes, which several threads call at once.
    cache_dir: where entries are kept; any of them may be deleted.
    name: of the entry, for people who look into the cache.
    height: of every image, in pixels.
    width: likewise.
    on_corrupt: "error", or "skip" to leave unreadable images out.
    track: draws the progress bar.

  Raises:
    UserError: an image cannot be decoded, or with "skip" none can.
  """
  if on_corrupt not in ("error", "skip"):
    raise UserError(
      f'dataset.on_corrupt is "{on_corrupt}": set it to "error" or "skip"'
    )
  entry = f"{name}-{height}x{width}-{fingerprint(files)}"
  folder = pathlib.Path(cache_dir, "images", entry)
  if not folder.exists():
    rows = _decode(files, open_reader(), height, width)
    rows = track(rows, f"decode {name}", len(files))
    _write(folder, rows, (height, width, 3), on_corrupt)
  corrupt = dict(json.loads((folder / "corrupt.json").read_text()))
  if corrupt:
    _report(name, list(corrupt.values()), len(files), on_corrupt)
  kept = [file for i, file in enumerate(files) if i not in corrupt]
  return Split(
    images=np.load(folder / "images.npy", mmap_mode="r"),
    pids=np.array([file.pid for file in kept], np.int32),
    camids=np.array([file.camid for file in kept], np.int32),
    names=tuple(file.name for file in kept),
  )


def _decode(files, read, height, width):
  """Yields for each file an array, or a line that says why there is none."""

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
  """Writes a cache entry under another name, and renames it at the end."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  for other in folder.parent.glob(f"*{_UNFINISHED}"):  # of killed runs
    if time.time() - other.stat().st_mtime > _DAY:
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
  """Writes the arrays among the rows; returns the others with positions."""
  corrupt, count = [], 0
  with open(path, "wb") as file:
    _write_header(file, (0, *shape))
    for i, row in enumerate(rows):
      if isinstance(row, str):
        corrupt.append((i, row))
        if on_corrupt == "error":
          raise _corrupt_error(row)
      else:
        file.write(row.tobytes())
        count += 1
    file.seek(0)
    _write_header(file, (count, *shape))  # as long as the first one
  if not count:
    raise _corrupt_error(f"no image can be read: {corrupt[0][1]}")
  return corrupt


def _write_header(file, shape) -> None:
  np.lib.format.write_array_header_1_0(
    file, {"descr": "|u1", "fortran_order": False, "shape": shape}
  )


def _report(name, corrupt, num_files, on_corrupt) -> None:
  if on_corrupt == "error":
    raise _corrupt_error(corrupt[0])
  logging.getLogger(__name__).warning(
    "%s: %d of %d images left out; the first: %s",
    name, len(corrupt), num_files, corrupt[0],
  )  # fmt: skip


def _corrupt_error(line: str) -> UserError:
  return UserError(
    f'{line}: replace or delete the file, or set dataset.on_corrupt="skip"'
  )
