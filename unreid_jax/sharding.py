"""The mesh and its two shardings: rows over the devices, or a copy on each."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from typing import Any, no_type_check

import jax
import numpy as np
from flax import struct
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from unreid_jax import UserError

AXIS = "data"
ROWS = P(AXIS)  # batches and banks: the first axis is split
ROWS_OF_PARTS = P(None, AXIS)  # a batch in parts: the rows of each
COPY = P()  # parameters: everywhere the same


def make_mesh(num_devices: int = 0) -> Mesh:
  """One axis, "data", over `num_devices` devices, or over all (0).

  They are the first ones of each process, an equal number of each.
  """
  devices, processes = jax.devices(), jax.process_count()
  if not 0 <= num_devices <= len(devices):
    raise UserError(
      f"num_devices={num_devices}, but JAX sees {len(devices)} "
      f"{devices[0].platform} device(s): change it; 0 takes all"
    )
  if num_devices % processes:
    raise UserError(
      f"num_devices={num_devices} is no multiple of {processes} processes: "
      "change it; 0 takes all devices"
    )
  if num_devices:
    by_process = [[] for _ in range(processes)]
    for device in devices:
      by_process[device.process_index].append(device)
    own = num_devices // processes
    devices = [device for some in by_process for device in some[:own]]
  shape, auto = (len(devices),), (AxisType.Auto,)
  return jax.make_mesh(shape, (AXIS,), auto, devices=devices)


def per_shard(
  function: Callable, inputs: tuple[P, ...], outputs: P | tuple[P, ...]
) -> Callable:
  """Maps shards over the mesh of `jax.set_mesh`, or over one device."""
  mesh = jax.sharding.get_abstract_mesh()
  mesh = make_mesh(1) if mesh.empty else mesh
  return jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs)


def num_devices() -> int:
  """How many devices the mesh of `jax.set_mesh` has; 1 without one."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.size


def constrain(array: jax.Array, spec: P) -> jax.Array:
  """Splits an array over the mesh of `jax.set_mesh`, if there is one."""
  if jax.sharding.get_abstract_mesh().empty:
    return array
  return jax.lax.with_sharding_constraint(array, spec)


def constrain_rows(array: jax.Array) -> jax.Array:
  """Splits the first axis over the mesh of `jax.set_mesh`, if there is one."""
  return constrain(array, ROWS)


def put_rows(mesh: Mesh, array: Any, rows: np.ndarray) -> jax.Array:
  """Puts `array[rows]` on the devices; each reads only its own part."""
  shape, split = (len(rows), *array.shape[1:]), NamedSharding(mesh, ROWS)
  own_part = lambda index: np.asarray(array[rows[index[0]]])
  return jax.make_array_from_callback(shape, split, own_part)


@struct.dataclass
@no_type_check
class SplitRows:
  """An array whose rows are split over the devices, and filled up for that."""

  filled: jax.Array
  num: int = struct.field(pytree_node=False)

  @classmethod
  def put(cls, mesh: Mesh, array: np.ndarray) -> "SplitRows":
    """Splits an array of any length; each process copies only its own part."""
    num = len(array)
    rows = np.minimum(np.arange(-(-num // mesh.size) * mesh.size), num - 1)
    return cls(put_rows(mesh, array, rows), num)

  @property
  def array(self) -> jax.Array:
    """The array itself; for use in a jitted function."""
    return self.filled[: self.num]


def batches(
  mesh: Mesh, arrays: dict[str, Any], rows: Iterable[np.ndarray]
) -> Iterator[dict[str, jax.Array]]:
  """Yields the rows of each array that belong to a batch, on the devices.

  A thread gathers and puts them, up to two batches ahead. What goes wrong in it
  is raised where the batch is asked for; it ends with the iterator.
  """
  put = lambda rows: {k: put_rows(mesh, x, rows) for k, x in arrays.items()}
  pool, ahead = concurrent.futures.ThreadPoolExecutor(1), collections.deque()
  try:
    for some in rows:
      ahead.append(pool.submit(put, some))
      if len(ahead) > 2:
        yield ahead.popleft().result()
    while ahead:
      yield ahead.popleft().result()
  finally:
    pool.shutdown(cancel_futures=True)
