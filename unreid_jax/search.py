"""Who looks like whom: the nearest images of a gallery."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from unreid_jax import UserError, values
from unreid_jax.arrays import checked
from unreid_jax.encode import flat
from unreid_jax.gallery import Gallery
from unreid_jax.reranking import rerank as rerank_distances

_BLOCK = 4096  # of the gallery, at a time
_CANDIDATES = 500  # that are ranked anew, for each query


class Hits(NamedTuple):
  """The nearest images of each query, nearest first.

  Attributes:
    rows: their positions in the gallery.
    similarity: their cosine similarity to the query.
  """

  rows: Int[np.ndarray, "q m"]
  similarity: Float[np.ndarray, "q m"]


@checked
def rank(
  query: Float[np.ndarray, "q d"] | dict,
  gallery: Float[np.ndarray, "g d"] | dict | Gallery,
  top: values.Count = 10,
) -> Hits:
  """The nearest images of a gallery, exactly, in memory that does not grow.

  Args:
    query: unit features, as an encoder gives them.
    gallery: the same of the gallery; or a folder's, see `gallery.update`.
    top: how many images are wanted for each query.

  Raises:
    UserError: shapes differ, a number is not finite, or top is below 1.
  """
  query, gallery = flat(query), _flat(gallery)
  near = np.zeros((len(query), 0), query.dtype)
  rows = np.zeros(near.shape, np.int64)
  for start in range(0, len(gallery), _BLOCK):
    part = gallery[start : start + _BLOCK]
    near = np.concatenate([near, query @ part.T], axis=1)
    new = np.broadcast_to(
      np.arange(start, start + len(part)), (len(query), len(part))
    )
    rows = np.concatenate([rows, new], axis=1)
    order = np.argsort(-near, axis=1, kind="stable")[:, :top]
    near = np.take_along_axis(near, order, axis=1)
    rows = np.take_along_axis(rows, order, axis=1)
  if not np.isfinite(near).all():
    raise UserError("a feature is not finite: leave out what has none")
  return Hits(rows, near)


@checked
def rerank(
  query: Float[np.ndarray, "q d"] | dict,
  gallery: Float[np.ndarray, "g d"] | dict | Gallery,
  top: values.Count = 10,
) -> Hits:
  """The nearest images by k-reciprocal re-ranking of the 500 nearest ones.

  Each query is ranked for itself, as by `ranking.rerank` in a gallery of its
  500 nearest images.

  Args:
    query, gallery: see `rank`.
    top: how many images are wanted for each query.
  """
  query, gallery = flat(query), _flat(gallery)
  found = rank(query, gallery, max(top, _CANDIDATES))
  hits = Hits(*(np.empty_like(x[:, :top]) for x in found))
  for i, (one, candidates) in enumerate(zip(query, found.rows, strict=True)):
    some = np.asarray(gallery[candidates])
    distances = rerank_distances(one[None], some)[0]
    order = np.argsort(distances, kind="stable")[:top]
    hits.rows[i] = candidates[order]
    hits.similarity[i] = found.similarity[i, order]
  return hits


def _flat(gallery):
  return gallery if isinstance(gallery, Gallery) else flat(gallery)
