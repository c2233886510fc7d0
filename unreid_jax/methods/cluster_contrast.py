"""Cluster Contrast: one centroid a cluster, from an epoch's pseudo labels.

Dai, Wang, Yuan, et al., "Cluster Contrast for Unsupervised Person
Re-Identification" (ACCV 2022, arXiv 2103.11568), after the authors' code
(alibaba/cluster-contrast-reid). The images are clustered each epoch, outliers
are left out, and the bank starts from the clusters' means. A feature is
contrasted with all centroids and then moves its own.
"""

import dataclasses
import functools
from typing import no_type_check

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from unreid_jax import losses, memory
from unreid_jax.config import check_values
from unreid_jax.methods import Batch, Method, euclidean_distance, size_of
from unreid_jax.pseudo_labels.clustering import Clustering, Labelling, cluster

_WRITES = {"momentum": memory.write, "hardest": memory.write_hardest}


@dataclasses.dataclass(frozen=True)
class Hyperparameters(Clustering):
  """The authors' values.

  Attributes:
    temperature: of the logits.
    momentum: weighs the old centroid: .1 nearly replaces it.
    update: "momentum", by each feature in the order of the batch (the
      authors' CM), or "hardest", by the one of the batch that is least
      similar to its centroid (CM_Hard, their `--use-hard`).
    label_smoothing: see `losses.cross_entropy`; not in the authors' code.
  """

  temperature: float = 0.05
  momentum: float = 0.1
  update: str = "momentum"
  label_smoothing: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    check_values(self, {"update": tuple(_WRITES)})


@struct.dataclass
@no_type_check  # its leaves may also be shardings
class State:
  """The clusters' centroids, of which the first `num_clusters` exist."""

  centroids: Float[Array, "k d"]
  num_clusters: Int[Array, ""]
  epoch: Int[Array, ""]


def make(**hyperparameters) -> Method:
  """Cluster Contrast with these `Hyperparameters`."""
  hp = Hyperparameters(**hyperparameters)
  bind = functools.partial
  return Method(
    init=bind(init, hp),
    encode=lambda epoch: "eval",
    label=bind(label, hp),
    refresh=refresh,
    loss=bind(loss, hp),
    update=bind(update, hp),
    distance=euclidean_distance,
  )


def max_clusters(hp: Clustering, num_images: int) -> int:
  """How many rows a bank must have."""
  return num_images if hp.instance_epochs else max(num_images // 2, 2)


def init(hp: Hyperparameters, key, features) -> State:
  """An empty bank for these features, [n, d]."""
  del key
  n, d = size_of(features)
  zero = jnp.zeros((), jnp.int32)
  empty = memory.create(jnp.zeros((max_clusters(hp, n), d)))
  return State(centroids=empty, num_clusters=zero, epoch=zero)


def label(hp: Clustering, state, features, camids, pids) -> Labelling:
  """Clusters the features."""
  del pids
  return cluster(hp, features, camids, int(state.epoch))


def refresh(state: State, features, labels, camids) -> State:
  """The mean feature of each cluster, normalised."""
  del camids
  num = len(state.centroids)
  return state.replace(
    centroids=memory.centroids(features, labels, num),
    num_clusters=jnp.max(labels) + 1,
    epoch=state.epoch + 1,
  )


def loss(hp, state: State, features, batch: Batch, key, negatives=None):
  """Cross-entropy of a feature's cluster against all clusters.

  Args:
    hp: Hyperparameters.
    state: with the centroids.
    features: unit features, [b, d].
    batch: with their labels.
    key: not used.
    negatives: as in `losses.cross_entropy`.
  """
  del key
  features = memory.normalize(features)  # as in the reference
  logits = memory.similarities(state.centroids, features) / hp.temperature
  value = losses.cross_entropy(
    logits, batch.labels, state.num_clusters, hp.label_smoothing, negatives
  )
  return value, {}


def update(hp: Hyperparameters, state: State, features, batch: Batch, key):
  """Moves the centroids of the batch's clusters."""
  del key
  write = _WRITES[hp.update]
  features = memory.normalize(features)
  return state.replace(
    centroids=write(state.centroids, batch.labels, features, hp.momentum)
  )
