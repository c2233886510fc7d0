"""Pseudo labels: nearest neighbours, Jaccard distance, clustering.

All functions take and return numpy arrays, and the search runs on whatever
devices JAX sees.
"""

from unreid_jax.pseudo_labels.dbscan import dbscan
from unreid_jax.pseudo_labels.infomap import infomap
from unreid_jax.pseudo_labels.jaccard import (
  jaccard_distance,
  jaccard_from_neighbors,
)
from unreid_jax.pseudo_labels.neighbors import neighbors

__all__ = [
  "dbscan", "infomap", "jaccard_distance", "jaccard_from_neighbors", "neighbors"
]  # fmt: skip
