"""Same person or not: how well a threshold on the distance of two images tells.

All functions take and return numpy arrays. Pairs are counted by their distance,
in chunks of queries as in `ranking`, so that memory does not grow with them:

  summarize(count_pairs(distances(rows), ...) for rows in chunks)

FAR is the false accept rate, the share of the pairs of different people that a
threshold takes for one person; FRR the false reject rate, the share of the
pairs of one person that it takes apart; TAR = 1 - FRR.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from unreid_jax import UserError
from unreid_jax.arrays import checked

LARGEST = 4.0  # the largest squared distance of unit vectors
_BINS = 2**16
_AT_ONCE = 2**20  # pairs, which bounds the memory
# The rates at which a card knows the distance; 0 is that of the nearest pair.
RATES = (0.0, 1e-5, 1e-4, 1e-3, *np.linspace(0.01, 1, 100).round(2).tolist())


class Pairs(NamedTuple):
  """How many pairs have which distance, in bins from 0 to `LARGEST`."""

  same: Int[np.ndarray, " bins"]
  different: Int[np.ndarray, " bins"]


class Verification(NamedTuple):
  """The error rates of each threshold: a pair is accepted if it is not farther.

  Attributes:
    thresholds: squared distances, ascending; the first accepts nothing.
    far: the false accept rate at each.
    frr: the false reject rate at each.
  """

  thresholds: Float[np.ndarray, " t"]
  far: Float[np.ndarray, " t"]
  frr: Float[np.ndarray, " t"]

  @property
  def best(self) -> int:
    """The position of the threshold at which both rates are the most equal."""
    return int(np.argmin(np.abs(self.far - self.frr)))

  @property
  def eer(self) -> float:
    """The equal error rate: the mean of FAR and FRR where they meet."""
    return float(self.far[self.best] + self.frr[self.best]) / 2

  def tar(self, far: float) -> float:
    """TAR of the loosest threshold whose FAR is not above the given one."""
    at = np.searchsorted(self.far, far, "right") - 1
    return float(1 - self.frr[at])

  def figures(self) -> dict[str, float]:
    """EER, and TAR at a FAR of 1e-3 and of 1e-4, as fractions of 1."""
    tar = {f"TAR@FAR=1e-{k}": self.tar(10.0**-k) for k in (3, 4)}
    return {"EER": self.eer} | tar

  def card(self, source: str) -> dict[str, str | float | list[float]]:
    """What an encoder's card keeps of it, in JSON; `decide` reads it.

    The source says in a few words whose pairs these are. "same" and "different"
    are the distances at which 1 - FRR and FAR reach each of `RATES`.
    """

    def reach(rates):
      found = np.searchsorted(rates, np.maximum(RATES, 1e-12))
      return self.thresholds[np.minimum(found, len(rates) - 1)].tolist()

    value = float(self.thresholds[self.best])
    rates = {"same": reach(1 - self.frr), "different": reach(self.far)}
    return {"source": source, "threshold": value} | rates


class Answer(NamedTuple):
  """Whether some pairs of images show one person each, and how sure that is.

  Attributes:
    same: whether the pair is not farther than the threshold.
    distance: the squared Euclidean distance of the unit features.
    far: the share of pairs of different people that are as near or nearer.
    frr: the share of pairs of one person that are as far or farther.
  """

  same: Bool[np.ndarray, " n"]
  distance: Float[np.ndarray, " n"]
  far: Float[np.ndarray, " n"]
  frr: Float[np.ndarray, " n"]


def decide(
  distance: Float[np.ndarray, " n"],
  card: Mapping[str, Any],
  far: float | None = None,
) -> Answer:
  """Decides by what `Verification.card` has kept.

  Args:
    distance: squared Euclidean distances of unit features.
    card: the card.
    far: the false accept rate to be kept to; by default the threshold is the
      one at which both rates are equal.
  """
  threshold = card["threshold"]
  if far is not None:
    threshold = np.interp(far, RATES, card["different"])
  accepted = np.interp(distance, card["different"], RATES, left=0)
  rejected = 1 - np.interp(distance, card["same"], RATES, left=0)
  return Answer(distance <= threshold, distance, accepted, rejected)


@checked
def count_pairs(
  distances: Float[np.ndarray, "q g"],
  query_pids: Int[np.ndarray, " q"],
  gallery_pids: Int[np.ndarray, " g"],
  query_camids: Int[np.ndarray, " q"],
  gallery_camids: Int[np.ndarray, " g"],
) -> Pairs:
  """Counts the pairs of query and gallery image by their distance.

  As in ranking, pairs of one person under one camera are left out.

  Args:
    distances: squared Euclidean distances of unit features, from 0 to 4.
    query_pids: the identity of each query.
    gallery_pids: the identity of each gallery image.
    query_camids: the camera of each query.
    gallery_camids: the camera of each gallery image.

  Raises:
    UserError: shapes differ, or a distance is NaN.
  """
  if np.isnan(distances).any():
    raise UserError("distances has a NaN: the features are not finite")
  counts = np.zeros(2 * _BINS, int)
  at_once = max(1, _AT_ONCE // max(len(gallery_pids), 1))
  for start in range(0, len(distances), at_once):
    of = slice(start, start + at_once)
    is_same = query_pids[of, None] == gallery_pids
    is_counted = ~is_same | (query_camids[of, None] != gallery_camids)
    bins = (distances[of] * (_BINS / LARGEST)).clip(0, _BINS - 1)
    bins = bins.astype(np.int32) + is_same * np.int32(_BINS)
    counts += np.bincount(bins[is_counted], minlength=2 * _BINS)
  return Pairs(same=counts[_BINS:], different=counts[:_BINS])


def summarize(parts: Iterable[Pairs]) -> Verification | None:
  """The error rates of all pairs; None if those of either kind are missing.

  A threshold is the upper end of a bin: it is exact to 4 / 65,536.
  """
  nothing = Pairs(np.zeros(_BINS, int), np.zeros(_BINS, int))
  same, different = (sum(x) for x in zip(nothing, *parts, strict=True))
  if not np.any(same) or not np.any(different):
    return None
  share = lambda counts: np.append(0, np.cumsum(counts)) / counts.sum()
  thresholds = np.linspace(0, LARGEST, _BINS + 1)
  return Verification(thresholds, share(different), 1 - share(same))
