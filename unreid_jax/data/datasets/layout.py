"""What the sets share: file names, folders, zips and the TFDS builder."""

import functools
import itertools
import logging
import os
import pathlib
import re
import types
import zipfile
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow_datasets as tfds

from unreid_jax import UserError
from unreid_jax.data import images
from unreid_jax.data.images import Dataset, File, Path
from unreid_jax.values import expand

_PER_SHARD = 8_192
_SET_ROOT = (
  "set dataset.root to the unpacked set, the folder that holds it, or its zip"
)
_log = logging.getLogger(__name__)


class Builder(tfds.core.dataset_builder.ShardBasedBuilder):
  """A set in Market-1501 layout; each subclass says where it differs.

  Its `files` are the images of each split, sorted by name; `data.load` decodes
  them where they lie. A builder is only prepared, as any of TFDS, by someone
  who wants array_record files. `SIZES` are the published numbers of train,
  query and gallery images, for each version; the first one is the default.
  """

  VERSION = tfds.core.Version("1.0.0")
  FOLDER = ""  # the path of the set inside a root that holds it
  SIZES: dict[str, tuple[int, int, int]] = {}  # noqa: RUF012
  NOTE = ""  # a warning to everyone who uses the set, logged each time
  code_path = None  # TFDS would look beside it for checksums and citations

  def __init__(
    self, *, root: str, data_dir: str | os.PathLike, version: str = ""
  ):
    """Lists the files, see `list_files`; they are not read yet.

    Prepared sets are kept in data_dir, one folder for each state of the source.
    """
    self.files = self.list_files(root, version)
    state = images.fingerprint(
      [f for files in self.files.values() for f in files]
    )
    folder = pathlib.Path(data_dir, state)
    super().__init__(data_dir=folder, file_format="array_record")

  @classmethod
  def list_files(cls, root: str, version: str = "") -> dict[str, list[File]]:
    """The files of each split, sorted by name.

    The `root` is the unpacked set, the folder that holds it or its zip, or the
    zip; the version a key of `SIZES`.

    Raises:
      UserError: the set or its images are missing, a file's name does not say
        who is on it, or there is no such version.
    """
    version = version or next(iter(cls.SIZES))
    if version not in cls.SIZES:
      raise UserError(
        f'{cls.name} has no version "{version}": set dataset.version to '
        f'"{" or ".join(filter(None, cls.SIZES))}"'
      )
    splits = cls.find(root, version)
    if cls.NOTE:
      _log.warning("%s: %s", cls.name, cls.NOTE)
    sizes = zip(splits.items(), cls.SIZES[version], strict=True)
    for (split, files), published in sizes:
      if len(files) != published:
        _log.warning(
          "%s: %d %s images, but the published set has %d: is it complete? "
          "Scores will not compare with published ones",
          cls.name, len(files), split, published,
        )  # fmt: skip
    return splits

  @classmethod
  def find(cls, root: str, version: str) -> dict[str, list[File]]:
    """The files of each split; `version`, a key of `SIZES`, may play a part."""
    return market_files(locate(root, [cls.FOLDER], "bounding_box_train"))

  def _info(self) -> tfds.core.DatasetInfo:
    features = {"image": tfds.features.Image(), "name": tfds.features.Text()}
    features |= {"pid": np.int32, "camid": np.int32}
    return tfds.core.DatasetInfo(
      builder=self,
      description=type(self).__doc__,
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,  # an index is a position in the sorted names
    )

  def _shard_iterators_per_split(self, dl_manager):
    """TFDS's other builders sort a split in memory and, if large, by TF."""
    del dl_manager  # nothing is ever downloaded
    return {
      split: [
        functools.partial(_examples, files[start : start + _PER_SHARD])
        for start in range(0, len(files), _PER_SHARD)
      ]
      for split, files in self.files.items()
    }


