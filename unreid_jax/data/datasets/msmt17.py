"""MSMT17: Wei et al., CVPR 2018."""

import logging

from unreid_jax import UserError
from unreid_jax.data.datasets import layout
from unreid_jax.data.images import File, check_name

# The folders of the train and the test images.
_FOLDERS = {"V1": ("train", "test"), "V2": ("mask_train_v2", "mask_test_v2")}


class MSMT17(layout.Builder):
  """MSMT17: 4,101 people under 15 cameras; its val is part of train here.

  Papers use V1. In V2 faces are blurred, and scores are lower. Pid 0 is a
  person like any other. V1 may also be in Market-1501 layout.
  """

  name = "msmt17"
  SIZES = dict.fromkeys(("", "V1", "V2"), (32_621, 11_659, 82_161))

  @classmethod
  def find(cls, root: str, version: str) -> dict[str, list[File]]:
    """Without a version, takes V1 where it finds both."""
    asked = [version] if version else list(_FOLDERS)
    markers = [_FOLDERS[v][0] for v in asked]
    if "V1" in asked:
      markers.append("bounding_box_train")
    folder = layout.locate(root, [f"MSMT17_{v}" for v in asked], *markers)
    if (folder / "bounding_box_train").is_dir():
      return layout.market_files(folder)
    found = next(v for v in asked if (folder / _FOLDERS[v][0]).is_dir())
    if found == "V2":
      logging.getLogger(__name__).warning(
        "msmt17: %s is V2, with blurred faces: scores are lower than on V1, "
        "with which papers compare", folder,
      )  # fmt: skip
    train, test = (folder / name for name in _FOLDERS[found])
    return {
      "train": _listed(folder, train, "list_train.txt", "list_val.txt"),
      "query": _listed(folder, test, "list_query.txt"),
      "gallery": _listed(folder, test, "list_gallery.txt"),
    }


def _listed(folder, images, *lists: str) -> list[File]:
  """Reads lines like "0000/0000_000_01_0303_8_0.jpg 0": camera 1 and pid 0."""
  files = {}
  for path in (folder / name for name in lists):
    for line in filter(str.strip, _lines(path)):
      try:
        name, pid = line.rsplit(maxsplit=1)
        camid = name.split("/")[-1].split("_")[2]
        file = File(name, *map(layout.read_id, (pid, camid)), images / name)
      except (ValueError, IndexError):
        raise UserError(
          f"{path}: {line[:200]!a} is not PATH PID with the camera third in "
          "the file's name: unpack the set again"
        ) from None
      check_name(path, name)
      if files.setdefault(name, file) is not file:
        raise UserError(f"{path} names {name} again: remove one of the lines")
  if not files:
    raise UserError(f"{path} names no image: unpack the set again")
  return sorted(files.values(), key=lambda file: file.name)


def _lines(path) -> list[str]:
  if not path.is_file():
    raise UserError(f"{path} is missing: unpack the set again")
  try:
    return path.read_text(encoding="utf-8-sig").splitlines()
  except Exception as error:  # zipfile has many
    raise UserError(
      f"{path} cannot be read ({error}): unpack the set again"
    ) from None
