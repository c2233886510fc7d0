"""Images to features to mAP and CMC."""

import os
import pathlib
from collections.abc import Callable

import jax
import numpy as np

from unreid_jax import memory, ranking, sharding
from unreid_jax.data import Dataset, Split
from unreid_jax.state import Parts, TrainState

_QUERIES, _GALLERY = 512, 4096  # a block of distances


def encode(
  step: Callable,
  variables,
  images: np.ndarray,
  order: np.ndarray,
  batch_size: int,
  key: jax.Array,
  title: str,
  track: Callable,
):
  """Runs `step` over all images.

  Args:
    step: jitted, one of `Parts.encode`.
    variables: of the encoder.
    images: uint8 [n, h, w, 3].
    order: a permutation of [n], the order in which they are run.
    batch_size: images a step; the last batch is filled up with repetitions.
    key: of the first batch; the others' are folded from it.
    title: of the progress bar.
    track: draws it, as `writer.Writer.track`.

  Returns:
    The variables after the last step, and the features on the host, [n, ...]
    in the order of the images.
  """
  mesh = jax.sharding.get_mesh()
  parts = []
  starts = range(0, len(order), batch_size)
  for start in track(starts, title, total=len(order), scale=batch_size):
    rows = order[np.arange(start, start + batch_size) % len(order)]
    batch = sharding.put_rows(mesh, images, rows)
    step_key = jax.random.fold_in(key, start)
    variables, features = step(variables, batch, step_key)
    parts.append(jax.device_get(features))
  back = np.argsort(order)
  features = jax.tree.map(lambda *x: np.concatenate(x)[back], *parts)
  return variables, features


def score(
  query_features,
  gallery_features,
  query: Split,
  gallery: Split,
  distance: Callable,
  track: Callable,
) -> dict[str, float]:
  """mAP, R1, R5, R10 and mINP, from a block of distances at a time.

  Args:
    query_features: array or dict of arrays [q, ...].
    gallery_features: likewise [g, ...].
    query: whose pids and camids are used.
    gallery: likewise.
    distance: a method's `distance`, jitted.
    track: draws the progress bar, as `writer.Writer.track`.
  """
  parts = []
  starts = range(0, len(query.pids), _QUERIES)
  scale = {"total": len(query.pids), "scale": _QUERIES, "unit": "queries"}
  for start in track(starts, "rank", **scale):
    q, q_camids = _block((query_features, query.camids), start, _QUERIES)
    row = np.empty((len(q_camids), len(gallery.pids)), np.float32)
    for first in range(0, len(gallery.pids), _GALLERY):
      g, g_camids = _block((gallery_features, gallery.camids), first, _GALLERY)
      block = row[:, first : first + _GALLERY]
      block[:] = distance(q, g, q_camids, g_camids)[:, : block.shape[1]]
    stop = min(start + _QUERIES, len(query.pids))
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
  return {
    "mAP": float(metrics.mAP),
    "R1": float(metrics.cmc[0]),
    "R5": float(metrics.cmc[4]),
    "R10": float(metrics.cmc[9]),
    "mINP": float(metrics.mINP),
  }


def evaluate(
  parts: Parts, state: TrainState, dataset: Dataset, track: Callable
) -> dict[str, float]:
  """Encodes query and gallery and scores them under the Market protocol."""
  features = [
    encode_split(parts, state, split, title, track)
    for title, split in zip(
      ("encode query", "encode gallery"), dataset[1:], strict=True
    )
  ]
  distance = parts.method.distance
  return score(*features, dataset.query, dataset.gallery, distance, track)


def encode_split(
  parts: Parts, state: TrainState, split: Split, title: str, track: Callable
):
  """Test-time features [n, ...] of a split, on the host."""
  _, features = encode(
    parts.encode["eval"],
    state.variables,
    split.images,
    np.arange(len(split.images)),
    parts.config.evaluate_batch_size,
    jax.random.key(0),  # for no use: nothing is drawn
    title,
    track,
  )
  return features


def export_features(
  parts: Parts,
  state: TrainState,
  split: Split,
  path: pathlib.Path,
  track: Callable,
) -> None:
  """Writes an .npz with names, camids and test-time features of a split."""
  features = encode_split(parts, state, split, "encode train", track)
  if not isinstance(features, dict):
    features = {"features": features}
  if jax.process_index() == 0:
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
      np.savez(file, names=split.names, camids=split.camids, **features)
    os.replace(partial, path)


def _block(tree, start, size):
  """Rows from `start`, always as many; the last one is repeated at the end."""
  n = len(jax.tree.leaves(tree)[0])
  stop = start + min(size, memory.capacity(n))  # divisible by the devices
  rows = np.minimum(np.arange(start, stop), n - 1)
  return jax.tree.map(lambda x: x[rows], tree)
