"""Files that torch.save wrote, read without PyTorch and without running them.

Source of the two layouts: torch/serialization.py of PyTorch 1.6 and 2.13.
"""

import functools
import io
import logging
import math
import mmap
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import ml_dtypes  # noqa: F401 - tells NumPy what bfloat16 and float8 are
import numpy as np

from unreid_jax import UserError
from unreid_jax.models.torch_pickle import ALONE, Tensor, follow

_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the older layout
# Where training scripts put a state dict, the likeliest first. Of a teacher and
# a student, the teacher is what is evaluated.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network")
_WRAPPERS += ("teacher", "student")
_log = logging.getLogger(__name__)


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of the file's state dict, by name, in PyTorch's order of axes.

  The state dict may be the whole file or lie in a dictionary, such as
  {"state_dict": ..., "epoch": ...}.

  Raises:
    UserError: the file is of another kind, damaged, has no state dict, or has
      anything that is not known to be harmless.
    OSError: it cannot be opened or read.
  """
  with open(path, "rb") as file:
    is_zip = file.read(2) == b"PK"
    try:
      return (_read_zip if is_zip else _read_stream)(file)
    except (UserError, OSError):
      raise
    except Exception as error:  # what damage leads to has no list
      reason = str(error).partition("\n")[0][:100] or type(error).__name__
      raise UserError(
        f"it is cut off or damaged ({reason}): get it again"
      ) from None


def _read_zip(file: io.BufferedReader) -> dict[str, np.ndarray]:
  """The layout since PyTorch 1.6: a zip of a pickle and the storages."""
  with zipfile.ZipFile(file) as archive:
    infos, names = archive.infolist(), archive.namelist()
    pickles = [
      x for x in names if x.count("/") == 1 and x.endswith("/data.pkl")
    ]
    if len(pickles) != 1:
      raise UserError(
        "it is a zip that torch.save did not write: unpack it, and name the "
        "file of weights"
      )
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in names:
      raise UserError(
        "it is a program (TorchScript), as OpenAI's CLIP is, and none is run: "
        "take weights without one, such as the .safetensors of transformers"
      )
    if any(info.compress_type for info in infos):
      raise UserError(
        "its parts are compressed, which torch.save never does: get the "
        "original, or save it again where PyTorch is installed"
      )
    size = file.seek(0, io.SEEK_END)
    if sum(info.file_size for info in infos) > size:
      raise ValueError("its parts are larger than the whole")
    for info in infos:
      info.CRC = info.CRC or None  # PyTorch may leave it out, as a 0
    order = f"{folder}byteorder"
    is_big = order in names and archive.read(order) == b"big"
    tree, _ = follow(io.BytesIO(archive.read(pickles[0])))

    def read_storage(key, swapped):
      data = archive.read(f"{folder}data/{key}")
      if is_big:
        data = np.frombuffer(data, f"u{swapped}").byteswap().tobytes()
      return data

    return _arrays(tree, read_storage, size)


def _read_stream(file: io.BufferedReader) -> dict[str, np.ndarray]:
  """The layout before: five pickles, then one storage after the other."""
  # Of a mapped file no more can be asked for than there is.
  with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
    if follow(data)[0] != _MAGIC:
      raise UserError(f"it is a pickle that torch.save did not write: {ALONE}")
    _, _ = follow(data), follow(data)  # the layout's version, the machine
    (tree, storages), (keys, _) = follow(data), follow(data)
    places, place = {}, data.tell()
    for key in keys:
      if not isinstance(key, str) or key not in storages:
        raise ValueError("it lists a storage that no tensor uses")
      size = int.from_bytes(data[place : place + 8], "little")
      size *= np.dtype(storages[key].dtype).itemsize
      places[key] = slice(place + 8, place + 8 + size)
      place = places[key].stop
      if place > len(data):
        raise ValueError(f"it has {len(data):,} bytes of at least {place:,}")
    read_storage = lambda key, swapped: data[places[key]]
    return _arrays(tree, read_storage, len(data))


def _arrays(
  tree: Any, read_storage: Callable, most: int
) -> dict[str, np.ndarray]:
  read_storage, state = functools.cache(read_storage), _state_dict(tree)
  return {name: _array(x, read_storage, most) for name, x in state.items()}


def _state_dict(tree: Any) -> dict[str, Tensor]:
  """The dictionary of tensors in what a file holds."""
  for _ in range(5):
    if not isinstance(tree, dict):
      kind = "tensor" if isinstance(tree, Tensor) else type(tree).__name__
      raise UserError(
        f"it holds a {kind}, not a dictionary of weights: {ALONE}"
      )
    inner = [k for k, v in tree.items() if isinstance(v, dict) and v]
    full = [k for k in inner if _tensors(tree[k])]
    names = [k for k in _WRAPPERS if k in (full or inner)]
    if not names:
      if tensors := _tensors(tree):
        return tensors
      names = full or inner
      if len(names) != 1:
        several = f"weights in {', '.join(full)}" if full else "no weights"
        raise UserError(f"it holds {several}: {ALONE}")
    if others := ", ".join(k for k in full if k != names[0]):
      _log.warning("took the weights in %s, not in %.300s", names[0], others)
    tree = tree[names[0]]
  raise UserError(f"its dictionaries lie too deep in dictionaries: {ALONE}")


def _tensors(tree: dict) -> dict[str, Tensor]:
  return {k: v for k, v in tree.items() if isinstance(v, Tensor)}


def _array(tensor: Tensor, read_storage: Callable, most: int) -> np.ndarray:
  """A view of a storage, which `read_storage(key, swapped)` reads.

  In a file of a big-endian machine, each `swapped` bytes are turned round. A
  view may show one number many times; more than `most` are refused, as whoever
  copies it would fill the memory.
  """
  dtype, shape = np.dtype(tensor.dtype), tensor.shape
  _, key, size, start = tensor.storage
  numbers = (size, start, tensor.offset, *shape, *tensor.strides)
  if any(type(n) is not int or n < 0 for n in numbers):
    raise ValueError("a tensor's size is not a number")
  # The stride of an axis of length 1 is never taken, and may be anything.
  taken = [s * (n > 1) for n, s in zip(shape, tensor.strides, strict=True)]
  last = tensor.offset + sum(
    s * (n - 1) for n, s in zip(shape, taken, strict=True)
  )
  if math.prod(shape) > most:
    raise ValueError("a tensor is larger than the file")
  if 0 in shape:
    return np.zeros(shape, dtype)
  whole = read_storage(key, dtype.itemsize // (2 if dtype.kind == "c" else 1))
  each = np.dtype(tensor.storage.dtype).itemsize
  data = memoryview(whole)[start * each : (start + size) * each]
  if (last + 1) * dtype.itemsize > len(data):
    raise ValueError("a tensor is larger than its storage")
  strides = [s * dtype.itemsize for s in taken]
  return np.ndarray(shape, dtype, data, tensor.offset * dtype.itemsize, strides)
