import sys

import jax
import numpy as np
import pytest

from unreid_jax import UserError, sharding
from unreid_jax.pseudo_labels import neighbors
from unreid_jax.pseudo_labels.neighbors import search


def integers(n, d, seed=0):
  """Small integers: exact in float32, with many equal distances."""
  rng = np.random.default_rng(seed)
  return rng.integers(-2, 3, (n, d)).astype(np.float32)


def twin(features, k):
  """All distances; each row first, then a stable sort."""
  squared = np.square(features[:, None] - features).sum(-1)
  order = squared.copy()
  np.fill_diagonal(order, -1)
  indices = np.argsort(order, axis=1, kind="stable")[:, :k]
  return np.take_along_axis(squared, indices, axis=1), indices, squared.max(1)


@pytest.mark.parametrize(("n", "k"), [(300, 30), (129, 1), (7, 7), (5, 30)])
def test_equals_twin(n, k):
  features = integers(n, 4)
  for got, want in zip(search(features, k), twin(features, k), strict=True):
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("num_devices", [1, 3, 8])
def test_the_mesh_in_use_does_not_matter(num_devices):
  features = integers(500, 3)
  want = neighbors(features, 20)
  with jax.set_mesh(sharding.make_mesh(num_devices)):
    got = neighbors(features, 20)
  np.testing.assert_array_equal(got[0], want[0])
  np.testing.assert_array_equal(got[1], want[1])
  assert got[0].dtype == np.float32 and got[1].dtype == np.int32


def test_blocks(monkeypatch):
  module = sys.modules[search.__module__]
  monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 50_000)
  features = integers(700, 5)
  for got, want in zip(search(features, 9), twin(features, 9), strict=True):
    np.testing.assert_array_equal(got, want)


def test_a_row_comes_before_its_duplicates():
  rng = np.random.default_rng(0)
  features = np.repeat(rng.normal(size=(20, 64)), 5, axis=0).astype(np.float32)
  distances, indices = neighbors(features, 5)
  np.testing.assert_array_equal(indices[:, 0], np.arange(100))
  group = np.arange(100) // 5 * 5
  np.testing.assert_array_equal(np.sort(indices), group[:, None] + np.arange(5))
  assert (distances >= 0).all() and distances.max() < 1e-4
  assert not distances[:, 0].any()


def test_golden(golden):
  want = golden("jaccard_A_k30")
  distances, indices = neighbors(want["features"], 30)
  np.testing.assert_array_equal(indices, want["rank"])
  gap = want["features"][:, None] - want["features"][indices]
  np.testing.assert_allclose(distances, np.square(gap).sum(-1), 0, 2e-6)


def test_no_neighbours():
  with pytest.raises(
    UserError, match=r"^k is 0: set it to a whole number of 1"
  ):
    neighbors(integers(9, 3), 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_features_that_are_not_finite(value):
  features = np.ones((5, 3), np.float32)
  features[2, 1] = value
  with pytest.raises(UserError, match="contain NaN or infinity: check the im"):
    neighbors(features, 2)


@pytest.mark.parametrize("shape", [(0, 3), (4,), (2, 3, 4)])
def test_features_of_another_shape(shape):
  with pytest.raises(UserError, match=r"features ha(s|ve) the shape .*: pass "):
    neighbors(np.ones(shape, np.float32), 2)
