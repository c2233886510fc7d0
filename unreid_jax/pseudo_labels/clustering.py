"""From features to the pseudo labels of an epoch, and how good they are."""

import dataclasses
import time
import types
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from unreid_jax.config import check_values
from unreid_jax.pseudo_labels.dbscan import dbscan
from unreid_jax.pseudo_labels.infomap import check_installed, infomap
from unreid_jax.pseudo_labels.jaccard import (
  TooManyPairsError,
  jaccard_from_neighbors,
)
from unreid_jax.pseudo_labels.neighbors import neighbors

_EPS_STEP = 0.05
_EMPTY = types.MappingProxyType({})


class Labelling(NamedTuple):
  """Pseudo labels, and what is to be reported of them.

  Attributes:
    labels: of all train images; -1 = outlier.
    scalars: figures of the epoch.
    seconds: of each part.
    notes: what a user should know, a line each.
    state: fields of the method's state that only the labelling knows, by name;
      the loop replaces them before `refresh`.
  """

  labels: Int[np.ndarray, " n"]
  scalars: Mapping[str, float] = _EMPTY
  seconds: Mapping[str, float] = _EMPTY
  notes: tuple[str, ...] = ()
  state: Mapping[str, np.ndarray] = _EMPTY


@dataclasses.dataclass(frozen=True)
class Clustering:
  """How a method clusters the images; the part that all of them share.

  Attributes:
    clustering: "dbscan" on the k-reciprocal Jaccard distance, or "infomap" on
      the graph of similar neighbours.
    k1: neighbours of an image, itself included.
    k2: neighbours whose encodings are averaged (Jaccard); 1: none.
    eps: largest distance of neighbours for DBSCAN, smallest cosine similarity
      of neighbours for InfoMap.
    min_samples: neighbours that make a core point of DBSCAN, itself included;
      the smallest cluster that InfoMap keeps.
    center_cameras: subtracts each camera's mean feature before clustering.
      Ours, not the papers': from random weights most of what a feature shows is
      its camera.
    instance_epochs: first epochs in which every image is a cluster of its own.
      Ours too, for random weights, whose clusters are worth nothing.
  """

  clustering: str = "dbscan"
  k1: int = 30
  k2: int = 6
  eps: float = 0.6
  min_samples: int = 4
  center_cameras: bool = False
  instance_epochs: int = 0

  def __post_init__(self):
    check_values(self, {"clustering": ("dbscan", "infomap")}, _RANGES)
    if self.clustering == "infomap":
      check_installed()


# Some are of a method's own.
_RANGES = (
  ("k1", lambda x: x >= 2, "to 2 or more"),
  ("k2", lambda x: x >= 1, "to 1 or more"),
  ("min_samples", lambda x: x >= 1, "to 1 or more"),
  ("eps", lambda x: 0 < x < 1, "between 0 and 1"),
  ("instance_epochs", lambda x: x >= 0, "to 0 or more"),
  ("num_instances", lambda x: x >= 1, "to 1 or more"),
  ("temperature", lambda x: x > 0, "above 0"),
  ("momentum", lambda x: 0 <= x < 1, "to 0 or more, below 1"),
  ("label_smoothing", lambda x: 0 <= x < 1, "to 0 or more, below 1"),
  ("hard_weight", lambda x: 0 <= x <= 1, "from 0 to 1"),
)


