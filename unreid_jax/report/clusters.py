"""Pseudo labels as pictures, and the features as a map."""

import numpy as np
from jaxtyping import Float, Int
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from unreid_jax.data import Split
from unreid_jax.report.crops import Row, crop

_ROWS, _SHOWN = 3, 9  # clusters of a kind, and pictures of each
_MAPPED = 600


def mosaic(split: Split, labels: Int[np.ndarray, " n"]) -> dict[str, list[Row]]:
  """Clusters of each kind: with identities, pure, mixed and split ones.

  Without them the largest and the smallest. Outliers come last.
  """
  clusters, at, sizes = np.unique(
    labels, return_inverse=True, return_counts=True
  )
  real = np.flatnonzero((clusters >= 0) & (sizes > 1))
  if not len(real):
    return {}
  by_size = real[np.argsort(-sizes[real], kind="stable")]
  members = lambda c: np.flatnonzero(at == c)
  row = lambda title, rows: Row(title, [crop(split, i) for i in rows[:_SHOWN]])
  of = lambda c: row(f"cluster {clusters[c]}, {sizes[c]} images", members(c))
  if np.all(split.pids < 0):
    out = {
      "Largest": [of(c) for c in by_size[:_ROWS]],
      "Smallest": [of(c) for c in by_size[::-1][:_ROWS]],
    }
  else:
    people = {c: len(np.unique(split.pids[members(c)])) for c in real}
    pure = [c for c in by_size if people[c] == 1]
    mixed = sorted((c for c in by_size if people[c] > 1),
                   key=lambda c: -people[c])  # fmt: skip
    out = {
      "Pure": [of(c) for c in pure[:_ROWS]],
      "Mixed": [_mixed(split, members(c), clusters[c]) for c in mixed[:_ROWS]],
      "Split": _split(split, labels, set(clusters[real])),
    }
  outliers = np.flatnonzero(~np.isin(at, real))
  some = outliers[:: max(1, len(outliers) // _SHOWN)]
  if len(outliers):
    out["Outliers"] = [row(f"{len(outliers)} images in no cluster", some)]
  return {name: rows for name, rows in out.items() if rows}


def _mixed(split, rows, label):
  """A few pictures of each person in a cluster."""
  people, at = np.unique(split.pids[rows], return_inverse=True)
  each = max(1, _SHOWN // len(people))
  some = [i for p in range(len(people)) for i in rows[at == p][:each]]
  title = f"cluster {label}, {len(rows)} images of {len(people)} people"
  return Row(title, [crop(split, i) for i in some[:_SHOWN]])


def _split(split, labels, real):
  """The people whose images are in the most clusters."""
  found = []
  for pid in np.unique(split.pids[split.pids > 0]):
    rows = np.flatnonzero(split.pids == pid)
    parts = [c for c in np.unique(labels[rows]) if c in real]
    if len(parts) > 1:
      found.append((len(parts), int(pid), rows, parts))
  out = []
  for num, pid, rows, parts in sorted(found, key=lambda x: (-x[0], x[1]))[
    :_ROWS
  ]:
    each = max(1, _SHOWN // num)
    some = [(i, c) for c in parts for i in rows[labels[rows] == c][:each]]
    crops = [
      crop(split, i, text=f"cluster {c}, camera {split.camids[i]}")
      for i, c in some[:_SHOWN]
    ]
    out.append(Row(f"person {pid} in {num} clusters", crops))
  return out


def sample(
  groups: Int[np.ndarray, " n"], seed: int = 0
) -> Int[np.ndarray, " m"]:
  """Images for the map: whole groups at random, and some outliers (-1)."""
  rng = np.random.default_rng(seed)
  outliers = rng.permutation(np.flatnonzero(groups < 0))[: _MAPPED // 6]
  names, sizes = np.unique(groups[groups >= 0], return_counts=True)
  order = rng.permutation(len(names))
  enough = np.cumsum(sizes[order]) <= _MAPPED - len(outliers)
  chosen = np.flatnonzero(np.isin(groups, names[order][enough]))
  if not len(chosen):  # one group is larger than the map
    chosen = rng.permutation(np.flatnonzero(groups >= 0))
    chosen = chosen[: _MAPPED - len(outliers)]
  return np.sort(np.concatenate([chosen, outliers]))


def place(features: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m 2"]:
  """A map of the features by t-SNE: neighbours stay neighbours."""
  num = len(features)
  if num < 4:
    return np.zeros((num, 2), np.float32)
  perplexity = min(20, (num - 1) / 3)
  pca = "pca" if min(features.shape) >= 2 else "random"
  layout = TSNE(init=pca, perplexity=perplexity, max_iter=500, random_state=0)
  with threadpool_limits(1):  # on busy cores its threads wait for each other
    return layout.fit_transform(features)
