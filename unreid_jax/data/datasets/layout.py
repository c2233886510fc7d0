"""What the sets share: file names, folders, zips and the TFDS builder."""

import io
import logging
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tensorflow_datasets as tfds

from unreid_jax import UserError, progress
from unreid_jax.data.images import Dataset, File, fingerprint, is_image

Folder = pathlib.Path | zipfile.Path

_SET_ROOT = (
  "set dataset.root to the unpacked set, the folder that holds it, or its zip"
)
_log = logging.getLogger(__name__)


class Builder(tfds.core.GeneratorBasedBuilder):
  """A set in Market-1501 layout; each subclass says where it differs.

  Its `files` are the images of each split, sorted by name. `SIZES` are the
  published numbers of train, query and gallery images, for each version; the
  first version is the default.
  """

  VERSION = tfds.core.Version("1.0.0")
  FOLDER = ""  # the path of the set inside a root that holds it
  SIZES: dict[str, tuple[int, int, int]] = {}  # noqa: RUF012
  NOTE = ""  # a warning to everyone who uses the set, logged each time
  code_path = None  # TFDS would look beside it for checksums and citations

  def __init__(
    self, *, root: str, data_dir: str | os.PathLike, version: str = ""
  ):
    """Finds and lists the files; they are not read yet.

    The `root` is the unpacked set, the folder that holds it or its zip, or the
    zip; the version a key of `SIZES`. Prepared sets are kept in data_dir, one
    folder for each state of the source.

    Raises:
      UserError: the set or its images are missing, a file's name does not say
        who is on it, or there is no such version.
    """
    version = version or next(iter(self.SIZES))
    if version not in self.SIZES:
      raise UserError(
        f'{self.name} has no version "{version}": set dataset.version to '
        f'"{" or ".join(filter(None, self.SIZES))}"'
      )
    self.files = self.find(root, version)
    if self.NOTE:
      _log.warning("%s: %s", self.name, self.NOTE)
    splits = zip(self.files.items(), self.SIZES[version], strict=True)
    for (split, files), published in splits:
      if len(files) != published:
        _log.warning(
          "%s: %d %s images, but the published set has %d: is it complete? "
          "Scores will not compare with published ones",
          self.name, len(files), split, published,
        )  # fmt: skip
    state = fingerprint([f for files in self.files.values() for f in files])
    folder = pathlib.Path(data_dir, state)
    super().__init__(data_dir=folder, file_format="array_record")

  def find(self, root: str, version: str) -> dict[str, list[File]]:
    """The files of each split; `version`, a key of `SIZES`, may play a part."""
    return market_files(locate(root, [self.FOLDER], "bounding_box_train"))

  def open_reader(self, split: str) -> Callable[[int], bytes]:
    """A function from a position in a split to that image, encoded.

    Prepares the set if need be.
    """
    tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(
      try_download_gcs=False, compute_stats=tfds.download.ComputeStatsMode.SKIP
    )
    self.download_and_prepare(download_config=config)
    encoded = {"image": tfds.decode.SkipDecoding()}
    source = self.as_data_source(split, decoders=encoded)
    return lambda i: source[i]["image"]

  # There is no download for TFDS to speak of.
  _log_download_bytes = _log_download_done = lambda self: None

  def _info(self) -> tfds.core.DatasetInfo:
    features = {"image": tfds.features.Image(), "name": tfds.features.Text()}
    features |= {"pid": np.int32, "camid": np.int32}
    return tfds.core.DatasetInfo(
      builder=self,
      description=type(self).__doc__,
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,  # an index is a position in the sorted names
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is ever downloaded
    return {split: self._generate_examples(split) for split in self.files}

  def _generate_examples(self, split: str) -> Iterator[tuple[str, dict]]:
    for file in progress.track(self.files[split], f"read {split}"):
      image = io.BytesIO(file.path.read_bytes())
      ids = {"name": file.name, "pid": file.pid, "camid": file.camid}
      yield file.name, ids | {"image": image}


def market_files(folder: Folder) -> dict[str, list[File]]:
  """The files of each split in Market-1501 layout, without junk (pid -1)."""
  names = ("bounding_box_train", "query", "bounding_box_test")
  parts = zip(Dataset._fields, names, strict=True)
  return {split: _images(folder / name) for split, name in parts}


def _images(folder: Folder) -> list[File]:
  paths = folder.iterdir() if folder.is_dir() else []
  files = [parse(path) for path in paths if is_image(path.name)]
  if not files:
    raise UserError(f"{folder} is missing or holds no image: unpack it again")
  kept = [file for file in files if file.pid != -1]
  return sorted(kept, key=lambda file: file.name)


def parse(path: Folder) -> File:
  """Reads identity and camera off a name like 0002_c1s1_000451_03.jpg."""
  parsed = re.match(r"(-?\d+)_c(\d+)", path.name)
  if not parsed:
    raise UserError(
      f"{path} is not named PERSON_cCAMERA..., as 0002_c1s1_000451_03.jpg is: "
      "rename it or move it away"
    )
  return File(path.name, *map(int, parsed.groups()), path)


def locate(root: str, folders: Sequence[str], *markers: str) -> Folder:
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


def _places(root: str) -> Iterator[Folder]:
  """The folder and the zips in it, or the one zip."""
  path = pathlib.Path(root).expanduser()
  if not root or not path.exists():
    raise UserError(f'dataset.root="{root}" does not exist: {_SET_ROOT}')
  if path.is_dir():
    yield path
    yield from map(zipfile.Path, filter(zipfile.is_zipfile, path.glob("*.zip")))
  elif zipfile.is_zipfile(path):
    yield zipfile.Path(path)
  else:
    raise UserError(f"{path} is not a zip, or not a whole one: get it again")
