"""Mean average precision and CMC under the Market-1501 protocol.

All functions take and return numpy arrays; only `rerank` uses a device. Nothing
is sorted but the few matches of each query: the rank of a match is the count of
gallery images that are not farther away. A large gallery is scored in chunks of
queries:

  summarize(rank_queries(distances(rows), ...) for rows in chunks)
"""

from collections.abc import Iterable
from typing import Annotated, NamedTuple

import numba
import numpy as np
from jaxtyping import Float, Int

from unreid_jax import UserError, values
from unreid_jax.arrays import checked, compiled
from unreid_jax.reranking import rerank as rerank

MaxRank = Annotated[int, values.Range(1, 10**6)]


class RankMetrics(NamedTuple):
  """Scores of the valid queries, as fractions of 1."""

  mAP: float
  cmc: Float[np.ndarray, " max_rank"]  # [k-1]: matched within rank k
  mINP: float


class QueryRanks(NamedTuple):
  """Scores of each query; `first_match` is 0 for a query without a match."""

  ap: Float[np.ndarray, " q"]
  first_match: Int[np.ndarray, " q"]
  inp: Float[np.ndarray, " q"]


@checked
def evaluate_rank(
  distances: Float[np.ndarray, "q g"],
  query_pids: Int[np.ndarray, " q"],
  gallery_pids: Int[np.ndarray, " g"],
  query_camids: Int[np.ndarray, " q"],
  gallery_camids: Int[np.ndarray, " g"],
  max_rank: MaxRank = 50,
) -> RankMetrics:
  """Scores a distance matrix: mAP, CMC and mINP.

  Gallery images of the query's identity and camera are left out, and so is a
  query without any other match. Pids have no special values: drop junk (-1)
  before, and leave distractors (0) in the gallery.

  Equal distances form one group, so the order of the gallery does not matter:
  average precision is scikit-learn's, and the first and last match rank behind
  the wrong images at the same distance (a constant feature earns nothing).

  Args:
    distances: the distance of each query to each gallery image.
    query_pids: the identity of each query.
    gallery_pids: the identity of each gallery image.
    query_camids: the camera of each query.
    gallery_camids: the camera of each gallery image.
    max_rank: the last rank of the CMC.

  Raises:
    UserError: shapes differ, a distance is NaN, or no query has a match.

  Source: mAP as `mean_ap` of yxgeee/SpCL; CMC as `eval_market1501` of
  KaiyangZhou/deep-person-reid; mINP from Ye et al., arXiv 2001.04193, eq. 4.
  """
  ranks = rank_queries(
    distances, query_pids, gallery_pids, query_camids, gallery_camids
  )
  return summarize([ranks], max_rank)


@checked
def rank_queries(
  distances: Float[np.ndarray, "q g"],
  query_pids: Int[np.ndarray, " q"],
  gallery_pids: Int[np.ndarray, " g"],
  query_camids: Int[np.ndarray, " q"],
  gallery_camids: Int[np.ndarray, " g"],
) -> QueryRanks:
  """Scores each query by itself; the arguments are those of `evaluate_rank`."""
  ids = query_pids, query_camids, gallery_pids, gallery_camids
  q_pids, q_camids, g_pids, g_camids = (x.astype(np.int64) for x in ids)
  if np.isnan(distances.min(initial=0)):
    raise UserError("distances contain NaN: check the features for NaN first")
  by_pid = np.argsort(g_pids, kind="stable")
  sides = "left", "right"
  begin, end = (np.searchsorted(g_pids[by_pid], q_pids, x) for x in sides)
  q = len(q_pids)
  ranks = QueryRanks(np.zeros(q), np.zeros(q, int), np.zeros(q))
  _rank_rows(distances, by_pid, begin, end, q_camids, g_camids, *ranks)
  return ranks


@checked
def summarize(
  parts: Iterable[QueryRanks], max_rank: MaxRank = 50
) -> RankMetrics:
  """Averages the scores of all valid queries, as `evaluate_rank` does."""
  parts = list(parts)
  if not all(isinstance(part, QueryRanks) for part in parts):
    raise UserError("parts is no list of results of rank_queries: pass one")
  nothing = QueryRanks(np.zeros(0), np.zeros(0, int), np.zeros(0))
  ap, first_match, inp = map(np.concatenate, zip(nothing, *parts, strict=True))
  valid = first_match > 0
  if not valid.any():
    raise UserError(
      "no query has a match under another camera in the gallery: check the "
      "pids and camids of both"
    )
  counts = np.bincount(np.minimum(first_match[valid], max_rank + 1))
  cmc = np.cumsum(np.pad(counts, (0, max_rank))[1 : max_rank + 1])
  mAP, mINP = (float(x[valid].mean()) for x in (ap, inp))
  return RankMetrics(mAP, cmc / valid.sum(), mINP)


@compiled(parallel=True)
def _rank_rows(
  distances, by_pid, begin, end, q_camids, g_camids, ap, first_match, inp
):
  for i in numba.prange(len(distances)):
    same_pid = by_pid[begin[i] : end[i]]
    is_match = g_camids[same_pid] != q_camids[i]
    if is_match.any():
      scores = _rank_row(distances[i], same_pid, is_match)
      ap[i], first_match[i], inp[i] = scores


@compiled()
def _rank_row(row, same_pid, is_match):
  """Average precision, rank of the first match, inverse negative penalty."""
  matches = np.sort(row[same_pid[is_match]])
  num = len(matches)
  wrong = _count_not_beyond(matches, row)
  wrong -= _count_not_beyond(matches, row[same_pid])
  ap, begin = 0.0, 0
  for i in range(num):
    if i + 1 == num or matches[i + 1] > matches[i]:  # the end of a tie
      ap += (i + 1 - begin) * (i + 1) / (i + 1 + wrong[i])
      begin = i + 1
  return ap / num, wrong[0] + 1, num / (num + wrong[num - 1])


@compiled()
def _count_not_beyond(matches, row):
  """Counts the distances of a row that are <= each of the ascending matches."""
  nearest, farthest = matches[0], matches[-1]
  # Most distances fall into a narrow bucket without a match, and need no
  # search. Rounding is harmless: the bucket never decreases with the distance.
  num_buckets = 16 * len(matches)
  width = farthest - nearest
  scale = num_buckets / width if width > 1e-30 else 0.0
  below = np.zeros(num_buckets + 3, np.int64)  # [b]: matches before bucket b
  for match in matches:
    below[_bucket(match, nearest, scale) + 1] += 1
  below = np.cumsum(below)
  count = np.zeros(len(matches), np.int64)
  for distance in row:
    if distance <= nearest:
      count[0] += 1
    elif distance <= farthest:
      b = _bucket(distance, nearest, scale)
      low, high = below[b], below[b + 1]
      while low < high:
        middle = (low + high) // 2
        if matches[middle] < distance:
          low = middle + 1
        else:
          high = middle
      count[low] += 1
  return np.cumsum(count)


@compiled()
def _bucket(distance, nearest, scale):
  return int((distance - nearest) * scale) if scale > 0 else 0
