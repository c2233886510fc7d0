"""What a run's config means: durations, and the config kept in a workdir."""

import json
import os
import pathlib
import re

from ml_collections import ConfigDict

from unreid_jax import UserError

# Keys that may change between two parts of a run: they say where it runs and
# what it reports, not what it computes.
_FREE = re.compile(
  r"epochs|num_devices|(evaluate|checkpoint|log)_every|evaluate_batch_size"
  r"|dataset\.(root|cache_dir)|encoder\.pretrained"
)


def to_steps(value, steps_per_epoch: int):
  """The number of steps in "3 epochs" or "200 steps"; others are unchanged."""
  if isinstance(value, tuple | list):
    return tuple(to_steps(v, steps_per_epoch) for v in value)
  match = re.fullmatch(r"([\d.]+) (step|epoch)s?", str(value))
  if not match:
    return value
  unit = steps_per_epoch if match[2] == "epoch" else 1
  return round(float(match[1]) * unit)


def claim(workdir: str, config: ConfigDict) -> None:
  """Writes WORKDIR/config.json, or checks it against an earlier run's.

  Raises:
    UserError: the workdir holds a run with other settings.
  """
  path = pathlib.Path(workdir) / "config.json"
  text = json.dumps(config.to_dict(), indent=2, sort_keys=True)
  if path.exists():
    old, new = (_flat(json.loads(t)) for t in (path.read_text(), text))
    for key in sorted(old.keys() | new.keys()):
      if old.get(key) != new.get(key) and not _FREE.fullmatch(key):
        raise UserError(
          f"{workdir} holds a run with {key}={old.get(key)!r}, but this one "
          f"has {new.get(key)!r}: choose another --workdir"
        )
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix(".partial")
  partial.write_text(text + "\n")
  os.replace(partial, path)


def _flat(tree, prefix=""):
  if not isinstance(tree, dict):
    return {prefix.removesuffix("."): tree}
  items = (_flat(v, f"{prefix}{k}.") for k, v in tree.items())
  return {key: value for item in items for key, value in item.items()}
