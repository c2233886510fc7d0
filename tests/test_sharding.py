"""Batches that a thread puts on the devices: order, errors, and its end."""

import threading

import jax
import numpy as np
import pytest

from unreid_jax import UserError, sharding

ROWS = np.random.default_rng(0).permutation(80).reshape(5, 16)


def test_batches_are_those_of_put_rows():
  arrays = {"x": np.arange(80, dtype=np.int32), "y": np.eye(80, 3)}
  mesh = sharding.make_mesh(8)
  batches = list(sharding.batches(mesh, arrays, ROWS))
  assert len(batches) == len(ROWS)
  for rows, batch in zip(ROWS, batches, strict=True):
    for name, array in arrays.items():
      np.testing.assert_array_equal(batch[name], array[rows])
      assert batch[name].sharding.spec == sharding.ROWS
  assert not list(sharding.batches(mesh, arrays, []))


class Slow:
  """An array that counts what it has given, and breaks at one image."""

  shape, given = (80,), 0

  def __getitem__(self, rows):
    if 79 in rows:
      raise UserError("79 is damaged")
    self.given += 1
    return np.asarray(rows)


def test_a_batch_that_fails_is_raised_where_it_is_used():
  """Those before it come first, and the thread ends."""
  before, got = threading.active_count(), []
  bad = next(i for i, rows in enumerate(ROWS) if 79 in rows)
  with pytest.raises(UserError, match="79 is damaged"):
    for batch in sharding.batches(sharding.make_mesh(1), {"x": Slow()}, ROWS):
      got.append(jax.device_get(batch["x"]))
  np.testing.assert_array_equal(got, ROWS[:bad])
  assert threading.active_count() == before


def test_a_loop_that_is_left_early():
  """At most two batches more are gathered, and the thread ends."""
  before, array = threading.active_count(), Slow()
  rows = np.zeros((50, 4), int)
  for _ in sharding.batches(sharding.make_mesh(1), {"x": array}, rows):
    break
  assert array.given <= 3
  assert threading.active_count() == before
