"""InfoMap: communities of the graph of similar neighbours."""

import importlib.util

import numpy as np
from jaxtyping import Float, Int

from unreid_jax import UserError, values
from unreid_jax.arrays import checked
from unreid_jax.pseudo_labels.neighbors import neighbors


@checked
def infomap(
  features: Float[np.ndarray, "n d"],
  k: values.Count = 15,
  min_similarity: values.Fraction = 0.5,
  min_size: values.Count = 5,
) -> Int[np.ndarray, " n"]:
  """Clusters images by the flow of a random walk over their neighbours.

  Each image has a directed edge to each of its nearest others whose cosine
  similarity is at least `min_similarity`; the similarity is the weight.

  Args:
    features: unit features.
    k: how many neighbours an image has, itself included.
    min_similarity: the smallest cosine similarity of two neighbours.
    min_size: the size of the smallest cluster; the reference's `cluster_num`
      is min_size - 1.

  Returns:
    Labels i32[n] from 0 on, in the order of each cluster's first image;
    -1 = outlier.

  Raises:
    UserError: the package infomap is not installed, a feature is not finite, or
      another argument is out of range.

  Source: Cluster Contrast's `infomap_cluster.py` (alibaba/
  cluster-contrast-reid), functions get_dist_nbr and cluster_by_infomap.
  """
  check_installed()
  found = neighbors(features, k)
  return infomap_from_neighbors(*found, min_similarity, min_size)


def infomap_from_neighbors(
  distances: Float[np.ndarray, "n m"],
  indices: Int[np.ndarray, "n m"],
  min_similarity: float,
  min_size: int,
) -> Int[np.ndarray, " n"]:
  """As `infomap`, from the result of the search for k neighbours."""
  from infomap import Infomap

  similarities = 1 - distances[:, 1:] / 2
  row, column = np.nonzero(similarities >= min_similarity)
  modules = np.arange(len(indices)) + len(indices)  # images without an edge
  if len(row):
    network = Infomap("--two-level --directed --silent")
    edges = row, indices[:, 1:][row, column], similarities[row, column]
    for edge in zip(*(x.tolist() for x in edges), strict=True):
      network.add_link(*edge)
    for node, module in network.run().modules().items():
      modules[node] = module
  _, first, inverse, sizes = np.unique(
    modules, return_index=True, return_inverse=True, return_counts=True
  )
  large = sizes >= min_size
  labels = np.full(len(sizes), -1, np.int32)
  order = np.argsort(np.where(large, first, len(modules)))[: large.sum()]
  labels[order] = np.arange(len(order))
  return labels[inverse]


def check_installed() -> None:
  """Raises a UserError if the package infomap is not installed."""
  if importlib.util.find_spec("infomap") is None:
    fix = "pip install -r requirements-infomap.txt"
    raise UserError(f"InfoMap is not installed: {fix}")
