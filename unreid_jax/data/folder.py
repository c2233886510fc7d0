"""Any folder of crops: what its sub-folders and file names say."""

import logging
import os
import pathlib
import re
from collections.abc import Iterator, Sequence

import numpy as np

from unreid_jax import UserError
from unreid_jax.data import images
from unreid_jax.data.images import File
from unreid_jax.values import expand

_log = logging.getLogger(__name__)


def splits_in(root: str) -> dict[str, list[File]]:
  """The files of each split of a folder, whose name may be anything.

  If it holds the folders query and gallery, these are scored, and a folder
  train is trained on. A person is a sub-folder of query and gallery, as in
  query/alice/1.jpg, or else what stands before the first "_" of a file's name,
  as in query/alice_1.jpg; "-1" is junk and is left out. Cameras count if every
  name has one, as alice_c3_1.jpg has; if none has, every gallery image of the
  query's person is a match, of whatever camera. Any other folder is a train set
  without identities (pid -1), see `files_in`.

  Raises:
    UserError: see `files_in`; there is train, query or gallery, but not both
      of the latter; they have no person in common; or some of their images
      have a camera and some have none.
  """
  folder = expand(root, "dataset.root")
  tests = {split: folder / split for split in ("query", "gallery")}
  parts = [x for x in ("train", *tests) if root and (folder / x).is_dir()]
  if not parts:
    return {"train": files_in(root)}
  if missing := [split for split in tests if split not in parts]:
    there, lacks = " and ".join(parts), " and no ".join(missing)
    raise UserError(
      f"{folder} holds {there}, but no {lacks}: check their names, or set "
      "dataset.root to the one folder that is to be trained on"
    )
  found = {split: files_in(str(path)) for split, path in tests.items()}
  names = [file.name for files in found.values() for file in files]
  people = sorted(set(map(person_in, names)) - {"-1"})
  pids = {who: pid for pid, who in enumerate(people, 1)} | {"-1": -1}
  for number, (split, files) in enumerate(found.items(), 1):
    known = [
      file._replace(pid=pids[person_in(file.name)], camid=number)
      for file in files
    ]
    found[split] = [file for file in known if file.pid != -1]
  if not set.intersection(*({f.pid for f in x} for x in found.values())):
    raise UserError(
      f"{tests['query']} and {tests['gallery']} have no person in common: name "
      "the images PERSON/FILE or PERSON_FILE in both"
    )
  if _have_cameras([file for files in found.values() for file in files]):
    for split, files in found.items():
      found[split] = [x._replace(camid=_camera(x.name)) for x in files]
  if "train" in parts:
    found["train"] = files_in(str(folder / "train"))
  return found


def _have_cameras(files) -> bool:
  """Whether the names of all test images have a camera; it is logged."""
  having, lacking = [], []
  for file in files:
    (lacking if _camera(file.name) is None else having).append(file.path)
  if having and lacking:
    raise UserError(
      f"{lacking[0]} names no camera (_cNUMBER), but {having[0]} does: let all "
      "images of query and gallery name one, or none"
    )
  _log.info(
    "cameras: images of the person under the query's camera do not count"
    if having
    else "no cameras: every gallery image of the person is a match"
  )
  return bool(having)


def person_in(name: str) -> str:
  """The person that the path of an image names, see `splits_in`."""
  first, _, rest = name.partition("/")
  return first if rest else re.split(r"_|\.", first)[0]


def cameras_in(names: Sequence[str]) -> list[str]:
  """The camera of each image of a folder, by their paths in it.

  That is the 3 of 0002_c3s1_000451.jpg if every name has one, or else the first
  sub-folder; "" if there is none.
  """
  numbers = [_camera(name) for name in names]
  if None not in numbers:
    return [str(number) for number in numbers]
  return [name.partition("/")[0] if "/" in name else "" for name in names]


def _camera(name) -> int | None:
  found = re.search(r"_c(\d{1,9})", name.rpartition("/")[2])
  return int(found[1]) if found else None


def files_in(root: str, key: str = "dataset.root") -> list[File]:
  """Every image below a folder, and its camera, see `cameras_in`.

  Sub-folders that are cameras are numbered from 1, in the order of their names.
  Links to folders are followed, hidden folders are not looked into. `key` is
  what sets the folder.

  Raises:
    UserError: there is no image, a folder cannot be read, a link leads nowhere,
      or two links lead to the same folder.
  """
  folder = expand(root, key)
  if not root or not folder.is_dir():
    fix = "set it to a directory of crops"
    raise UserError(f'{key}="{root}" is no folder: {fix}')
  paths = {path.relative_to(folder).as_posix(): path for path in _walk(folder)}
  if not paths:
    raise UserError(f"{folder} holds no image ({' '.join(images.SUFFIXES)})")
  names = sorted(paths)
  camids = [_camera(name) for name in names]
  if None in camids:
    camids = np.unique(cameras_in(names), return_inverse=True)[1] + 1
    camids = camids.tolist()
  pairs = zip(names, camids, strict=True)
  return [File(name, -1, camid, paths[name]) for name, camid in pairs]


def _walk(root: pathlib.Path) -> Iterator[pathlib.Path]:
  """The images below a folder; each folder is visited once."""
  todo, known = [(root, set(map(str, root.resolve().parents)))], {}
  while todo:
    folder, above = todo.pop()
    real = os.path.realpath(folder)
    if real in above:  # a link back up, whose images have been seen
      continue
    if real in known:
      raise UserError(
        f"{folder} and {known[real]} are the same folder: remove one of them"
      )
    known[real] = folder
    with os.scandir(folder) as entries:
      for entry in entries:
        path = folder / entry.name
        if entry.name.startswith("."):
          continue
        is_folder = entry.is_dir()
        if is_folder or images.is_image(entry.name):
          images.check_name(path, entry.name)
        elif entry.is_symlink() and not path.exists():
          raise UserError(f"{path} leads nowhere: mend or remove the link")
        if is_folder:
          todo.append((path, above | {real}))
        elif images.is_image(entry.name):
          yield path
