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
    sizes = batch_size, num_instances
    draw = by_cluster(rng, labels, camids, *sizes, other_camera)
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
  batch_size: int,
  num_instances: int,
  other_camera: bool = True,
):
  """Yields batches of some clusters x num_instances images, without end.

  A pass visits the clusters in a random order, each once; those of its last,
  incomplete batch are left out. A cluster's images stand side by side. Where
  there are fewer clusters than a batch needs, a batch repeats them.

  The first image of a cluster is drawn at random, the others from its images
  under other cameras than the first one's; if there are none, from its other
  images. These are drawn without replacement if there are num_instances of
  them or more. A cluster of one image yields it once, so that the clusters
  behind it shift, and one may be cut by the border of two batches.

  Args:
    rng: draws everything.
    labels: of all images; negative: outlier.
    camids: likewise.
    batch_size: images a batch.
    num_instances: images of a cluster, K; batch_size // K clusters, P.
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
