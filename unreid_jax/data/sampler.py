"""Which images make up which step: pure functions of labels, seed and epoch.

Images with a negative label, the outliers, are never drawn.
"""

import numpy as np
from jaxtyping import Int

from unreid_jax import UserError

_NOTHING = "no image has a label >= 0: there is nothing to train on"


def plan(
  labels: Int[np.ndarray, " n"],
  camids: Int[np.ndarray, " n"],
  epoch: int,
  *,
  batch_size: int,
  steps: int,
  seed: int,
  num_instances: int,
  other_camera: bool,
) -> Int[np.ndarray, "{steps} {batch_size}"]:
  """The images of each step of an epoch: `by_cluster`, or else `shuffled`.

  Where no two images share a label, these are shuffled in any case.

  Args:
    labels: of all train images.
    camids: likewise.
    epoch: from 0.
    batch_size: images a step.
    steps: of the epoch.
    seed: of the run.
    num_instances: of a cluster in a batch; 0 for `shuffled`.
    other_camera: see `by_cluster`.

  Raises:
    UserError: no image has a label.
  """
  rng = np.random.default_rng((seed, epoch))
  has_clusters = np.bincount(labels[labels >= 0]).max(initial=0) > 1
  if num_instances and has_clusters:
    num_ids = batch_size // num_instances
    draw = by_cluster(rng, labels, camids, num_ids, num_instances, other_camera)
  else:
    draw = shuffled(rng, labels, batch_size)
  return np.stack([next(draw) for _ in range(steps)])


def shuffled(rng: np.random.Generator, labels, batch_size: int):
  """Yields batches without end; every image once a pass, in a new order.

  The images of a pass's last, incomplete batch are left out; they are others
  in each pass. Where there are fewer images than a batch needs, it repeats
  them.
  """
  images = np.flatnonzero(np.asarray(labels) >= 0)
  if not len(images):
    raise UserError(_NOTHING)
  while True:
    order = rng.permutation(images)
    order = np.resize(order, max(len(order), batch_size))
    for end in range(batch_size, len(order) + 1, batch_size):
      yield order[end - batch_size : end]


def by_cluster(
  rng: np.random.Generator,
  labels,
  camids,
  num_ids: int,
  num_instances: int,
  other_camera: bool = True,
):
  """Yields batches of num_ids clusters x num_instances images, without end.

  A pass visits the clusters in a random order, each once; those of its last,
  incomplete batch are left out. A cluster's images stand side by side. Where
  there are fewer clusters than a batch needs, a batch repeats them.

  The first image of a cluster is drawn at random, the others from its images
  under other cameras than the first one's; if there are none, from its other
  images. These are drawn without replacement if there are num_instances of
  them or more. A cluster of one image repeats it (the reference yields it
  once, and the blocks behind it shift).

  Args:
    rng: draws everything.
    labels: of all images; negative: outlier.
    camids: likewise.
    num_ids: P, the clusters in a batch.
    num_instances: K, the images of each.
    other_camera: False takes the others from all of the cluster's images, as
      the references' `--no-cam`.

  Source: Ge et al., NeurIPS 2020 (RandomMultipleGallerySampler in yxgeee/SpCL
  and alibaba/cluster-contrast-reid).
  """
  order = np.argsort(labels, kind="stable")
  order = order[np.searchsorted(np.asarray(labels)[order], 0) :]
  if not len(order):
    raise UserError(_NOTHING)
  borders = np.flatnonzero(np.diff(np.asarray(labels)[order])) + 1
  clusters = np.split(order, borders)
  camids = np.asarray(camids)

  def block(images):
    first = rng.choice(images)
    others = images[images != first]
    if other_camera:
      elsewhere = images[camids[images] != camids[first]]
      others = elsewhere if len(elsewhere) else others
    others = others if len(others) else images
    replace = len(others) < num_instances
    rest = rng.choice(others, num_instances - 1, replace=replace)
    return np.concatenate([[first], rest])

  while True:
    visits = rng.permutation(len(clusters))
    visits = np.resize(visits, max(len(visits), num_ids))
    for end in range(num_ids, len(visits) + 1, num_ids):
      batch = visits[end - num_ids : end]
      yield np.concatenate([block(clusters[c]) for c in batch])
