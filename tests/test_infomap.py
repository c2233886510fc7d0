import sys

import numpy as np
import pytest

from unreid_jax import UserError
from unreid_jax.pseudo_labels import infomap


def test_golden(golden):
  pytest.importorskip("infomap")
  want = golden("infomap")
  labels = infomap(want["features"], k=15, min_similarity=0.5, min_size=5)
  assert labels.dtype == np.int32
  pairs = np.unique(np.stack([labels, want["labels"]]), axis=1)
  # One label of ours for each of theirs, and the outliers are the same.
  assert pairs.shape[1] == len(np.unique(want["labels"])) == 23
  assert [-1, -1] in pairs.T.tolist()
  first = [np.argmax(labels == label) for label in range(22)]
  assert first == sorted(first)


def test_small_clusters_and_lone_images_are_outliers():
  pytest.importorskip("infomap")
  axes = np.eye(8, dtype=np.float32)
  features = axes[[5, 0, 0, 0, 1, 1, 0, 6, 2, 2, 2]]
  few = infomap(features, k=4, min_size=4).tolist()
  assert few == [-1, 0, 0, 0, -1, -1, 0, -1, -1, -1, -1]
  more = infomap(features, k=4, min_size=2).tolist()
  assert more == [-1, 0, 0, 0, 1, 1, 0, -1, 2, 2, 2]
  assert infomap(axes).tolist() == [-1] * 8


def test_the_threshold_is_a_cosine():
  pytest.importorskip("infomap")
  angles = np.deg2rad([0, 30, 180, 270])
  features = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
  together = lambda limit: infomap(features, 3, limit, min_size=2).tolist()
  assert together(0.85) == [0, 0, -1, -1]  # cos 30 = 0.866
  assert together(0.88) == [-1] * 4


def test_without_the_package(monkeypatch):
  monkeypatch.setitem(sys.modules, "infomap", None)
  with pytest.raises(UserError, match=r"requirements-infomap\.txt"):
    infomap(np.eye(3, dtype=np.float32))
