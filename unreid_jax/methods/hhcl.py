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
from typing import Literal, no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from unreid_jax import memory
from unreid_jax.methods import (
  Batch,
  Method,
  StepResult,
  cluster_contrast,
  size_of,
)
from unreid_jax.methods.cluster_contrast import loss_of
from unreid_jax.pseudo_labels.clustering import Clustering
from unreid_jax.values import BelowOne, Count, Fraction, InsideUnit, Positive


@dataclasses.dataclass(frozen=True)
class Hyperparameters(Clustering):
  """The authors' values for Market-1501.

  Attributes:
    memory: "two_rows" or "instances", see above.
    temperature: divides the similarities; the result are the logits.
    momentum: the weight of the old row.
    hard_weight: w, the weight of the hard rows' loss (two_rows) or, as in the
      code, of the centroids' loss (instances).
    loss_weights: how the losses of the two rows are weighed: "code", w hard +
      w (1 - w) mean, which is .5 and .25, by a bracket in the authors' code; or
      "convex", w and 1 - w.
    num_instances: P, the instances of a cluster in the memory.
    label_smoothing: acts on both losses, see `losses.cross_entropy`; the code
      takes any value for .1.
  """

  eps: InsideUnit = 0.45
  memory: Literal["two_rows", "instances"] = "two_rows"
  temperature: Positive = 0.05
  momentum: BelowOne = 0.1
  hard_weight: Fraction = 0.5
  loss_weights: Literal["code", "convex"] = "code"
  num_instances: Count = 16
  label_smoothing: BelowOne = 0.0


@struct.dataclass
@no_type_check  # its leaves may also be shardings
class State:
  """The memory; of its k clusters the first `num_clusters` exist."""

  centroids: Float[Array, "k d"]  # the mean rows
  hard: Float[Array, "k *p d"]  # the hard rows, or P instances a cluster
  num_clusters: Int[Array, ""]


def make(**hyperparameters) -> Method:
  """HHCL with these `Hyperparameters`."""
  hp = Hyperparameters(**hyperparameters)
  bind = functools.partial
  step = two_rows_step if hp.memory == "two_rows" else instances_step
  return Method(
    init=bind(init, hp),
    label=bind(cluster_contrast.label, hp),
    refresh=bind(refresh, hp),
    step=bind(step, hp),
    proxies=bind(cluster_contrast.proxies, hp),
  )


def init(hp: Hyperparameters, key, shapes) -> State:
  """Empty banks for features [n, d]."""
  del key
  n, d = size_of(shapes)
  num = cluster_contrast.max_clusters(hp, n)
  instances = () if hp.memory == "two_rows" else (hp.num_instances,)
  return State(
    centroids=memory.create(jnp.zeros((num, d), shapes.dtype)),
    hard=memory.create(jnp.zeros((num, *instances, d), shapes.dtype)),
    num_clusters=jnp.zeros((), jnp.int32),
  )


def refresh(hp: Hyperparameters, state: State, labels, given, key) -> State:
  """The mean of each cluster in its row; instances drawn with replacement."""
  k = len(state.centroids)
  centroids = hard = memory.centroids(given, labels, k)
  if hp.memory == "instances":
    draws = jax.random.uniform(key, (k, hp.num_instances))
    order = jnp.argsort(jnp.where(labels < 0, k, labels))
    is_in = (labels >= 0).astype(jnp.int32)
    sizes = jnp.zeros(k, jnp.int32).at[labels].add(is_in, mode="drop")
    place = (jnp.cumsum(sizes) - sizes)[:, None]
    chosen = jnp.floor(draws * sizes[:, None].astype(draws.dtype))
    chosen = order[jnp.minimum(place + chosen.astype(int), len(order) - 1)]
    hard = memory.pick(given, jnp.where(sizes[:, None] > 0, chosen, -1))
  return state.replace(
    centroids=centroids, hard=hard, num_clusters=jnp.max(labels) + 1
  )


def two_rows_step(
  hp, state: State, features, batch: Batch, key, negatives=None
) -> StepResult:
  """Cross-entropies against the hard and the mean rows; each moves once."""
  del key
  logits = [
    memory.similarities(x, features) for x in (state.hard, state.centroids)
  ]
  w = hp.hard_weight
  weights = w, w * (1 - w) if hp.loss_weights == "code" else 1 - w
  loss, figures = _weigh(hp, weights, logits, state, batch, negatives)
  write = batch.labels, features, hp.momentum
  hard = memory.write_hardest(state.hard, *write)
  centroids = memory.write_mean(state.centroids, *write)
  return loss, (state.replace(hard=hard, centroids=centroids), figures)


def instances_step(
  hp, state: State, features, batch: Batch, key, negatives=None
) -> StepResult:
  """Cross-entropies against the hardest instances and the centroids.

  Then the batch's mean moves the centroids, and the j-th feature of a cluster
  in the batch replaces its j-th instance. Beyond the P-th they are dropped; the
  authors' code writes them into the next cluster's instances.
  """
  del key
  k, p, d = state.hard.shape
  rows = state.hard.reshape(k * p, d)
  each = memory.similarities(rows, features).reshape(-1, k, p)
  is_own = batch.labels[:, None] == jnp.arange(k)[None]
  hardest = jnp.where(is_own, each.min(axis=2), each.max(axis=2))
  logits = hardest, memory.similarities(state.centroids, features)
  weights = 1 - hp.hard_weight, hp.hard_weight
  loss, figures = _weigh(hp, weights, logits, state, batch, negatives)
  same = batch.labels[:, None] == batch.labels[None]
  turn = jnp.tril(same, -1).sum(axis=1)
  at = jnp.where(turn < p, batch.labels * p + turn, -1)
  hard = memory.write(rows, at, features, 0.0).reshape(k, p, d)
  centroids = memory.write_mean(
    state.centroids, batch.labels, features, hp.momentum
  )
  return loss, (state.replace(hard=hard, centroids=centroids), figures)


def _weigh(hp, weights, similarities, state, batch, negatives):
  """The hard and the mean loss, weighed and added up; and both as figures."""
  logits = [x / hp.temperature for x in similarities]
  losses = [loss_of(hp, x, state, batch, negatives) for x in logits]
  (hard, of_hard), (mean, of_mean) = losses
  added = jax.tree.map(
    lambda a, b: weights[0] * a + weights[1] * b, of_hard, of_mean
  )
  figures = {"loss_hard": hard, "loss_mean": mean} | added
  return weights[0] * hard + weights[1] * mean, figures
