"""Bank and losses against slow twins in numpy, on 1 and on 8 devices.

All of it is in float64, where rounding cannot hide a mistake.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unreid_jax import losses, memory, sharding

N, D, B = 300, 16, 24


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(params=[1, 8])
def mesh(request):
  mesh = sharding.make_mesh(request.param)
  with jax.enable_x64(), jax.set_mesh(mesh):
    yield mesh


@pytest.fixture
def rng():
  return np.random.default_rng(0)


@pytest.fixture
def bank(mesh, rng):
  return jnp.asarray(unit(rng.standard_normal((N, D))))


@pytest.fixture
def features(mesh, rng):
  return jnp.asarray(unit(rng.standard_normal((B, D))))


def test_a_bank_is_padded_the_same_on_any_number_of_devices(mesh, bank):
  created = jax.jit(memory.create)(bank)
  assert created.shape == (384, D)
  assert created.addressable_shards[0].data.shape == (384 // mesh.size, D)
  np.testing.assert_array_equal(created[:N], bank)
  assert not created[N:].any()


def test_centroids_are_the_same_on_any_number_of_devices(rng):
  features = unit(rng.standard_normal((N + 3, D))).astype(np.float32)
  labels = rng.integers(-1, 30, len(features))
  found = []
  for num in 1, 2, 8:
    with jax.set_mesh(sharding.make_mesh(num)):
      make = jax.jit(memory.centroids, static_argnums=2)
      found.append(np.asarray(make(features, labels, 100)))
  means = [features[labels == i].sum(axis=0) for i in range(30)]
  np.testing.assert_allclose(found[0][:30], unit(means), atol=1e-6)
  assert found[0].shape == (128, D) and not found[0][30:].any()
  for other in found[1:]:
    np.testing.assert_array_equal(other, found[0])


def test_selected_similarities_and_their_gradient(mesh, bank, features, rng):
  rows = jnp.asarray(rng.integers(0, N, (B, 9)))
  weights = rng.standard_normal((B, 9))

  @jax.jit
  def value(features):
    similarities = memory.similarities(memory.create(bank), features)
    return jnp.vdot(weights, memory.select(similarities, rows))

  picked = np.einsum("bd,bmd->bm", features, bank[rows])
  expected = np.einsum("bm,bmd->bd", weights, bank[rows])
  np.testing.assert_allclose(value(features), (weights * picked).sum(), 1e-12)
  grad = jax.grad(value)(features)
  np.testing.assert_allclose(grad, expected, 0, 1e-12)


def test_nearest_is_a_stable_argsort(mesh, rng):
  # Small integers: many ties, within a shard and across.
  distances = rng.integers(0, 20, (B, 384)) * 1.0
  values, rows = jax.jit(lambda x: memory.nearest(x, 60))(distances)
  expected = np.argsort(distances, axis=1, kind="stable")[:, :60]
  np.testing.assert_array_equal(rows, expected)
  np.testing.assert_array_equal(
    values, np.take_along_axis(distances, expected, axis=1)
  )


def test_squared_distances(mesh, bank, features):
  bank = bank * 1.5  # not only for unit rows
  got = memory.squared_distances(memory.create(bank), features)
  expected = np.square(features[:, None] - bank[None]).sum(-1)
  np.testing.assert_allclose(got[:, :N], expected, 0, 1e-12)


@pytest.mark.parametrize("stripes", [(), (3,)])
def test_writes_happen_one_after_the_other(mesh, rng, stripes):
  bank = unit(rng.standard_normal((N, *stripes, D)))
  features = unit(rng.standard_normal((B, *stripes, D)))
  rows = rng.integers(0, 6, B) * 50  # all rows repeat
  rows[[3, 11]] = -1
  write = jax.jit(lambda b, r, f: memory.write(memory.create(b), r, f, 0.2))
  expected = bank.copy()
  for row, feature in zip(rows, features, strict=True):
    if row >= 0:
      expected[row] = unit(0.2 * expected[row] + 0.8 * feature)
  got = write(bank, rows, features)
  np.testing.assert_allclose(got[:N], expected, 0, 1e-12)
  assert not got[N:].any()


def test_a_zero_row_becomes_the_feature(mesh, features):
  bank = memory.create(jnp.zeros((N, D)))
  got = memory.write(bank, jnp.arange(B), features, 0.5)
  np.testing.assert_allclose(got[:B], features, 1e-12)
  assert not got[B:].any()


def test_class_sums_and_centroids(mesh, bank, features):
  classes = np.arange(384) % 7 - 1
  is_member = 1.0 * (classes[:N, None] == np.arange(384))
  totals = is_member.T @ np.asarray(bank)

  @jax.jit
  def run(bank, features, classes):
    similarities = memory.similarities(memory.create(bank), features)
    sums = memory.class_sums(similarities, classes)
    return sums, memory.centroids(bank, classes[:N], 6)

  got = run(bank, features, classes)
  np.testing.assert_allclose(got[0], features @ totals.T, 0, 1e-12)
  np.testing.assert_allclose(got[1][:6], unit(totals[:6]), 0, 1e-12)
  assert not got[1][6:].any()


def test_negatives_are_added_to_the_cross_entropy(mesh, rng):
  """The first row has no negatives, the second a single one."""
  logits = 5 * rng.standard_normal((B, N))
  negatives = 5 * rng.standard_normal((B, 7)) + 10
  negatives[0], negatives[1, 1:] = -np.inf, -np.inf

  def slow(logits):
    exponentials = np.exp(np.hstack([logits[:, :200], negatives]))
    own = np.exp(logits[range(B), range(B)])
    return -np.log(own / exponentials.sum(axis=1)).mean()

  @jax.jit
  def loss(logits, negatives):
    added = losses.added_by_negatives(logits, jnp.array(200), negatives)
    return losses.cross_entropy(logits, jnp.arange(B), jnp.array(200)) + added

  slope, added_slope = jax.grad(loss, (0, 1))(logits, negatives)
  np.testing.assert_allclose(loss(logits, negatives), slow(logits), 1e-12)
  assert np.isfinite(added_slope).all() and not added_slope[0].any()
  assert (added_slope[1:, 0] > 0).all()
  for place in [(0, 3), (1, 1), (2, 250)]:
    moved = [logits.copy(), logits.copy()]
    moved[0][place] += 1e-6
    moved[1][place] -= 1e-6
    expected = (slow(moved[0]) - slow(moved[1])) / 2e-6
    np.testing.assert_allclose(slope[place], expected, 1e-5, 1e-9)
