"""The upper bound: Cluster Contrast with the true identities as clusters.

No paper of its own: what the same encoder, sampler and loss reach when the
labels are right. HHCL's authors report such a row as "supervised".
"""

import dataclasses

import numpy as np

from unreid_jax import UserError
from unreid_jax.methods import Method, cluster_contrast
from unreid_jax.pseudo_labels.clustering import Labelling, keep_largest


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
  """Those of Cluster Contrast that are not about clustering."""

  temperature: float = 0.05
  momentum: float = 0.1
  update: str = "momentum"
  label_smoothing: float = 0.0


def make(**hyperparameters) -> Method:
  """Cluster Contrast on true labels with these `Hyperparameters`."""
  hp = Hyperparameters(**hyperparameters)
  method = cluster_contrast.make(**dataclasses.asdict(hp))
  return method._replace(label=label)


def label(state, features, camids, pids) -> Labelling:
  """The identities, numbered from 0 in ascending order; junk is left out.

  Raises:
    UserError: the images have no identities.
  """
  del state, features, camids
  if (pids < 0).all():
    raise UserError(
      "the train images have no identities, and the method supervised needs "
      "them: choose another method"
    )
  known, labels = np.unique(pids, return_inverse=True)
  labels = np.maximum(labels - np.sum(known < 0), -1).astype(np.int32)
  kept = keep_largest(labels, max(len(labels) // 2, 2))
  num, of = kept.max() + 1, labels.max() + 1
  notes = (
    () if num == of else (f"the {num} largest of {of} identities are kept",)
  )
  return Labelling(kept, notes=notes)
