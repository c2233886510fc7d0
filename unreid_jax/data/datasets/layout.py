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
from unreid_jax.data.images import File, fingerprint, is_image

Folder = pathlib.Path | zipfile.Path

_NAME = re.compile(r"(-?\d+)_c(\d+)")
_log = logging.getLogger(__name__)


class Builder(tfds.core.GeneratorBasedBuilder):
  """A set in Market-1501 layout; each subclass says where it differs.

  Attributes:
    FOLDER: the path of the set inside a root that holds it.
    SIZES: how many images train, query and gallery have as published, for each
      version; the first version is the default.
    NOTE: a warning to everyone who uses the set, logged each time.
    files: the images of each split, sorted by name.
  """

  VERSION = tfds.core.Version("1.0.0")
  FOLDER = ""
  SIZES: dict[str, tuple[int, int, int]] = {}  # noqa: RUF012
  NOTE = ""
  code_path = None  # TFDS would look beside it for checksums and citations

  def __init__(
    self, *, root: str, data_dir: str | os.PathLike, version: str = ""
  ):
    """Finds and lists the files; they are not read yet.

    Args:
      root: the unpacked set, the folder that holds it or its zip, or the zip.
      data_dir: where prepared sets are kept, one folder for each state of the
        source.
      version: a key of `SIZES`.

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
    self._compare_sizes(version)
    state = fingerprint([f for files in self.files.values() for f in files])
    super().__init__(
      data_dir=pathlib.Path(data_dir, state), file_format="array_record"
    )

  def find(self, root: str, version: str) -> dict[str, list[File]]:
    """The files of each split; `version` is a key of `SIZES`."""
    del version
    return market_files(locate(root, [self.FOLDER], "bounding_box_train"))

  def open_reader(self, split: str) -> Callable[[int], bytes]:
    """Prepares the set if need be.

    Returns:
      a function from a position in the split to that image, encoded.
    """
    tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(
      try_download_gcs=False, compute_stats=tfds.download.ComputeStatsMode.SKIP
    )
    self.download_and_prepare(download_config=config)
    encoded = {"image": tfds.decode.SkipDecoding()}
    source = self.as_data_source(split, decoders=encoded)
    return lambda i: source[i]["image"]

  def _say_nothing(self) -> None:
    """Replaces TFDS's lines about a download: there is none."""

  _log_download_bytes = _log_download_done = _say_nothing

  def _compare_sizes(self, version: str) -> None:
    splits = zip(self.files.items(), self.SIZES[version], strict=True)
    for (split, files), published in splits:
      if len(files) != published:
        _log.warning(
          "%s: %d %s images, but the published set has %d: is it complete? "
          "Scores will not compare with published ones",
          self.name, len(files), split, published,
        )  # fmt: skip

  def _info(self) -> tfds.core.DatasetInfo:
    features = {
      "image": tfds.features.Image(),
      "name": tfds.features.Text(),
      "pid": np.int32,
      "camid": np.int32,
    }
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
    files = self.files[split]
    for file in progress.track(files, f"read {split}"):
      values = file._asdict() | {"image": io.BytesIO(file.path.read_bytes())}
      del values["path"]
      yield file.name, values


def market_files(folder: Folder) -> dict[str, list[File]]:
  """The files of each split in Market-1501 layout, without junk (pid -1)."""
  parts = {
    "train": "bounding_box_train",
    "query": "query",
    "gallery": "bounding_box_test",
  }
  return {split: _images(folder / name) for split, name in parts.items()}


def _images(folder: Folder) -> list[File]:
  paths = folder.iterdir() if folder.is_dir() else []
  files = [parse(path) for path in paths if is_image(path.name)]
  if not files:
    raise UserError(f"{folder} is missing or holds no image: unpack it again")
  kept = [file for file in files if file.pid != -1]
  return sorted(kept, key=lambda file: file.name)


def parse(path: Folder) -> File:
  """Reads identity and camera off a name like 0002_c1s1_000451_03.jpg."""
  parsed = _NAME.match(path.name)
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
    markers: folders of which the set must hold one, best first.

  Raises:
    UserError: there is no such root, or it does not hold the set.
  """
  for place in _places(root):
    for marker in markers:
      for found in (*(place / folder for folder in folders), place):
        if (found / marker).is_dir():
          return found
  raise UserError(
    f"{root} holds no {folders[0]}/{' or '.join(markers)}: set dataset.root to "
    f"the unpacked set, the folder that holds it, or its zip"
  )


def _places(root: str) -> Iterator[Folder]:
  """The folder and the zips in it, or the one zip."""
  path = pathlib.Path(root).expanduser()
  if not root or not path.exists():
    raise UserError(
      f'dataset.root="{root}" does not exist: set it to the unpacked set, the '
      "folder that holds it, or its zip"
    )
  if path.is_file():
    if not zipfile.is_zipfile(path):
      raise UserError(f"{path} is not a zip, or not a whole one: get it again")
    yield zipfile.Path(path)
    return
  yield path
  yield from map(zipfile.Path, filter(zipfile.is_zipfile, path.glob("*.zip")))
