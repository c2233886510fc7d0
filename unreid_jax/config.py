"""What a run's config means: durations, and the config kept in a workdir."""

import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from unreid_jax import UserError

# Keys that may change between two parts of a run: they say where it runs and
# what it reports, not what it learns.
_FREE = re.compile(
  r"epochs|num_devices|(evaluate|checkpoint|log)_every|evaluate_batch_size"
  r"|dataset\.(root|cache_dir)|encoder\.pretrained"
  r"|method\.(camera|squared)_at_test"
)
_DURATIONS = re.compile(
  r".*_every|optim\.(warmup|milestones)|method\.(warmup|ramp|generator_steps)"
)


def resolve(config: ConfigDict, steps_per_epoch: int) -> ConfigDict:
  """The config with every duration as a number of steps.

  Raises:
    UserError: a duration that is none.
  """
  resolved = ConfigDict(config.to_dict())
  for key, value in _flat(config.to_dict()).items():
    if _DURATIONS.fullmatch(key):
      *path, last = key.split(".")
      section = resolved[path[0]] if path else resolved
      with section.ignore_type():
        section[last] = _steps(key, value, steps_per_epoch)
  return resolved


def _steps(key, value, steps_per_epoch):
  if isinstance(value, tuple | list):
    return tuple(_steps(key, v, steps_per_epoch) for v in value)
  match = re.fullmatch(r"(\d+(?:\.\d+)?)(?: (step|epoch)s?)?", str(value))
  if not match:
    raise UserError(
      f'{key}="{value}" is no duration: write "10 epochs" or "500 steps"'
    )
  unit = steps_per_epoch if match[2] == "epoch" else 1
  number = float(match[1])
  return max(round(number * unit), 1 if number else 0)


def check_workdir(workdir: str, config: ConfigDict) -> None:
  """Refuses a workdir whose checkpoint comes from another config.

  Raises:
    UserError: the settings differ in more than where it runs.
  """
  folder = pathlib.Path(workdir)
  path = folder / "config.json"
  saved = folder.glob("checkpoints/last/*")
  if not path.exists() or not any(x.name.isdigit() for x in saved):
    return
  old, new = _flat(json.loads(path.read_text())), _flat(_as_json(config))
  for key in sorted(old.keys() & new.keys()):
    if old[key] != new[key] and not _FREE.fullmatch(key):
      raise UserError(
        f"{workdir} holds a run with {key}={old[key]!r}, but this one has "
        f"{new[key]!r}: choose another --workdir"
      )


def write_config(workdir: str, config: ConfigDict) -> None:
  """Writes WORKDIR/config.json."""
  if jax.process_index() == 0:
    path = pathlib.Path(workdir) / "config.json"
    text = json.dumps(_as_json(config), indent=2, sort_keys=True)
    path.with_suffix(".partial").write_text(text + "\n")
    os.replace(path.with_suffix(".partial"), path)


def check_values(
  hyperparameters: Any,
  choices: Mapping[str, tuple[str, ...]],
  ranges: Iterable[tuple[str, Callable, str]] = (),
) -> None:
  """Refuses a hyper-parameter that has no meaning.

  Args:
    hyperparameters: an object with the values.
    choices: what a name may be set to.
    ranges: name, whether a value is right, and how to set it; of names that
      the object has.

  Raises:
    UserError: naming the first one.
  """
  for name, known in choices.items():
    value = getattr(hyperparameters, name)
    if value not in known:
      known = " or ".join(f'"{x}"' for x in known)
      raise UserError(f'method.{name} is "{value}": set it to {known}')
  for name, is_right, hint in ranges:
    value = getattr(hyperparameters, name, None)
    if value is not None and not is_right(value):
      raise UserError(f"method.{name} is {value}: set it {hint}")


def _as_json(config):
  return json.loads(json.dumps(config.to_dict()))


def _flat(tree, prefix=""):
  if not isinstance(tree, dict):
    return {prefix.removesuffix("."): tree}
  items = (_flat(v, f"{prefix}{k}.") for k, v in tree.items())
  return {key: value for item in items for key, value in item.items()}
