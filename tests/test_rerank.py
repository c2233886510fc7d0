import jax
import numpy as np
import pytest

from unreid_jax import UserError, sharding
from unreid_jax.ranking import rerank


def random_features(n, d=8, seed=0):
  """Multiples of 1/64, whose squared distances are exact."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(12, d))[rng.integers(0, 12, n)]
  x += 0.6 * rng.normal(size=(n, d))
  x /= np.linalg.norm(x, axis=1, keepdims=True)
  return (np.round(64 * x) / 64).astype(np.float32)


def twin(query, gallery, k1, k2, weight):
  """With Python sets and dense matrices, in double precision."""
  x = np.concatenate([query, gallery]).astype(np.float64)
  n = len(x)
  original = np.square(np.square(x[:, None] - x).sum(-1))
  original /= np.maximum(original.max(axis=1, keepdims=True), 1e-300)
  # A row comes before its duplicates.
  rank = np.argsort(original - np.eye(n), axis=1, kind="stable")

  def reciprocal(i, k):
    return {j for j in rank[i, : k + 1] if i in rank[j, : k + 1]}

  encoding = np.zeros((n, n))
  for i in range(n):
    near = reciprocal(i, k1)
    grown = set(near)
    for j in near:
      nearer = reciprocal(j, round(k1 / 2))
      if len(nearer & near) / len(nearer) > 2 / 3 + 1e-9:
        grown |= nearer
    weights = np.exp(-original[i, sorted(grown)])
    encoding[i, sorted(grown)] = weights / weights.sum()
  encoding = np.stack([encoding[rank[i, :k2]].mean(0) for i in range(n)])
  q = len(query)
  overlap = [np.minimum(v, encoding[q:]).sum(1) for v in encoding[:q]]
  jaccard = 1 - np.array(overlap) / (2 - np.array(overlap))
  return (1 - weight) * jaccard + weight * original[:q, q:]


def test_golden(golden):
  want = golden("rerank")
  query, gallery = np.split(want["features"], [40])
  got = rerank(query, gallery)
  np.testing.assert_allclose(got, want["out_k20_6_03"], 0, 2e-6)
  got = rerank(query, gallery, k1=15, k2=1, lambda_value=0.5)
  np.testing.assert_allclose(got, want["out_k15_1_05"], 0, 2e-6)


@pytest.mark.parametrize(
  "options",
  [(20, 6, 0.3), (13, 4, 0.0), (7, 1, 1.0), (1, 9, 0.5), (40, 6, 0.3)],
)
@pytest.mark.parametrize(("q", "g"), [(10, 70), (30, 9)])
def test_equals_twin(q, g, options):
  query, gallery = np.split(random_features(q + g, seed=g), [q])
  got = rerank(query, gallery, *options)
  assert got.dtype == np.float32
  want = twin(query, gallery, *options)
  np.testing.assert_allclose(got, want, 0, 2e-6)


def test_the_number_of_devices_does_not_matter():
  query, gallery = np.split(random_features(90), [20])
  want = rerank(query, gallery)
  with jax.set_mesh(sharding.make_mesh(1)):
    np.testing.assert_array_equal(rerank(query, gallery), want)


def test_identical_images():
  same = np.repeat(random_features(1), 50, axis=0)
  assert np.isfinite(rerank(same[:10], same[10:])).all()


def test_nan():
  features = random_features(30)
  features[20] = np.nan
  with pytest.raises(UserError, match="NaN"):
    rerank(features[:10], features[10:])
