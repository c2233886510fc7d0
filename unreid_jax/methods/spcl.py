"""SpCL, self-paced contrastive learning with a hybrid memory, unsupervised.

Ge, Zhu, Chen, et al., "Self-paced Contrastive Learning with Hybrid Memory for
Domain Adaptive Object Re-ID" (NeurIPS 2020, arXiv 2006.02713), after the
authors' code (yxgeee/SpCL). Every image has a row in the memory. Each epoch the
memory itself is clustered; what is unreliable in the clusters and all outliers
are classes of one image. A feature is contrasted with the mean similarity to
the rows of each class, and then moves its own row.
"""

import dataclasses
import functools
from typing import Any, Literal, no_type_check

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from unreid_jax import losses, memory
from unreid_jax.methods import (
  Batch,
  Labels,
  Method,
  StepResult,
  one_each,
  size_of,
)
from unreid_jax.pseudo_labels.clustering import Clustering, cluster
from unreid_jax.pseudo_labels.self_paced import check_gap, refine
from unreid_jax.values import BadValue, BelowOne, NotNegative, Positive

Recluster = Literal["memory", "features"]
Outliers = Literal["classes", "none"]


@dataclasses.dataclass(frozen=True)
class Hyperparameters(Clustering):
  """The authors' values.

  Attributes:
    temperature: divides the similarities; the result are the logits.
    momentum: the weight of the old row.
    eps_gap: eps minus it and plus it tell which clusters are reliable.
    recluster: what is clustered after the first epoch: "memory", the memory as
      the steps have left it, without a pass over the images; or "features",
      which are encoded anew each epoch, and which the memory then starts from.
    outliers: "classes", each image that is alone is a class of its own, as the
      authors have it; or "none", it is left out. Ours, for first features so
      poor that most images are alone though they are somebody's; with
      recluster="features", as nothing moves the rows of outliers.
  """

  temperature: Positive = 0.05
  momentum: BelowOne = 0.2
  eps_gap: NotNegative = 0.02
  recluster: Recluster = "memory"
  outliers: Outliers = "classes"

  def __post_init__(self):
    super().__post_init__()
    check_gap("eps_gap", self.eps, self.eps_gap)
    check_outliers(self)


def check_outliers(hp: Any) -> None:
  """Refuses to leave out outliers whose rows would be clustered for ever."""
  if (hp.outliers, hp.recluster) == ("none", "memory"):
    fix = 'set it to "classes", or recluster to "features"'
    raise BadValue(
      "outliers", f'is "none", and nothing moves their rows: {fix}'
    )


@struct.dataclass
@no_type_check  # its leaves may also be shardings
class State:
  """A row for each image, and the class of each row (-1: no image)."""

  bank: Float[Array, "k d"]
  labels: Int[Array, " k"]
  sizes: Int[Array, " k"]  # how many rows each class has
  threshold: Float[Array, ""]  # of independence; NaN before any clustering


def make(**hyperparameters) -> Method:
  """SpCL with these `Hyperparameters`."""
  hp = Hyperparameters(**hyperparameters)
  bind = functools.partial
  return Method(
    init=init, label=bind(label, hp), refresh=refresh, step=bind(step, hp)
  )


def init(key, shapes) -> State:
  """An empty memory for features [n, d]."""
  del key
  return State(**empty(shapes), threshold=jnp.full((), jnp.nan))


def empty(shapes) -> dict[str, Array]:
  """The fields of a state that are about rows and classes."""
  bank = memory.create(jnp.zeros(size_of(shapes), shapes.dtype))
  return {
    "bank": bank,
    "labels": jnp.full(len(bank), -1, jnp.int32),
    "sizes": jnp.zeros(len(bank), jnp.int32),
  }


def label(hp, state: State, encode, split, epoch: int) -> Labels:
  """Clusters at three eps, and what is reliable in them."""
  num = len(split.camids)
  features, given = features_to_cluster(hp, state, encode, num, epoch)
  if epoch < hp.instance_epochs:
    return one_each(num, given | {"threshold": np.asarray(state.threshold)})
  gaps = 0.0, -hp.eps_gap, hp.eps_gap
  found = cluster(hp, features, split.camids, gaps, hp.outliers == "classes")
  labels, threshold = refine(*found.labels, threshold=float(state.threshold))
  labels = np.unique(labels, return_inverse=True)[1].astype(np.int32)
  alone = np.bincount(labels)[labels] == 1
  if hp.outliers == "none":
    labels[alone] = -1
    labels = np.unique(np.append(labels, -1), return_inverse=True)[1][:-1] - 1
    labels = labels.astype(np.int32)
  unreliable = int(np.sum(alone & (found.labels[0] >= 0)))
  figures = {"eps": found.eps, "unreliable": unreliable}
  given["threshold"] = np.array(threshold, np.float32)
  return Labels(labels, given, figures, found.seconds, found.notes)


def features_to_cluster(hp, state, encode, num: int, epoch: int):
  """What is clustered, [n, d]; and what `given` must hold for a new memory."""
  if epoch and hp.recluster == "memory":
    return memory.to_host(state.bank, num), {}
  features = encode()
  return features, {"features": features}


def refresh(state, labels, given, key):
  """New classes; and, if there are features, a memory that holds these."""
  del key
  k = len(state.bank)
  labels = jnp.pad(labels, (0, k - len(labels)), constant_values=-1)
  at = jnp.where(labels < 0, k, labels)
  given = dict(given)
  if "features" in given:
    given["bank"] = memory.create(given.pop("features"))
  return state.replace(
    labels=labels,
    sizes=jnp.zeros(k, jnp.int32).at[at].add(1, mode="drop"),
    **given,
  )


def step(
  hp: Hyperparameters, state: State, features, batch: Batch, key
) -> StepResult:
  """Softmax over the classes' mean similarities, then the writes."""
  del key
  logits = memory.similarities(state.bank, features) / hp.temperature
  logits = class_means(state, logits)
  exists = state.sizes > 0
  loss = losses.softmax_with_epsilon(logits, batch.labels, exists)
  return loss, (write(hp, state, features, batch), {})


def class_means(state, logits: Float[Array, "b k"]) -> Float[Array, "b k"]:
  """The mean over the rows of each class; 0 for a class without rows.

  That is the product with the rows' mean, which is not normalised.
  """
  sums = memory.class_sums(logits, state.labels)
  return sums / jnp.maximum(state.sizes, 1).astype(sums.dtype)[None]


def write(hp, state, features, batch: Batch):
  """Moves the rows of the batch's images, in the order of the batch."""
  new = memory.write(state.bank, batch.indices, features, hp.momentum)
  return state.replace(bank=new)
