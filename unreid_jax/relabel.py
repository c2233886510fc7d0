"""The start of an epoch: features, pseudo labels, and a bank made of them."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, PyTree

from unreid_jax import UserError, encode, sharding
from unreid_jax.data import Split
from unreid_jax.methods import Labels, Method
from unreid_jax.pseudo_labels.clustering import describe
from unreid_jax.state import Parts, TrainState
from unreid_jax.workdir.writer import Writer


def make_refresh(method: Method, out: PyTree) -> Callable:
  """The method's `refresh`, jitted once for the whole run.

  Its third argument is what `split_rows` returns; `out` are the shardings of
  the method's state.
  """
  is_split = lambda x: isinstance(x, sharding.SplitRows)

  def refresh(banks, labels, given, key):
    whole = lambda x: x.array if is_split(x) else x
    given = jax.tree.map(whole, given, is_leaf=is_split)
    return method.refresh(banks, labels, given, key)

  return jax.jit(refresh, out_shardings=out)


def split_rows(mesh: Mesh, given: PyTree, num: int) -> PyTree:
  """Splits arrays with a row for each of `num` images over the devices.

  So none of them has the features of all images.
  """
  split = lambda x: sharding.SplitRows.put(mesh, x)
  is_long = lambda x: np.shape(x)[:1] == (num,)
  return jax.tree.map(lambda x: split(x) if is_long(x) else x, given)


def relabel(
  parts: Parts,
  state: TrainState,
  refresh: Callable,
  train_set: Split,
  key: Array,
  writer: Writer,
  check: Callable[[], None],
) -> TrainState:
  """The state with an epoch's labels, and with banks that are made of them.

  If the method has no new labels, or less than two clusters, the last epoch's
  labels and banks stay; in the first epoch that is a UserError. `refresh` comes
  from `make_refresh`, and `key` is the method's. `check` is called before each
  batch is encoded, and may raise.
  """
  config, step = parts.config, int(state.step)
  epoch, variables = step // config.steps_per_epoch, state.variables

  def apply(*arguments):
    check()
    return parts.apply(*arguments)

  def encode_all(train: bool = False):
    nonlocal variables
    if not train:
      encoder = encode.Encoder(parts.card, variables, apply, parts.mesh)
      size = config.evaluate_batch_size
      return encoder(train_set.images, size, "encode train")
    order = np.arange(len(train_set.images))
    np.random.default_rng(config.seed + epoch).shuffle(order)
    first = epoch * len(order)

    def run(variables, images, start):
      check()
      batch_key = jax.random.fold_in(key, first + start)
      return parts.adapt(variables, images, batch_key)

    variables, features = encode.encode(
      run, variables, train_set.images, config.batch_size, "encode train", order
    )
    return features

  found = parts.method.label(state.method, encode_all, train_set, epoch)
  state = state.replace(batch_stats=variables["batch_stats"])
  if found is None:
    return state
  _report(found, train_set.pids, step, writer)
  if not _is_usable(found.values, np.asarray(state.labels), writer):
    return state
  num_instances = config.sampler.num_instances
  num_ids = config.batch_size // (num_instances or config.batch_size)
  if found.values.max() + 1 < num_ids:
    writer.log(f"  fewer clusters than a batch's {num_ids}: it repeats some")
  epoch_key = jax.random.fold_in(key, epoch)
  given = split_rows(parts.mesh, found.given, len(found.values))
  banks = refresh(state.method, found.values, given, epoch_key)
  labels = jax.device_put(found.values, state.labels.sharding)
  return state.replace(method=banks, labels=labels)


def _is_usable(
  labels: Int[np.ndarray, " n"], previous: Int[np.ndarray, " n"], writer: Writer
) -> bool:
  """Whether there are two clusters; if not, the last epoch's must do."""
  if labels.max(initial=-1) > 0:
    return True
  if previous.max(initial=-1) > 0:
    writer.log("  less than two clusters: the last epoch's labels stay")
    return False
  raise UserError(
    f"{labels.max(initial=-1) + 1} cluster(s) of {len(labels)} images, and two "
    "are needed: the features are all alike or all apart; start from "
    "encoder.pretrained weights, or change how the method clusters"
  )


def _report(found: Labels, pids, step: int, writer: Writer) -> None:
  """Writes what is known of the labels, from the first step that uses them."""
  if not found.clustered:
    return
  truth = describe(found.values, pids if (pids >= 0).all() else None)
  writer.write(step + 1, "cluster", truth | found.figures)
  text = f"{truth['clusters']:,} clusters, {truth['outliers']:,} outliers"
  if truth["clusters"]:
    text += f", {truth['size_min']:.0f} to {truth['size_max']:.0f} images each "
    text += f"(median {truth['size_median']:.0f})"
  names = ("NMI", "ARI", "precision", "recall")
  true = [f"{name} {100 * truth[name]:.1f}" for name in names if name in truth]
  seconds = [f"{name} {s:.1f} s" for name, s in found.seconds.items()]
  writer.log(f"{'cluster':<20}{text}")
  for parts in (true, seconds, found.notes):
    if parts:
      writer.log(f"{'':<20}{'  '.join(parts)}")
