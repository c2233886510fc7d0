"""DBSCAN on a sparse matrix of distances."""

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array, issparse, sparray, spmatrix
from sklearn.cluster import DBSCAN

from unreid_jax import UserError, values
from unreid_jax.arrays import as_floats, checked


@checked
def dbscan(
  distances: sparray | spmatrix | Float[np.ndarray, "n n"],
  eps: values.Positive = 0.6,
  min_samples: values.Count = 4,
) -> Int[np.ndarray, " n"]:
  """Finds density-based clusters, those of scikit-learn on the dense matrix.

  Args:
    distances: a symmetric matrix [n, n], in any sparse format or dense. What
      it does not store is farther than eps; but each image is its own
      neighbour, whatever the diagonal says.
    eps: the largest distance of two neighbours.
    min_samples: how many neighbours make a core point, itself included.

  Returns:
    Labels i32[n] from 0 on, in the order of each cluster's first core point;
    -1 = outlier.

  Raises:
    UserError: the matrix is not square, not symmetric by more than rounding,
      or has a negative distance or NaN; eps or min_samples is out of range.
  """
  near = _near(distances, eps)
  if not near.shape[0]:
    return np.zeros(0, np.int32)
  _check_symmetry(near, eps)
  model = DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed")
  return model.fit_predict(near).astype(np.int32)


def _near(distances, eps):
  """The entries of at most eps, before scikit-learn copies more."""
  if not issparse(distances):
    _check_sign(distances)
    keep = distances <= eps
    indptr = np.append(0, np.cumsum(keep.sum(axis=1)))
    kept = distances[keep], np.nonzero(keep)[1], indptr
    return csr_array(kept, distances.shape)
  rows = _as_rows(distances)
  _check_sign(rows.data)
  keep = rows.data <= eps
  if keep.all():
    return rows
  indptr = np.append(0, np.cumsum(keep))[rows.indptr].astype(np.int32)
  return csr_array((rows.data[keep], rows.indices[keep], indptr), rows.shape)


def _as_rows(distances):
  """A sparse matrix of any format by its rows, with sorted columns."""
  shape = distances.shape
  if len(shape) != 2 or shape[0] != shape[1]:
    raise UserError(f"distances has the shape {shape}: pass [n, n]")
  try:
    if hasattr(distances, "indptr"):  # scipy would read beyond its arrays
      distances.check_format(full_check=True)
      if (np.diff(distances.indptr) < 0).any():  # unseen if it ends at 0
        raise ValueError("indptr falls")
    places = {"coo": lambda x: x.coords, "lil": lambda x: map(np.array, x.rows)}
    for place in places.get(distances.format, lambda x: ())(distances):
      if place.size and not 0 <= place.min() <= place.max() < shape[0]:
        raise ValueError(f"it has row or column {place.max()} of {shape[0]}")
    rows = csr_array(distances)
  except ValueError as error:
    raise UserError(f"distances is no valid matrix: {error}") from None
  data = as_floats("distances", rows.data)
  rows = csr_array((data, rows.indices, rows.indptr), shape)
  if not rows.has_canonical_format:  # unsorted, or entries are to be added
    rows = rows.copy()  # the arrays are the caller's
    rows.sum_duplicates()
  return rows


def _check_sign(distances):
  if not (least := distances.min(initial=0)) >= 0:  # NaN is not, either
    problem = f"distances has the value {least}"
    raise UserError(f"{problem}: pass numbers of 0 or more")


def _check_symmetry(near, eps):
  """Refuses a pair that is near in one order, and in the other one is not."""
  by_column = near.tocsc()
  same = np.array_equal(near.indices, by_column.indices)
  if same and np.array_equal(near.indptr, by_column.indptr):
    return
  n, column = near.shape[0], near.indices.astype(np.int64)
  row = np.repeat(np.arange(n), np.diff(near.indptr))
  is_alone = ~np.isin(row * n + column, column * n + row)
  is_alone &= near.data < 0.999 * eps  # else it may be rounding
  if is_alone.any():
    i, j = (x[np.argmax(is_alone)] for x in (row, column))
    raise UserError(
      f"distances is not symmetric: [{i}, {j}] is at most eps, [{j}, {i}] is "
      "not: pass each distance in both places, the same"
    )
