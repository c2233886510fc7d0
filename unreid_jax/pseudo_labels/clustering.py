"""From features to the pseudo labels of an epoch, and how good they are."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, Int
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from unreid_jax import values
from unreid_jax.arrays import checked
from unreid_jax.pseudo_labels import dbscan, jaccard_from_neighbors, neighbors
from unreid_jax.pseudo_labels.infomap import (
  check_installed,
  infomap_from_neighbors,
)
from unreid_jax.pseudo_labels.jaccard import TooManyPairsError
from unreid_jax.pseudo_labels.neighbors import as_features

_EPS_STEP = 0.05
_Labels = Int[np.ndarray, " n"]  # of all images; -1 = outlier
_Features = Float[np.ndarray, "n d"]


class Clusters(NamedTuple):
  """Pseudo labels of all images, and how they came about."""

  labels: tuple[_Labels, ...]  # at each gap
  eps: float  # that was used, to which the gaps are added
  seconds: dict[str, float]  # that each part took
  notes: tuple[str, ...]  # lines that a user should read


@dataclasses.dataclass(frozen=True)
class Clustering(values.Checked):
  """How a method clusters the images; the part that all of them share.

  Attributes:
    clustering: "dbscan" on the k-reciprocal Jaccard distance, or "infomap" on
      the graph of similar neighbours.
    k1: how many neighbours an image has, itself included.
    k2: over how many neighbours, the image included, the encodings of the
      Jaccard distance are averaged; 1: none.
    eps: the largest distance of neighbours for DBSCAN, the smallest cosine
      similarity of neighbours for InfoMap.
    min_samples: how many neighbours make a core point of DBSCAN, itself
      included; the size of the smallest cluster that InfoMap keeps.
    center_cameras: whether each camera's mean feature is subtracted first. It
      is ours: from random weights most of what a feature shows is its camera.
    instance_epochs: how many epochs at the start have every image as a cluster
      of its own. It is ours too: those of random weights are worth nothing.
  """

  clustering: Literal["dbscan", "infomap"] = "dbscan"
  k1: Annotated[int, values.Range(2)] = 30
  k2: values.Count = 6
  eps: values.InsideUnit = 0.6
  min_samples: values.Count = 4
  center_cameras: bool = False
  instance_epochs: values.CountOrZero = 0

  def __post_init__(self):
    super().__post_init__()
    if self.clustering == "infomap":
      check_installed()


@checked
def cluster(
  hp: Clustering,
  features: _Features,
  camids: Int[np.ndarray, " n"],
  gaps: tuple[float, ...] = (0.0,),
  outliers_are_classes: bool = False,
) -> Clusters:
  """Clusters all images by their unit features, at one eps or several.

  With less than two clusters there is nothing to contrast. Then eps is moved in
  steps of .05 until there are two or more: to tighter ones if one cluster holds
  half of the images, else to looser ones, which are not needed if outliers are
  contrasted too (`outliers_are_classes`). If none does it, the labels hold
  fewer than two clusters.

  Each of the `gaps` says how much looser than eps a labelling is: DBSCAN's eps
  grows by it, InfoMap's falls. The first is 0, and its clusters are counted.
  """
  if hp.center_cameras:
    features = center_by_camera(features, camids)
  seconds, notes, eps = {}, (), hp.eps
  label_at = _labeller(hp, features, gaps, seconds)
  labels = label_at(eps)
  if _is_useless(labels[0], outliers_are_classes):
    num, end = labels[0].max(initial=-1) + 1, "no other eps makes two"
    for eps in _other_eps(hp, _is_giant(labels[0]), gaps):
      labels = label_at(eps)
      if not _is_useless(labels[0], outliers_are_classes):
        end = f"this epoch has eps {eps}"
        break
    notes = (f"eps {hp.eps} makes {num} cluster(s); {end}",)
  return Clusters(labels, eps, seconds, notes)


def _labeller(hp, features, gaps, seconds) -> Callable:
  """A function from eps to the labels at each gap, by one neighbour search."""
  with _timed(seconds, "neighbors"):
    found = neighbors(features, hp.k1)
  jaccard, reach = None, 0.0  # the distances up to the loosest eps so far

  def label_at(eps):
    nonlocal jaccard, reach
    each_eps = [eps + _looser(hp) * gap for gap in gaps]
    if hp.clustering == "infomap":
      run = functools.partial(infomap_from_neighbors, *found)
    else:
      if (loosest := max(each_eps)) > reach:
        try:
          with _timed(seconds, "jaccard"):
            jaccard = jaccard_from_neighbors(features, *found, hp.k2, loosest)
        except TooManyPairsError:  # nearly all are alike
          return (np.zeros(len(features), np.int32),) * len(gaps)
        reach = loosest
      run = functools.partial(dbscan, jaccard)
    with _timed(seconds, hp.clustering):
      labels = tuple(run(eps, hp.min_samples) for eps in each_eps)
    if jax.process_count() > 1:  # processors round differently: one decides
      labels = multihost_utils.broadcast_one_to_all(labels)
    return labels

  return label_at


def _looser(hp):
  """The sign of a step to a looser eps; InfoMap's eps is a similarity."""
  return 1 if hp.clustering == "dbscan" else -1


