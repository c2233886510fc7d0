"""Features to mAP and CMC under the Market-1501 protocol."""

import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from unreid_jax import memory, methods, progress, ranking, verification
from unreid_jax.data import Dataset, Split
from unreid_jax.encode import Encoder, flat
from unreid_jax.methods import Distance, Features
from unreid_jax.verification import Verification
from unreid_jax.workdir import whole_file

_QUERIES, _GALLERY = 512, 4096  # a block of distances
_PAIRS = 10**8  # enough for a false accept rate of 1e-4
_LABELLED = 10**4  # images of which all pairs are looked at
_euclidean = jax.jit(methods.euclidean_distance)


class Evaluation(NamedTuple):
  """What is known of an encoder.

  Attributes:
    scores: figures by name, as fractions of 1; none without queries.
    card: what is to be added to the encoder's card, see `Verification.card`.
    query, gallery: their features; None without queries.
  """

  scores: dict[str, float]
  card: dict[str, Any]
  query: Features = None
  gallery: Features = None


def evaluate(
  encoder: Encoder, distance: Distance, dataset: Dataset, batch_size: int
) -> Evaluation:
  """Encodes queries and gallery, ranks them and verifies their pairs.

  Args:
    encoder: gives the features.
    distance: a method's, jitted; see `methods.Distance`.
    dataset: its query and gallery are used.
    batch_size: how many images are encoded at a time.

  Returns:
    The scores are mAP, R1, R5, R10 and mINP, EER and TAR.
  """
  query, gallery = dataset.query, dataset.gallery
  query_features = encoder(query.images, batch_size, "encode query")
  gallery_features = encoder(gallery.images, batch_size, "encode gallery")
  both = query_features, gallery_features
  scores, card = score(*both, query, gallery, distance), {}
  if found := verify(*map(flat, both), query, gallery):
    scores |= found.figures()
    card = {"same_person": found.card("test identities")}
  return Evaluation(scores, card, *both)


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
  parts = []
  for of, row in distances(
    query_features, gallery_features, query, gallery, distance
  ):
    pids, camids = query.pids[of], query.camids[of]
    parts.append(
      ranking.rank_queries(row, pids, gallery.pids, camids, gallery.camids)
    )
  metrics = ranking.summarize(parts, max_rank=10)
  first = {f"R{k}": float(metrics.cmc[k - 1]) for k in (1, 5, 10)}
  return {"mAP": float(metrics.mAP)} | first | {"mINP": float(metrics.mINP)}


def verify(
  query_features: Float[np.ndarray, "q d"],
  gallery_features: Float[np.ndarray, "g d"],
  query: Split,
  gallery: Split,
) -> Verification | None:
  """Error rates of a threshold on the distance of unit features.

  With more than 1e8 pairs, every second, third ... query is taken. None: there
  are no pairs of one person under two cameras, or none of different people.
  """
  num_pairs = len(query.pids) * len(gallery.pids)
  some = slice(None, None, max(1, -(-num_pairs // _PAIRS)))
  query = Split(query.images, query.pids[some], query.camids[some], ())
  rows = distances(
    query_features[some], gallery_features, query, gallery, _euclidean, "verify"
  )
  return verification.summarize(
    verification.count_pairs(
      row, query.pids[of], gallery.pids, query.camids[of], gallery.camids
    )
    for of, row in rows
  )


def by_labels(
  features: Features,
  labels: Int[np.ndarray, " n"],
  camids: Int[np.ndarray, " n"],
) -> Evaluation:
  """What pseudo labels (-1: outlier) say of an encoder: its threshold.

  Where they connect cameras, only pairs under two cameras are looked at.
  """
  known = np.flatnonzero(labels >= 0)
  known = known[:: max(1, -(-len(known) // _LABELLED))]
  rows, alone = flat(features)[known], np.arange(len(known), dtype=np.int32)
  for cameras in (camids[known], alone):  # without cameras: all other images
    split = Split(np.empty(0), labels[known], cameras, ())
    if found := verify(rows, rows, split, split):
      return Evaluation({}, {"same_person": found.card("pseudo labels")})
  return Evaluation({}, {})


def distances(
  query_features: Features,
  gallery_features: Features,
  query: Split,
  gallery: Split,
  distance: Distance,
  title: str = "rank",
) -> Iterator[tuple[slice, Float[np.ndarray, "q g"]]]:
  """Yields some queries, and their distances to the whole gallery.

  The title is the name of this phase on the progress bar.
  """
  num = len(query.pids)
  starts = range(0, num, _QUERIES)
  for start in progress.track(starts, title, num, _QUERIES, "queries"):
    q, q_camids = _block((query_features, query.camids), start, _QUERIES)
    row = np.empty((len(q_camids), len(gallery.pids)), np.float32)
    for first in range(0, len(gallery.pids), _GALLERY):
      g, g_camids = _block((gallery_features, gallery.camids), first, _GALLERY)
      block = row[:, first : first + _GALLERY]
      block[:] = distance(q, g, q_camids, g_camids)[:, : block.shape[1]]
    of = slice(start, min(start + _QUERIES, num))
    yield of, row[: of.stop - start]


def export_features(
  encoder: Encoder, split: Split, batch_size: int, path: pathlib.Path
) -> Features:
  """Writes names, camids and features of a split into an .npz file."""
  features = encoder(split.images, batch_size, "encode train")
  named = features if isinstance(features, dict) else {"features": features}
  if jax.process_index() == 0:
    with whole_file(path) as file:
      np.savez(file, names=split.names, camids=split.camids, **named)
  return features


def _block(tree, start, size):
  """Rows from `start`, always as many; the last one is repeated at the end."""
  n = len(jax.tree.leaves(tree)[0])
  stop = start + min(size, memory.capacity(n))  # divisible by the devices
  rows = np.minimum(np.arange(start, stop), n - 1)
  return jax.tree.map(lambda x: x[rows], tree)
