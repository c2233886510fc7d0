"""The memory bank: rows split over the devices and never gathered.

A bank is an array [k, ..., d], sharded by rows over the mesh axis "data". The
features of a batch travel to the bank, not the other way round: every device
works on its own rows, and only results of the size of a batch are merged. All
products use the highest precision, so that a ranking does not depend on the
accelerator. Banks, features and results are of one dtype.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int

from unreid_jax import sharding

# The capacity of a bank must not depend on the number of devices, or a
# checkpoint could not be read on another number: it is a multiple of this.
ROW_MULTIPLE = 128
_BY_ROW = sharding.ROWS
_BY_COLUMN = sharding.P(None, sharding.AXIS)
_COPY = sharding.COPY


def capacity(num_rows: int) -> int:
  """Rows of a bank that holds `num_rows`: the next multiple of 128."""
  return -(-num_rows // ROW_MULTIPLE) * ROW_MULTIPLE


def create(values: Float[Array, "n ..."]) -> Float[Array, "k ..."]:
  """A bank that begins with these rows; the rows beyond them are zero."""
  extra = capacity(len(values)) - len(values)
  padded = jnp.pad(values, [(0, extra)] + [(0, 0)] * (values.ndim - 1))
  return sharding.constrain_rows(padded)


def normalize(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
  """Scales to unit length along the last axis; a zero vector stays zero."""
  squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * lax.rsqrt(jnp.maximum(squared, 1e-24))


def similarities(
  bank: Float[Array, "k d"], features: Float[Array, "b d"]
) -> Float[Array, "b k"]:
  """Inner products with all rows, sharded by column; differentiable."""

  def shard(bank, features):
    return jnp.matmul(features, bank.T, precision=lax.Precision.HIGHEST)

  return sharding.per_shard(shard, (_BY_ROW, _COPY), _BY_COLUMN)(bank, features)


def squared_distances(
  bank: Float[Array, "k d"], features: Float[Array, "b d"]
) -> Float[Array, "b k"]:
  """Squared Euclidean distances to all rows, sharded by column."""
  bank_squared = jnp.sum(jnp.square(bank), axis=1)
  squared = jnp.sum(jnp.square(features), axis=1, keepdims=True)
  return squared + bank_squared[None] - 2 * similarities(bank, features)


def select(
  values: Float[Array, "b k"], rows: Int[Array, "b m"]
) -> Float[Array, "b m"]:
  """Picks `values[i, rows[i]]` from values that are sharded by column.

  Every device holds the result.
  """

  def shard(values, rows):
    own, local = _own_rows(rows, values.shape[1])
    picked = jnp.take_along_axis(values, jnp.where(own, local, 0), axis=1)
    return lax.psum(jnp.where(own, picked, 0), sharding.AXIS)

  return sharding.per_shard(shard, (_BY_COLUMN, _COPY), _COPY)(values, rows)


def take(
  bank: Float[Array, "k d"], rows: Int[Array, "b m"]
) -> Float[Array, "b m d"]:
  """Copies some rows of the bank to every device."""

  def shard(bank, rows):
    own, local = _own_rows(rows, len(bank))
    picked = bank[jnp.where(own, local, 0)]
    return lax.psum(jnp.where(own[..., None], picked, 0), sharding.AXIS)

  return sharding.per_shard(shard, (_BY_ROW, _COPY), _COPY)(bank, rows)


def class_sums(
  values: Float[Array, "b k"], classes: Int[Array, " k"]
) -> Float[Array, "b k"]:
  """Sums of the values over the rows of each class; differentiable.

  Every device adds up its own rows, then each gets the sums of its part of the
  classes: what travels is [b, k], never a bank.

  Args:
    values: a value for each row of a bank, sharded by column, such as the
      `similarities`.
    classes: the class of each row, below k; a row with a negative one is left
      out.

  Returns:
    The sum of class c in column c, sharded by column.
  """
  k = len(classes)

  def shard(values, classes):
    at = jnp.where(classes < 0, k, classes)
    sums = jnp.zeros((k, len(values)), values.dtype)
    sums = sums.at[at].add(values.T, mode="drop")
    return lax.psum_scatter(sums, sharding.AXIS, tiled=True).T

  return sharding.per_shard(shard, (_BY_COLUMN, _BY_ROW), _BY_COLUMN)(
    values, classes
  )


def nearest(
  distances: Float[Array, "b k"], num: int
) -> tuple[Float[Array, "b {num}"], Int[Array, "b {num}"]]:
  """Finds the `num` smallest of distances that are sharded by column.

  Every device sorts out its own nearest rows, then the candidates are merged.

  Returns:
    The distances in ascending order, and their rows. Of equal distances the
    lower row comes first, on any number of devices.
  """

  def shard(distances):
    k = distances.shape[1]
    values, rows = lax.top_k(-distances, min(num, k))
    rows = rows + lax.axis_index(sharding.AXIS) * k
    gather = lambda x: lax.all_gather(x, sharding.AXIS, axis=1, tiled=True)
    values, order = lax.top_k(gather(values), num)
    rows = jnp.take_along_axis(gather(rows), order, axis=1)
    return -values[None], rows[None]

  # Every device holds the same result; the first one's is taken.
  out = sharding.per_shard(shard, (_BY_COLUMN,), (_BY_ROW, _BY_ROW))(distances)
  return out[0][0], out[1][0]


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
  first writes happen at once, then all second ones, and so on.

  Args:
    bank: unit vectors along the last axis.
    rows: the row that each feature is written to; a negative one: to none.
    features: the features f.
    momentum: the weight of the old value, in [0, 1).

  Returns:
    The bank after the writes.
  """

  def shard(bank, rows, features):
    own, local = _own_rows(rows, bank.shape[0])
    nowhere = bank.shape[0]
    earlier = jnp.tril(rows[:, None] == rows[None], -1) & own[None]
    turn = jnp.where(own, jnp.sum(earlier, axis=1), -1)

    def write_turn(i, bank):
      at = jnp.where(turn == i, local, nowhere)
      old = bank.at[at].get(mode="fill", fill_value=0)
      new = normalize(momentum * old + (1 - momentum) * features)
      return bank.at[at].set(new, mode="drop")

    return lax.fori_loop(0, jnp.max(turn) + 1, write_turn, bank)

  return sharding.per_shard(shard, (_BY_ROW, _COPY, _COPY), _BY_ROW)(
    bank, rows, lax.stop_gradient(features)
  )


