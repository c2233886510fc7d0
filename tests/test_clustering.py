"""From features to an epoch's labels, also where there is nothing to find."""

import dataclasses
import itertools
import sys

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from unreid_jax import UserError
from unreid_jax.pseudo_labels import jaccard
from unreid_jax.pseudo_labels.clustering import (
  Clustering,
  center_by_camera,
  cluster,
  describe,
  keep_largest,
)
from unreid_jax.pseudo_labels.self_paced import check_gap

HP = Clustering(k1=8, k2=3)


def make_features(num_groups, size, noise, seed=0):
  rng = np.random.default_rng(seed)
  centers = np.repeat(rng.standard_normal((num_groups, 16)), size, axis=0)
  features = centers + noise * rng.standard_normal(centers.shape)
  features /= np.linalg.norm(features, axis=1, keepdims=True)
  return features.astype(np.float32), np.arange(len(features)) % 2


def test_finds_the_groups():
  found = cluster(HP, *make_features(6, 10, 0.1))
  np.testing.assert_array_equal(found.labels, [np.arange(60) // 10])
  assert found.eps == 0.6 and found.notes == ()
  assert set(found.seconds) == {"neighbors", "jaccard", "dbscan"}


@pytest.mark.parametrize("name", ["dbscan", "infomap"])
def test_each_gap_is_its_eps_alone(name):
  if name == "infomap":
    pytest.importorskip("infomap")
  features, camids = make_features(12, 6, 1.0)
  hp = Clustering(clustering=name, k1=8, k2=2, min_samples=2, eps=0.5)
  several = cluster(hp, features, camids, gaps=(0.0, -0.2, 0.2)).labels
  looser = 1 if name == "dbscan" else -1
  for gap, labels in zip((0.0, -0.2, 0.2), several, strict=True):
    alone = dataclasses.replace(hp, eps=hp.eps + looser * gap)
    alone = cluster(alone, features, camids).labels
    np.testing.assert_array_equal(labels, alone[0])
  outliers = [np.sum(labels < 0) for labels in several]
  assert outliers[1] > outliers[0] > outliers[2]


def test_no_cluster_loosens_eps():
  """At eps .05 these images are all outliers."""
  features, camids = make_features(6, 10, 0.8)
  hp = Clustering(k1=8, k2=1, eps=0.05)
  found = cluster(hp, features, camids)
  assert found.labels[0].max() >= 1 and 0.05 < found.eps <= 0.9
  note = f"eps 0.05 makes 0 cluster(s); this epoch has eps {found.eps}"
  assert found.notes == (note,)
  found = cluster(hp, features, camids, outliers_are_classes=True)
  assert found.labels[0].max() == -1 and found.eps == 0.05 and not found.notes


@pytest.mark.parametrize("outliers_are_classes", [False, True])
def test_one_giant_cluster_tightens_eps(outliers_are_classes):
  """One noisy group: at eps .95 everybody is everybody's neighbour."""
  features, camids = make_features(1, 60, 1.0)
  hp = Clustering(k1=12, k2=6, eps=0.95)
  gaps = 0.0, -0.02, 0.02
  found = cluster(hp, features, camids, gaps, outliers_are_classes)
  labels, tight, loose = found.labels
  assert np.sum(tight < 0) >= np.sum(labels < 0) >= np.sum(loose < 0)
  assert labels.max() >= 1 and found.eps < 0.95
  assert found.notes[0].startswith("eps 0.95 makes 1 cluster(s); this")


@pytest.mark.parametrize("most", [2**29, 100])
@pytest.mark.parametrize("gaps", [(0.0,), (0.0, -0.02, 0.02)])
@pytest.mark.parametrize("name", ["dbscan", "infomap"])
@pytest.mark.parametrize("outliers_are_classes", [False, True])
def test_constant_features(monkeypatch, most, gaps, name, outliers_are_classes):
  """One cluster at any eps, also where the pairs do not fit in memory."""
  if name == "infomap":
    pytest.importorskip("infomap")
  monkeypatch.setattr(jaccard, "_MAX_ENTRIES", most)
  features, camids = np.ones((40, 16), np.float32) / 4, np.zeros(40, int)
  hp = Clustering(clustering=name, k1=8, k2=3)
  found = cluster(hp, features, camids, gaps, outliers_are_classes)
  assert [labels.max() < 1 for labels in found.labels] == [True] * len(gaps)
  end = "no other eps makes two"
  if outliers_are_classes and name == "dbscan":  # most are outliers at last
    end = f"this epoch has eps {found.eps}"
    assert np.mean(found.labels[0] < 0) > 0.5 and found.eps < 0.6
  assert found.notes == (f"eps 0.6 makes 1 cluster(s); {end}",)


def test_bad_values(monkeypatch):
  with pytest.raises(UserError, match="k1 is 1: set it to a whole number of 2"):
    Clustering(k1=1)
  monkeypatch.setitem(sys.modules, "infomap", None)
  with pytest.raises(UserError, match=r"requirements-infomap\.txt"):
    Clustering(clustering="infomap")
  check_gap("method.eps_gap", 0.5, 0.4)
  for gap in (-0.1, 0.5):
    with pytest.raises(UserError, match=f"^method.eps_gap is {gap}: set it"):
      check_gap("method.eps_gap", 0.5, gap)


def test_eps_is_taken_as_it_is():
  found = cluster(Clustering(k1=8, k2=3, eps=2 / 3), *make_features(6, 10, 0.1))
  assert found.eps == 2 / 3 and found.notes == ()


def test_fewer_images_than_neighbours():
  assert cluster(Clustering(), *make_features(2, 6, 0.05)).labels[0].size == 12


def test_center_by_camera():
  """Two cameras that shift the features: only centring finds the groups."""
  features, camids = make_features(6, 10, 0.1)
  shift = np.random.default_rng(1).standard_normal((2, 16))
  shifted = features + 3 * shift[camids].astype(np.float32)
  shifted /= np.linalg.norm(shifted, axis=1, keepdims=True)
  true = np.arange(60) // 10
  plain = cluster(HP, shifted, camids).labels[0]
  hp = Clustering(k1=8, k2=3, center_cameras=True)
  centered = cluster(hp, shifted, camids).labels[0]
  assert adjusted_rand_score(true, plain) < 0.7
  assert adjusted_rand_score(true, centered) > 0.9
  unit = np.linalg.norm(center_by_camera(shifted, camids), axis=1)
  np.testing.assert_allclose(unit, 1, 1e-6)


def test_keep_largest():
  labels = np.array([0, 1, 1, 2, 3, 3, 3, -1, 4, 4])
  kept, notes = keep_largest(labels, 3)
  np.testing.assert_array_equal(kept, [-1, 0, 0, -1, 1, 1, 1, -1, 2, 2])
  assert notes == ("the 3 largest of 5 clusters are kept",)
  assert keep_largest(labels, 5) == (labels, ())


@pytest.mark.parametrize("outliers", [False, True])
def test_describe(outliers):
  """Against a loop over all pairs."""
  rng = np.random.default_rng(0)
  pids = rng.integers(0, 6, 50).astype(np.int32)
  labels = rng.integers(-1 if outliers else 0, 5, 50).astype(np.int32)
  found = describe(labels, pids)
  both = together = true = 0
  for i, j in itertools.combinations(range(50), 2):
    is_together = labels[i] == labels[j] >= 0
    both += is_together and pids[i] == pids[j]
    together += is_together
    true += pids[i] == pids[j]
  np.testing.assert_allclose(found["precision"], both / together)
  np.testing.assert_allclose(found["recall"], both / true)
  assert found["clusters"] == 5 and found["outliers"] == np.sum(labels < 0)
  sizes = np.bincount(labels[labels >= 0])
  assert found["size_median"] == np.median(sizes)
  assert found["size_max"] == sizes.max()
  perfect = describe(pids, pids)
  for name in ("NMI", "ARI", "precision", "recall"):
    np.testing.assert_allclose(perfect[name], 1)


def test_describe_nothing():
  nothing = np.full(6, -1)
  found = describe(nothing, np.arange(6) // 2)
  assert found["clusters"] == 0 and found["precision"] == 0
  assert np.isfinite(list(found.values())).all()
