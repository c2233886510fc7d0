"""Blocks and batches leave no trace in the result."""

import jax
import numpy as np
import pytest

from unreid_jax import evaluate, memory, methods, ranking, sharding
from unreid_jax.data import Split


def make_split(rng, num):
  images = rng.integers(0, 256, (num, 4, 2, 3), np.uint8)
  pids, camids = rng.integers(0, 9, (2, num)).astype(np.int32)
  return Split(images, pids, camids, tuple(map(str, range(num))))


def fused(query, gallery, query_camids, gallery_camids):
  return memory.squared_distances(gallery, query)  # over the mesh


@pytest.mark.parametrize("num_devices", [1, 8])
def test_a_gallery_that_the_devices_do_not_divide(num_devices):
  rng = np.random.default_rng(0)
  query, gallery = make_split(rng, 9), make_split(rng, 41)
  features = [rng.standard_normal((n, 8), np.float32) for n in (9, 41)]
  with jax.set_mesh(sharding.make_mesh(num_devices)):
    got = evaluate.score(*features, query, gallery, jax.jit(fused))
  distances = np.square(features[0][:, None] - features[1]).sum(-1)
  want = ranking.evaluate_rank(
    distances, query.pids, gallery.pids, query.camids, gallery.camids
  )
  assert got["mAP"] == pytest.approx(want.mAP, abs=1e-6)


def test_a_threshold_from_labels(monkeypatch):
  """That of all pairs of labelled images, under two cameras if there are."""
  monkeypatch.setattr(evaluate, "_LABELLED", 40)
  rng = np.random.default_rng(0)
  labels = rng.integers(-1, 6, 90)
  rows = np.eye(6, 8, dtype=np.float32)[labels] + 0.3 * rng.standard_normal(
    (90, 8), np.float32
  )
  rows /= np.linalg.norm(rows, axis=1, keepdims=True)
  camids = rng.integers(1, 3, 90)
  known = np.flatnonzero(labels >= 0)[::2]
  distances = np.square(rows[known][:, None] - rows[known]).sum(axis=2)
  for cameras in (camids, np.ones(90, int)):
    apart = cameras[known][:, None] != cameras[known]
    apart |= ~apart.any() & ~np.eye(len(known), dtype=bool)
    same = labels[known][:, None] == labels[known]
    card = evaluate.by_labels(rows, labels, cameras).card["same_person"]
    assert card["source"] == "pseudo labels"
    wrong = (
      np.mean(distances[~same] <= card["threshold"]),
      np.mean(distances[same & apart] > card["threshold"]),
    )
    assert abs(wrong[0] - wrong[1]) < 0.02 and max(wrong) < 0.2
    assert card["same"][-1] == pytest.approx(
      distances[same & apart].max(), abs=1e-3
    )
  for useless in (np.full(90, -1), np.arange(90)):
    assert evaluate.by_labels(rows, useless, camids).card == {}


@pytest.mark.parametrize("num", [21, 3])  # more and fewer than a block
def test_score_equals_the_whole_matrix(monkeypatch, num):
  monkeypatch.setattr(evaluate, "_QUERIES", 7)
  monkeypatch.setattr(evaluate, "_GALLERY", 11)
  rng = np.random.default_rng(0)
  query, gallery = make_split(rng, num), make_split(rng, 40)
  features = [rng.standard_normal((n, 8), np.float32) for n in (num, 40)]
  got = evaluate.score(
    *features, query, gallery, jax.jit(methods.euclidean_distance)
  )
  distances = 2 - 2 * features[0] @ features[1].T
  want = ranking.evaluate_rank(
    distances, query.pids, gallery.pids, query.camids, gallery.camids
  )
  assert got["mAP"] == pytest.approx(want.mAP, abs=1e-6)
  assert got["mINP"] == pytest.approx(want.mINP, abs=1e-6)
  for k in (1, 5, 10):
    assert got[f"R{k}"] == pytest.approx(want.cmc[k - 1], abs=1e-6)
