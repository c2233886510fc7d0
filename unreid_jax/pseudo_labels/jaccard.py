"""The k-reciprocal Jaccard distance, sparse from end to end.

A row of the encoding V has some thirty entries, and two images overlap in few
of them; so V is kept as rows and as columns, and every image only meets the
images that share a column with it.
"""

from typing import no_type_check

import numba
import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from unreid_jax import UserError
from unreid_jax.pseudo_labels.neighbors import neighbors

_MAX_ENTRIES = 2**30  # of a matrix: 8 GB
_SPAN = 32  # columns that share a mark


def jaccard_distance(
  features: Float[np.ndarray, "n d"],
  k1: int = 30,
  k2: int = 6,
  max_distance: float | None = None,
) -> csr_array:
  """Jaccard distances of the k-reciprocal neighbourhoods of all images.

  Args:
    features: unit features.
    k1: neighbours of an image, itself included; all if there are fewer.
    k2: neighbours, itself included, whose encodings are averaged; 1: none.
    max_distance: the largest distance that is stored, below 1.

  Returns:
    f32[n, n], symmetric, with the diagonal of zeros and sorted columns. Stored
    is what is <= max_distance, or < 1; every other distance is farther, or 1.

  Raises:
    UserError: a feature is NaN, max_distance is not in [0, 1), k1 or k2 is
      below 1, or more than 2^30 distances would be stored (8 GB): nearly all
      images are alike.

  Source: Zhong et al., CVPR 2017, eq. 3 to 10, as `compute_jaccard_distance` of
  alibaba/cluster-contrast-reid has it: k1 counts the image itself.
  """
  found = neighbors(features, k1)
  return jaccard_from_neighbors(features, *found, k2, max_distance)


def jaccard_from_neighbors(
  features: Float[np.ndarray, "n d"],
  distances: Float[np.ndarray, "n m"],
  indices: Int[np.ndarray, "n m"],
  k2: int = 6,
  max_distance: float | None = None,
) -> csr_array:
  """`jaccard_distance` after the search; distances and indices are its result.

  k1 is their number of columns.
  """
  if max_distance is None:
    limit = np.nextafter(np.float32(1), np.float32(0))
  elif 0 <= max_distance < 1:
    limit = np.float32(max_distance)
  else:
    raise UserError(
      f"max_distance is {max_distance}: set it to 0 or more, below 1"
    )
  half = round(indices.shape[1] / 2) + 1
  squared = reciprocal_distances(features, distances, indices, half)
  encoding = encode(squared, indices, k2)
  return _distances(encoding, limit)


def reciprocal_distances(
  features: Float[np.ndarray, "n d"],
  distances: Float[np.ndarray, "n m"],
  indices: Int[np.ndarray, "n m"],
  half: int,
) -> csr_array:
  """Squared distances of each image to its expanded k-reciprocal set.

  Args:
    features: of the images.
    distances: squared distances to the nearest images.
    indices: the nearest images, itself included.
    half: how many of them make the sets that expand another one.
  """
  n, k = indices.shape
  half = min(half, k)
  features = np.ascontiguousarray(features, np.float32)
  threads = numba.get_num_threads()
  lists = np.ascontiguousarray(indices, np.int32), _positions(indices)
  counts = np.zeros(n, np.int64)
  _count_sets(threads, *lists, half, counts)
  indptr = np.append(0, np.cumsum(counts))
  columns = np.empty(indptr[-1], np.int32)
  data = np.empty(indptr[-1], np.float32)
  _fill_sets(threads, *lists, half, features, distances, indptr, columns, data)
  return csr_array((data, columns, indptr), (n, n))


def encode(
  exponents: csr_array, indices: Int[np.ndarray, "n m"], k2: int
) -> csr_array:
  """V: the softmax of each row of -exponents, averaged over k2 neighbours."""
  n = len(indices)
  values = exponents
  np.exp(-values.data, out=values.data)
  values.data /= np.repeat(values.sum(axis=1), np.diff(values.indptr))
  nearest = indices[:, :k2]
  num = nearest.shape[1]
  if num == 1:
    return values
  picks = csr_array(
    (
      np.ones(nearest.size, np.float32),
      nearest.ravel(),
      num * np.arange(n + 1),
    ),
    (n, n),
  )
  mean = picks @ values
  mean.data /= np.float32(num)
  mean.sort_indices()
  return mean


def _distances(encoding, limit):
  n = encoding.shape[0]
  threads = numba.get_num_threads()
  rows = threads, encoding.indptr, encoding.indices, encoding.data
  columns = encoding.tocsc()
  columns = columns.indptr, columns.indices, columns.data
  counts = np.zeros(n, np.int64)
  none = np.empty(0, np.int32), np.empty(0, np.float32)
  _compare(*rows, *columns, limit, counts, np.zeros(n, np.int64), *none)
  total = counts.sum()
  if total > _MAX_ENTRIES:
    raise UserError(
      f"{total} pairs of {n} images are at a distance of at most {limit:.3g}: "
      "the features are nearly all alike, or max_distance should be smaller"
    )
  indptr = np.append(0, np.cumsum(counts))
  out = np.empty(total, np.int32), np.empty(total, np.float32)
  _compare(*rows, *columns, limit, counts, indptr, *out)
  return csr_array((out[1], out[0], indptr), (n, n))


