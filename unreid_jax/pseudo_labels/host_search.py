"""The nearest neighbours on the processor itself: BLAS, then a heap an image.

XLA multiplies matrices at half the rate of numpy's BLAS on a CPU. Here each
product is computed once and offered to both of its images, while its tile is
still in the cache.
"""

import concurrent.futures

import numba
import numpy as np
import threadpoolctl
from jaxtyping import Float32, Int32

from unreid_jax.arrays import compiled
from unreid_jax.pseudo_labels import shares

_TILE = 512  # rows and columns of a tile of products
_SPAN = 64  # products that are looked at together
_Found = tuple[
  Float32[np.ndarray, "n k"],
  Int32[np.ndarray, "n k"],
  Float32[np.ndarray, " n"],
]


def search(features: Float32[np.ndarray, "n d"], k: int) -> _Found:
  """Distances and rows of the k <= n nearest, and the largest distance.

  The processes share the tiles, and merge what each has found. In which order
  products come to a heap does not matter: of equal ones it keeps lower rows.
  """
  n, num = len(features), -(-len(features) // _TILE)
  squared = np.einsum("nd,nd->n", features, features)
  own, best = shares.own_rows(), np.full((n, k), np.inf, np.float32)
  rows, farthest = np.full((n, k), n, np.int32), np.zeros(n, np.float32)

  def offer(tile):
    i, j = (slice(x * _TILE, (x + 1) * _TILE) for x in tile)
    products = features[i] @ features[j].T
    if i == j:  # a row comes before its duplicates
      np.fill_diagonal(products, np.inf)
    _offer(products, i.start, j.start, squared, best, rows, farthest)

  threads = numba.get_num_threads()
  with (
    concurrent.futures.ThreadPoolExecutor(threads) as pool,
    threadpoolctl.threadpool_limits(1, "blas"),  # of each of our threads
  ):
    for part in range(own[0], num, own[1]):
      # No two of these tiles write to the same rows.
      pairs = ((i, (part - i) % num) for i in range(num))
      list(pool.map(offer, [(i, j) for i, j in pairs if i <= j]))
  if own[1] > 1:
    for some, (*each, far) in shares.gather(best, rows, farthest):
      each = (np.concatenate(list(x), axis=1) for x in each)
      best[some], rows[some] = _nearest(*each, k)
      farthest[some] = far.max(axis=0)
  best, rows = _nearest(best, rows, k)
  return np.maximum(best, 0), rows, farthest


def _nearest(distances, rows, k):
  order = np.lexsort((rows, distances))[:, :k]
  return [np.take_along_axis(x, order, axis=1) for x in (distances, rows)]


@compiled(nogil=True)
def _offer(products, i, j, squared, best, rows, farthest):
  """Offers a tile's columns to its rows, and then its rows to its columns."""
  m, n = products.shape
  across, down = squared[j : j + n], squared[i : i + m]
  for r in range(m):
    a = i + r
    far = _offer_to(products[r], squared[a], across, j, best[a], rows[a])
    farthest[a] = max(farthest[a], far)
  if i == j:
    return
  # Rows a power of two apart would share the lines of the processor's cache.
  columns = np.empty((_SPAN, m + 16), products.dtype)
  for start in range(0, n, _SPAN):
    width = min(_SPAN, n - start)
    for r in range(m):
      for c in range(width):
        columns[c, r] = products[r, start + c]
    for c in range(width):
      a = j + start + c
      column = columns[c, :m]
      far = _offer_to(column, squared[a], down, i, best[a], rows[a])
      farthest[a] = max(farthest[a], far)


# That no number is NaN lets it compare several at a time.
@compiled(fastmath={"nnan", "nsz"})
def _offer_to(products, own, others, first, best, rows):
  """Keeps the nearest in the heap of one row; returns the largest distance."""
  far, two = np.float32(0), np.float32(2)
  for start in range(0, len(products), _SPAN):
    stop = min(start + _SPAN, len(products))
    near = np.float32(np.inf)
    for c in range(start, stop):
      distance = own + (others[c] - two * products[c])
      near, far = min(near, distance), max(far, distance)
    if near > best[0]:
      continue
    for c in range(start, stop):
      distance = own + (others[c] - two * products[c])
      if _is_worse(best, rows, 0, distance, first + c):
        _replace_worst(best, rows, distance, first + c)
  return far


@compiled()
def _replace_worst(best, rows, distance, row):
  """Replaces the root of a heap: the farthest, and of equals the last row."""
  hole, child = 0, 1
  while child < len(best):
    other = child + 1
    if other < len(best) and _is_worse(
      best, rows, other, best[child], rows[child]
    ):
      child = other
    if not _is_worse(best, rows, child, distance, row):
      break
    best[hole], rows[hole] = best[child], rows[child]
    hole, child = child, 2 * child + 1
  best[hole], rows[hole] = distance, row


@compiled()
def _is_worse(best, rows, at, distance, row):
  return best[at] > distance or (best[at] == distance and rows[at] > row)
