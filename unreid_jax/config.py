"""What a run's config may hold: the type of every key, and what depends on it.

The types stand where the values are used: in the arguments of `optim.make`, in
a method's `Hyperparameters`, and so on; `Run` has those of the config's own
keys. Here they are only collected.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypedDict

from ml_collections import ConfigDict

from unreid_jax import UserError, data, memory, methods, models, optim, values
from unreid_jax.data import augment, sampler
from unreid_jax.values import Count, CountOrNone, Duration, Free, Range


class Run(TypedDict):
  """The keys that belong to no section."""

  seed: Annotated[int, Range(0, 2**31 - 1)]
  num_devices: Free[CountOrNone]
  epochs: Free[Count]
  batch_size: Count
  evaluate_batch_size: Free[Count]
  evaluate_every: Free[Duration]
  checkpoint_every: Free[Duration]
  log_every: Free[Duration]
  steps_per_epoch: CountOrNone


def kinds(config: Mapping[str, Any]) -> dict[str, Any]:
  """The type of each key of a config; a section's is `values.Nested`."""
  sections = {
    "sampler": values.fields(sampler.plan),
    "dataset": values.fields(data.load),
    "augment": values.fields(augment.augment),
    "encoder": values.fields(models.make) | {"pretrained": Free[str]},
    "optim": values.fields(optim.make) | values.fields(optim.step_decay),
    "method": methods.fields(config["method"]),
  }
  nested = {
    name: Annotated[dict, values.Nested(lambda _, types=types: types)]
    for name, types in sections.items()
  }
  return values.fields(Run) | nested


def check(config: ConfigDict, num_devices: int) -> None:
  """Refuses a config that no run can have, before any image is read.

  Args:
    config: as the user has set it.
    num_devices: how many devices share a batch.

  Raises:
    UserError: which key has which value, and what it may be set to.
  """
  settings = config.to_dict()
  values.check(kinds(settings), settings)
  resolved = resolve(config, 1)
  with values.section("method"):
    methods.make(**resolved.method.to_dict())
  for key in ("batch_size", "evaluate_batch_size"):
    if config[key] % num_devices:
      raise UserError(
        f"{key}={config[key]} is no multiple of {num_devices} devices: change "
        "it or num_devices"
      )
  num_instances = config.sampler.num_instances
  if num_instances and config.batch_size % num_instances:
    raise UserError(
      f"batch_size={config.batch_size} is no multiple of "
      f"sampler.num_instances={num_instances}: change either"
    )
  if memory.ROW_MULTIPLE % num_devices:
    raise UserError(
      f"{num_devices} devices cannot share a bank: set num_devices to a power "
      f"of two, {memory.ROW_MULTIPLE} at most"
    )


def resolve(config: ConfigDict, steps_per_epoch: int) -> ConfigDict:
  """The config with every duration, and `steps_per_epoch`, in steps."""
  resolved = config.copy_and_resolve_references()
  resolved.steps_per_epoch = steps_per_epoch
  settings = config.to_dict()
  for path, kind, value in _leaves(kinds(settings), settings):
    if values.has(kind, values.DURATION):
      *sections, key = path.split(".")
      section = resolved
      for name in sections:
        section = section[name]
      with section.ignore_type():
        section[key] = values.steps(value, steps_per_epoch)
  return resolved


def differences(
  old: Mapping[str, Any], new: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
  """Where a run's stored config differs in what it learns, not where it runs.

  Args:
    old: the stored config.
    new: the config that the run is to go on with.

  Yields:
    The key, its old and its new value; of keys that both have.
  """
  stored = {path: value for path, _, value in _leaves(kinds(new), old)}
  for path, kind, value in _leaves(kinds(new), new):
    if path in stored and not values.has(kind, values.FREE):
      before, now = (list(x) if isinstance(x, tuple) else x
                     for x in (stored[path], value))  # fmt: skip
      if before != now:
        yield path, before, now


def _leaves(types, section, prefix=""):
  """The full path, the type and the value of each key, sections excluded."""
  for key, value in section.items():
    kind = types.get(key)
    nested = values.nested_fields(kind, value)
    if nested is not None:
      yield from _leaves(nested, value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", kind, value
