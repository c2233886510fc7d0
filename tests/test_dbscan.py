import warnings

import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.cluster import DBSCAN

from unreid_jax.pseudo_labels import dbscan


def random_distances(seed, n=150, levels=0):
  rng = np.random.default_rng(seed)
  points = rng.random((n, 2)).astype(np.float32)
  dense = np.linalg.norm(points[:, None] - points, axis=2)
  if levels:  # many pairs at exactly eps
    dense = np.ceil(dense * levels).astype(np.float32) / np.float32(levels)
  return dense


def to_sparse(dense, limit):
  """With the diagonal's zeros, which scipy would drop."""
  rows, columns = np.nonzero(dense <= limit)
  indptr = np.searchsorted(rows, np.arange(len(dense) + 1))
  return csr_array((dense[rows, columns], columns, indptr), dense.shape)


@pytest.mark.parametrize("eps", [0.05, 0.1, 0.4])
@pytest.mark.parametrize("min_samples", [1, 4, 9])
@pytest.mark.parametrize("levels", [0, 20])
def test_equals_the_dense_one(eps, min_samples, levels):
  for seed in range(4):
    dense = random_distances(seed, levels=levels)
    model = DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed")
    want = model.fit_predict(dense)
    for limit in (np.float32(eps), 0.5, 2):
      sparse = to_sparse(dense, limit)
      before = sparse.copy()
      with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels = dbscan(sparse, eps, min_samples)
      assert labels.dtype == np.int32
      np.testing.assert_array_equal(labels, want)
      np.testing.assert_array_equal(sparse.data, before.data)
      np.testing.assert_array_equal(sparse.indices, before.indices)


def test_only_outliers():
  assert (dbscan(to_sparse(random_distances(0), 0.0), 0.001) == -1).all()


def test_dense_and_other_formats():
  """What the references' own function returns, and scipy's other formats."""
  dense = random_distances(0)
  model = DBSCAN(eps=0.1, min_samples=4, metric="precomputed")
  want = model.fit_predict(dense)
  assert want.max() > 0
  np.testing.assert_array_equal(dbscan(dense, 0.1), want)
  other = to_sparse(dense, 0.5).tocoo()
  np.testing.assert_array_equal(dbscan(other, 0.1), want)
