import sys

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from unreid_jax import UserError, sharding
from unreid_jax.pseudo_labels import host_search, neighbors
from unreid_jax.pseudo_labels.neighbors import search, search_on_devices


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


def on_devices(num_devices):
  mesh = sharding.make_mesh(num_devices)
  return lambda features, k: search_on_devices(features, k, mesh)


on_cpu = pytest.mark.parametrize(
  "find",
  [search, on_devices(1), on_devices(3), on_devices(8)],
  ids=["host", "1 device", "3 devices", "8 devices"],
)


@on_cpu
@pytest.mark.parametrize(("n", "k"), [(300, 30), (129, 1), (7, 7)])
def test_equals_twin(find, n, k):
  features = integers(n, 4)
  found = find(features, k)
  for got, want in zip(found, twin(features, k), strict=True):
    np.testing.assert_array_equal(got, want)
  assert found[0].dtype == np.float32 and found[1].dtype == np.int32


def test_more_neighbours_than_rows():
  features = integers(5, 4)
  for got, want in zip(search(features, 30), twin(features, 5), strict=True):
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("n", [700, 641])
def test_tiles_and_blocks(monkeypatch, n):
  monkeypatch.setattr(host_search, "_TILE", 128)
  module = sys.modules[search.__module__]
  monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 50_000)
  features = integers(n, 5)
  for find in (search, on_devices(8)):
    for got, want in zip(find(features, 9), twin(features, 9), strict=True):
      np.testing.assert_array_equal(got, want)


def test_processes_share_the_tiles_and_merge_what_they_found(monkeypatch):
  monkeypatch.setattr(host_search, "_TILE", 64)
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  features, parts = integers(300, 4), []

  def gather(part):
    parts.append(part)
    return jax.tree.map(lambda *x: np.stack(x), *parts)

  monkeypatch.setattr(multihost_utils, "process_allgather", gather)
  for process in range(3):  # the last one has what all have found
    monkeypatch.setattr(jax, "process_index", lambda process=process: process)
    found = host_search.search(features, 20)
  for got, want in zip(found, twin(features, 20), strict=True):
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
