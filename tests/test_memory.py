"""The sharded bank against slow twins in numpy, on 1 and on 8 devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unreid_jax import memory, sharding

N, D, B = 300, 16, 24


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(params=[1, 8])
def mesh(request):
  mesh = sharding.make_mesh(request.param)
  with jax.set_mesh(mesh):
    yield mesh


@pytest.fixture
def rng():
  return np.random.default_rng(0)


@pytest.fixture
def bank(rng):
  return jnp.asarray(unit(rng.standard_normal((N, D), np.float32)))


@pytest.fixture
def features(rng):
  return jnp.asarray(unit(rng.standard_normal((B, D), np.float32)))


def test_a_bank_is_padded_the_same_on_any_number_of_devices(mesh, bank):
  created = jax.jit(memory.create)(bank)
  assert created.shape == (384, D)
  assert created.addressable_shards[0].data.shape == (384 // mesh.size, D)
  np.testing.assert_array_equal(created[:N], bank)
  assert not created[N:].any()


def test_selected_similarities_and_their_gradient(mesh, bank, features, rng):
  rows = jnp.asarray(rng.integers(0, N, (B, 9)).astype(np.int32))
  weights = rng.standard_normal((B, 9), np.float32)

  @jax.jit
  def value(features):
    similarities = memory.similarities(memory.create(bank), features)
    return jnp.vdot(weights, memory.select(similarities, rows))

  picked = np.einsum("bd,bmd->bm", features, bank[rows])
  expected = np.einsum("bm,bmd->bd", weights, bank[rows])
  np.testing.assert_allclose(value(features), (weights * picked).sum(), 1e-5)
  grad = jax.grad(value)(features)
  np.testing.assert_allclose(grad, expected, 1e-5, 1e-6)


def test_nearest_is_a_stable_argsort(mesh, rng):
  # Small integers: many ties, within a shard and across.
  distances = rng.integers(0, 20, (B, 384)).astype(np.float32)
  values, rows = jax.jit(lambda x: memory.nearest(x, 60))(distances)
  expected = np.argsort(distances, axis=1, kind="stable")[:, :60]
  np.testing.assert_array_equal(rows, expected)
  np.testing.assert_array_equal(
    values, np.take_along_axis(distances, expected, axis=1)
  )


def test_squared_distances(mesh, bank, features):
  bank = bank * 1.5  # not only for unit rows
  got = memory.squared_distances(memory.create(bank), features)
  expected = np.square(features[:, None] - bank).sum(-1)
  np.testing.assert_allclose(got[:, :N], expected, 1e-5, 1e-5)


@pytest.mark.parametrize("stripes", [(), (3,)])
def test_writes_happen_one_after_the_other(mesh, rng, stripes):
  bank = unit(rng.standard_normal((N, *stripes, D), np.float32))
  features = unit(rng.standard_normal((B, *stripes, D), np.float32))
  rows = rng.integers(0, 6, B).astype(np.int32) * 50  # all rows repeat
  rows[[3, 11]] = -1
  write = jax.jit(lambda b, r, f: memory.write(memory.create(b), r, f, 0.2))
  expected = bank.copy()
  for row, feature in zip(rows, features, strict=True):
    if row >= 0:
      expected[row] = unit(0.2 * expected[row] + 0.8 * feature)
  got = write(bank, rows, features)
  np.testing.assert_allclose(got[:N], expected, 0, 1e-6)
  assert not got[N:].any()


def test_a_zero_row_becomes_the_feature(mesh, features):
  bank = memory.create(jnp.zeros((N, D)))
  got = memory.write(bank, jnp.arange(B), features, 0.5)
  np.testing.assert_allclose(got[:B], features, 1e-6)
  assert not got[B:].any()
