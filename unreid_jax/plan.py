"""What a run would need on so many devices, from its compiled step."""

import collections
import math
import re
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from unreid_jax import UserError, data, sharding, values
from unreid_jax.config import check, kinds, resolve, shapes
from unreid_jax.state import TrainState, keys, make_parts, shapes_of_state
from unreid_jax.step import compile_step

_KINDS = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
_BYTES = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "s64": 8, "f64": 8}
_JACCARD = 2100  # bytes an image: see docs/results.md


class Plan(NamedTuple):
  """What a run needs, in bytes; its `flops` are each device's in a step."""

  images: int
  devices: int
  device: dict[str, int]  # on each device
  host: dict[str, int]  # on each host
  disk: dict[str, int]
  moved: dict[str, int]  # between devices in a step
  flops: float
  micro_batches: int  # whose loop counts once, in what is moved and in flops

  @property
  def peak(self) -> int:
    """The bytes of a device when it has most."""
    *always, of_step, of_epoch = self.device.values()
    return sum(always) + max(of_step, of_epoch)


def plan(config: ConfigDict, num_images: int = 0) -> Plan:
  """Compiles a run's step for its devices, which may be virtual; runs nothing.

  Args:
    config: as the user has set it; its data need not be there.
    num_images: how many train images there are; 0: as in the published set.

  Raises:
    UserError: no run can have this config, or the number of images is unknown.
  """
  values.check(kinds(), config.to_dict())
  images = num_images or _published_size(config)
  if images < config.batch_size:
    raise UserError(
      f"{images} train images are fewer than batch_size={config.batch_size}: "
      "set --num_images"
    )
  mesh = sharding.make_mesh(config.num_devices)
  with jax.set_mesh(mesh):
    check(config, mesh.size)
    steps = config.steps_per_epoch or images // config.batch_size
    parts = make_parts(resolve(config, steps))
    state = shapes_of_state(parts, images)
    step = compile_step(parts, state, keys(config.seed)[0])
    device, host = device_needs(state, config), host_needs(config, images)
  device["in a step: activations, gradients"] = (
    step.memory_analysis().temp_size_in_bytes
  )
  # Beside its share of the features a device holds up to three more of that
  # size, while the devices show each other theirs.
  copies = 4 if mesh.size > 1 else 1
  device["at an epoch's start: features, new banks"] = (
    host["features of all images"] // mesh.size * copies
    + device["banks and labels"]
  )
  disk = {"two checkpoints, the best, and a new one": 4 * _bytes(state)}
  moved = collections.Counter()
  for kind, size in collectives(step.as_text()) if mesh.size > 1 else ():
    # What is scattered was mesh.size times as large.
    moved[kind] += size * (mesh.size if kind == "reduce-scatter" else 1)
  flops = step.cost_analysis().get("flops", 0.0)
  found = images, mesh.size, device, host, disk, dict(moved), flops
  return Plan(*found, config.micro_batches)


def lines(plan: Plan, device_memory: float = 0.0) -> list[str]:
  """The plan for a person; device_memory is what a device has, in GiB."""
  verdict = ""
  if device_memory:
    fits = plan.peak <= device_memory * 2**30
    verdict = f", {'fits' if fits else 'does NOT fit'} in {device_memory:g} GiB"
  return [
    f"{plan.images:,} train images, {plan.devices} devices",
    *_table("each device, MiB", plan.device),
    f"  at most, in training: {plan.peak / 2**30:,.2f} GiB{verdict}",
    *_table("each host, MiB", plan.host),
    *_table("disk, MiB", plan.disk),
    *_table("between devices in each step, MiB", plan.moved),
    f"arithmetic of each device in a step: {plan.flops / 1e9:,.1f} GFLOP",
    *(
      [f"  both with one of the {plan.micro_batches} micro-batches counted"]
      if plan.micro_batches > 1
      else []
    ),
  ]


def device_needs(state: TrainState, config: ConfigDict) -> dict[str, int]:
  """The bytes that a state and its batches have on each device."""
  pixels = config.dataset.height * config.dataset.width * 3
  own = config.batch_size // jax.sharding.get_mesh().size
  return {
    "parameters and running statistics": _bytes(
      (state.variables, state.average), own=True
    ),
    "optimizer": _bytes(state.opt_state, own=True),
    "banks and labels": _bytes((state.method, state.labels), own=True),
    "images of a batch, and of two ahead": 3 * own * pixels,
  }


def host_needs(config: ConfigDict, images: int) -> dict[str, int]:
  """The bytes that all images have on each host; those of Jaccard measured."""
  _, (features, _) = shapes(config)
  numbers = sum(x.size // len(x) for x in jax.tree.leaves(features))
  method = config.method.get("base", config.method)
  pixels = config.dataset.height * config.dataset.width * 3
  needs = {
    "decoded images, a file that is mapped": images * pixels,
    "features of all images": images * numbers * 4,
  }
  if "k1" in method:
    needs["neighbours of all images"] = images * method.k1 * 8
    needs["their Jaccard distances, about"] = images * _JACCARD
  return needs


def collectives(program: str) -> list[tuple[str, int]]:
  """The kind and the bytes of each collective's result in a compiled program.

  What stands in a loop counts once.
  """
  lines = re.findall(rf"= (.*?) ({_KINDS})(?:-start)?\(", program)
  size = lambda dtype, axes: (
    _BYTES.get(dtype, 4) * math.prod(int(n) for n in axes.split(",") if n)
  )
  return [
    (kind, size(*array))
    for arrays, kind in lines
    for array in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", arrays)
  ]


def _published_size(config):
  """How many train images the published set has."""
  if config.dataset.name in ("folder", "synthetic"):
    return 0
  sizes = data.builder(config.dataset.name).SIZES
  version = config.dataset.version or next(iter(sizes))
  if version not in sizes:
    raise UserError(
      f'dataset.version is "{version}": set it to '
      f'"{" or ".join(filter(None, sizes))}"'
    )
  return sizes[version][0]


def _bytes(tree: Any, own: bool = False) -> int:
  """Of all arrays; or of the part of each that a device has."""
  shape = lambda x: x.sharding.shard_shape(x.shape) if own else x.shape
  arrays = jax.tree.leaves(tree)
  return sum(math.prod(shape(x)) * x.dtype.itemsize for x in arrays)


def _table(title: str, sizes: dict[str, int]) -> list[str]:
  rows = [f"  {name:<46}{size / 2**20:>12,.1f}" for name, size in sizes.items()]
  return [title, *rows]
