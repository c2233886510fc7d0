"""Clusters at several eps, and which of them SpCL trusts.

Ge, Zhu, Chen, et al., "Self-paced Contrastive Learning with Hybrid Memory for
Domain Adaptive Object Re-ID" (NeurIPS 2020, arXiv 2006.02713), after the
authors' code (yxgeee/SpCL, examples/spcl_train_usl.py).
"""

import numpy as np
from jaxtyping import Float, Int

from unreid_jax import UserError
from unreid_jax.pseudo_labels.clustering import (
  Clustering,
  center_by_camera,
  timed,
)
from unreid_jax.pseudo_labels.dbscan import dbscan
from unreid_jax.pseudo_labels.infomap import infomap
from unreid_jax.pseudo_labels.jaccard import jaccard_from_neighbors
from unreid_jax.pseudo_labels.neighbors import neighbors

_QUANTILE = 0.9  # of the clusters are independent enough in the first epoch


def cluster_at(
  hp: Clustering,
  features: Float[np.ndarray, "n d"],
  camids: Int[np.ndarray, " n"],
  *gaps: float,
) -> tuple[list[Int[np.ndarray, " n"]], dict[str, float]]:
  """Clusters the images at eps + gap for each gap, from one Jaccard distance.

  Args:
    hp: how.
    features: unit features of the images.
    camids: their cameras.
    *gaps: > 0 is looser: InfoMap's eps, a similarity, falls by the gap.

  Returns:
    For each gap the labels, -1 = outlier; and the seconds of each part.
  """
  if hp.center_cameras:
    features = center_by_camera(features, camids)
  seconds = {}
  if hp.clustering == "infomap":
    run = lambda eps: infomap(features, hp.k1, eps, hp.min_samples)
    eps = [hp.eps - gap for gap in gaps]
  else:
    found = timed(seconds, "neighbors", neighbors, features, hp.k1)
    eps = [hp.eps + gap for gap in gaps]
    arguments = features, *found, hp.k2, max(eps)
    distances = timed(seconds, "jaccard", jaccard_from_neighbors, *arguments)
    run = lambda eps: dbscan(distances, eps, hp.min_samples)
  return [timed(seconds, hp.clustering, run, x) for x in eps], seconds


def check_gap(name: str, eps: float, gap: float) -> None:
  """Raises a UserError where eps -/+ gap leaves the range from 0 to 1."""
  if not (gap >= 0 and eps - gap > 0 and eps + gap < 1):
    raise UserError(
      f"method.{name} is {gap}: set it so that eps={eps} minus and plus it "
      "lies between 0 and 1"
    )


def outliers_alone(labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
  """Each outlier as a class of its own, numbered after the clusters."""
  is_outlier = labels < 0
  number = labels.max(initial=-1) + np.cumsum(is_outlier)
  return np.where(is_outlier, number, labels).astype(np.int32)


def disagreement(
  one: Int[np.ndarray, " n"], other: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
  """1 - |A and B| / |A or B| for an image's class A in `one`, B in `other`.

  Counts the pairs of classes that occur: n log n, and no [n, n] matrix. In
  float32 and rounded as in the reference, which compares such scores.
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
  """Keeps the reliable part of the clusters; the rest are alone.

  A cluster is independent if a looser eps adds little to it: the lowest
  disagreement with `loose` among its images must not exceed the threshold. An
  image is compact if a tighter eps takes no more from its cluster than from
  the cluster's best image.

  Args:
    labels: clusters at eps; -1 = outlier.
    tight: at a smaller eps.
    loose: at a larger eps.
    threshold: of independence; NaN sets it so that nine of ten clusters pass.
      The reference sets it in the first epoch, and keeps it.

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
