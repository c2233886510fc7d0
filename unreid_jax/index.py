"""An approximate index of a gallery's features, kept beside them on disk."""

import contextlib
import importlib.util
import os
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Float

from unreid_jax import UserError, values
from unreid_jax.arrays import checked
from unreid_jax.encode import flat
from unreid_jax.gallery import Gallery
from unreid_jax.search import Hits

_AT_ONCE = 65_536  # features that are read from the disk and added at a time


@checked
def rank_approximately(
  query: Float[np.ndarray, "q d"] | dict,
  gallery: Gallery,
  top: values.Count = 10,
) -> Hits:
  """As `search.rank`, by a graph of near neighbours (HNSW) instead of all.

  Some of the nearest may be missed; the similarities are exact. The graph is
  kept with the features, and only new ones are added to it.

  Args:
    query: unit features, as an encoder gives them.
    gallery: a folder's features, see `gallery.update`.
    top: how many images are wanted for each query; fewer come back if the
      graph leads to fewer.

  Raises:
    UserError: usearch is not installed, or the index cannot be written.
  """
  if not importlib.util.find_spec("usearch"):
    raise UserError("usearch is not installed: pip install usearch")
  query = flat(query)
  if not len(gallery):
    return Hits(*(np.zeros((len(query), 0), x) for x in (int, np.float32)))
  index = _updated(gallery)
  place = np.full(len(gallery.stored), -1)  # the store has former images, too
  place[gallery.rows] = np.arange(len(gallery))
  wanted = top
  while True:
    found = index.search(query, min(wanted, len(index)))
    keys = np.atleast_2d(found.keys)
    near = [place[row[row < len(place)].astype(int)] for row in keys]
    near = [row[row >= 0] for row in near]
    fewest = min(map(len, near))
    if fewest >= min(top, len(gallery)) or wanted >= len(index):
      break
    wanted *= 2
  near = np.stack([row[:fewest] for row in near])
  similarity = np.stack(
    [gallery[rows] @ one for rows, one in zip(near, query, strict=True)]
  )
  order = np.argsort(-similarity, axis=1, kind="stable")[:, :top]
  return Hits(*(np.take_along_axis(x, order, 1) for x in (near, similarity)))


def _updated(gallery) -> Any:
  """The index of all stored features, made anew if it is of others."""
  from usearch.index import Index

  stored, path = gallery.stored, pathlib.Path(gallery.stored.filename)
  path = path.with_name("index.usearch")
  index = None
  if path.exists():
    with contextlib.suppress(Exception):  # whatever usearch says to a torso
      index = Index.restore(os.fspath(path))
  if index is None or not _fits(index, stored):
    index = Index(ndim=stored.shape[1], metric="ip", dtype="f16")
  if len(index) == len(stored):
    return index
  for start in range(len(index), len(stored), _AT_ONCE):
    part = np.asarray(stored[start : start + _AT_ONCE])
    index.add(np.arange(start, start + len(part)), part)
  partial = path.with_suffix(f".{os.getpid()}.partial")  # of this process
  try:
    index.save(os.fspath(partial))
    os.replace(partial, path)
  except Exception as error:  # usearch has several
    partial.unlink(missing_ok=True)
    raise UserError(
      f"{path} cannot be written ({error}): mend that, or choose another "
      "--cache_dir"
    ) from None
  return index


def _fits(index, stored) -> bool:
  """Whether it has the first of these features, by its last one."""
  num = len(index)
  if not 0 < num <= len(stored) or index.ndim != stored.shape[1]:
    return False
  last = np.asarray(index.get(num - 1), np.float32)
  return last.shape == stored[0].shape and np.allclose(
    last, stored[num - 1], atol=1e-3
  )
