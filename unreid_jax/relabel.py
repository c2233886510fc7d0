"""The start of an epoch: features, pseudo labels, and a bank made of them."""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Int

from unreid_jax import UserError, evaluate
from unreid_jax.data import Split
from unreid_jax.pseudo_labels.clustering import Labelling, describe
from unreid_jax.state import Parts, TrainState, shardings
from unreid_jax.writer import Writer


def make_refresh(parts: Parts, state: TrainState) -> Callable:
  """The method's `refresh`, jitted once for the whole run."""
  out = shardings(parts.mesh, state.method)
  return jax.jit(parts.method.refresh, out_shardings=out)


def relabel(
  parts: Parts,
  state: TrainState,
  refresh: Callable,
  labels: Int[np.ndarray, " n"],
  train_set: Split,
  mode: str,
  key: Array,
  writer: Writer,
) -> tuple[TrainState, Int[np.ndarray, " n"]]:
  """Encodes the train set, labels it and refreshes the method's banks.

  In the mode "train" the images come shuffled and augmented, in training
  batches, and the running statistics of batch norm move on. In the mode
  "memory" nothing is encoded: the method labels by what its state remembers.

  Args:
    parts: of the run.
    state: before the epoch.
    refresh: from `make_refresh`.
    labels: of the last epoch; they stay if there are no better ones.
    train_set: its images, cameras and, for diagnosis, identities.
    mode: what the method's `encode` said.
    key: of the mode "train".
    writer: for what is found.

  Raises:
    UserError: less than two clusters, in this epoch and in the last.
  """
  config, pids, camids = parts.config, train_set.pids, train_set.camids
  variables, features = state.variables, None
  if mode != "memory":
    images = train_set.images
    variables, features = _encode(parts, state, images, mode, key, writer)
  labelling = parts.method.label(state.method, features, camids, pids)
  if jax.process_count() > 1:  # hosts must not differ by rounding
    found = labelling.labels, dict(labelling.state)
    found = multihost_utils.broadcast_one_to_all(found)
    labelling = labelling._replace(labels=found[0], state=found[1])
  _report(labelling, pids, int(state.step), writer)
  labels = _usable(labelling.labels, labels, writer)
  news = labelling.state if labels is labelling.labels else {}
  num_instances = config.sampler.num_instances
  num_ids = config.batch_size // (num_instances or config.batch_size)
  if labels.max() + 1 < num_ids:
    writer.log(f"  fewer clusters than a batch's {num_ids}: it repeats some")
  known = state.method.replace(**news)
  banks = refresh(known, features, labels, camids)
  stats = variables["batch_stats"]
  return state.replace(batch_stats=stats, method=banks), labels


def _encode(parts, state, images, mode, key, writer):
  """The variables afterwards, and the features of all images."""
  config, order = parts.config, np.arange(len(images))
  batch_size = config.evaluate_batch_size
  if mode == "train":
    batch_size = config.batch_size
    np.random.default_rng(config.seed).shuffle(order)
  return evaluate.encode(
    parts.encode[mode],
    state.variables,
    images,
    order,
    batch_size,
    key,
    "encode train",
    writer.track,
  )


def _usable(labels, previous, writer):
  """The labels, or the last epoch's if there is nothing to contrast."""
  if labels.max(initial=-1) > 0:
    return labels
  if previous.max(initial=-1) > 0:
    writer.log("  less than two clusters: the last epoch's labels stay")
    return previous
  raise UserError(
    f"{labels.max(initial=-1) + 1} cluster(s) of {len(labels)} images, and two "
    "are needed: the features are all alike or all apart; start from "
    "encoder.pretrained weights, or change method.k1 or method.min_samples"
  )


def _report(labelling: Labelling, pids, step: int, writer: Writer) -> None:
  """Writes what is known of the labels, from the first step that uses them."""
  labels = labelling.labels
  if labels.max(initial=-1) + 1 == len(labels) and not labelling.seconds:
    return  # every image for itself, and nobody tried to cluster them
  found = describe(labels, pids if (pids >= 0).all() else None)
  writer.write(step + 1, "cluster", found | labelling.scalars)
  text = f"{found['clusters']:,} clusters, {found['outliers']:,} outliers"
  if found["clusters"]:
    text += f", {found['size_min']:.0f} to {found['size_max']:.0f} images each "
    text += f"(median {found['size_median']:.0f})"
  names = ("NMI", "ARI", "precision", "recall")
  true = [f"{name} {100 * found[name]:.1f}" for name in names if name in found]
  seconds = [f"{name} {s:.1f} s" for name, s in labelling.seconds.items()]
  writer.log(f"{'cluster':<20}{text}")
  for parts in (true, seconds, labelling.notes):
    if parts:
      writer.log(f"{'':<20}{'  '.join(parts)}")
