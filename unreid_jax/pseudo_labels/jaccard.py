"""The k-reciprocal Jaccard distance, sparse from end to end.

A row of the encoding V has some thirty entries, and two images overlap in few
of them. So V is kept as rows and as columns, and every image only meets the
images that share a column with it.
"""

from typing import Annotated

import numba
import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from unreid_jax import UserError, values
from unreid_jax.arrays import checked, compiled
from unreid_jax.pseudo_labels import shares
from unreid_jax.pseudo_labels.k_reciprocal import encode, reciprocal_distances
from unreid_jax.pseudo_labels.neighbors import as_features, neighbors

_MAX_ENTRIES = 2**29  # that a matrix may have: 4 GB
_SPAN = 64  # overlaps that are looked at together
_MOST_NEIGHBORS = 32000  # that an image has: positions among them are int16
Reach = Annotated[int, values.Range(1, _MOST_NEIGHBORS)]


class TooManyPairsError(UserError):
  """Nearly all images are alike: their distances would fill the memory."""


@checked
def jaccard_distance(
  features: Float[np.ndarray, "n d"],
  k1: Reach = 30,
  k2: values.Count = 6,
  max_distance: values.BelowOne | None = None,
) -> csr_array:
  """Jaccard distances of the k-reciprocal neighbourhoods of all images.

  Several JAX processes share the work: all must call it, with the same
  features.

  Args:
    features: unit features.
    k1: how many neighbours an image has, itself included; all images if there
      are fewer. At most 32,000.
    k2: over how many neighbours, the image included, an encoding is averaged;
      1: none.
    max_distance: the largest distance that is stored, below 1; None stores
      every distance below 1.

  Returns:
    A symmetric matrix f32[n, n] with sorted columns, which stores the zeros of
    its diagonal too. A distance that is not stored is larger than
    max_distance; without one, it is 1.

  Raises:
    UserError: a feature is not finite, k1, k2 or max_distance is out of range,
      or more than 2^29 distances would be stored (4 GB): nearly all images are
      alike.

  Source: Zhong et al., CVPR 2017, eq. 3 to 10, as `compute_jaccard_distance` of
  alibaba/cluster-contrast-reid has it: k1 counts the image itself.
  """
  found = neighbors(features, k1)
  return jaccard_from_neighbors(features, *found, k2, max_distance)


@checked
def jaccard_from_neighbors(
  features: Float[np.ndarray, "n d"],
  distances: Float[np.ndarray, "n m"],
  indices: Int[np.ndarray, "n m"],
  k2: values.Count = 6,
  max_distance: values.BelowOne | None = None,
) -> csr_array:
  """As `jaccard_distance`, from the result of the search for k1 neighbours.

  It need not be ours: of each image there are squared distances and rows, the
  nearest first. The image itself must be among them, and no row twice. Of
  several JAX processes all must call it, with the same.
  """
  features = as_features(features)
  distances, indices = _check_neighbors(distances, indices)
  limit = np.nextafter(np.float32(1), np.float32(0))
  if max_distance is not None:
    limit = np.float32(max_distance)
  half = round(indices.shape[1] / 2) + 1
  squared = reciprocal_distances(features, distances, indices, half)
  return _distances(*by_column(encode(squared, indices, k2)), limit)


def _check_neighbors(distances, indices):
  """Refuses what the kernels would read or divide wrongly.

  Returns both as the kernels want them: the distances without their rounding,
  which is 0 to the image itself and nowhere less.
  """
  n, k = indices.shape
  if k > _MOST_NEIGHBORS:
    problem = f"indices has {k} columns"
    raise UserError(f"{problem}: pass {_MOST_NEIGHBORS} or fewer")
  if (wrong := indices[(indices < 0) | (indices >= n)]).size:
    problem = f"indices has the value {wrong[0]}, but the rows are 0 to {n - 1}"
    raise UserError(f"{problem}: -1 is a neighbour that a search did not find")
  own = indices == np.arange(n)[:, None]
  if not (has_own := own.any(axis=1)).all():
    row, fix = np.argmin(has_own), "search among all images, itself included"
    raise UserError(f"row {row} of indices is without image {row}: {fix}")
  ascending = np.sort(indices, axis=1)
  if (twice := ascending[:, 1:] == ascending[:, :-1]).any():
    row = np.argmax(twice.any(axis=1))
    raise UserError(f"row {row} of indices has an image twice: pass it once")
  farthest = distances.max(axis=1)
  rounding = 1e-3 + 0.01 * farthest
  fits = (farthest < 2**127) & (distances.min(axis=1) >= -rounding)
  fits &= distances[own] <= rounding
  if not fits.all():  # NaN does not fit either
    problem = f"row {np.argmin(fits)} of distances has no squared distances"
    raise UserError(f"{problem}: they are 0 or more, and 0 to the image itself")
  distances = np.where(own, 0, np.maximum(distances, 0)).astype(np.float32)
  behind = np.maximum.accumulate(distances, axis=1) - distances
  if (behind := (behind > rounding[:, None]) & ~own).any():
    problem = f"row {np.argmax(behind.any(axis=1))} of distances"
    raise UserError(f"{problem} does not ascend: pass the nearest first")
  return distances, indices.astype(np.int32)


