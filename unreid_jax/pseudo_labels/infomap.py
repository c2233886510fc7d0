"""InfoMap: communities of the graph of similar neighbours."""

import importlib.util

import numpy as np
from jaxtyping import Float, Int

from unreid_jax import UserError
from unreid_jax.pseudo_labels.neighbors import neighbors


def infomap(
  features: Float[np.ndarray, "n d"],
  k: int = 15,
  min_similarity: float = 0.5,
  min_size: int = 5,
) -> Int[np.ndarray, " n"]:
  """Clusters images by the flow of a random walk over their neighbours.

  Each image has a directed edge to each of its nearest others whose cosine
  similarity is at least `min_similarity`; the similarity is the weight.

  Args:
    features: unit features.
    k: how many neighbours an image has, itself included.
    min_similarity: the smallest cosine similarity of two neighbours.
    min_size: the size of the smallest cluster; the images of smaller ones are
      outliers. The reference's `cluster_num` is min_size - 1.

  Returns:
    Labels i32[n] from 0 on, in the order of each cluster's first image;
    -1 = outlier.

  Raises:
    UserError: the package infomap is not installed.

  Source: Cluster Contrast's `infomap_cluster.py` (alibaba/
  cluster-contrast-reid), functions get_dist_nbr and cluster_by_infomap.
  """
  check_installed()
  return infomap_from_neighbors(
    *neighbors(features, k), min_similarity, min_size
  )


def infomap_from_neighbors(
  distances: Float[np.ndarray, "n m"],
  indices: Int[np.ndarray, "n m"],
  min_similarity: float = 0.5,
  min_size: int = 5,
) -> Int[np.ndarray, " n"]:
  """As `infomap`, from the result of the search for k neighbours."""
  from infomap import Infomap

  similarities = 1 - distances[:, 1:] / 2
  row, column = np.nonzero(similarities >= min_similarity)
  modules = np.arange(len(indices)) + len(indices)  # images without an edge
  if len(row):
    network = Infomap("--two-level --directed --silent")
    ends = indices[:, 1:][row, column]
    weights = similarities[row, column]
    for edge in zip(row.tolist(), ends.tolist(), weights.tolist(), strict=True):
      network.add_link(*edge)
    for node, module in network.run().modules().items():
      modules[node] = module
  return _number(modules, min_size)


def check_installed() -> None:
  """Raises a UserError if the package infomap is not installed."""
  if importlib.util.find_spec("infomap") is None:
    raise UserError(
      "InfoMap is not installed: pip install -r requirements-infomap.txt"
    )


def _number(modules, min_size):
  """Labels in the order of first occurrence; -1 for the small ones."""
  _, first, inverse, sizes = np.unique(
    modules, return_index=True, return_inverse=True, return_counts=True
  )
  large = sizes >= min_size
  labels = np.full(len(sizes), -1, np.int32)
  order = np.argsort(np.where(large, first, len(modules)))[: large.sum()]
  labels[order] = np.arange(len(order))
  return labels[inverse]
