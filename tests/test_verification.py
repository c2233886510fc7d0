"""Error rates of a threshold: scikit-learn's, whatever the chunks."""

import numpy as np
import pytest
from sklearn.metrics import roc_curve

from unreid_jax import UserError, verification

BIN = verification.LARGEST / 2**16


def case(seed, q=30, g=200):
  """Distances in the middle of bins, nearer for pairs of one person."""
  rng = np.random.default_rng(seed)
  pids = [np.arange(q) % 12, rng.integers(0, 12, g)]
  camids = [rng.integers(1, 4, q), rng.integers(1, 4, g)]
  is_same = pids[0][:, None] == pids[1]
  bins = rng.normal(20_000 - 8_000 * is_same, 4_000).round().clip(0, 60_000)
  kept = ~is_same | (camids[0][:, None] != camids[1])
  return ((bins + 0.5) * BIN, *pids, *camids), is_same[kept], kept


@pytest.fixture(scope="module")
def measured():
  arguments, is_same, kept = case(0)
  counts = verification.count_pairs(*arguments)
  return verification.summarize([counts]), arguments[0][kept], is_same


def test_equals_scikit_learn(measured):
  found, distances, is_same = measured
  far, tar, _ = roc_curve(is_same, -distances, drop_intermediate=False)
  curve = np.unique(np.stack([found.far, 1 - found.frr], axis=1), axis=0)
  want = np.unique(np.stack([far, tar], axis=1), axis=0)
  np.testing.assert_allclose(curve, want, atol=1e-12)
  at = np.argmin(np.abs(far - (1 - tar)))
  assert found.eer == pytest.approx((far[at] + 1 - tar[at]) / 2)
  for rate in (0.2, 0.01, 1e-3, 1e-4, 0.0):
    assert found.tar(rate) == pytest.approx(tar[far <= rate].max())
  assert found.figures().keys() == {"EER", "TAR@FAR=1e-3", "TAR@FAR=1e-4"}


def test_chunks_equal_the_whole(measured):
  (distances, q_pid, g_pid, q_cam, g_cam), _, _ = case(0)
  parts = (
    verification.count_pairs(distances[i], q_pid[i], g_pid, q_cam[i], g_cam)
    for i in (slice(0, 7), slice(7, 8), slice(8, None))
  )
  for got, want in zip(verification.summarize(parts), measured[0], strict=True):
    np.testing.assert_array_equal(got, want)


def test_the_card_decides_as_counted(measured):
  """The rates at any distance, to the steps in which a card has them."""
  found, distances, is_same = measured
  card = found.card("these")
  probes = np.quantile(distances, np.linspace(0.02, 0.98, 25))
  answer = verification.decide(probes, card)
  for name, pairs in (("far", ~is_same), ("frr", is_same)):
    accepted = (distances[pairs] <= probes[:, None]).mean(axis=1)
    want = accepted if name == "far" else 1 - accepted
    np.testing.assert_allclose(getattr(answer, name), want, atol=0.011)
  decided = verification.decide(distances, card).same
  wrong = np.mean(decided[~is_same]), np.mean(~decided[is_same])
  assert wrong == pytest.approx((found.eer, found.eer), abs=0.01)
  strict = verification.decide(distances, card, far=0.01).same
  assert np.mean(strict[~is_same]) == pytest.approx(0.01, abs=2e-3)
  nearer = verification.decide(distances.min(keepdims=True) - BIN, card)
  assert (nearer.far, nearer.frr) == (0, 1)


def test_nothing_to_count():
  one = np.zeros(1, int)
  counts = verification.count_pairs(np.zeros((1, 1)), one, one, one, one + 1)
  assert verification.summarize([counts]) is None
  with pytest.raises(UserError, match="NaN"):
    verification.count_pairs([[np.nan]], one, one, one, one)