def cluster(
  hp: Clustering,
  features: Float[np.ndarray, "n d"],
  camids: Int[np.ndarray, " n"],
  epoch: int,
) -> Labelling:
  """Clusters the images of an epoch, n / 2 clusters at most.

  With less than two clusters there is nothing to contrast. Then eps is moved in
  steps of .05 until there are two or more: to tighter ones if one cluster holds
  half of the images, else to looser ones. If none does it, the labels hold
  fewer than two clusters.

  Args:
    hp: how.
    features: unit features of the train images.
    camids: their cameras.
    epoch: from 0.
  """
  if epoch < hp.instance_epochs:
    return Labelling(np.arange(len(features), dtype=np.int32))
  seconds = {}
  if hp.center_cameras:
    features = center_by_camera(features, camids)
  if hp.clustering == "dbscan":
    found = timed(seconds, "neighbors", neighbors, features, hp.k1)

  jaccard, reach = None, 0.0  # the distances up to the loosest eps so far

  def attempt(eps):
    nonlocal jaccard, reach
    if hp.clustering == "infomap":
      arguments = features, hp.k1, eps, hp.min_samples
      return timed(seconds, "infomap", infomap, *arguments)
    if eps > reach:
      arguments = features, *found, hp.k2, eps
      try:
        jaccard = timed(seconds, "jaccard", jaccard_from_neighbors, *arguments)
      except TooManyPairsError:  # nearly all are alike
        return np.zeros(len(features), np.int32)
      reach = eps
    return timed(seconds, "dbscan", dbscan, jaccard, eps, hp.min_samples)

  eps, labels, notes = hp.eps, attempt(hp.eps), []
  begin = f"eps {eps} makes {labels.max(initial=-1) + 1} cluster(s)"
  if labels.max(initial=-1) < 1:
    is_giant = np.mean(labels == 0) >= 0.5
    looser = 1 if hp.clustering == "dbscan" else -1  # InfoMap's is a similarity
    step = -looser * _EPS_STEP if is_giant else looser * _EPS_STEP
    moves = np.round(hp.eps + step * np.arange(1, 1 / _EPS_STEP), 4).tolist()
    for eps in (x for x in moves if 0 < x < 1):
      labels = attempt(eps)
      if labels.max(initial=-1) > 0:
        notes.append(f"{begin}; this epoch has eps {eps}")
        break
    else:
      notes.append(f"{begin}; no other eps makes two")
  kept = keep_largest(labels, max(len(labels) // 2, 2))
  if kept is not labels:
    of = labels.max() + 1
    notes.append(f"the {kept.max() + 1} largest of {of} clusters are kept")
  return Labelling(kept, {"eps": eps}, seconds, tuple(notes))


def center_by_camera(
  features: Float[np.ndarray, "n d"], camids: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n d"]:
  """Unit features after each camera's mean has been subtracted."""
  centered = np.array(features)
  for camera in np.unique(camids):
    centered[camids == camera] -= features[camids == camera].mean(axis=0)
  norms = np.linalg.norm(centered, axis=1, keepdims=True)
  return centered / np.maximum(norms, 1e-12)


def keep_largest(labels: Int[np.ndarray, " n"], most: int):
  """Labels with at most so many clusters; the images of the rest are -1."""
  sizes = np.bincount(labels[labels >= 0])
  if len(sizes) <= most:
    return labels
  kept = np.sort(np.argsort(-sizes, kind="stable")[:most])
  renumber = np.full(len(sizes) + 1, -1, labels.dtype)
  renumber[kept] = np.arange(most)
  return renumber[labels]


def describe(
  labels: Int[np.ndarray, " n"], pids: Int[np.ndarray, " n"] | None = None
):
  """How many clusters of which sizes, and how true they are.

  Args:
    labels: pseudo labels; -1 = outlier, and so is a cluster of one image.
    pids: the true identities, if they are known.

  Returns:
    clusters, outliers, quantiles of the cluster sizes; with pids NMI, ARI, and
    precision and recall of the pairs of images that share a label. Each
    outlier counts as a cluster of its own here.
  """
  sizes = np.bincount(labels[labels >= 0])
  labels = np.where(np.isin(labels, np.flatnonzero(sizes == 1)), -1, labels)
  sizes = sizes[sizes > 1]
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


def timed(seconds: dict[str, float], name: str, function, *arguments):
  """The function's result; adds the seconds it took under that name."""
  start = time.perf_counter()
  result = function(*arguments)
  seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
  return result
