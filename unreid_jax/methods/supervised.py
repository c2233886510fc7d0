"""The upper bound: Cluster Contrast with the true identities as clusters.

No paper of its own: what the same encoder, sampler and loss reach when the
labels are right. HHCL's authors report such a row as "supervised".
"""

import dataclasses
from typing import Literal

import numpy as np

from unreid_jax import UserError
from unreid_jax.methods import Labels, Method, cluster_contrast
from unreid_jax.pseudo_labels.clustering import keep_largest
from unreid_jax.values import BelowOne, Checked, Positive


@dataclasses.dataclass(frozen=True)
class Hyperparameters(Checked):
  """Those of Cluster Contrast that are not about clustering."""

  temperature: Positive = 0.05
  momentum: BelowOne = 0.1
  bank_update: Literal["momentum", "hardest"] = "momentum"
  label_smoothing: BelowOne = 0.0


def make(**hyperparameters) -> Method:
  """Cluster Contrast on true labels with these `Hyperparameters`."""
  hp = Hyperparameters(**hyperparameters)
  method = cluster_contrast.make(**dataclasses.asdict(hp))
  return method._replace(label=label)


def label(state, encode, split, epoch: int) -> Labels:
  """The identities, numbered from 0 in ascending order; junk is left out.

  Raises:
    UserError: the images have no identities.
  """
  del state, epoch
  if (split.pids < 0).all():
    raise UserError(
      "the train images have no identities, and the method supervised needs "
      "them: choose another method"
    )
  known, labels = np.unique(split.pids, return_inverse=True)
  labels = np.maximum(labels - np.sum(known < 0), -1).astype(np.int32)
  labels, notes = keep_largest(labels, max(len(labels) // 2, 2))
  return Labels(labels, encode(), notes=notes)
