"""Cluster Contrast: one centroid a cluster, from an epoch's pseudo labels.

Dai, Wang, Yuan, et al., "Cluster Contrast for Unsupervised Person
Re-Identification" (ACCV 2022, arXiv 2103.11568), after the authors' code
(alibaba/cluster-contrast-reid). The images are clustered each epoch, outliers
are left out, and the bank starts from the clusters' means. A feature is
contrasted with all centroids and then moves its own.
"""

import dataclasses
import functools
from typing import Literal, no_type_check

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from unreid_jax import losses, memory
from unreid_jax.methods import (
  Batch,
  Figures,
  Labels,
  Method,
  Proxies,
  StepResult,
  one_each,
  size_of,
)
from unreid_jax.pseudo_labels.clustering import (
  Clustering,
  cluster,
  keep_largest,
)
from unreid_jax.values import BelowOne, Positive

_WRITES = {"momentum": memory.write, "hardest": memory.write_hardest}


@dataclasses.dataclass(frozen=True)
class Hyperparameters(Clustering):
  """The authors' values.

  Attributes:
    temperature: divides the similarities; the result are the logits.
    momentum: the weight of the old centroid: .1 nearly replaces it.
    bank_update: which features of a batch move a centroid: "momentum", each of
      its cluster's in the order of the batch (the authors' CM), or "hardest",
      the one that is least similar to it (CM_Hard, their `--use-hard`).
    label_smoothing: see `losses.cross_entropy`; not in the authors' code.
  """

  temperature: Positive = 0.05
  momentum: BelowOne = 0.1
  bank_update: Literal["momentum", "hardest"] = "momentum"
  label_smoothing: BelowOne = 0.0


@struct.dataclass
@no_type_check  # its leaves may also be shardings
class State:
  """The clusters' centroids, of which the first `num_clusters` exist."""

  centroids: Float[Array, "k d"]
  num_clusters: Int[Array, ""]


def make(**hyperparameters) -> Method:
  """Cluster Contrast with these `Hyperparameters`."""
  hp = Hyperparameters(**hyperparameters)
  bind = functools.partial
  return Method(
    init=bind(init, hp),
    label=bind(label, hp),
    refresh=refresh,
    step=bind(step, hp),
    proxies=bind(proxies, hp),
  )


def max_clusters(hp: Clustering, num_images: int) -> int:
  """How many clusters a bank must have room for."""
  return num_images if hp.instance_epochs else max(num_images // 2, 2)


def init(hp: Clustering, key, shapes) -> State:
  """An empty bank for features [n, d]."""
  del key
  n, d = size_of(shapes)
  empty = memory.create(jnp.zeros((max_clusters(hp, n), d), shapes.dtype))
  return State(centroids=empty, num_clusters=jnp.zeros((), jnp.int32))


def label(hp: Clustering, state, encode, split, epoch: int) -> Labels:
  """Clusters the images; `refresh` gets their features."""
  del state
  features = encode()
  if epoch < hp.instance_epochs:
    return one_each(len(split.camids), features)
  found = cluster(hp, features, split.camids)
  most = max_clusters(hp, len(split.camids))
  labels, notes = keep_largest(found.labels[0], most)
  figures = {"eps": found.eps}
  return Labels(labels, features, figures, found.seconds, found.notes + notes)


def refresh(state: State, labels, given, key) -> State:
  """The mean feature of each cluster, normalised."""
  del key
  num = len(state.centroids)
  return state.replace(
    centroids=memory.centroids(given, labels, num),
    num_clusters=jnp.max(labels) + 1,
  )


def step(
  hp, state: State, features, batch: Batch, key, negatives=None
) -> StepResult:
  """Cross-entropy of a feature's cluster, then the centroids move."""
  del key
  features = memory.normalize(features)  # as in the reference
  logits = memory.similarities(state.centroids, features) / hp.temperature
  loss, figures = loss_of(hp, logits, state, batch, negatives)
  write = batch.labels, features, hp.momentum
  centroids = _WRITES[hp.bank_update](state.centroids, *write)
  return loss, (state.replace(centroids=centroids), figures)


def loss_of(
  hp, logits, state, batch: Batch, negatives
) -> tuple[Float[Array, ""], Figures]:
  """Cross-entropy of logits [b, k], and what other negatives add to it."""
  rest = state.num_clusters, hp.label_smoothing
  loss = losses.cross_entropy(logits, batch.labels, *rest)
  if negatives is None:
    return loss, {}
  added = losses.added_by_negatives(logits, state.num_clusters, negatives)
  return loss + added, {"loss_negatives": added}


def proxies(hp, state) -> Proxies:
  """The centroids."""
  return Proxies(state.centroids, state.num_clusters, hp.temperature)