def _other_eps(hp, is_giant, gaps):
  """The steps from eps that leave it between 0 and 1 at each gap."""
  step = _EPS_STEP * _looser(hp) * (-1 if is_giant else 1)
  moves = np.round(hp.eps + step * np.arange(1, 1 / _EPS_STEP), 4).tolist()
  offsets = [_looser(hp) * gap for gap in gaps]
  return [x for x in moves if 0 < x + min(offsets) <= x + max(offsets) < 1]


def _is_giant(labels):
  return np.mean(labels == 0) >= 0.5


def _is_useless(labels, outliers_are_classes):
  """Whether nothing can be contrasted."""
  is_few = labels.max(initial=-1) < 1
  return is_few and (_is_giant(labels) or not outliers_are_classes)


@checked
def center_by_camera(
  features: _Features, camids: Int[np.ndarray, " n"]
) -> _Features:
  """Subtracts each camera's mean, and scales to unit length again."""
  centered = np.array(features := as_features(features))
  for camera in np.unique(camids):
    centered[camids == camera] -= features[camids == camera].mean(axis=0)
  norms = np.linalg.norm(centered, axis=1, keepdims=True)
  return centered / np.maximum(norms, 1e-12)


@checked
def keep_largest(
  labels: _Labels, most: values.CountOrZero
) -> tuple[_Labels, tuple[str, ...]]:
  """Makes outliers of all but the `most` largest clusters, and a note of it."""
  clusters, at, sizes = np.unique(
    labels, return_inverse=True, return_counts=True
  )
  num = np.sum(clusters >= 0)
  if num <= most:
    return labels, ()
  sizes[clusters < 0] = 0
  kept = np.sort(np.argsort(-sizes, kind="stable")[:most])
  renumber = np.full(len(sizes), -1, labels.dtype)
  renumber[kept] = np.arange(most)
  note = f"the {most} largest of {num} clusters are kept"
  return renumber[at], (note,)


@checked
def describe(
  labels: _Labels, pids: Int[np.ndarray, " n"] | None = None
) -> dict[str, float | int]:
  """How many clusters of which sizes there are, and how true they are.

  It has counts (an image alone is an outlier), and quantiles of the cluster
  sizes; with the true identities also NMI, ARI, and precision and recall of the
  pairs that share a label, for which each outlier is a cluster of its own.
  """
  clusters, at, sizes = np.unique(
    labels, return_inverse=True, return_counts=True
  )
  is_cluster = (clusters >= 0) & (sizes > 1)
  labels, sizes = np.where(is_cluster[at], at, -1), sizes[is_cluster]
  out = {"clusters": len(sizes), "outliers": int(np.sum(labels < 0))}
  if len(sizes):
    names = ("min", "q25", "median", "q75", "max")
    quantiles = np.quantile(sizes, (0, 0.25, 0.5, 0.75, 1))
    out |= {f"size_{n}": q for n, q in zip(names, quantiles, strict=True)}
  if pids is None:
    return out
  alone = np.where(labels < 0, len(labels) + np.arange(len(labels)), labels)
  both = np.unique(np.stack([alone, pids]), axis=1, return_counts=True)[1]
  pairs = lambda counts: np.sum(counts * (counts - 1.0)) / 2
  true, together = pairs(np.unique(pids, return_counts=True)[1]), pairs(sizes)
  return out | {
    "NMI": normalized_mutual_info_score(pids, alone),
    "ARI": adjusted_rand_score(pids, alone),
    "precision": pairs(both) / together if together else 0.0,
    "recall": pairs(both) / true if true else 0.0,
  }


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
  """Adds the seconds that its body takes under that name."""
  start = time.perf_counter()
  try:
    yield
  finally:
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