def _examples(files: Sequence[File]) -> Iterator[tuple[str, dict]]:
  for file in files:
    ids = {"name": file.name, "pid": file.pid, "camid": file.camid}
    # TFDS keeps the examples of a shard, and reads the image when it writes it.
    image = types.SimpleNamespace(read=file.path.read_bytes)
    yield file.name, ids | {"image": image}


def market_files(folder: Path) -> dict[str, list[File]]:
  """The files of each split in Market-1501 layout, without junk (pid -1)."""
  names = ("bounding_box_train", "query", "bounding_box_test")
  parts = zip(Dataset._fields, names, strict=True)
  return {split: _images(folder / name) for split, name in parts}


def _images(folder: Path) -> list[File]:
  paths = folder.iterdir() if folder.is_dir() else []
  files = [parse(path) for path in paths if images.is_image(path.name)]
  if not files:
    raise UserError(f"{folder} is missing or holds no image: unpack it again")
  kept = [file for file in files if file.pid != -1]
  if not kept:
    raise UserError(f"{folder} holds junk images (pid -1) only: {_SET_ROOT}")
  kept = sorted(kept, key=lambda file: file.name)
  for one, other in itertools.pairwise(kept):
    if one.name == other.name:  # a zip can do that
      raise UserError(f"{one.path} is there twice: pack the set again")
  return kept


def parse(path: Path) -> File:
  """Reads identity and camera off a name like 0002_c1s1_000451_03.jpg."""
  images.check_name(path, path.name)
  pid, _, rest = path.name.partition("_c")
  camid = re.match("[0-9]*", rest)[0]
  try:
    pid = -1 if pid == "-1" else read_id(pid)
    return File(path.name, pid, read_id(camid), path)
  except ValueError:
    raise UserError(
      f"{path} is not named PERSON_cCAMERA..., as 0002_c1s1_000451_03.jpg is, "
      "with numbers below 2**31: rename it or move it away"
    ) from None


def read_id(digits: str) -> int:
  """A pid or camid; a ValueError if it is none that fits 32 bits."""
  if not re.fullmatch("[0-9]{1,10}", digits) or int(digits) >= 2**31:
    raise ValueError(digits)
  return int(digits)


def locate(root: str, folders: Sequence[str], *markers: str) -> Path:
  """Finds the folder of a set, by a folder that it must hold.

  Args:
    root: a folder, in which zips are searched too, or a zip.
    folders: where the set may lie in the root, best first; then comes the root.
    *markers: folders of which the set must hold one, best first.

  Raises:
    UserError: there is no such root, or it does not hold the set.
  """
  for place in _places(root):
    for marker in markers:
      for found in (*(place / folder for folder in folders), place):
        if (found / marker).is_dir():
          return found
  wanted = f"{folders[0]}/{' or '.join(markers)}"
  raise UserError(f"{root} holds no {wanted}: {_SET_ROOT}")


def _places(root: str) -> Iterator[Path]:
  """The folder and the zips in it, or the one zip."""
  path = expand(root, "dataset.root")
  if not root or not path.exists():
    raise UserError(f'dataset.root="{root}" does not exist: {_SET_ROOT}')
  if path.is_dir():
    yield path
    yield from filter(None, map(_open_zip, sorted(path.glob("*.zip"))))
  elif archive := _open_zip(path):
    yield archive
  else:
    raise UserError(f"{path} is not a zip, or not a whole one: get it again")


def _open_zip(path: pathlib.Path) -> zipfile.Path | None:
  """The root of an archive; None if it is none."""
  if not path.is_file():  # opening a pipe would wait for ever
    return None
  with path.open("rb") as file:  # is_zipfile would hide that it cannot be read
    if not zipfile.is_zipfile(file):
      return None
  try:
    return zipfile.Path(path)
  except Exception as error:  # zipfile has many
    raise UserError(
      f"{path} cannot be opened as a zip ({error}): get it again"
    ) from None
