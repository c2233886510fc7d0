"""Which clusters SpCL trusts, from those at a tighter and at a looser eps.

Ge, Zhu, Chen, et al., "Self-paced Contrastive Learning with Hybrid Memory for
Domain Adaptive Object Re-ID" (NeurIPS 2020, arXiv 2006.02713), after the
authors' code (yxgeee/SpCL, examples/spcl_train_usl.py).
"""

import numpy as np
from jaxtyping import Float, Int

from unreid_jax import UserError
from unreid_jax.arrays import checked
from unreid_jax.values import BadValue

Labels = Int[np.ndarray, " n"]


def check_gap(name: str, eps: float, gap: float) -> None:
  """Raises a `BadValue` of the key if eps minus or plus the gap leaves 0..1."""
  if not (gap >= 0 and eps - gap > 0 and eps + gap < 1):
    fits = f"eps={eps} minus and plus it lies between 0 and 1"
    raise BadValue(name, f"is {gap}: set it to 0 or more, with which {fits}")


@checked
def outliers_alone(labels: Labels) -> Labels:
  """Makes each outlier a class of its own, numbered after the clusters."""
  return _set_alone(labels, labels < 0)


@checked
def disagreement(one: Labels, other: Labels) -> Float[np.ndarray, " n"]:
  """How much an image's class in `one` differs from its class in `other`.

  For classes A and B it is 1 - |A and B| / |A or B|, in float32 and rounded as
  in the reference, which compares such scores; an outlier is a class. Only
  pairs of classes that occur are counted, so it takes n log n steps and no
  [n, n] matrix.
  """
  one, size = _classes(outliers_alone(one))
  other, other_size = _classes(outliers_alone(other))
  both = _classes(one * len(one) + other)[1]
  either = size + other_size - both
  return np.float32(1) - both.astype(np.float32) / either.astype(np.float32)


@checked
def refine(
  labels: Labels, tight: Labels, loose: Labels, threshold: float = np.nan
) -> tuple[Labels, float]:
  """Keeps the reliable part of the clusters; every other image is alone.

  A cluster is independent if a looser eps adds little to it: the lowest
  disagreement with `loose` among its images must not exceed the threshold. An
  image is compact if a tighter eps takes no more from its cluster than from
  the cluster's best image.

  Args:
    labels: the cluster of each image at eps; -1 = outlier.
    tight, loose: the same at a tighter and at a looser eps.
    threshold: the highest disagreement of an independent cluster; NaN: such
      that nine of ten clusters pass. The reference keeps the first epoch's.

  Returns:
    A class for each image, with the reference's numbers, some of which have no
    image; and the threshold, NaN as long as there is no cluster.
  """
  labels, tight, loose = map(outliers_alone, (labels, tight, loose))
  compactness = disagreement(labels, tight)
  independence = disagreement(labels, loose)
  at, size = _classes(labels)
  compactest, lowest = np.ones((2, len(labels)), np.float32)
  np.minimum.at(compactest, at, compactness)
  np.minimum.at(lowest, at, independence)
  scores = np.sort(lowest[np.unique(at[size > 1])])
  if np.isnan(threshold) and len(scores):
    place = min(round(0.9 * len(scores)), len(scores) - 1)
    threshold = float(scores[place])
  keeps = (lowest[at] <= threshold) & (compactness <= compactest[at])
  return _set_alone(labels, ~keeps), threshold


def _classes(labels):
  """Of each image: its class, numbered without gaps, and the class's size."""
  _, at, sizes = np.unique(labels, return_inverse=True, return_counts=True)
  return at, sizes[at]


def _set_alone(labels, is_alone):
  """Gives these images a class of their own, after all others."""
  highest = int(labels.max(initial=-1))
  if highest + len(labels) > np.iinfo(np.int32).max:
    raise UserError(f"labels has the value {highest}: number classes from 0")
  number = highest + np.cumsum(is_alone)
  return np.where(is_alone, number, labels).astype(np.int32)
