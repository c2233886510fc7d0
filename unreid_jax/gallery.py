"""Features of a folder of images, kept on disk and brought up to date."""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import pathlib
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from unreid_jax import progress, values
from unreid_jax.data import images
from unreid_jax.data.folder import files_in
from unreid_jax.encode import Encoder, flat
from unreid_jax.workdir import named

_AT_ONCE = 512  # images that are read and encoded at a time
_CORRUPT = -1  # the row of a file that holds no image


@dataclasses.dataclass(frozen=True)
class Gallery:
  """Images of a folder, sorted by name; indexed by position, their features.

  Attributes:
    folder: the folder.
    names: the path of each image in it.
    rows: the row of each in `stored`.
    stored: unit features on disk, see `encode.flat`.
    corrupt: the names of files that hold no image, which are left out.
  """

  folder: pathlib.Path
  names: Sequence[str]
  rows: Int[np.ndarray, " n"]
  stored: Float[np.ndarray, "m d"]
  corrupt: Sequence[str]

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, i: slice | np.ndarray) -> Float[np.ndarray, "k d"]:
    return self.stored[self.rows[i]]

  def path(self, i: int | np.integer) -> pathlib.Path:
    """Where an image lies."""
    return self.folder / self.names[i]


def update(
  folder: str | os.PathLike,
  encoder: Encoder,
  cache_dir: str | os.PathLike = "",
  batch_size: int = 128,
) -> Gallery:
  """The features of all images below a folder; only new ones are encoded.

  An image is new if no image of its name, size in bytes and time of change is
  known. When a call is interrupted, the next one goes on.

  Args:
    folder: may have sub-folders.
    encoder: each encoder has features of its own.
    cache_dir: where they are kept; ~/.cache/unreid_jax if empty.
    batch_size: how many images are encoded at a time.

  Raises:
    UserError: there is no image, a file cannot be read, or the features cannot
      be kept.
  """
  files = files_in(os.fspath(folder), "folder")
  folder = values.expand(folder, "folder").resolve()
  cache = values.expand(cache_dir or "~/.cache/unreid_jax", "--cache_dir")
  name = (
    f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]}-{_crc(encoder)}"
  )
  keys = [(file.name, *images.state(file.path)) for file in files]
  with _Store(cache / "features" / name, _width(encoder)) as store:
    new = [i for i, key in enumerate(keys) if key not in store.known]
    parts = [new[i : i + _AT_ONCE] for i in range(0, len(new), _AT_ONCE)]
    size = encoder.card["height"], encoder.card["width"]
    paths = ([files[i].path for i in part] for part in parts)
    pixels = _read(paths, *size)
    shown = progress.track(parts, "encode images", len(new), _AT_ONCE)
    for part, (batch, is_whole) in zip(shown, pixels, strict=True):
      features = flat(encoder(batch, batch_size)) if len(batch) else None
      store.append([keys[i] for i in part], is_whole, features)
    rows = np.array([store.known[key] for key in keys], np.int64)
  kept = rows != _CORRUPT
  split = lambda mask: [files[i].name for i in np.flatnonzero(mask)]
  return Gallery(folder, split(kept), rows[kept], store.stored(), split(~kept))


class _Store:
  """Two files that only grow; what a killed process left half-written is cut.

  `features.bin` has a row of float32 for each whole image, and `images.jsonl`
  a line for each file that has been read: its key, and whether it is whole.
  Another process that wants the same store waits.
  """

  def __init__(self, path: pathlib.Path, width: int):
    self._features, self._images = path / "features.bin", path / "images.jsonl"
    self._width, self.known, self._num = width, {}, 0

  def __enter__(self) -> "_Store":
    with contextlib.ExitStack() as stack:
      stack.enter_context(named(self._features.parent, "--cache_dir"))
      self._features.parent.mkdir(parents=True, exist_ok=True)
      self._lines = stack.enter_context(open(self._images, "a+b"))
      with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(self._lines, fcntl.LOCK_EX)
      self._rows = stack.enter_context(open(self._features, "ab"))
      self._recover()
      self._stack = stack.pop_all()
    return self

  def __exit__(self, *error) -> None:
    self._stack.close()

  def _recover(self):
    """Reads the lines that have their features, and cuts off the rest."""
    rows = self._rows.tell() // (4 * self._width)
    self._lines.seek(0)
    end = 0
    for line in self._lines:
      try:
        *key, is_whole = json.loads(line)
        hash(key := tuple(key))
      except (ValueError, TypeError, RecursionError):  # garbage
        break
      if not isinstance(is_whole, bool) or not line.endswith(b"\n"):
        break
      if self._num + is_whole > rows:
        break
      self._note(key, is_whole)
      end += len(line)
    self._lines.truncate(end)
    self._rows.truncate(4 * self._width * self._num)

  def _note(self, key, is_whole):
    self.known[key] = self._num if is_whole else _CORRUPT
    self._num += is_whole

  def append(self, keys, is_whole, features) -> None:
    """Adds files, and the features of those that are whole."""
    with named(self._features.parent, "--cache_dir"):
      if features is not None:
        self._rows.write(np.ascontiguousarray(features, np.float32))
        self._rows.flush()
      for key, ok in zip(keys, is_whole, strict=True):
        self._lines.write(json.dumps([*key, ok]).encode() + b"\n")
        self._note(key, ok)
      self._lines.flush()

  def stored(self) -> Float[np.ndarray, "m d"]:
    """All features, which stay on disk."""
    shape = self._num, self._width
    if not self._num:
      return np.zeros(shape, np.float32)
    return np.memmap(self._features, np.float32, "r", shape=shape)


def _read(parts, height, width):
  """Yields the pixels of the whole images of each part, and which are whole.

  The next part is read while the caller works.
  """

  def read(path):
    try:
      return images.decode(path, height, width)
    except images.CorruptImage:
      return None

  with concurrent.futures.ThreadPoolExecutor() as pool:
    ahead = None
    for part in [*parts, []]:
      ahead, now = [pool.submit(read, path) for path in part], ahead
      if now is None:
        continue
      pixels = [future.result() for future in now]
      is_whole = [one is not None for one in pixels]
      yield np.array([x for x in pixels if x is not None], np.uint8), is_whole


def _width(encoder: Encoder) -> int:
  """How many numbers a feature has."""
  shape = (encoder.mesh.size, encoder.card["height"], encoder.card["width"], 3)
  batch = jax.ShapeDtypeStruct(shape, jnp.uint8)
  features = jax.eval_shape(encoder.apply, encoder.variables, batch)
  leaves = jax.tree.leaves(features)
  return sum(math.prod(x.shape[1:]) for x in leaves)


def _crc(encoder: Encoder) -> str:
  """Eight hex digits that tell an encoder's features from others'."""
  keys = ("encoder", "height", "width", "mean", "std")
  card = json.dumps([encoder.card[key] for key in keys], sort_keys=True)
  crc = zlib.crc32(card.encode())
  for leaf in jax.tree.leaves(jax.device_get(encoder.variables)):
    crc = zlib.crc32(np.ascontiguousarray(leaf), crc)
  return f"{crc:08x}"
