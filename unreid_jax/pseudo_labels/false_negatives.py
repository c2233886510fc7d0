"""Negative proxies that are the anchor's own identity."""

import numpy as np
from jaxtyping import Int


def merged_into(
  labels: Int[np.ndarray, " n"], loose: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " k"]:
  """The looser cluster in which most images of each class are.

  Args:
    labels: classes from 0 on, none without an image.
    loose: any labels; -1 counts as one of them.
  """
  pairs, counts = np.unique(
    np.stack([labels, loose]), axis=1, return_counts=True
  )
  out = np.empty(labels.max() + 1, np.int32)
  order = np.argsort(counts, kind="stable")
  out[pairs[0, order]] = pairs[1, order]  # the last write stays
  return out


def report(
  labels: Int[np.ndarray, " n"],
  loose: Int[np.ndarray, " k"],
  pids: Int[np.ndarray, " n"] | None,
) -> dict[str, float]:
  """How many negative proxies are false, and how many of these are masked.

  All images are anchors; the proxy of another class is false if most of its
  images are of the anchor's identity, and masked if both classes have the same
  looser cluster. For diagnosis only.

  Args:
    labels: class of each image.
    loose: looser cluster of each class; -1: none.
    pids: true identities; None or negative ones: unknown.

  Returns:
    false_negatives: their share of all negatives, the true tau_plus.
    mask_precision: share of the masked proxies that are false.
    mask_missed: share of the false ones that are not masked.
    What would be divided by zero is left out, and all if pids are unknown.
  """
  if pids is None or (pids < 0).any():
    return {}
  whose, around = merged_into(labels, pids), loose[labels]
  is_own = whose[labels] == pids
  has_mask = around >= 0
  false = _count(whose, pids) - is_own
  masked = np.where(has_mask, _count(loose, around) - 1, 0)
  pair = lambda pid, cluster: pid.astype(np.int64) * (len(loose) + 1) + cluster
  caught = _count(pair(whose, loose), pair(pids, around)) - is_own
  caught = np.where(has_mask, caught, 0).sum()
  shares = {
    "false_negatives": (false.sum(), len(labels) * (len(loose) - 1)),
    "mask_precision": (caught, masked.sum()),
    "mask_missed": (false.sum() - caught, false.sum()),
  }
  return {name: float(a / b) for name, (a, b) in shares.items() if b}


def _count(keys, wanted):
  """How often each of `wanted` is among the keys."""
  numbers = np.unique(np.append(keys, wanted), return_inverse=True)[1]
  counts = np.bincount(numbers[: len(keys)], minlength=len(numbers))
  return counts[numbers[len(keys) :]]
