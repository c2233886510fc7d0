"""k-reciprocal re-ranking, on the sparse encoding of the Jaccard distance."""

import numba
import numpy as np
from jaxtyping import Float

from unreid_jax import values
from unreid_jax.arrays import checked, compiled
from unreid_jax.pseudo_labels.jaccard import Reach, add_overlaps, by_column
from unreid_jax.pseudo_labels.k_reciprocal import encode, reciprocal_distances
from unreid_jax.pseudo_labels.neighbors import as_features, search


@checked
def rerank(
  query: Float[np.ndarray, "q d"],
  gallery: Float[np.ndarray, "g d"],
  k1: Reach = 20,
  k2: values.Count = 6,
  lambda_value: values.Fraction = 0.3,
) -> Float[np.ndarray, "q g"]:
  """Re-ranked distances: Jaccard distances, mixed with the original ones.

  As everywhere in the field, the original distance is the *fourth* power of the
  Euclidean one (squared distances are handed over and squared again), divided
  by the largest of its query over all queries and gallery images. Nothing else
  of the size of the result is held. Of several JAX processes all must call it,
  with the same features.

  Args:
    query: unit features of the queries.
    gallery: unit features of the gallery.
    k1: how many neighbours an image has, itself not included; at most 32,000.
    k2: over how many neighbours, the image included, an encoding is averaged;
      1: none.
    lambda_value: the weight of the original distance, from 0 to 1.

  Returns:
    f32[q, g], smaller is nearer.

  Raises:
    UserError: a feature is not finite, or k1, k2 or lambda_value is out of
      range.

  Source: Zhong et al., CVPR 2017, eq. 3 to 12, as `re_ranking` of yxgeee/SpCL.
  """
  features = as_features(np.concatenate([query, gallery]))
  *found, farthest = search(features, max(k1 + 1, k2))
  distances, indices = (np.ascontiguousarray(x[:, : k1 + 1]) for x in found)
  scale = np.maximum(farthest, np.float32(1e-37))
  half = round(k1 / 2) + 1
  exponents = reciprocal_distances(features, distances, indices, half)
  sizes = np.diff(exponents.indptr)
  exponents.data = np.square(exponents.data / np.repeat(scale, sizes))
  lists = by_column(encode(exponents, found[1], k2))
  squared = np.einsum("nd,nd->n", features, features)
  out = features[: len(query)] @ features[len(query) :].T
  weight = np.float32(lambda_value)
  _mix(numba.get_num_threads(), *lists, squared, scale, weight, out)
  return out


@compiled(parallel=True)
def _mix(threads, rows, columns, squared, scale, weight, out):
  """Turns inner products into re-ranked distances, in place."""
  q, g = out.shape
  one, two, zero = np.float32(1), np.float32(2), np.float32(0)
  for t in numba.prange(threads):
    overlap = np.zeros(q + g, np.float32)
    for i in range(t, q, threads):
      add_overlaps(i, q, rows, columns, overlap)
      for j in range(g):
        original = max(squared[i] + squared[q + j] - two * out[i, j], zero)
        original = (original / scale[i]) ** 2
        jaccard = one - overlap[q + j] / (two - overlap[q + j])
        out[i, j] = (one - weight) * jaccard + weight * original
      overlap[q:] = 0
