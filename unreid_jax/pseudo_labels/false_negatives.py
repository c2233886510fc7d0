"""Negative proxies that are the anchor's own identity."""

import numpy as np
from jaxtyping import Int

from unreid_jax import UserError
from unreid_jax.arrays import checked


@checked
def merged_into(
  labels: Int[np.ndarray, " n"], loose: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " k"]:
  """Finds the looser cluster (-1 is one too) of most images of each class.

  The classes must be numbered from 0, and none be without an image.
  """
  classes = np.unique(labels)
  if not np.array_equal(classes, np.arange(len(classes))):
    raise UserError("labels has gaps or outliers: number the classes from 0")
  both = np.stack([labels, loose])
  pairs, counts = np.unique(both, axis=1, return_counts=True)
  out = np.empty(len(classes), loose.dtype)
  order = np.argsort(counts, kind="stable")
  out[pairs[0, order]] = pairs[1, order]  # the last write stays
  return out


@checked
def report(
  labels: Int[np.ndarray, " n"],
  loose: Int[np.ndarray, " k"],
  pids: Int[np.ndarray, " n"] | None,
) -> dict[str, float]:
  """How many negative proxies are false, and how many of these are masked.

  All images are anchors; the proxy of another class is false if most of its
  images are of the anchor's identity, and masked if both classes have the same
  looser cluster (-1: none). It is for diagnosis only.

  Returns:
    The shares that are not of nothing, and none if the identities are unknown
    (None, or a negative one): false_negatives, of the false negatives in all,
    which is the true tau_plus; mask_precision, of the false ones in the masked
    proxies; mask_missed, of the false ones that are not masked.
  """
  if pids is None or (pids < 0).any():
    return {}
  pids = np.unique(pids, return_inverse=True)[1]
  whose = merged_into(labels, pids)
  if len(whose) != len(loose):
    problem = f"loose has {len(loose)} clusters for {len(whose)} classes"
    raise UserError(f"{problem} of labels: pass one of each")
  has_mask = loose[labels] >= 0
  loose = np.unique(loose, return_inverse=True)[1]
  around, is_own = loose[labels], whose[labels] == pids
  false = _count(whose, pids) - is_own
  masked = np.where(has_mask, _count(loose, around) - 1, 0)
  pair = lambda pid, cluster: pid * len(loose) + cluster
  caught = _count(pair(whose, loose), pair(pids, around)) - is_own
  caught = np.where(has_mask, caught, 0).sum()
  shares = {
    "false_negatives": (false.sum(), len(labels) * (len(loose) - 1)),
    "mask_precision": (caught, masked.sum()),
    "mask_missed": (false.sum() - caught, false.sum()),
  }
  return {name: float(a / b) for name, (a, b) in shares.items() if b}


def _count(keys, wanted):
  """Counts how often each of `wanted` is among the keys."""
  numbers = np.unique(np.append(keys, wanted), return_inverse=True)[1]
  counts = np.bincount(numbers[: len(keys)], minlength=len(numbers))
  return counts[numbers[len(keys) :]]
