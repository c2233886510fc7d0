import jax
import numpy as np
import pytest

from unreid_jax import UserError, sharding
from unreid_jax.pseudo_labels import (
  dbscan,
  jaccard_distance,
  jaccard_from_neighbors,
  neighbors,
)


def unit(x):
  x = np.asarray(x, np.float32)
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def people(n=200, d=16, num_ids=15, noise=0.25, seed=0):
  rng = np.random.default_rng(seed)
  centres = unit(rng.normal(size=(num_ids, d)))
  noise = noise * rng.normal(size=(n, d))
  return unit(centres[rng.integers(0, num_ids, n)] + noise)


def to_dense(sparse):
  """What is not stored is 1."""
  rows = np.repeat(np.arange(sparse.shape[0]), np.diff(sparse.indptr))
  dense = np.ones(sparse.shape, np.float32)
  dense[rows, sparse.indices] = sparse.data
  return dense


def reciprocal(rank, i, num):
  return {j for j in rank[i, :num] if i in rank[j, :num]}


def twin(features, rank, k2=6, half=None, near_distances=None):
  """With Python sets and dense matrices, in double precision."""
  n, k1 = rank.shape
  squared = np.square(features[:, None] - features).sum(-1)
  if near_distances is not None:
    np.put_along_axis(squared, rank, near_distances, axis=1)
  half = half or round(k1 / 2) + 1
  near = [reciprocal(rank, i, k1) for i in range(n)]
  nearer = [reciprocal(rank, i, half) for i in range(n)]
  encoding = np.zeros((n, n))
  for i in range(n):
    grown = set(near[i])
    for j in near[i]:
      if len(nearer[j] & near[i]) > (2 / 3 + 1e-9) * len(nearer[j]):
        grown |= nearer[j]
    grown = sorted(grown)
    weights = np.exp(-squared[i, grown])
    encoding[i, grown] = weights / weights.sum()
  encoding = np.stack([encoding[rank[i, :k2]].mean(0) for i in range(n)])
  overlap = np.stack([np.minimum(v, encoding).sum(1) for v in encoding])
  distances = np.maximum(1 - overlap / (2 - overlap), 0)
  np.fill_diagonal(distances, 0)
  return distances


@pytest.mark.parametrize(
  "name", ["A_k20", "A_k30", "B_k20", "B_k30", "C_dup_k30"]
)
def test_golden(golden, name):
  want = golden(f"jaccard_{name}")
  features = golden(f"jaccard_{name.replace('k20', 'k30')}")["features"]
  k1 = int(name[-2:])
  sparse = jaccard_distance(features, k1)
  np.testing.assert_array_equal(np.diff(sparse.indptr), want["J_nnz_lt1"])
  expected = np.ones((len(want["J_rows"]), len(features)), np.float32)
  rows = np.repeat(np.arange(len(expected)), np.diff(want["J_ptr"]))
  expected[rows, want["J_col"]] = want["J_val"]
  expected[np.arange(len(expected)), want["J_rows"]] = 0
  dense = to_dense(sparse)
  np.testing.assert_allclose(dense[want["J_rows"]], expected, 0, 1e-6)
  sums = dense.sum(axis=1, dtype=np.float64)
  np.testing.assert_allclose(sums, want["J_rowsum_f64"], 0, 1e-4)
  for eps in (0.4, 0.5, 0.6):
    if (name, eps) == ("B_k20", 0.5):
      continue  # some distances are 0.5 but for rounding
    labels = dbscan(jaccard_distance(features, k1, max_distance=eps), eps)
    np.testing.assert_array_equal(labels, want[f"labels_eps0{eps * 10:.0f}"])
    np.testing.assert_array_equal(labels, dbscan(sparse, eps))


@pytest.mark.parametrize(
  ("k1", "k2"),
  [(30, 6), (29, 6), (15, 1), (14, 4), (5, 9), (3, 2), (2, 1), (1, 1), (99, 6)],
)
def test_equals_twin(k1, k2):
  features = people(n=90, seed=k1)
  rank = neighbors(features, k1)[1]
  sparse = jaccard_distance(features, k1, k2)
  want = twin(features, rank, k2)
  np.testing.assert_allclose(to_dense(sparse), want, 0, 1e-6)
  assert sparse.nnz == np.sum(want < 1)


