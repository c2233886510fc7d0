"""Whether a run can go on from what an earlier one left in its workdir."""

import pathlib
import zlib

import numpy as np
from ml_collections import ConfigDict

from unreid_jax import UserError
from unreid_jax.config import check_same
from unreid_jax.data.images import Split
from unreid_jax.workdir import Workdir
from unreid_jax.workdir.checkpoints import check_version


def find_earlier(workdir: Workdir, config: ConfigDict) -> pathlib.Path | None:
  """The checkpoint that a run with this config goes on from, if there is one.

  Raises:
    UserError: the folder holds a run that cannot go on with it.
  """
  earlier = workdir.newest("last")
  if not earlier:
    workdir.check_unused()
  elif earlier.name == "0" and not workdir.newest("best"):
    return None  # nothing has been learnt yet
  else:
    check_version(earlier)
    check_same(workdir.stored_config(), config)
    workdir.check_metrics()
  return earlier


def fingerprint(split: Split) -> dict[str, int]:
  """What tells one set of images from another: of its pixels, a sample."""
  num = len(split.names)
  crc = zlib.crc32("\0".join(split.names).encode("utf-8", "surrogateescape"))
  for array in split.pids, split.camids, split.images[:: max(num // 500, 1)]:
    crc = zlib.crc32(np.ascontiguousarray(array), crc)
  return {"number": num, "crc32": crc}


def check_same_images(stored: dict, card: dict, path: pathlib.Path) -> None:
  """Refuses, by their cards, to go on from a checkpoint with other images."""
  then, now = stored.get("train_images"), card["train_images"]
  if then is not None and then != now:
    what = "their names, cameras or pixels differ"
    number = then.get("number") if isinstance(then, dict) else "?"
    if number != now["number"]:
      what = f"{number} then, {now['number']} now"
    raise UserError(
      f"{path} was trained on other train images ({what}): bring them back, or "
      "choose another --workdir"
    )
