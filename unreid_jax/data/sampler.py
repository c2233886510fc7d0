"""Which images make up which step: pure functions of labels, seed and epoch.

Images with a negative label, the outliers, are never drawn.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from unreid_jax import UserError
from unreid_jax.arrays import checked
from unreid_jax.values import Count, CountOrZero

_Ids = Int[np.ndarray, " n"]
_Batches = Iterator[Int[np.ndarray, " {batch_size}"]]


@checked
def plan(
  labels: _Ids,
  camids: _Ids,
  epoch: CountOrZero,
  *,
  batch_size: Count,
  steps: Count,
  seed: CountOrZero,
  num_instances: CountOrZero,
  other_camera: bool,
) -> Int[np.ndarray, "{steps} {batch_size}"]:
  """The positions of the images of each step of an epoch.

  Args:
    labels, camids: one for each train image; a negative label is an outlier.
    epoch: counted from 0.
    batch_size: the number of images in a step.
    steps: the number of steps in the epoch.
    seed: the seed of the run, which with the epoch draws everything.
    num_instances: how many images of a cluster stand in a batch, see
      `by_cluster`; with 0, or if no two images share a label, see `shuffled`.
    other_camera: see `by_cluster`.

  Raises:
    UserError: all images are outliers.
  """
  rng = np.random.default_rng((seed, epoch))
  inliers = labels[labels >= 0]
  has_clusters = len(np.unique(inliers)) < len(inliers)
  if num_instances and has_clusters:
    sizes = batch_size, num_instances
    draw = by_cluster(rng, labels, camids, *sizes, other_camera)
  else:
    draw = shuffled(rng, labels, batch_size)
  return np.stack([next(draw) for _ in range(steps)])


@checked
def shuffled(
  rng: np.random.Generator, labels: _Ids, batch_size: Count
) -> _Batches:
  """Yields batches without end, from passes over all images in random order.

  The last, incomplete batch of each pass is left out. If there are fewer images
  than a batch needs, the batch repeats them.
  """
  images = _inliers(labels)
  while True:
    order = rng.permutation(images)
    order = np.resize(order, max(len(order), batch_size))
    for end in range(batch_size, len(order) + 1, batch_size):
      yield order[end - batch_size : end]


@checked
def by_cluster(
  rng: np.random.Generator,
  labels: _Ids,
  camids: _Ids,
  batch_size: Count,
  num_instances: Count,
  other_camera: bool = True,
) -> _Batches:
  """Yields batches without end, with `num_instances` images of each cluster.

  A pass visits each cluster once, in random order; its last, incomplete batch
  is left out. The images of a cluster stand side by side. If there are fewer
  clusters than a batch needs, the batch repeats them.

  The first image of a cluster is drawn at random. The others are drawn from
  its images under other cameras or, if there are none or with
  `other_camera=False` (`--no-cam` in the references), from all of its other
  images; with replacement if these are fewer than num_instances. A cluster of
  one image yields it once: the clusters behind it move up, and one of them may
  be cut by the border between two batches.

  Source: Ge et al., NeurIPS 2020 (RandomMultipleGallerySampler in yxgeee/SpCL
  and alibaba/cluster-contrast-reid).
  """
  images = _inliers(labels)
  order = images[np.argsort(labels[images], kind="stable")]
  clusters = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)

  def block(images):
    first = rng.choice(images)
    others = images[images != first]
    if other_camera:
      elsewhere = images[camids[images] != camids[first]]
      others = elsewhere if len(elsewhere) else others
    if not len(others):
      return images
    replace = len(others) < num_instances
    rest = rng.choice(others, num_instances - 1, replace=replace)
    return np.concatenate([[first], rest])

  length = sum(num_instances if len(x) > 1 else 1 for x in clusters)
  repeats = -(-batch_size // length)
  while True:
    visits = np.tile(rng.permutation(len(clusters)), repeats)
    blocks, rows = (block(clusters[c]) for c in visits), []
    for _ in range(repeats * length // batch_size):
      while len(rows) < batch_size:
        rows.extend(next(blocks))
      yield np.array(rows[:batch_size])
      rows = rows[batch_size:]


def _inliers(labels):
  """The images with a label of 0 or more."""
  if not (labels >= 0).any():
    raise UserError("no image has a label >= 0: there is nothing to train on")
  return np.flatnonzero(labels >= 0)
