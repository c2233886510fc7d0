"""A split's images, decoded once into memory-mapped arrays in a cache."""

import collections
import concurrent.futures
import contextlib
import errno
import fcntl
import functools
import itertools
import json
import logging
import math
import os
import pathlib
import shutil
import time
import uuid
from collections.abc import Sequence
from typing import Literal

import numpy as np

from unreid_jax import UserError, progress
from unreid_jax.data import images
from unreid_jax.data.images import CorruptImage, File, Split

_AT_ONCE = 64  # images that are decoded ahead of the one to be written
_UNFINISHED = ".unfinished"
_log = logging.getLogger(__name__)


def load_split(
  files: Sequence[File],
  fingerprint: str,
  *,
  cache_dir: str | os.PathLike,
  name: str,
  height: int,
  width: int,
  on_corrupt: Literal["error", "skip"] = "error",
) -> Split:
  """The images of some files, decoded into the cache unless they are there.

  An entry of the cache is a folder, which gets its name when it is complete:
  `name`, the size of the images in pixels, and the fingerprint of the files. A
  damaged entry is made again.

  Raises:
    UserError: an image cannot be read or, with "error", decoded; with "skip",
      none of them can; the cache cannot be written.
  """
  entry = f"{name}-{height}x{width}-{fingerprint}"
  entry = pathlib.Path(cache_dir, "images", entry)
  shape = (len(files), height, width, 3)
  found = _open(entry, shape)
  if not found:
    _make(entry, name, files, shape, on_corrupt)
    found = _open(entry, shape)
  rows, corrupt = found
  if corrupt:
    first = next(iter(corrupt.values()))
    if on_corrupt == "error":
      raise _refuse(first)
    _log.warning(
      "%s: %d of %d images left out; the first: %s",
      name, len(corrupt), len(files), first,
    )  # fmt: skip
  kept = [file for i, file in enumerate(files) if i not in corrupt]
  names, pids, camids, _ = zip(*kept, strict=True)
  pids, camids = np.array([pids, camids], np.int32)
  return Split(rows, pids, camids, names)


def _open(entry, shape):
  """An entry's images and what is corrupt; None: it is missing or damaged."""
  try:
    pairs = json.loads((entry / "corrupt.json").read_text())
    corrupt = {int(i): str(line) for i, line in pairs}
    rows = np.lib.format.open_memmap(entry / "images.npy", mode="r")
  except (FileNotFoundError, NotADirectoryError):
    return None
  except OSError as error:
    raise UserError(
      f"{entry} cannot be read ({error.strerror}): mend that, delete it, or "
      "set dataset.cache_dir"
    ) from None
  except Exception:  # whatever is in the files
    return None
  is_whole = rows.shape == (shape[0] - len(corrupt), *shape[1:])
  is_whole &= rows.dtype == np.uint8 and rows.flags.c_contiguous
  is_whole &= corrupt.keys() <= set(range(shape[0]))
  return (rows, corrupt) if is_whole else None


def _make(entry, name, files, shape, on_corrupt) -> None:
  """Writes an entry under a temporary name and renames it at the end."""
  new = entry.with_name(f"{entry.name}-{uuid.uuid4().hex[:8]}{_UNFINISHED}")
  num_bytes = math.prod(shape)
  # It is shut down here, on the thread that opens it. A generator with a pool
  # inside may be closed by a thread of the pool, which then waits for itself.
  pool = concurrent.futures.ThreadPoolExecutor()
  try:
    entry.parent.mkdir(parents=True, exist_ok=True)
    with _alone(entry):
      if _open(entry, shape):
        return
      _clear(entry)
      space = shutil.disk_usage(entry.parent)
      if space.total and space.free < num_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
      new.mkdir()
      rows = _decode(pool, files, *shape[1:3])
      rows = progress.track(rows, f"decode {name}", len(files))
      corrupt = _write(new / "images.npy", rows, shape, on_corrupt)
      (new / "corrupt.json").write_text(json.dumps(corrupt))
      _rename(new, entry)
  except OSError as error:  # of the cache; an image's is a UserError by now
    reason = error.strerror or error
    raise UserError(
      f"{entry.parent} cannot be written ({reason}): the cache of decoded "
      f"images needs {num_bytes / 1e9:.2f} GB: make room, or set "
      "dataset.cache_dir to another folder"
    ) from None
  finally:
    pool.shutdown(cancel_futures=True)
    shutil.rmtree(new, ignore_errors=True)


def _decode(pool, files, height, width):
  """Yields each file's pixels, or a line that says what is wrong in it."""
  decode = functools.partial(images.decode, height=height, width=width)
  submit = lambda file: (file, pool.submit(decode, file.path, if_small=True))
  todo = map(submit, files)
  ahead = collections.deque(itertools.islice(todo, _AT_ONCE))
  while ahead:
    file, small = ahead.popleft()
    try:
      row = small.result()
      yield decode(file.path) if row is None else row
    except CorruptImage as bad:
      yield str(bad)
    ahead.extend(itertools.islice(todo, 1))


@contextlib.contextmanager
def _alone(entry):
  """Within it, other processes that want the same entry wait.

  That spares them the work. Where the file system has no locks, they all do it,
  and the first to rename its folder wins. The system frees the lock of a killed
  process.
  """
  path = entry.with_name(f"{entry.name}.lock")
  is_theirs = path.exists() and not os.access(path, os.W_OK)
  with open(path, "r" if is_theirs else "a") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      _log.warning("another process is writing %s: waiting for it", entry)
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
      _log.debug("%s cannot be locked", path)
    try:
      yield
    finally:
      with contextlib.suppress(OSError):
        path.unlink()
      with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)  # a forked child has the file too


def _clear(entry) -> None:
  """Removes what killed runs left, and the entry if it is damaged."""
  for other in entry.parent.glob(f"*{_UNFINISHED}"):
    with contextlib.suppress(FileNotFoundError):  # another process was faster
      if time.time() - other.stat().st_mtime > 24 * 3600:
        shutil.rmtree(other, ignore_errors=True)
  if os.path.lexists(entry):
    _log.warning("%s is damaged and is made again", entry)
    if entry.is_dir() and not entry.is_symlink():
      shutil.rmtree(entry)
    else:
      entry.unlink()


def _rename(new, entry) -> None:
  try:
    new.rename(entry)
  except OSError:
    if not entry.exists():  # else another process was faster
      raise


def _write(path, rows, shape, on_corrupt) -> list[tuple[int, str]]:
  """Writes the images; returns (position, reason) of each that is missing."""
  corrupt, header = [], {"descr": "|u1", "fortran_order": False}
  write_header = np.lib.format.write_array_header_1_0
  with open(path, "wb") as file:
    write_header(file, header | {"shape": shape})
    for i, row in enumerate(rows):
      if not isinstance(row, str):
        file.write(row)
      elif on_corrupt == "error":
        raise _refuse(row)
      else:
        corrupt.append((i, row))
    if len(corrupt) == shape[0]:
      raise _refuse(f"no image can be read: {corrupt[0][1]}")
    file.seek(0)  # both headers have the same length
    count = shape[0] - len(corrupt)
    write_header(file, header | {"shape": (count, *shape[1:])})
    file.flush()
    os.fsync(file.fileno())  # some disks only now find that they are full
  return corrupt


def _refuse(line: str) -> UserError:
  return UserError(
    f'{line}: replace or delete the file, or set dataset.on_corrupt="skip"'
  )
