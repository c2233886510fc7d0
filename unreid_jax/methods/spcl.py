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
from typing import no_type_check

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from unreid_jax import losses, memory
from unreid_jax.config import check_values
from unreid_jax.methods import Batch, Method, euclidean_distance, size_of
from unreid_jax.pseudo_labels.clustering import Clustering, Labelling
from unreid_jax.pseudo_labels.self_paced import check_gap, cluster_at, refine

RECLUSTER = ("memory", "features")


@dataclasses.dataclass(frozen=True)
class Hyperparameters(Clustering):
  """The authors' values.

  Attributes:
    temperature: of the logits.
    momentum: weighs the old row.
    eps_gap: eps minus it and plus it tell which clusters are reliable.
    recluster: "memory" clusters the memory as it is, without a pass over the
      images after the first epoch; "features" encodes all images each epoch,
      clusters their features, and starts the memory from them.
  """

  temperature: float = 0.05
  momentum: float = 0.2
  eps_gap: float = 0.02
  recluster: str = "memory"

  def __post_init__(self):
    super().__post_init__()
    check_gap("eps_gap", self.eps, self.eps_gap)
    check_values(self, {"recluster": RECLUSTER})


@struct.dataclass
@no_type_check  # its leaves may also be shardings
class State:
  """A row for each image, and the class of each row (-1: no image)."""

  bank: Float[Array, "k d"]
  labels: Int[Array, " k"]
  sizes: Int[Array, " k"]  # rows of each class
  epoch: Int[Array, ""]
  threshold: Float[Array, ""]  # of independence; NaN: not yet set


def make(**hyperparameters) -> Method:
  """SpCL with these `Hyperparameters`."""
  hp = Hyperparameters(**hyperparameters)
  bind = functools.partial
  return Method(
    init=init,
    encode=bind(encode, hp),
    label=bind(label, hp),
    refresh=refresh,
    loss=bind(loss, hp),
    update=bind(update, hp),
    distance=euclidean_distance,
  )


def init(key, features) -> State:
  """An empty memory for these features, [n, d]."""
  del key
  return State(**empty(features), threshold=jnp.full((), jnp.nan))


def empty(features) -> dict[str, Array]:
  """The fields of a state that are about rows and classes."""
  bank = memory.create(jnp.zeros(size_of(features)))
  return {
    "bank": bank,
    "labels": jnp.full(len(bank), -1, jnp.int32),
    "sizes": jnp.zeros(len(bank), jnp.int32),
    "epoch": jnp.zeros((), jnp.int32),
  }


def encode(hp, epoch: int) -> str:
  """A pass over the images fills the memory; from then on it is enough."""
  return "memory" if epoch and hp.recluster == "memory" else "eval"


def label(hp: Hyperparameters, state: State, features, camids, pids):
  """Clusters at three eps, and what is reliable in them."""
  del pids
  if int(state.epoch) < hp.instance_epochs:
    return Labelling(np.arange(len(camids), dtype=np.int32))
  features = rows_to_cluster(state, features, camids)
  gaps = 0.0, -hp.eps_gap, hp.eps_gap
  found, seconds = cluster_at(hp, features, camids, *gaps)
  labels, threshold = refine(*found, threshold=float(state.threshold))
  labels = np.unique(labels, return_inverse=True)[1].astype(np.int32)
  alone = np.bincount(labels)[labels] == 1
  scalars = {"eps": hp.eps, "unreliable": int(np.sum(alone & (found[0] >= 0)))}
  return Labelling(
    labels, scalars, seconds, state={"threshold": np.array(threshold, "f4")}
  )


def rows_to_cluster(state, features, camids) -> np.ndarray:
  """The features, or in their absence what the memory holds of the images."""
  if features is None:
    return memory.to_host(state.bank, len(camids))
  return features


def refresh(state, features, labels, camids):
  """New classes; and, if there are features, a memory that holds these."""
  del camids
  k = len(state.bank)
  labels = jnp.pad(labels, (0, k - len(labels)), constant_values=-1)
  at = jnp.where(labels < 0, k, labels)
  return state.replace(
    bank=state.bank if features is None else memory.create(features),
    labels=labels,
    sizes=jnp.zeros(k, jnp.int32).at[at].add(1, mode="drop"),
    epoch=state.epoch + 1,
  )


def loss(hp: Hyperparameters, state: State, features, batch: Batch, key):
  """Softmax over the classes, of mean similarities."""
  del key
  logits = memory.similarities(state.bank, features) / hp.temperature
  logits = class_means(state, logits)
  exists = state.sizes > 0
  return losses.softmax_with_epsilon(logits, batch.labels, exists), {}


def class_means(state, logits: Float[Array, "b k"]) -> Float[Array, "b k"]:
  """Mean over the rows of each class; 0 for a class without rows.

  That is the product with the rows' mean, which is not normalised.
  """
  sums = memory.class_sums(logits, state.labels)
  return sums / jnp.maximum(state.sizes, 1)


def update(hp, state, features, batch: Batch, key):
  """Moves the rows of the batch's images, in the order of the batch."""
  del key
  write = batch.indices, features, hp.momentum
  return state.replace(bank=memory.write(state.bank, *write))
