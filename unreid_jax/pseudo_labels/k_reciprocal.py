"""k-reciprocal neighbourhoods, and the sparse encoding V of images by them."""

from typing import no_type_check

import numba
import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from unreid_jax import UserError


def reciprocal_distances(
  features: Float[np.ndarray, "n d"],
  distances: Float[np.ndarray, "n m"],
  indices: Int[np.ndarray, "n m"],
  half: int,
) -> csr_array:
  """Squared distances of each image to its expanded k-reciprocal set.

  Args:
    features: the features of the images.
    distances: the squared distances of each image to its nearest ones.
    indices: the nearest images of each, itself included.
    half: how many of them make the smaller sets that expand another set.
  """
  n, k = indices.shape
  half = min(half, k)
  features = np.ascontiguousarray(features, np.float32)
  threads = numba.get_num_threads()
  lists = np.ascontiguousarray(indices, np.int32), _positions(indices)
  counts = np.zeros(n, np.int64)
  _count_sets(threads, *lists, half, counts)
  indptr = np.append(0, np.cumsum(counts)).astype(np.int32)
  columns = np.empty(indptr[-1], np.int32)
  data = np.empty(indptr[-1], np.float32)
  _fill_sets(threads, *lists, half, features, distances, indptr, columns, data)
  return csr_array((data, columns, indptr), (n, n))


def encode(
  exponents: csr_array, indices: Int[np.ndarray, "n m"], k2: int
) -> csr_array:
  """Makes V: the softmax of each row of -exponents, averaged over k2 rows."""
  if k2 < 1:
    raise UserError(f"k2 is {k2}: set it to 1 (no average) or more")
  n = len(indices)
  lists = exponents.indices, exponents.indptr
  values = csr_array((np.exp(-exponents.data), *lists), (n, n))
  values.data /= np.repeat(values.sum(axis=1), np.diff(values.indptr))
  nearest = np.asarray(indices[:, :k2], np.int32)
  num = nearest.shape[1]
  if num == 1:
    return values
  indptr = np.arange(0, nearest.size + 1, num, np.int32)
  ones = np.ones(nearest.size, np.float32)
  picks = csr_array((ones, nearest.ravel(), indptr), (n, n))
  mean = picks @ values
  mean.data /= np.float32(num)
  mean.sort_indices()
  return mean


# `no_type_check` keeps the tests' annotation checker out of compiled code.


@no_type_check
@numba.njit(parallel=True, cache=True)
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


@no_type_check
@numba.njit(parallel=True, cache=True)
def _count_sets(threads, indices, positions, half, counts):
  n, k = indices.shape
  for t in numba.prange(threads):
    place = np.full(n, -1, np.int16)
    chosen = np.zeros(n, np.bool_)
    members = np.empty(k + k * half, np.int32)
    for i in range(t, n, threads):
      counts[i] = _expand(i, indices, positions, half, place, chosen, members)


@no_type_check
@numba.njit(parallel=True, cache=True)
def _fill_sets(
  threads, indices, positions, half, features, distances, indptr, columns, data
):
  n, k = indices.shape
  for t in numba.prange(threads):
    place = np.full(n, -1, np.int16)
    chosen = np.zeros(n, np.bool_)
    members = np.empty(k + k * half, np.int32)
    for i in range(t, n, threads):
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
  for i in range(len(a)):
    total += (a[i] - b[i]) ** 2
  return total
