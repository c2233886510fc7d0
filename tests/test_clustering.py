"""From features to an epoch's labels, also where there is nothing to find."""

import itertools
import re

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from unreid_jax.pseudo_labels import jaccard
from unreid_jax.pseudo_labels.clustering import (
  Clustering,
  center_by_camera,
  cluster,
  describe,
  keep_largest,
)

HP = Clustering(k1=8, k2=3)


def make_features(num_groups, size, noise, seed=0):
  rng = np.random.default_rng(seed)
  centers = np.repeat(rng.standard_normal((num_groups, 16)), size, axis=0)
  features = centers + noise * rng.standard_normal(centers.shape)
  features /= np.linalg.norm(features, axis=1, keepdims=True)
  return features.astype(np.float32), np.arange(len(features)) % 2


def test_finds_the_groups():
  labelling = cluster(HP, *make_features(6, 10, 0.1), epoch=0)
  np.testing.assert_array_equal(labelling.labels, np.arange(60) // 10)
  assert labelling.scalars == {"eps": 0.6} and labelling.notes == ()
  assert set(labelling.seconds) == {"neighbors", "jaccard", "dbscan"}


def test_no_cluster_loosens_eps():
  """At eps .05 these images are all outliers."""
  features, camids = make_features(6, 10, 0.8)
  hp = Clustering(k1=8, k2=1, eps=0.05)
  labelling = cluster(hp, features, camids, epoch=0)
  assert labelling.labels.max() >= 1
  eps = labelling.scalars["eps"]
  assert 0.05 < eps <= 0.9
  note = f"eps 0.05 makes 0 cluster(s); this epoch has eps {eps}"
  assert labelling.notes == (note,)


def test_one_giant_cluster_tightens_eps():
  """One noisy group: at eps .95 everybody is everybody's neighbour."""
  features, camids = make_features(1, 60, 1.0)
  hp = Clustering(k1=12, k2=6, eps=0.95)
  labelling = cluster(hp, features, camids, epoch=0)
  assert labelling.labels.max() >= 1 and labelling.scalars["eps"] < 0.95
  assert labelling.notes[0].startswith("eps 0.95 makes 1 cluster(s); this")


@pytest.mark.parametrize("most", [2**29, 100])
def test_constant_features(monkeypatch, most):
  """One cluster at any eps, also where the pairs do not fit in memory."""
  monkeypatch.setattr(jaccard, "_MAX_ENTRIES", most)
  features = np.ones((40, 16), np.float32) / 4
  labelling = cluster(HP, features, np.zeros(40, int), epoch=0)
  assert labelling.labels.max() < 1
  note = "eps 0.6 makes 1 cluster(s); no other eps makes two"
  assert labelling.notes == (note,)


def test_eps_is_taken_as_it_is():
  features, camids = make_features(6, 10, 0.1)
  labelling = cluster(Clustering(k1=8, k2=3, eps=2 / 3), features, camids, 0)
  assert labelling.scalars == {"eps": 2 / 3} and labelling.notes == ()


def test_more_clusters_than_half_the_images():
  rng = np.random.default_rng(0)
  features = rng.standard_normal((60, 16)).astype(np.float32)
  hp = Clustering(k1=8, k2=1, eps=0.1, min_samples=1)
  labelling = cluster(hp, features, np.zeros(60, int), epoch=0)
  assert labelling.labels.max() == 29
  assert re.fullmatch(
    r"the 30 largest of \d+ clusters are k.*", *labelling.notes
  )


def test_fewer_images_than_neighbours():
  features, camids = make_features(2, 6, 0.05)
  labels = cluster(Clustering(), features, camids, epoch=0).labels
  assert labels.shape == (12,)


def test_instance_epochs():
  features, camids = make_features(2, 6, 0.05)
  hp = Clustering(instance_epochs=2)
  for epoch in (0, 1):
    labels = cluster(hp, features, camids, epoch).labels
    np.testing.assert_array_equal(labels, np.arange(12))
  assert len(set(cluster(hp, features, camids, 2).labels)) < 12


def test_center_by_camera():
  """Two cameras that shift the features: only centring finds the groups."""
  features, camids = make_features(6, 10, 0.1)
  shift = np.random.default_rng(1).standard_normal((2, 16))
  shifted = features + 3 * shift[camids].astype(np.float32)
  shifted /= np.linalg.norm(shifted, axis=1, keepdims=True)
  true = np.arange(60) // 10
  plain = cluster(HP, shifted, camids, epoch=0).labels
  hp = Clustering(k1=8, k2=3, center_cameras=True)
  centered = cluster(hp, shifted, camids, epoch=0).labels
  assert adjusted_rand_score(true, plain) < 0.7
  assert adjusted_rand_score(true, centered) > 0.9
  unit = np.linalg.norm(center_by_camera(shifted, camids), axis=1)
  np.testing.assert_allclose(unit, 1, 1e-6)


def test_keep_largest():
  labels = np.array([0, 1, 1, 2, 3, 3, 3, -1, 4, 4])
  kept = keep_largest(labels, 3)
  np.testing.assert_array_equal(kept, [-1, 0, 0, -1, 1, 1, 1, -1, 2, 2])
  assert keep_largest(labels, 5) is labels


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
