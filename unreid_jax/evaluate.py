"""Features to mAP and CMC under the Market-1501 protocol."""

import pathlib

import jax
import numpy as np

from unreid_jax import memory, progress, ranking
from unreid_jax.data import Dataset, Split
from unreid_jax.encode import Encoder
from unreid_jax.methods import Distance, Features
from unreid_jax.workdir import whole_file

_QUERIES, _GALLERY = 512, 4096  # a block of distances


def evaluate(
  encoder: Encoder, distance: Distance, dataset: Dataset, batch_size: int
) -> dict[str, float]:
  """Encodes queries and gallery and scores them.

  Args:
    encoder: gives the features.
    distance: a method's, jitted; see `methods.Distance`.
    dataset: its query and gallery are used.
    batch_size: how many images are encoded at a time.

  Returns:
    mAP, R1, R5, R10 and mINP, as fractions of 1.
  """
  query, gallery = dataset.query, dataset.gallery
  query_features = encoder(query.images, batch_size, "encode query")
  gallery_features = encoder(gallery.images, batch_size, "encode gallery")
  return score(query_features, gallery_features, query, gallery, distance)


def score(
  query_features: Features,
  gallery_features: Features,
  query: Split,
  gallery: Split,
  distance: Distance,
) -> dict[str, float]:
  """mAP, R1, R5, R10 and mINP, from a block of distances at a time.

  Args:
    query_features: an array [q, ...], or a dict of arrays.
    gallery_features: the same of the gallery, [g, ...].
    query: its pids and camids are used.
    gallery: its pids and camids are used.
    distance: a method's, jitted; see `methods.Distance`.
  """
  parts, num = [], len(query.pids)
  starts = range(0, num, _QUERIES)
  for start in progress.track(starts, "rank", num, _QUERIES, "queries"):
    q, q_camids = _block((query_features, query.camids), start, _QUERIES)
    row = np.empty((len(q_camids), len(gallery.pids)), np.float32)
    for first in range(0, len(gallery.pids), _GALLERY):
      g, g_camids = _block((gallery_features, gallery.camids), first, _GALLERY)
      block = row[:, first : first + _GALLERY]
      block[:] = distance(q, g, q_camids, g_camids)[:, : block.shape[1]]
    stop = min(start + _QUERIES, num)
    parts.append(
      ranking.rank_queries(
        row[: stop - start],
        query.pids[start:stop],
        gallery.pids,
        query.camids[start:stop],
        gallery.camids,
      )
    )
  metrics = ranking.summarize(parts, max_rank=10)
  first = {f"R{k}": float(metrics.cmc[k - 1]) for k in (1, 5, 10)}
  return {"mAP": float(metrics.mAP)} | first | {"mINP": float(metrics.mINP)}


def export_features(
  encoder: Encoder, split: Split, batch_size: int, path: pathlib.Path
) -> None:
  """Writes names, camids and features of a split into an .npz file."""
  features = encoder(split.images, batch_size, "encode train")
  if not isinstance(features, dict):
    features = {"features": features}
  if jax.process_index() == 0:
    with whole_file(path) as file:
      np.savez(file, names=split.names, camids=split.camids, **features)


def _block(tree, start, size):
  """Rows from `start`, always as many; the last one is repeated at the end."""
  n = len(jax.tree.leaves(tree)[0])
  stop = start + min(size, memory.capacity(n))  # divisible by the devices
  rows = np.minimum(np.arange(start, stop), n - 1)
  return jax.tree.map(lambda x: x[rows], tree)
