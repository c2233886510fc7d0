"""Batches of clusters: the references' rules, and what they crash on."""

import functools

import numpy as np
import pytest

from unreid_jax import UserError
from unreid_jax.data import sampler

PLAN = functools.partial(
  sampler.plan,
  batch_size=8,
  steps=30,
  seed=0,
  num_instances=4,
  other_camera=True,
)


def tiny_set():
  """Six clusters of four to nine images under three cameras; outliers."""
  rng = np.random.default_rng(0)
  labels = np.repeat(np.arange(-1, 6), [5, 4, 5, 6, 7, 8, 9])
  labels = rng.permutation(labels)
  return labels, rng.integers(0, 3, len(labels))


def blocks_of(rows):
  return rows.reshape(-1, 4)


def test_rules_of_the_reference(golden):
  """Shares over many visits, beside the reference's own 400 epochs."""
  z = golden("sampler_rmgs")
  labels, camids = z["pids"].astype(np.int32), z["cams"].astype(np.int32)
  length = int(z["length_actual"][0])
  draw = sampler.by_cluster(np.random.default_rng(1), labels, camids, length, 4)
  visits = {pid: [] for pid in np.unique(labels[labels >= 0])}
  for _ in range(400):
    rows = next(draw)
    borders = np.flatnonzero(np.diff(labels[rows])) + 1
    for part in np.split(rows, borders):
      visits[labels[part[0]]].append(part)
  columns = z["per_pid"].T
  for pid, theirs, emitted, same_camera, duplicates, again in columns.T:
    ours = np.stack(visits[pid])
    assert len(ours) == theirs == 400 and ours.size == emitted
    if emitted == theirs:  # one image
      continue
    companions = ours[:, 1:]
    assert np.all(labels[ours] == pid)
    is_same = camids[companions] == camids[ours[:, :1]]
    # Binomial shares of 400 visits: three standard deviations of a difference.
    assert abs(is_same.sum() - same_camera) <= 3 * 3 * np.sqrt(2 * 400 / 4)
    assert (is_same.sum() == 0) == (same_camera == 0)
    repeats = [len(set(row)) < 3 for row in companions.tolist()]
    assert abs(sum(repeats) - duplicates) <= 3 * np.sqrt(2 * 400 / 4)
    assert (sum(repeats) == 0) == (duplicates == 0)
    assert np.sum(companions == ours[:, :1]) == again == 0


def test_without_cameras():
  labels, camids = tiny_set()
  rows = PLAN(labels, camids, 0, other_camera=False, steps=200)
  blocks = blocks_of(rows)
  companions_same = camids[blocks[:, 1:]] == camids[blocks[:, :1]]
  assert 0.2 < companions_same.mean() < 0.4  # three cameras
  assert not np.any(blocks[:, 1:] == blocks[:, :1])


def test_every_cluster_once_a_pass():
  labels, camids = tiny_set()
  blocks = blocks_of(PLAN(labels, camids, 0))
  passes = labels[blocks[:, 0]].reshape(-1, 6)
  assert all(sorted(x) == list(range(6)) for x in passes.tolist())
  assert len({tuple(x) for x in passes.tolist()}) > 5
  assert np.all(labels[blocks] == labels[blocks[:, :1]])


def test_the_last_incomplete_batch_of_a_pass_is_left_out():
  labels = np.repeat(np.arange(5), 6)
  blocks = blocks_of(PLAN(labels, labels * 0, 0))
  passes = labels[blocks[:, 0]].reshape(-1, 4)
  assert all(len(set(x)) == 4 for x in passes.tolist())


def test_a_pure_function_of_labels_seed_and_epoch():
  labels, camids = tiny_set()
  np.testing.assert_array_equal(
    PLAN(labels, camids, 3), PLAN(labels, camids, 3)
  )
  others = PLAN(labels, camids, 4), PLAN(labels, camids, 3, seed=1)
  for other in others:
    assert np.any(other != PLAN(labels, camids, 3))


@pytest.mark.parametrize("num_clusters", [1, 2, 3])
def test_fewer_clusters_than_a_batch_needs(num_clusters):
  """The reference's loader is empty then, and ends in StopIteration."""
  labels = np.repeat(np.arange(num_clusters), 5)
  rows = PLAN(labels, labels * 0, 0, batch_size=16)
  assert rows.shape == (30, 16)
  for row in rows:
    assert set(labels[row]) == set(range(num_clusters))


def test_shuffled():
  labels = np.arange(50)
  labels[::10] = -1
  rows = PLAN(labels, labels, 0, num_instances=0, steps=5)
  assert rows.shape == (5, 8)
  assert len(set(rows.ravel())) == 40 and np.all(labels[rows] >= 0)
  longer = PLAN(labels, labels, 0, num_instances=0, steps=12)
  np.testing.assert_array_equal(longer[:5], rows)  # 5 steps are a pass
  assert np.any(np.sort(longer[5:10].ravel()) != np.sort(rows.ravel()))


def test_fewer_images_than_a_batch():
  labels = np.array([0, 1, -1, 2])
  rows = PLAN(labels, labels, 0, num_instances=0)
  assert rows.shape == (30, 8)
  assert all(set(row) == {0, 1, 3} for row in rows.tolist())


def test_images_without_a_twin_are_shuffled():
  labels = np.arange(50)
  np.testing.assert_array_equal(
    PLAN(labels, labels, 0, steps=6),
    PLAN(labels, labels, 0, num_instances=0, steps=6),
  )


def test_clusters_of_one_image():
  """A batch holds more of them, and the next cluster may be cut."""
  labels = np.array([0, 0, 1, 2, 3, 4, 5, 5])
  seen = PLAN(labels, labels * 0, 0, steps=200)
  counts = np.bincount(labels[seen].ravel(), minlength=6)
  assert counts[1:5].max() < counts[[0, 5]].min() / 2
  assert {len(set(labels[row])) for row in seen} >= {3, 4, 5}


def test_nothing_to_draw():
  nothing = np.full(20, -1)
  with pytest.raises(UserError, match="no image has a label"):
    PLAN(nothing, nothing, 0)
  with pytest.raises(UserError, match="no image has a label"):
    PLAN(nothing, nothing, 0, num_instances=0)