# `no_type_check` keeps the tests' annotation checker out of compiled code.


@no_type_check
@numba.njit(parallel=True, cache=True)
def _positions(indices):
  """[i, c]: where row i stands in the list of its c-th neighbour, or k."""
  n, k = indices.shape
  positions = np.full((n, k), k, np.int16)
  for i in numba.prange(n):
    for c in range(k):
      neighbor = indices[i, c]
      for p in range(k):
        if indices[neighbor, p] == i:
          positions[i, c] = p
          break
  return positions


@no_type_check
@numba.njit(parallel=True, cache=True)
def _count_sets(num, indices, positions, half, counts):
  n, k = indices.shape
  for t in numba.prange(num):
    place = np.full(n, -1, np.int16)
    chosen = np.zeros(n, np.bool_)
    members = np.empty(k + k * half, np.int32)
    for i in range(t, n, num):
      counts[i] = _expand(i, indices, positions, half, place, chosen, members)


@no_type_check
@numba.njit(parallel=True, cache=True)
def _fill_sets(
  num, indices, positions, half, features, distances, indptr, columns, data
):
  n, k = indices.shape
  for t in numba.prange(num):
    place = np.full(n, -1, np.int16)
    chosen = np.zeros(n, np.bool_)
    members = np.empty(k + k * half, np.int32)
    for i in range(t, n, num):
      count = _expand(i, indices, positions, half, place, chosen, members)
      start = indptr[i]
      columns[start : start + count] = np.sort(members[:count])
      for c in range(k):
        place[indices[i, c]] = c
      for e in range(start, start + count):
        p = place[columns[e]]
        if p >= 0:
          data[e] = distances[i, p]
        else:
          data[e] = _squared_distance(features[i], features[columns[e]])
      for c in range(k):
        place[indices[i, c]] = -1


@no_type_check
@numba.njit(cache=True)
def _expand(i, indices, positions, half, place, chosen, members):
  """Writes the expanded k-reciprocal set of row i, and returns its size.

  `place` is -1 and `chosen` False everywhere, before and after.
  """
  k = indices.shape[1]
  count = 0
  for c in range(k):
    place[indices[i, c]] = c
    if positions[i, c] < k:
      members[count] = indices[i, c]
      chosen[indices[i, c]] = True
      count += 1
  for c in range(k):
    if positions[i, c] == k:
      continue
    candidate = indices[i, c]
    size, shared = 0, 0
    for h in range(half):
      if positions[candidate, h] < half:
        size += 1
        p = place[indices[candidate, h]]
        shared += p >= 0 and positions[i, p] < k
    if 3 * shared <= 2 * size:
      continue
    for h in range(half):
      member = indices[candidate, h]
      if positions[candidate, h] < half and not chosen[member]:
        chosen[member] = True
        members[count] = member
        count += 1
  for c in range(k):
    place[indices[i, c]] = -1
  for e in range(count):
    chosen[members[e]] = False
  return count


@no_type_check
@numba.njit(cache=True, fastmath=True)
def _squared_distance(a, b):
  total = np.float32(0)
  for x, y in zip(a, b):
    total += (x - y) * (x - y)
  return total


@no_type_check
@numba.njit(parallel=True, cache=True)
def _compare(
  num, indptr,
  columns,
  data,
  col_indptr,
  col_rows,
  col_data,
  limit,
  counts,
  out_indptr,
  out_columns,
  out_data,
):
  """Counts the distances <= limit of each row; writes them if there is room."""
  n = len(counts)
  one, two = np.float32(1), np.float32(2)
  for t in numba.prange(num):
    overlap = np.zeros(n + _SPAN, np.float32)
    touched = np.zeros(n // _SPAN + 1, np.bool_)
    for i in range(t, n, num):
      for e in range(indptr[i], indptr[i + 1]):
        c, value = columns[e], data[e]
        for f in range(col_indptr[c], col_indptr[c + 1]):
          j = col_rows[f]
          overlap[j] += min(value, col_data[f])
          touched[j // _SPAN] = True
      count = 0
      for s in range(len(touched)):
        if not touched[s]:
          continue
        touched[s] = False
        for j in range(s * _SPAN, (s + 1) * _SPAN):
          m = overlap[j]
          overlap[j] = 0
          if m == 0:
            continue
          distance = max(one - m / (two - m), np.float32(0))
          if j == i:
            distance = np.float32(0)
          if distance <= limit:
            if len(out_data):
              out_columns[out_indptr[i] + count] = j
              out_data[out_indptr[i] + count] = distance
            count += 1
      counts[i] = count