def test_the_rounding_of_half_is_to_even():
  """k1 = 25 has 13 in half a list, k1 = 27 has 15."""
  features = people(noise=0.4)
  for k1, half in ((25, 13), (27, 15)):
    found = neighbors(features, k1)
    got = to_dense(jaccard_from_neighbors(features, *found))
    np.testing.assert_allclose(got, twin(features, found[1], 6, half), 0, 1e-6)
    for other in (half - 1, half + 1):
      assert np.abs(got - twin(features, found[1], 6, other)).max() > 1e-3


def test_two_thirds_are_not_enough():
  """Often just 2/3 of a small set is shared: k1 = 4, sets of three."""
  features = people(n=300, d=3, num_ids=40)
  rank = neighbors(features, 4)[1]
  shared = [
    len(reciprocal(rank, j, 3) & reciprocal(rank, i, 4)) == 2
    for i in range(300)
    for j in reciprocal(rank, i, 4)
    if len(reciprocal(rank, j, 3)) == 3
  ]
  assert sum(shared) > 20
  got = to_dense(jaccard_distance(features, 4, 1))
  np.testing.assert_allclose(got, twin(features, rank, 1), 0, 1e-6)


def test_format():
  sparse = jaccard_distance(people())
  rows = np.repeat(np.arange(200), np.diff(sparse.indptr))
  assert sparse.has_sorted_indices and sparse.data.dtype == np.float32
  assert sparse.indices.dtype == sparse.indptr.dtype == np.int32
  assert (np.diff(sparse.indices)[np.diff(rows) == 0] > 0).all()
  assert sparse.data.min() == 0 and sparse.data.max() < 1
  dense = to_dense(sparse)
  np.testing.assert_array_equal(dense, dense.T)
  assert not sparse.data[rows == sparse.indices].any()
  assert np.sum(rows == sparse.indices) == 200


def test_max_distance_keeps_exactly_what_is_not_farther():
  features = people()
  whole = to_dense(jaccard_distance(features))
  at = float(np.sort(whole[whole > 0.3])[0])  # an entry, and one just below
  for limit in (0.0, 0.3, at, float(np.nextafter(np.float32(at), 0)), 0.99):
    part = jaccard_distance(features, max_distance=limit)
    expected = np.where(whole <= np.float32(limit), whole, 1)
    np.testing.assert_array_equal(to_dense(part), expected)
    assert part.nnz == np.sum(whole <= np.float32(limit))
  assert whole[whole <= np.float32(at)].max() == np.float32(at)


def test_devices_and_foreign_types():
  features = np.round(64 * people()) / 64  # with exact products and sums
  want = to_dense(jaccard_distance(features))
  with jax.set_mesh(sharding.make_mesh(1)):
    got = to_dense(jaccard_distance(features.astype(np.float64)))
  np.testing.assert_array_equal(got, want)
  distances, indices = neighbors(features, 30)
  got = jaccard_from_neighbors(
    np.asfortranarray(features), distances, indices.astype(np.int64)
  )
  np.testing.assert_array_equal(to_dense(got), want)


def test_fewer_images_than_k1():
  sparse = jaccard_distance(people(n=3), 30)
  np.testing.assert_allclose(to_dense(sparse), np.zeros((3, 3)), 0, 1e-6)
  assert jaccard_distance(people(n=1)).nnz == 1


def test_identical_images(monkeypatch):
  features = np.repeat(people(n=1), 2000, axis=0)
  sparse = jaccard_distance(features, max_distance=0.6)
  # All share five of the six lists that are averaged, those of rows 0 to 4.
  assert sparse.nnz == 2000**2
  assert sparse.data.max() < 0.3
  assert not dbscan(sparse).any()
  limit = "unreid_jax.pseudo_labels.jaccard._MAX_ENTRIES"
  monkeypatch.setattr(limit, 2000**2 - 1)
  with pytest.raises(UserError, match="4000000 pairs of 2000 images"):
    jaccard_distance(features, max_distance=0.6)


@pytest.mark.parametrize("max_distance", [-0.1, 1.0, float("nan")])
def test_bad_max_distance(max_distance):
  with pytest.raises(UserError, match="max_distance"):
    jaccard_distance(people(), max_distance=max_distance)


def test_bad_k2():
  with pytest.raises(UserError, match="k2 is 0"):
    jaccard_distance(people(), k2=0)
