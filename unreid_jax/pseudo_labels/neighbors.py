"""The nearest neighbours of every image among all, by brute force."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Float32, Int

from unreid_jax import UserError, memory, sharding, values
from unreid_jax.arrays import checked
from unreid_jax.pseudo_labels import host_search

_BLOCK_ELEMENTS = 2**25  # of a block of distances, over all devices: 128 MB
Float32Rows = Float32[np.ndarray, "n d"]
_Distances, _Rows = Float[np.ndarray, "n m"], Int[np.ndarray, "n m"]


@checked
def neighbors(
  features: Float[np.ndarray, "n d"], k: values.Count
) -> tuple[_Distances, _Rows]:
  """Finds the k nearest rows of each row, itself included.

  The search is exact and holds no [n, n] matrix. It compares a block of rows at
  a time with all rows, which are spread over the devices of `jax.set_mesh`, or
  over all devices; if these are CPUs, numpy's matrix products replace XLA's. Of
  several JAX processes all must call it, with the same features.

  Args:
    features: rows [n, d], which need not be of unit length.
    k: how many neighbours a row gets, itself included; all rows if there are
      fewer.

  Returns:
    Squared Euclidean distances f32[n, m] and rows i32[n, m] with m = min(k, n),
    nearest first. The row itself comes first, at distance 0; of other equal
    distances the lower row comes first, on any number of devices.

  Raises:
    UserError: k is below 1, the features are no matrix, or not finite.
  """
  return search(features, k)[:2]


def search(
  features: Float[np.ndarray, "n d"], k: int
) -> tuple[_Distances, _Rows, Float[np.ndarray, " n"]]:
  """As `neighbors`, and the largest squared distance from each row."""
  features, k = as_features(features), min(k, len(features))
  mesh = jax.sharding.get_mesh()
  mesh = sharding.make_mesh() if mesh.empty else mesh
  if mesh.devices.flat[0].platform == "cpu":
    return host_search.search(features, k)
  return search_on_devices(features, k, mesh)


def search_on_devices(
  features: Float32Rows, k: int, mesh: Mesh
) -> tuple[_Distances, _Rows, Float[np.ndarray, " n"]]:
  """As `search`, for k <= n, with the rows spread over accelerators."""
  n = len(features)
  with jax.set_mesh(mesh):
    share = mesh.size * memory.ROW_MULTIPLE
    capacity = -(-n // share) * share
    rows = np.minimum(np.arange(capacity), n - 1)
    bank = sharding.put_rows(mesh, features, rows)
    # A power of two, so that few shapes are compiled.
    size = 2 ** min(_BLOCK_ELEMENTS // capacity, 1024).bit_length() // 2 or 1
    parts = []
    for start in range(0, n, size):
      block = np.minimum(np.arange(start, start + size), n - 1)
      found = _search_block(bank, features[block], block, n, k)
      parts.append(jax.device_get(found))
  return tuple(np.concatenate(x)[:n] for x in zip(*parts, strict=True))


def as_features(features: Float[np.ndarray, "n d"]) -> Float32Rows:
  """The features as float32, if no distance of two is infinite or NaN."""
  if not features.size:
    raise UserError(
      f"the features have the shape {features.shape}: pass one image or more"
    )
  with np.errstate(over="ignore", invalid="ignore"):
    features = np.asarray(features, np.float32, order="C")
    squared = np.einsum("nd,nd->n", features, features)
  if not squared.max() < 2**125:  # NaN is not, either
    raise UserError(
      "the features contain NaN or infinity: check the images and the model"
    )
  return features


@functools.partial(jax.jit, static_argnames="k")
def _search_block(bank, features, rows, n, k):
  distances = jnp.maximum(memory.squared_distances(bank, features), 0)
  column = jnp.arange(len(bank), dtype=rows.dtype)[None]
  farthest = jnp.max(jnp.where(column < n, distances, 0), axis=1)
  distances = jnp.where(column < n, distances, jnp.inf)
  # A row comes before its duplicates.
  distances = jnp.where(column == rows[:, None], -1, distances)
  distances, found = memory.nearest(distances, k)
  return jnp.maximum(distances, 0), found, farthest
