"""The memory bank: rows split over the devices and never gathered.

A bank is an array [k, ..., d], sharded by rows over the mesh axis "data". The
features of a batch travel to the bank, not the other way round: every device
works on its own rows, and only results of the size of a batch are merged. All
products use the highest precision, so that a ranking does not depend on the
accelerator. Banks, features and results are of one dtype.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from unreid_jax import sharding
from unreid_jax.sharding import AXIS, COPY, ROWS, P, constrain_rows, per_shard

# The capacity of a bank must not depend on the number of devices, or a
# checkpoint could not be read on another number: it is a multiple of this.
ROW_MULTIPLE = 128
_PIECE = 2**15  # rows of a bank that all devices hold for a moment
_COLUMNS = P(None, AXIS)
Bank = Float[Array, "k d"]
Features = Float[Array, "b d"]
Similarities = Float[Array, "b k"]  # sharded by column; also distances


def capacity(num_rows: int) -> int:
  """Rows of a bank that holds `num_rows`: the next multiple of 128."""
  return -(-num_rows // ROW_MULTIPLE) * ROW_MULTIPLE


def create(values: Float[Array, "n ..."]) -> Float[Array, "k ..."]:
  """A bank that begins with these rows; the rows beyond them are zero."""
  return _fill(values, ROW_MULTIPLE, 0)


def normalize(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
  """Scales to unit length along the last axis; a zero vector stays zero."""
  squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * lax.rsqrt(jnp.maximum(squared, 1e-24))


def similarities(bank: Bank, features: Features) -> Similarities:
  """Inner products with all rows; differentiable."""

  def shard(bank, features):
    return jnp.matmul(features, bank.T, precision=lax.Precision.HIGHEST)

  return per_shard(shard, (ROWS, COPY), _COLUMNS)(bank, features)


def squared_distances(bank: Bank, features: Features) -> Similarities:
  """Squared Euclidean distances to all rows."""
  bank_squared = jnp.sum(jnp.square(bank), axis=1)
  squared = jnp.sum(jnp.square(features), axis=1, keepdims=True)
  return squared + bank_squared[None] - 2 * similarities(bank, features)


def select(
  values: Similarities, rows: Int[Array, "b m"]
) -> Float[Array, "b m"]:
  """Copies `values[i, rows[i]]` to every device."""

  def shard(values, rows):
    own, local = _own_rows(rows, values.shape[1])
    picked = jnp.take_along_axis(values, jnp.where(own, local, 0), axis=1)
    return lax.psum(jnp.where(own, picked, 0), AXIS)

  return per_shard(shard, (_COLUMNS, COPY), COPY)(values, rows)


def take(bank: Bank, rows: Int[Array, "b m"]) -> Float[Array, "b m d"]:
  """Copies some rows of the bank to every device."""

  def shard(bank, rows):
    own, local = _own_rows(rows, len(bank))
    picked = bank[jnp.where(own, local, 0)]
    return lax.psum(jnp.where(own[..., None], picked, 0), AXIS)

  return per_shard(shard, (ROWS, COPY), COPY)(bank, rows)


def class_sums(values: Similarities, classes: Int[Array, " k"]) -> Similarities:
  """Sums of the values over the rows of each class; differentiable.

  The sum of class c < k is in column c; a row with a negative class is left
  out. Every device adds up its own rows, then each gets the sums of its part of
  the classes: what travels is [b, k], never a bank.
  """
  k = len(classes)

  def shard(values, classes):
    at = jnp.where(classes < 0, k, classes)
    sums = jnp.zeros((k, len(values)), values.dtype)
    sums = sums.at[at].add(values.T, mode="drop")
    return lax.psum_scatter(sums, AXIS, tiled=True).T

  return per_shard(shard, (_COLUMNS, ROWS), _COLUMNS)(values, classes)


def nearest(
  distances: Similarities, num: int
) -> tuple[Float[Array, "b {num}"], Int[Array, "b {num}"]]:
  """The `num` smallest distances in ascending order, and their rows.

  Of equal distances the lower row comes first, on any number of devices. Every
  device sorts out its own nearest rows, then the candidates are merged.
  """

  def shard(distances):
    k = distances.shape[1]
    values, rows = lax.top_k(-distances, min(num, k))
    rows = rows + lax.axis_index(AXIS) * k
    gather = lambda x: lax.all_gather(x, AXIS, axis=1, tiled=True)
    values, order = lax.top_k(gather(values), num)
    rows = jnp.take_along_axis(gather(rows), order, axis=1)
    return -values[None], rows[None]

  # Every device holds the same result; the first one's is taken.
  values, rows = per_shard(shard, (_COLUMNS,), (ROWS, ROWS))(distances)
  return values[0], rows[0]


def write(
  bank: Float[Array, "k *d"],
  rows: Int[Array, " b"],
  features: Float[Array, "b *d"],
  momentum: float,
) -> Float[Array, "k *d"]:
  """Moves rows towards features, one after the other in the batch's order.

  Each write is `bank[r] = normalize(momentum * bank[r] + (1 - momentum) * f)`,
  where a row that occurs again sees its earlier writes, as in the references'
  backward passes. Writes to different rows do not see each other, so all
  first writes happen at once, then all second ones, and so on. A feature with a
  negative row is not written.
  """

  def shard(bank, rows, features):
    own, local = _own_rows(rows, len(bank))
    earlier = jnp.tril(rows[:, None] == rows[None], -1) & own[None]
    turn = jnp.where(own, jnp.sum(earlier, axis=1), -1)

    def write_turn(i, bank):
      at = jnp.where(turn == i, local, len(bank))  # the others: nowhere
      old = bank.at[at].get(mode="fill", fill_value=0)
      new = normalize(momentum * old + (1 - momentum) * features)
      return bank.at[at].set(new, mode="drop")

    return lax.fori_loop(0, jnp.max(turn) + 1, write_turn, bank)

  features = lax.stop_gradient(features)
  return per_shard(shard, (ROWS, COPY, COPY), ROWS)(bank, rows, features)


def write_hardest(
  bank: Bank, rows: Int[Array, " b"], features: Features, momentum: float
) -> Bank:
  """Writes to each row once: the feature that is least similar to it.

  It is CM_Hard of alibaba/cluster-contrast-reid; the arguments are `write`'s.
  """
  own = jnp.maximum(rows, 0)[:, None]
  own = select(similarities(bank, lax.stop_gradient(features)), own)[:, 0]
  position = jnp.arange(len(rows))
  is_earlier = position[:, None] > position[None]
  beats = (own[:, None] > own[None]) | (own[:, None] == own[None]) & is_earlier
  beaten = ((rows[:, None] == rows[None]) & beats).any(axis=1)
  return write(bank, jnp.where(beaten, -1, rows), features, momentum)


def write_mean(
  bank: Bank, rows: Int[Array, " b"], features: Features, momentum: float
) -> Bank:
  """Writes to each row once: the mean of its features, not normalised.

  It is CM_Hybrid of bupt-ai-cz/HHCL-ReID; the arguments are `write`'s.
  """
  same = (rows[:, None] == rows[None]).astype(features.dtype)
  sums = jnp.matmul(same, features, precision=lax.Precision.HIGHEST)
  is_first = jnp.tril(same, -1).sum(axis=1) == 0
  mean = sums / same.sum(axis=1, keepdims=True)
  return write(bank, jnp.where(is_first, rows, -1), mean, momentum)


def centroids(
  features: Float[Array, "n d"], labels: Int[Array, " n"], num_rows: int
) -> Bank:
  """A bank of the normalised mean of each label's unit features.

  It has `num_rows` rows or more, and those without a feature are zero. Features
  with a negative label are left out. The devices show each other their features
  in turn, and each adds up those of its own rows: on CPUs always in the order
  of the images.
  """
  k, num = capacity(num_rows), sharding.num_devices()
  labels = _fill(labels, num, -1)
  features = _fill(features, num, 0)

  def shard(features, labels):
    def add(turn, sums):
      own, local = _own_rows(_shown(labels, turn), len(sums))
      at = jnp.where(own, local, len(sums))
      return sums.at[at].add(_shown(features, turn), mode="drop")

    empty = jnp.zeros((k // num, features.shape[1]), features.dtype)
    empty = lax.pcast(empty, AXIS, to="varying")
    return normalize(lax.fori_loop(0, num, add, empty))

  return per_shard(shard, (ROWS, ROWS), ROWS)(features, labels)


def pick(
  features: Float[Array, "n d"], rows: Int[Array, "k *m"]
) -> Float[Array, "k *m d"]:
  """A bank of some of the features; a negative row gives zeros.

  No device holds all features: see `centroids`. k is a bank's capacity.
  """
  num = sharding.num_devices()
  features = _fill(features, num, 0)

  def shard(features, rows):
    def fetch(turn, picked):
      local = rows - turn * len(features)
      here = (local >= 0) & (local < len(features))
      found = _shown(features, turn)[jnp.where(here, local, 0)]
      return jnp.where(here[..., None], found, picked)

    empty = jnp.zeros((*rows.shape, features.shape[1]), features.dtype)
    empty = lax.pcast(empty, AXIS, to="varying")
    return lax.fori_loop(0, num, fetch, empty)

  return per_shard(shard, (ROWS, ROWS), ROWS)(features, rows)


def to_host(bank: Bank, num_rows: int) -> np.ndarray:
  """Copies the first rows to every host: between epochs, not in a step."""
  if jax.process_count() == 1:
    return np.asarray(bank)[:num_rows]
  # A piece at a time, as each comes to every device first.
  size = min(len(bank), _PIECE)
  cut = lambda bank, start: lax.dynamic_slice_in_dim(bank, start, size)
  cut = jax.jit(cut, out_shardings=NamedSharding(bank.sharding.mesh, COPY))
  out = np.empty(bank.shape, bank.dtype)
  for start in range(0, num_rows, size):
    start = min(start, len(bank) - size)
    out[start : start + size] = cut(bank, start)
  return out[:num_rows]


def _fill(array, multiple, value):
  """Rows split over the devices, filled up to a multiple of a number."""
  pads = [(0, -len(array) % multiple)] + [(0, 0)] * (array.ndim - 1)
  return constrain_rows(jnp.pad(array, pads, constant_values=value))


def _shown(rows, turn):
  """The rows of the device whose turn it is, on every device."""
  if lax.axis_size(AXIS) == 1:
    return rows
  is_turn = lax.axis_index(AXIS) == turn
  return lax.psum(jnp.where(is_turn, rows, 0), AXIS)


def _own_rows(rows, num_local):
  """Which rows lie on this device, and their position there."""
  local = rows - (lax.axis_index(AXIS) * num_local).astype(rows.dtype)
  return (local >= 0) & (local < num_local), local
