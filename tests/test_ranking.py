import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from unreid_jax import UserError
from unreid_jax.ranking import evaluate_rank, rank_queries, summarize


def arguments(golden):
  return [golden[key] for key in ("dist", "qpid", "gpid", "qcam", "gcam")]


def random_case(seed, q=40, g=150, levels=12):
  """Coarse distances, so many ties; pid 0 queries have no match."""
  rng = np.random.default_rng(seed)
  distances = rng.integers(0, levels, (q, g)).astype(np.float32)
  pids = np.arange(q) % 15, rng.integers(1, 20, g)
  return [distances, *pids, rng.integers(0, 3, q), rng.integers(0, 3, g)]


def twin(distances, q_pid, g_pid, q_cam, g_cam):
  """One query at a time: sorted, wrong images first among equals."""
  for row, pid, cam in zip(distances, q_pid, q_cam, strict=True):
    keep = (g_pid != pid) | (g_cam != cam)
    match = g_pid[keep] == pid
    row = np.unique(row[keep], return_inverse=True)[1]  # sklearn: no infinity
    if not match.any():
      yield 0.0, 0, 0.0
      continue
    found = np.flatnonzero(match[np.lexsort((match, row))]) + 1
    ap = average_precision_score(match, -row)
    yield ap, found[0], len(found) / found[-1]


@pytest.mark.parametrize("name", ["small", "junk", "tiny_gallery"])
def test_golden(golden, name):
  want = golden(f"rank_{name}")
  result = evaluate_rank(*arguments(want), max_rank=100)
  np.testing.assert_allclose(result.mAP, want["map_spcl_f64"], atol=1e-6)
  np.testing.assert_allclose(result.cmc, want["cmc_spcl"], atol=1e-6)
  short = want["cmc_torchreid"]
  np.testing.assert_allclose(result.cmc[: len(short)], short, atol=1e-6)
  ranks = rank_queries(*arguments(want))
  valid = ranks.first_match > 0
  np.testing.assert_allclose(ranks.ap[valid], want["ap_fastreid_f64"])
  np.testing.assert_allclose(ranks.inp[valid], want["inp_fastreid_f64"])
  np.testing.assert_allclose(result.mINP, want["inp_fastreid_f64"].mean())


def test_golden_ties(golden):
  want = golden("rank_ties")
  result = evaluate_rank(*arguments(want))
  np.testing.assert_allclose(result.mAP, want["map_spcl_f64"], atol=1e-6)


@pytest.mark.parametrize("levels", [1, 2, 12, 10**6])
def test_equals_twin(levels):
  case = random_case(levels, levels=levels)
  want = np.array(list(twin(*case)))
  ranks = rank_queries(*case)
  np.testing.assert_allclose(np.stack(ranks, axis=1), want)
  valid = want[:, 1] > 0
  assert 0 < valid.sum() < len(valid)
  result = evaluate_rank(*case, max_rank=20)
  ap, first_match, inp = want[valid].T
  np.testing.assert_allclose([result.mAP, result.mINP], [ap.mean(), inp.mean()])
  cmc = [np.mean(first_match <= k) for k in range(1, 21)]
  np.testing.assert_allclose(result.cmc, cmc)


@pytest.mark.parametrize("far", [1e9, 3e38, np.inf])
def test_uneven_distances(far):
  """Most matches in one bucket; a width that overflows."""
  case = random_case(5)
  case[0][:, ::7] = far
  case[0][::2, ::5] = -far
  case[0][1::4] *= 1e-38
  want = np.array(list(twin(*case)))
  np.testing.assert_allclose(np.stack(rank_queries(*case), axis=1), want)


def test_order_of_the_gallery_does_not_matter():
  distances, q_pid, g_pid, q_cam, g_cam = random_case(1)
  order = np.random.default_rng(2).permutation(len(g_pid))
  a = evaluate_rank(distances, q_pid, g_pid, q_cam, g_cam)
  b = evaluate_rank(
    distances[:, order], q_pid, g_pid[order], q_cam, g_cam[order]
  )
  np.testing.assert_array_equal(np.hstack(a), np.hstack(b))


def test_chunks_equal_the_whole():
  distances, q_pid, g_pid, q_cam, g_cam = random_case(3)
  parts = (
    rank_queries(distances[i], q_pid[i], g_pid, q_cam[i], g_cam)
    for i in (slice(0, 7), slice(7, 8), slice(8, None))
  )
  whole = evaluate_rank(distances, q_pid, g_pid, q_cam, g_cam, max_rank=30)
  np.testing.assert_array_equal(
    np.hstack(summarize(parts, max_rank=30)), np.hstack(whole)
  )


def test_a_constant_feature_earns_nothing():
  q_pid, g_pid, cam = np.arange(4), np.arange(4), np.zeros(4, int)
  result = evaluate_rank(
    np.zeros((4, 4), np.float32), q_pid, g_pid, cam, cam + 1
  )
  np.testing.assert_array_equal(result.cmc[:4], [0, 0, 0, 1])
  assert result.mAP == result.mINP == 0.25


def test_bad_input():
  case = random_case(4)
  with pytest.raises(
    UserError, match=r"^query_pids has the shape .* q is 150 in dis"
  ):
    evaluate_rank(case[0].T, *case[1:])
  with pytest.raises(UserError, match="no query has a match"):
    evaluate_rank(case[0], case[1] + 100, *case[2:])
  case[0][3, 5] = np.nan
  with pytest.raises(UserError, match="NaN"):
    evaluate_rank(*case)
