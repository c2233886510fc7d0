"""Which clusters SpCL trusts, from those at a tighter and at a looser eps.

Ge, Zhu, Chen, et al., "Self-paced Contrastive Learning with Hybrid Memory for
Domain Adaptive Object Re-ID" (NeurIPS 2020, arXiv 2006.02713), after the
authors' code (yxgeee/SpCL, examples/spcl_train_usl.py).
"""

import numpy as np
from jaxtyping import Float, Int

from unreid_jax.values import BadValue

# Share of the clusters that are independent enough in the first epoch.
_QUANTILE = 0.9


def check_gap(name: str, eps: float, gap: float) -> None:
  """Raises a `BadValue` if eps minus or plus the gap leaves (0, 1).

  Args:
    name: the key that sets the gap.
    eps: the eps of the clusters.
    gap: how much tighter and looser the other clusters are.
  """
  if not (gap >= 0 and eps - gap > 0 and eps + gap < 1):
    raise BadValue(
      name,
      f"is {gap}: set it to 0 or more, with which eps={eps} minus and plus it "
      "lies between 0 and 1",
    )


def outliers_alone(labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
  """Makes each outlier a class of its own, numbered after the clusters."""
  is_outlier = labels < 0
  number = labels.max(initial=-1) + np.cumsum(is_outlier)
  return np.where(is_outlier, number, labels).astype(np.int32)


def disagreement(
  one: Int[np.ndarray, " n"], other: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
  """How much an image's class in `one` differs from its class in `other`.

  For classes A and B it is 1 - |A and B| / |A or B|, in float32 and rounded as
  in the reference, which compares such scores. Only pairs of classes that occur
  are counted, so it takes n log n steps and no [n, n] matrix.
  """
  pairs = one.astype(np.int64) * (other.max(initial=0) + 1) + other
  _, pair, counts = np.unique(pairs, return_inverse=True, return_counts=True)
  both = counts[pair]
  either = np.bincount(one)[one] + np.bincount(other)[other] - both
  return np.float32(1) - both.astype(np.float32) / either.astype(np.float32)


def refine(
  labels: Int[np.ndarray, " n"],
  tight: Int[np.ndarray, " n"],
  loose: Int[np.ndarray, " n"],
  threshold: float = np.nan,
) -> tuple[Int[np.ndarray, " n"], float]:
  """Keeps the reliable part of the clusters; every other image is alone.

  A cluster is independent if a looser eps adds little to it: the lowest
  disagreement with `loose` among its images must not exceed the threshold. An
  image is compact if a tighter eps takes no more from its cluster than from
  the cluster's best image.

  Args:
    labels: the cluster of each image at eps; -1 = outlier.
    tight: its cluster at a tighter eps.
    loose: its cluster at a looser eps.
    threshold: the highest disagreement of an independent cluster; NaN: such
      that nine of ten clusters pass. The reference sets it in the first epoch,
      and keeps it.

  Returns:
    A class for each image, with the reference's numbers, some of which have no
    image; and the threshold, NaN as long as there is no cluster.
  """
  labels, tight, loose = map(outliers_alone, (labels, tight, loose))
  compactness = disagreement(labels, tight)
  independence = disagreement(labels, loose)
  sizes = np.bincount(labels)
  best = np.ones((2, len(sizes)), np.float32)
  np.minimum.at(best[0], labels, compactness)
  np.minimum.at(best[1], labels, independence)
  scores = np.sort(best[1, sizes > 1])
  if np.isnan(threshold) and len(scores):
    place = min(round(_QUANTILE * len(scores)), len(scores) - 1)
    threshold = float(scores[place])
  keeps = best[1, labels] <= threshold
  keeps &= compactness <= best[0, labels]
  number = len(sizes) - 1 + np.cumsum(~keeps)
  return np.where(keeps, labels, number).astype(np.int32), threshold
