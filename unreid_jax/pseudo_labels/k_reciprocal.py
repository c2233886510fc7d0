"""k-reciprocal neighbourhoods, and the sparse encoding V of images by them."""

import numba
import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from unreid_jax.arrays import compiled
from unreid_jax.pseudo_labels import shares


def reciprocal_distances(
  features: Float[np.ndarray, "n d"],
  distances: Float[np.ndarray, "n m"],
  indices: Int[np.ndarray, "n m"],
  half: int,
) -> csr_array:
  """Squared distances of each image to its expanded k-reciprocal set.

  The distances and indices are `neighbors`'; `half` of the neighbours make the
  smaller sets that expand another set.
  """
  n, k = indices.shape
  half = min(half, k)
  features = np.ascontiguousarray(features, np.float32)
  lists = np.ascontiguousarray(indices, np.int32), _positions(indices)
  threads, own = numba.get_num_threads(), shares.own_rows()
  given = own, threads, lists, half, features, distances
  counts, none = np.zeros(n, np.int32), np.empty(0, np.int32)
  _write_sets(*given, counts, none, np.empty(0, np.float32))
  shares.add_up(counts)
  indptr = np.append(0, np.cumsum(counts)).astype(np.int32)
  columns = np.empty(indptr[-1], np.int32)
  data = np.empty(indptr[-1], np.float32)
  _write_sets(*given, indptr, columns, data)
  shares.complete(indptr[:-1], counts, (columns, data))
  return csr_array((data, columns, indptr), (n, n))


def encode(
  exponents: csr_array, indices: Int[np.ndarray, "n m"], k2: int
) -> csr_array:
  """Makes V: the softmax of each row of -exponents, averaged over k2 rows."""
  lists, shape = (exponents.indices, exponents.indptr), exponents.shape
  values = csr_array((np.exp(-exponents.data), *lists), shape)
  values.data /= np.repeat(values.sum(axis=1), np.diff(values.indptr))
  nearest = np.asarray(indices[:, :k2], np.int32)
  num = nearest.shape[1]
  if num == 1:
    return values
  indptr = np.arange(0, nearest.size + 1, num, np.int32)
  ones = np.ones(nearest.size, np.float32)
  mean = csr_array((ones, nearest.ravel(), indptr), shape) @ values
  mean.data /= np.float32(num)
  mean.sort_indices()
  return mean


@compiled(parallel=True)
def _positions(indices):
  """Finds where row i stands in the list of its c-th neighbour (k: nowhere)."""
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


@compiled(parallel=True)
def _write_sets(
  own, threads, lists, half, features, distances, starts, columns, data
):
  """Writes own rows' sets, and the distances to them, to starts[i] and after.

  If there is no room for any, it writes the size of the set to starts[i].
  """
  indices, positions = lists
  n, k = indices.shape
  for t in numba.prange(threads):
    place = np.full(n, -1, np.int16)
    chosen = np.zeros(n, np.bool_)
    found = np.empty(k + k * half, np.int32)
    for i in range(own[0] + t * own[1], n, threads * own[1]):
      for c in range(k):
        place[indices[i, c]] = c
      count = _expand(i, indices, positions, half, place, chosen, found)
      if len(columns) == 0:
        starts[i] = count
      else:
        start = starts[i]
        columns[start : start + count] = np.sort(found[:count])
        for e in range(start, start + count):
          p = place[columns[e]]
          if p >= 0:
            data[e] = distances[i, p]
          else:
            data[e] = _squared_distance(features[i], features[columns[e]])
      for c in range(k):
        place[indices[i, c]] = -1


@compiled()
def _expand(i, indices, positions, half, place, chosen, members):
  """Writes the expanded k-reciprocal set of row i, and returns its size.

  `place` says where an image stands in the row's list (-1: nowhere); `chosen`
  is False everywhere, before and after.
  """
  k, count = indices.shape[1], 0
  for c in range(k):
    if positions[i, c] < k:
      members[count] = indices[i, c]
      chosen[indices[i, c]] = True
      count += 1
  for candidate in members[:count]:
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
  for e in range(count):
    chosen[members[e]] = False
  return count


@compiled(fastmath=True)
def _squared_distance(a, b):
  total = np.float32(0)
  for i in range(len(a)):
    total += (a[i] - b[i]) ** 2
  return total
