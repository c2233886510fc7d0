"""Image files, and how one of them becomes pixels of the size asked for."""

import concurrent.futures
import contextlib
import hashlib
import io
import os
import pathlib
import re
import stat
import warnings
import zipfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image, ImageOps

from unreid_jax import UserError, values

# We bound the memory ourselves.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
Path = pathlib.Path | zipfile.Path
_Pixels = UInt8[np.ndarray, "h w 3"]
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
# What may be inside, whatever the suffix says: Pillow knows many formats, and
# would run Ghostscript for one of them.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP")
_MANY_PIXELS, _MANY_BYTES, _TOO_MANY_BYTES = 2**22, 2**24, 2**30


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


class File(NamedTuple):
  """An image file on disk or in a zip, not read yet."""

  name: str
  pid: int
  camid: int
  path: Path


class CorruptImage(UserError):
  """What is in a file is no image, or a damaged one."""


def unreadable(path: Path | str, error: OSError) -> UserError:
  """The system does not let us read a file or folder."""
  reason = error.strerror or error
  return UserError(
    f"{path} cannot be read ({reason}): mend that or move it away"
  )


def is_image(name: str) -> bool:
  """Whether a file name is an image's, and not Thumbs.db or the like."""
  return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def check_name(path: Path, name: str) -> None:
  """Refuses a name that is not UTF-8, or would break a line of output."""
  if re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", name):
    raise UserError(f"{str(path)!a} has a name that is not text: rename it")


def fingerprint(files: Sequence[File]) -> str:
  """Sixteen hex digits that change when a file is added, renamed or changed.

  They are made from names, sizes and times of change (in a zip, checksums and
  that of the zip). It raises a UserError if a file is missing or is none.
  """
  digest = hashlib.sha256()
  for *labels, path in files:
    digest.update(repr((*labels, state(path))).encode())
  return digest.hexdigest()[:16]


def state(path: Path) -> tuple[int, ...]:
  """The size of a file in bytes, and what changes with its content."""
  try:
    if isinstance(path, zipfile.Path):
      info = path.root.getinfo(path.at)
      changed = os.stat(path.root.filename).st_mtime_ns
      return info.file_size, info.CRC, changed
    info = path.stat()
  except (FileNotFoundError, KeyError):
    raise UserError(f"{path} is missing: check the path") from None
  except OSError as error:
    raise unreadable(path, error) from None
  if not stat.S_ISREG(info.st_mode):  # reading a pipe would wait for ever
    if stat.S_ISDIR(info.st_mode):
      raise UserError(f"{path} is a folder: name its images")
    raise UserError(f"{path} is no regular file: move it away")
  return info.st_size, info.st_mtime_ns


def decode(
  path: Path, height: int, width: int, *, if_small: bool = False
) -> _Pixels | None:
  """The pixels of an image file, upright, in RGB of that size.

  With `if_small`, None for an image of many pixels or bytes: whoever decodes
  several at once decodes that one alone, so that memory stays bounded.

  Raises:
    CorruptImage: what is in the file is no image, or a damaged one.
    UserError: the file cannot be read; it may be healthy.
  """
  size = state(path)[0]
  if size > _TOO_MANY_BYTES:
    raise CorruptImage(f"{path} has {size / 1e9:.1f} GB, which is no crop")
  if if_small and size > _MANY_BYTES:
    return None
  try:
    encoded = io.BytesIO(path.read_bytes())
    with Image.open(encoded, formats=_FORMATS) as image:
      if if_small and image.width * image.height > _MANY_PIXELS:
        return None
      return resize(image, height, width)
  except MemoryError:
    raise UserError(
      f"{path}: there is not enough memory to decode it"
    ) from None
  except Image.UnidentifiedImageError:
    raise CorruptImage(f"{path} is not an image") from None
  except Exception as error:  # each of Pillow's formats and zip has its own
    if isinstance(error, OSError) and error.errno:  # Pillow's have none
      raise unreadable(path, error) from None
    reason = str(error) or type(error).__name__
    raise CorruptImage(f"{path} cannot be decoded ({reason})") from None


def resize(image: Image.Image, height: int, width: int) -> _Pixels:
  """RGB of that size, by Pillow's bicubic filter, as torchvision does it.

  An image is turned upright as its EXIF says; of several frames the first is
  taken. What is transparent becomes black, and 16 bits become 8.
  """
  size = (width, height)
  return np.asarray(_rgb(image).resize(size, Image.Resampling.BICUBIC))


def _rgb(image: Image.Image) -> Image.Image:
  image.load()
  with contextlib.suppress(SyntaxError):  # EXIF damaged, pixels perhaps not
    ImageOps.exif_transpose(image, in_place=True)
  if image.mode in ("I", "F"):
    raise UserError("32 bits a pixel, of unknown range: convert it to 8 bits")
  if image.mode.startswith("I;16"):  # Pillow would cut at 255
    scaled = np.rint(np.asarray(image) / np.float32(257))
    image = Image.fromarray(scaled.astype(np.uint8))
  is_opaque = not image.has_transparency_data
  mode = "RGB" if is_opaque else "RGBA"
  image = image if image.mode == mode else image.convert(mode)
  if is_opaque:
    return image
  black = Image.new("RGB", image.size)
  black.paste(image, mask=image)
  return black


class Sized:
  """Images of one size, which are read and resized when they are asked for."""

  def __init__(self, images, height, width):
    if hasattr(images, "__array__") and not isinstance(images, Image.Image):
      images = np.asarray(images)  # of JAX, say
    is_array = isinstance(images, np.ndarray) and images.ndim == 3
    is_one = is_array or isinstance(images, str | os.PathLike | Image.Image)
    self._images = [images] if is_one else images
    is_list = isinstance(self._images, Sequence)
    if not is_list and not getattr(self._images, "ndim", 0):
      kind = type(images).__name__
      raise UserError(f"the images are of the type {kind}: pass a list of them")
    self.shape = (len(self._images), height, width, 3)

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, rows) -> UInt8[np.ndarray, "b h w 3"]:
    images, size = self._images, self.shape[1:]
    is_array = isinstance(images, np.ndarray) and images.dtype == np.uint8
    if is_array and images.shape[1:] == size:
      return images[rows]
    with concurrent.futures.ThreadPoolExecutor() as pool:
      read = lambda row: _read(images[row], row, *size[:2])
      once, back = np.unique(rows, return_inverse=True)
      return np.stack(list(pool.map(read, once)))[back]


def _read(image, row, height, width):
  """One image at its size."""
  if isinstance(image, str | os.PathLike):
    return decode(values.expand(image, "it"), height, width)
  if isinstance(image, Image.Image):
    return resize(image, height, width)
  image = np.asarray(image)
  is_colour = image.ndim == 3 and image.shape[2] == 3 and image.size
  if image.dtype != np.uint8 or not is_colour:
    raise UserError(
      f"image {row} is {image.dtype}{list(image.shape)}: pass uint8[h, w, 3], "
      "or a path"
    )
  return resize(Image.fromarray(image), height, width)
