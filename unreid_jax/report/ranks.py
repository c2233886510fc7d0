"""What stands first in the ranked lists, and who is taken for whom."""

import collections
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from unreid_jax import ranking
from unreid_jax.data import Split
from unreid_jax.evaluate import Evaluation, distances
from unreid_jax.methods import Distance
from unreid_jax.report.crops import Row, crop

_TOP, _SHOWN = 30, 10
_PAIRS, _OF_EACH = 6, 4  # pairs of people, and pictures of each


class Ranks(NamedTuple):
  """The nearest gallery images of each query.

  Attributes:
    ap: the query's average precision; NaN where it has no match.
    rows: the nearest images, nearest first.
    right: whether each shows the query's person.
    junk: whether it does so under the query's camera, and is not counted.
  """

  ap: Float[np.ndarray, " q"]
  rows: Int[np.ndarray, "q m"]
  right: Bool[np.ndarray, "q m"]
  junk: Bool[np.ndarray, "q m"]

  @property
  def mistakes(self) -> dict[int, int]:
    """The first counted image of each query for which it is a wrong one."""
    first = np.argmin(self.junk, axis=1)
    each = np.arange(len(first))
    wrong = ~self.right[each, first] & ~np.isnan(self.ap)
    return {int(i): int(self.rows[i, first[i]]) for i in np.flatnonzero(wrong)}


def rank(
  found: Evaluation, query: Split, gallery: Split, distance: Distance
) -> Ranks:
  """Ranks all queries as they are scored."""
  parts, num = [], min(_TOP, len(gallery.pids))
  for of, row in distances(
    found.query, found.gallery, query, gallery, distance
  ):
    pids, camids = query.pids[of], query.camids[of]
    scores = ranking.rank_queries(
      row, pids, gallery.pids, camids, gallery.camids
    )
    rows = np.stack([np.argpartition(one, num - 1)[:num] for one in row])
    near = np.take_along_axis(row, rows, axis=1)
    order = np.argsort(near, axis=1, kind="stable")
    rows = np.take_along_axis(rows, order, axis=1)
    same = gallery.pids[rows] == pids[:, None]
    junk = same & (gallery.camids[rows] == camids[:, None])
    ap = np.where(scores.first_match > 0, scores.ap, np.nan)
    parts.append(Ranks(ap, rows, same, junk))
  return Ranks(*map(np.concatenate, zip(*parts, strict=True)))


def lists(ranks: Ranks, query: Split, gallery: Split) -> dict[str, list[Row]]:
  """Ranked lists of the worst, the median and the best queries."""
  order = np.argsort(ranks.ap)[: np.sum(~np.isnan(ranks.ap))]
  middle = np.roll(order, -(len(order) // 2))
  chosen = {
    "Worst": (order, 5),
    "Median": (middle, 3),
    "Best": (order[::-1], 3),
  }

  def row(i):
    crops = [crop(query, i, "query")]
    for g, right, junk in list(zip(*(x[i] for x in ranks[1:]), strict=True))[
      :_SHOWN
    ]:
      mark = "junk" if junk else "right" if right else "wrong"
      crops.append(crop(gallery, g, mark))
    title = f"{query.names[i]}: average precision {100 * ranks.ap[i]:.0f} %"
    return Row(title, crops)

  return {
    name: [row(i) for i in _of_each_person(rows, query.pids, num)]
    for name, (rows, num) in chosen.items()
  }


def _of_each_person(rows, pids, num):
  """The first rows of different people."""
  seen = {}
  for i in rows:
    seen.setdefault(int(pids[i]), i)
  return list(seen.values())[:num]


def confusions(
  ranks: Ranks, query: Split, gallery: Split
) -> tuple[str, list[Row]]:
  """A sentence on who is taken for whom, and the pairs of people side by side.

  A query is mistaken if the first counted image shows another person.
  """
  pairs = collections.Counter(
    tuple(sorted((int(query.pids[q]), int(gallery.pids[g]))))
    for q, g in ranks.mistakes.items()
  )
  known = collections.Counter({x: n for x, n in pairs.items() if min(x) > 0})
  text = (
    f"{pairs.total()} of {np.sum(~np.isnan(ranks.ap))} queries find another "
    f"person first, {pairs.total() - known.total()} of them a stranger"
  )
  ranked = known.most_common()
  if ranked:
    reached = np.cumsum([num for _, num in ranked])
    half = 1 + int(np.searchsorted(reached, reached[-1] / 2))
    people = len(np.unique(query.pids))
    text += (
      f". Half of the mistakes between known people are made by {half} of the "
      f"{people * (people - 1) // 2:,} possible pairs of them"
    )
  rows = [
    Row(
      f"person {a} and person {b}: mistaken {num} times",
      [crop(gallery, i) for pid in (a, b) for i in _views(gallery, pid)],
    )
    for (a, b), num in ranked[:_PAIRS]
  ]
  return f"{text}.", rows


def _views(split, pid):
  """An image of a person under each of some cameras."""
  rows = np.flatnonzero(split.pids == pid)
  first = np.unique(split.camids[rows], return_index=True)[1]
  return rows[first[:_OF_EACH]]