def by_column(encoding: csr_array) -> tuple[tuple[np.ndarray, ...], ...]:
  """Returns the three arrays of the rows, and those of the columns."""
  columns = encoding.tocsc()
  # numba need not look for negative indices if they are unsigned.
  indices = columns.indices.view(np.uint32)
  rows = encoding.indptr, encoding.indices, encoding.data
  return rows, (columns.indptr, indices, columns.data)


def _distances(rows, columns, limit):
  threads, n = numba.get_num_threads(), len(rows[0]) - 1
  own = shares.own_rows()
  # Only pairs with i <= j are compared: `before` counts the others of a row.
  before, counts = np.zeros((threads, n), np.int64), np.zeros(n, np.int64)
  none = np.empty(0, np.int32), np.empty(0, np.float32)
  _compare(own, rows, columns, limit, before, counts, *none)
  before = before.sum(axis=0)
  shares.add_up(before)
  shares.add_up(counts)
  indptr = np.append(0, np.cumsum(before + counts))
  if (total := indptr[-1]) > _MAX_ENTRIES:
    raise TooManyPairsError(
      f"{total} pairs of {n} images are at a distance of at most {limit:.3g}: "
      "the features are nearly all alike, or max_distance should be smaller"
    )
  out = np.empty(total, np.int32), np.empty(total, np.float32)
  starts = indptr[:-1] + before
  given = own, rows, columns, limit, np.zeros((threads, n), int)
  _compare(*given, starts, *out)
  shares.complete(starts, counts, out)
  _mirror(indptr, starts, *out)
  # scipy would copy the columns to int64 if the pointers were.
  return csr_array((out[1], out[0], indptr.astype(np.int32)), (n, n))


@compiled(parallel=True)
def _compare(own, rows, columns, limit, before, starts, out_columns, out_data):
  """Writes the distances <= limit of own rows to themselves and later rows.

  Those of row i go to starts[i] and after. If there is no room for any, it
  counts them: row i's in starts[i], those from earlier rows in before[:, i].
  """
  threads, n = before.shape
  counting = len(out_data) == 0
  one, two = np.float32(1), np.float32(2)
  # Less than the overlap of any pair that can pass.
  least = max(two * (one - limit) / (two - limit) - np.float32(1e-5), 1e-30)
  for t in numba.prange(threads):
    overlap = np.zeros(-(-n // _SPAN) * _SPAN, np.float32)
    for i in range(own[0] + t * own[1], n, threads * own[1]):
      add_overlaps(i, i, rows, columns, overlap)
      count = 0
      for begin in range(i // _SPAN * _SPAN, n, _SPAN):
        if not _reaches(overlap[begin : begin + _SPAN], least):
          continue
        for j in range(begin, begin + _SPAN):
          m = overlap[j]
          if m < least:
            continue
          distance = max(one - m / (two - m), np.float32(0))
          distance = distance if j > i else np.float32(0)
          if distance > limit:
            continue
          if not counting:
            out_columns[starts[i] + count] = j
            out_data[starts[i] + count] = distance
          elif j > i:
            before[t, j] += 1
          count += 1
      overlap[i:] = 0
      if counting:
        starts[i] = count


@compiled()
def add_overlaps(i, first, rows, columns, overlap):
  """Adds sum_c min(V[i, c], V[j, c]) to overlap[j] for all j >= first."""
  indptr, members, values = columns
  for e in range(rows[0][i], rows[0][i + 1]):
    c, value = rows[1][e], rows[2][e]
    column = members[indptr[c] : indptr[c + 1]]
    others = values[indptr[c] : indptr[c + 1]]
    for f in range(np.searchsorted(column, first), len(column)):
      overlap[column[f]] += min(value, others[f])


@compiled()
def _reaches(span, least):
  found = False
  for s in range(_SPAN):
    found |= span[s] >= least
  return found


@compiled()
def _mirror(indptr, starts, columns, data):
  """Writes the entries below the diagonal from those above."""
  end = indptr.copy()
  for i in range(len(starts)):
    for e in range(starts[i], indptr[i + 1]):
      j = columns[e]
      if j > i:
        columns[end[j]] = i
        data[end[j]] = data[e]
        end[j] += 1
