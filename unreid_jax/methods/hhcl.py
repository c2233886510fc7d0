"""HHCL: a cluster-level and a hard-instance contrast, weighed.

Hu, Zhu, He, "Hard-sample Guided Hybrid Contrast Learning for Unsupervised
Person Re-Identification" (IC-NIDC 2021, arXiv 2109.12333), after the authors'
code (bupt-ai-cz/HHCL-ReID). The abstract, the framework figure and the authors'
answers say what the paper has; the text was not at hand.

Two memories, and the paper's is not the one that made the published numbers:

  "two_rows"   each cluster has a hard row, moved by the batch's least similar
               feature, and a mean row, moved by the batch's mean. CMhybrid in
               the code: the released commands and checkpoints (default).
  "instances"  each cluster has a centroid and P of its features; an anchor is
               contrasted with the least similar one of its own cluster and the
               most similar one of each other. CMhybrid_v2: the paper's, after
               the authors, who call it unstable.
"""

import dataclasses
import functools
from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, UInt32

from unreid_jax import losses, memory
from unreid_jax.config import check_values
from unreid_jax.methods import Batch, Method, cluster_contrast, size_of
from unreid_jax.pseudo_labels.clustering import Clustering


@dataclasses.dataclass(frozen=True)
class Hyperparameters(Clustering):
  """The authors' values for Market-1501.

  Attributes:
    memory: "two_rows" or "instances".
    temperature: of the logits.
    momentum: weighs the old row.
    hard_weight: w, of the hard rows' loss (two_rows) or, as in the code, of
      the centroids' loss (instances).
    loss_weights: of the two rows: "code", w hard + w (1 - w) mean, which is .5
      and .25, by a bracket in the authors' code; or "convex", w and 1 - w.
    num_instances: P, the instances of a cluster in the memory.
    label_smoothing: of both losses, see `losses.cross_entropy`; the code takes
      any value for .1.
  """

  eps: float = 0.45
  memory: str = "two_rows"
  temperature: float = 0.05
  momentum: float = 0.1
  hard_weight: float = 0.5
  loss_weights: str = "code"
  num_instances: int = 16
  label_smoothing: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    choices = {
      "memory": ("two_rows", "instances"),
      "loss_weights": ("code", "convex"),
    }
    check_values(self, choices)


@struct.dataclass
@no_type_check  # its leaves may also be shardings
class State:
  """The memory; of its k clusters the first `num_clusters` exist."""

  centroids: Float[Array, "k d"]  # the mean rows
  hard: Float[Array, "k *p d"]  # the hard rows, or P instances a cluster
  num_clusters: Int[Array, ""]
  key: UInt32[Array, " two"]  # chooses the first instances
  epoch: Int[Array, ""]


def make(**hyperparameters) -> Method:
  """HHCL with these `Hyperparameters`."""
  hp = Hyperparameters(**hyperparameters)
  has_two_rows = hp.memory == "two_rows"
  bind = functools.partial
  method = cluster_contrast.make(**_shared(hp))
  return method._replace(
    init=bind(init, hp),
    refresh=bind(refresh, hp),
    loss=bind(two_rows_loss if has_two_rows else instances_loss, hp),
    update=bind(update_two_rows if has_two_rows else update_instances, hp),
  )


def init(hp: Hyperparameters, key, features) -> State:
  """Empty banks for these features, [n, d]."""
  n, d = size_of(features)
  num = cluster_contrast.max_clusters(hp, n)
  instances = () if hp.memory == "two_rows" else (hp.num_instances,)
  return State(
    centroids=memory.create(jnp.zeros((num, d))),
    hard=memory.create(jnp.zeros((num, *instances, d))),
    num_clusters=jnp.zeros((), jnp.int32),
    key=jax.random.key_data(key),
    epoch=jnp.zeros((), jnp.int32),
  )


