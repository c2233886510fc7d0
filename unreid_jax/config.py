"""What a run's config may hold: the type of every key, and what depends on it.

The types stand where the values are used: in the arguments of `optim.make`, in
a method's `Hyperparameters`, and so on; `Run` has those of the config's own
keys. Here they are only collected.
"""

import functools
import json
import pathlib
import zlib
from collections.abc import Mapping
from typing import Annotated, Any, TypedDict

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from unreid_jax import UserError, data, memory, methods, models, optim, values
from unreid_jax.data import augment, sampler
from unreid_jax.models import pretrained
from unreid_jax.values import (
  BelowOne,
  Count,
  CountOrZero,
  Duration,
  Free,
  Range,
)


class Run(TypedDict):
  """The keys that belong to no section."""

  seed: Annotated[int, Range(0, 2**31 - 1)]
  num_devices: Free[CountOrZero]
  epochs: Free[Count]
  batch_size: Count
  micro_batches: Free[Count]
  evaluate_batch_size: Free[Count]
  evaluate_every: Free[Duration]
  checkpoint_every: Free[Duration]
  log_every: Free[Duration]
  report: Free[bool]
  steps_per_epoch: CountOrZero
  ema: BelowOne


def kinds() -> dict[str, Any]:
  """The type of each key of a config; a section's is `values.Nested`."""
  encoder = values.fields(models.make) | {"pretrained": Free[str]}
  sections = {
    "sampler": values.fields(sampler.plan),
    "dataset": values.fields(data.load),
    "augment": values.fields(augment.augment),
    "encoder": encoder,
    "optim": values.fields(optim.make) | values.fields(optim.schedule),
  }
  types_of = {k: lambda _, types=types: types for k, types in sections.items()}
  types_of["method"] = methods.fields
  nested = {k: Annotated[dict, values.Nested(f)] for k, f in types_of.items()}
  return values.fields(Run) | nested


def check(config: ConfigDict, num_devices: int) -> None:
  """Refuses a config that no run can have, before any image is read.

  Args:
    config: as the user has set it.
    num_devices: how many devices share a batch.

  Raises:
    UserError: which key has which value, and what it may be set to.
  """
  values.check(kinds(), config.to_dict())
  _check_devices(config, num_devices)
  _check_micro_batches(config, num_devices)
  smaller = min(config.dataset.height, config.dataset.width)
  if config.augment.pad >= smaller:
    raise UserError(
      f"augment.pad={config.augment.pad}: set it below {smaller} pixels, or a "
      "crop may hold nothing of the image"
    )
  num_instances = config.sampler.num_instances
  if num_instances and config.batch_size % num_instances:
    raise UserError(
      f"batch_size={config.batch_size} is no multiple of "
      f"sampler.num_instances={num_instances}: change either"
    )
  _check_features(resolve(config, 1))


def encoder_options(config: ConfigDict) -> dict[str, Any]:
  """The arguments of `models.make`."""
  return {k: v for k, v in config.encoder.items() if k != "pretrained"}


def check_weights(config: ConfigDict) -> None:
  """Refuses `encoder.pretrained`, if it is set, where it does not fit."""
  if config.encoder.pretrained:
    module, (_, variables) = shapes(config)
    size = config.dataset.height, config.dataset.width
    pretrained.load(config.encoder.pretrained, module, variables, size)


def _check_devices(config, num):
  """Whether so many devices can share the batches and the banks evenly."""
  shared = {k: config[k] for k in ("batch_size", "evaluate_batch_size")}
  shared["the rows of a bank"] = memory.ROW_MULTIPLE
  uneven = {k: size for k, size in shared.items() if size % num}
  if not uneven:
    return
  fits = max(
    n for n in range(1, num) if not any(x % n for x in shared.values())
  )
  name, size = next(iter(uneven.items()))
  how = f"{name}={size} is" if name in config else f"{name} are"
  advice = f"set num_devices to {fits}"
  if name in config:
    advice += f", or {name} to {max(size // num, 1) * num}"
  raise UserError(f"{how} no multiple of {num} devices: {advice}")


def _check_micro_batches(config, num_devices):
  """Whether all devices can share each part, and none cuts a group."""
  num, batch = config.micro_batches, config.batch_size
  if batch % (num * num_devices):
    raise UserError(
      f"micro_batches={num}: batch_size={batch} is no multiple of {num} x "
      f"{num_devices} devices: change any of them"
    )
  size, group = batch // num, config.encoder.bn_group_size or batch
  if size % group and batch % group == 0:
    raise UserError(
      f"micro_batches={num} would cut a group of batch norm: set it to a "
      f"divisor of {batch // group}, or encoder.bn_group_size to {size}, which "
      "is another batch norm"
    )


