"""DBSCAN on a sparse matrix of distances."""

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array, issparse, sparray, spmatrix
from sklearn.cluster import DBSCAN


def dbscan(
  distances: sparray | spmatrix | Float[np.ndarray, "n n"],
  eps: float = 0.6,
  min_samples: int = 4,
) -> Int[np.ndarray, " n"]:
  """Finds density-based clusters, those of scikit-learn on the dense matrix.

  Args:
    distances: a symmetric matrix [n, n], in any sparse format or dense. What
      it does not store is farther than eps.
    eps: the largest distance of two neighbours.
    min_samples: how many neighbours make a core point, itself included.

  Returns:
    Labels i32[n] from 0 on, in the order of each cluster's first core point;
    -1 = outlier.
  """
  if issparse(distances):
    distances = csr_array(distances)
    if distances.data.max(initial=0) > eps:
      distances = _prune(distances, eps)
  model = DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed")
  return model.fit_predict(distances).astype(np.int32)


def _prune(distances, eps):
  """A copy without the entries above eps, before scikit-learn copies more."""
  keep = distances.data <= eps
  indptr = np.append(0, np.cumsum(keep))[distances.indptr].astype(np.int32)
  kept = distances.data[keep], distances.indices[keep], indptr
  return csr_array(kept, distances.shape)