def write_hardest(
  bank: Float[Array, "k d"],
  rows: Int[Array, " b"],
  features: Float[Array, "b d"],
  momentum: float,
) -> Float[Array, "k d"]:
  """Writes to each row once: the feature that is least similar to it.

  It has the arguments of `write`, and is CM_Hard of
  alibaba/cluster-contrast-reid.
  """
  own = jnp.maximum(rows, 0)[:, None]
  own = select(similarities(bank, lax.stop_gradient(features)), own)[:, 0]
  position = jnp.arange(len(rows))
  is_earlier = position[:, None] > position[None]
  beats = (own[:, None] > own[None]) | (own[:, None] == own[None]) & is_earlier
  beaten = (rows[:, None] == rows[None]) & beats
  return write(
    bank, jnp.where(beaten.any(axis=1), -1, rows), features, momentum
  )


def write_mean(
  bank: Float[Array, "k d"],
  rows: Int[Array, " b"],
  features: Float[Array, "b d"],
  momentum: float,
) -> Float[Array, "k d"]:
  """Writes to each row once: the mean of its features, not normalised.

  It has the arguments of `write`, and is CM_Hybrid of bupt-ai-cz/HHCL-ReID.
  """
  same = (rows[:, None] == rows[None]).astype(features.dtype)
  sums = jnp.matmul(same, features, precision=lax.Precision.HIGHEST)
  is_first = jnp.tril(same, -1).sum(axis=1) == 0
  mean = sums / same.sum(axis=1, keepdims=True)
  return write(bank, jnp.where(is_first, rows, -1), mean, momentum)


def centroids(
  features: Float[Array, "n d"], labels: Int[Array, " n"], num_rows: int
) -> Float[Array, "k d"]:
  """A bank of the normalised mean of each label's features.

  Args:
    features: unit features.
    labels: the row of each feature; a feature with a negative one is left out.
    num_rows: the least number of rows; those without a feature are zero.
  """
  k = capacity(num_rows)
  rows = jnp.where(labels < 0, k, labels)
  sums = jnp.zeros((k, features.shape[1]), features.dtype)
  return create(normalize(sums.at[rows].add(features, mode="drop")))


def to_host(bank: Float[Array, "k d"], num_rows: int) -> np.ndarray:
  """Copies the first rows to every host: between epochs, not in a step."""
  return multihost_utils.process_allgather(bank, tiled=True)[:num_rows]


def _own_rows(rows, num_local):
  """Which rows lie on this device, and their position there."""
  first = lax.axis_index(sharding.AXIS) * num_local
  local = rows - first.astype(rows.dtype)
  return (local >= 0) & (local < num_local), local