def settings(config: ConfigDict) -> dict[str, Any]:
  """Each key's value by its path, but for those that say where files are."""
  leaves = {path: x for path, _, x in _leaves(kinds(), config.to_dict())}
  paths = "dataset.root", "dataset.cache_dir", "encoder.pretrained"
  return {path: x for path, x in leaves.items() if path not in paths}


def _check_features(config):
  """Whether encoder, method and images go together; nothing is computed."""
  with values.section("method"):
    method = methods.make(**config.method.to_dict())
  module, (features, variables) = shapes(config)
  jax.eval_shape(lambda key: method.init(key, features), jax.random.key(0))
  options = {"train": True, "mutable": ["batch_stats"]}
  options["rngs"] = {"drop_path": jax.random.key(0)}
  as_trained = functools.partial(module.apply, **options)
  jax.eval_shape(as_trained, variables, _images(config))
  optimizer = optim.make(**config.optim)
  step = lambda params: optimizer.update(params, optimizer.init(params), params)
  jax.eval_shape(step, variables["params"])


def shapes(config):
  """The encoder, and the shapes of a batch's features and of its variables."""
  module = models.make(**encoder_options(config))
  init, key = module.init_with_output, jax.random.key(0)
  return module, jax.eval_shape(init, key, _images(config))


def _images(config):
  shape = (config.batch_size, config.dataset.height, config.dataset.width, 3)
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def resolve(config: ConfigDict, steps_per_epoch: int) -> ConfigDict:
  """The config with every duration, and `steps_per_epoch`, in steps."""
  resolved = config.copy_and_resolve_references()
  resolved.steps_per_epoch = steps_per_epoch
  for path, kind, value in _leaves(kinds(), config.to_dict()):
    if values.has(kind, values.DURATION):
      *sections, key = path.split(".")
      section = resolved
      for name in sections:
        section = section[name]
      with section.ignore_type():
        section[key] = values.steps(value, steps_per_epoch)
  return resolved


def from_json(stored: Mapping[str, Any]) -> ConfigDict:
  """The config that was written to a config.json, whose tuples are lists."""
  is_list = lambda x: isinstance(x, list)
  to_tuple = lambda x: tuple(x) if is_list(x) else x
  return ConfigDict(jax.tree.map(to_tuple, dict(stored), is_leaf=is_list))


def check_same(stored: Mapping[str, Any], config: ConfigDict) -> None:
  """Refuses a config with which a stored run cannot go on.

  Args:
    stored: the config that the run was begun with.
    config: the one that it is to go on with; it may differ in keys whose type
      is `values.Free`.

  Raises:
    UserError: which key differs.
  """
  settings = json.loads(json.dumps(config.to_dict()))  # as it would be stored
  try:
    known = {path: x for path, _, x in _leaves(kinds(), stored)}
  except values.BadValue as bad:  # no method of that name, say
    raise UserError(
      f"the config.json of --workdir is damaged or of another version ({bad}): "
      "choose another --workdir"
    ) from None
  for path, kind, now in _leaves(kinds(), settings):
    is_free = values.has(kind, values.FREE)
    is_new = path not in known
    if is_free or (is_new and is_off(path, now, config.method.name)):
      continue
    if known.get(path) != now:
      then = repr(known[path]) if path in known else "no such key"
      raise UserError(
        f"--workdir holds a run with {path}={then}, but this one has {now!r}: "
        "choose another --workdir"
      )


def is_off(path: str, value: Any, method: str) -> bool:
  """Whether a key that an earlier version had not leaves a run as it was."""
  defaults = methods.defaults(method)
  section, _, key = path.partition(".")
  if section == "method" and key in defaults:
    return value == defaults[key]
  return value in (0, 1, "", "0 steps", [])


def _leaves(types, section, prefix=""):
  """The full path, the type and the value of each key, sections excluded."""
  for key, value in section.items():
    kind = types.get(key)
    nested = values.nested_fields(kind, value)
    if nested is not None:
      yield from _leaves(nested, value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", kind, value


def facts(config: ConfigDict) -> dict[str, Any]:
  """What must be the same in all processes before they do anything."""
  folder = pathlib.Path(__file__).parent
  sources = (path.read_bytes() for path in sorted(folder.rglob("*.py")))
  return settings(config) | {
    "the code of unreid_jax": functools.reduce(
      lambda crc, text: zlib.crc32(text, crc), sources, 0
    ),
    "the version of jax": jax.__version__,
    "the number of devices": jax.local_device_count(),
  }