def refresh(hp: Hyperparameters, state: State, features, labels, camids):
  """Mean of each cluster in its row; instances drawn with replacement."""
  del camids
  k = len(state.centroids)
  centroids = hard = memory.centroids(features, labels, k)
  if hp.memory == "instances":
    key = jax.random.wrap_key_data(state.key)
    draws = jax.random.uniform(
      jax.random.fold_in(key, state.epoch), (k, hp.num_instances)
    )
    order = jnp.argsort(jnp.where(labels < 0, k, labels))
    sizes = jnp.zeros(k, jnp.int32).at[labels].add(labels >= 0, mode="drop")
    place = jnp.cumsum(sizes) - sizes
    chosen = jnp.floor(draws * sizes[:, None]).astype(jnp.int32)
    chosen = order[jnp.minimum(place[:, None] + chosen, len(order) - 1)]
    exists = (sizes > 0)[:, None, None]
    hard = memory.create(jnp.where(exists, features[chosen], 0))
  return state.replace(
    centroids=centroids,
    hard=hard,
    num_clusters=jnp.max(labels) + 1,
    epoch=state.epoch + 1,
  )


def two_rows_loss(
  hp: Hyperparameters, state, features, batch: Batch, key, negatives=None
):
  """Cross-entropies against the hard and against the mean rows.

  `negatives`, here and below: as in `losses.cross_entropy`, of both.
  """
  del key
  rest = state, features, batch, negatives
  hard = _cross_entropy(hp, state.hard, *rest)
  mean = _cross_entropy(hp, state.centroids, *rest)
  w = hp.hard_weight
  w_mean = w * (1 - w) if hp.loss_weights == "code" else 1 - w
  return w * hard + w_mean * mean, {"loss_hard": hard, "loss_mean": mean}


def update_two_rows(hp: Hyperparameters, state, features, batch: Batch, key):
  """Moves both rows of each cluster in the batch, once."""
  del key
  write = (batch.labels, features, hp.momentum)
  return state.replace(
    hard=memory.write_hardest(state.hard, *write),
    centroids=memory.write_mean(state.centroids, *write),
  )


def instances_loss(
  hp: Hyperparameters, state, features, batch: Batch, key, negatives=None
):
  """Cross-entropies against the centroids and the hardest instances."""
  del key
  k, p, d = state.hard.shape
  flat = memory.similarities(state.hard.reshape(k * p, d), features)
  each = flat.reshape(-1, k, p)
  is_own = batch.labels[:, None] == jnp.arange(k)
  hardest = jnp.where(is_own, each.min(axis=2), each.max(axis=2))
  hard = _of_logits(hp, hardest / hp.temperature, state, batch, negatives)
  mean = _cross_entropy(hp, state.centroids, state, features, batch, negatives)
  value = hp.hard_weight * mean + (1 - hp.hard_weight) * hard
  return value, {"loss_hard": hard, "loss_mean": mean}


def update_instances(hp: Hyperparameters, state, features, batch: Batch, key):
  """Moves the centroids by the batch's mean, and replaces the instances.

  The j-th feature of a cluster in the batch replaces its j-th instance. Beyond
  the P-th they are dropped; the authors' code writes them into the next
  cluster's instances.
  """
  del key
  k, p, d = state.hard.shape
  same = batch.labels[:, None] == batch.labels
  turn = jnp.tril(same, -1).sum(axis=1)
  rows = jnp.where(turn < p, batch.labels * p + turn, -1)
  instances = memory.write(state.hard.reshape(k * p, d), rows, features, 0.0)
  return state.replace(
    hard=instances.reshape(k, p, d),
    centroids=memory.write_mean(
      state.centroids, batch.labels, features, hp.momentum
    ),
  )


def _cross_entropy(hp, bank, state, features, batch, negatives):
  logits = memory.similarities(bank, features) / hp.temperature
  return _of_logits(hp, logits, state, batch, negatives)


def _of_logits(hp, logits, state, batch, negatives):
  return losses.cross_entropy(
    logits, batch.labels, state.num_clusters, hp.label_smoothing, negatives
  )


def _shared(hp):
  """The hyper-parameters that say how to cluster."""
  names = [field.name for field in dataclasses.fields(Clustering)]
  return {name: getattr(hp, name) for name in names}
