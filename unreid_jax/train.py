"""A run, from the images to the last checkpoint: read `train` first."""

import contextlib
import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array
from ml_collections import ConfigDict

from unreid_jax import UserError, data, evaluate, sharding
from unreid_jax.checkpoint import Checkpoints, Preemption
from unreid_jax.config import check_workdir, resolve, write_config
from unreid_jax.data import sampler
from unreid_jax.methods import Batch
from unreid_jax.relabel import make_refresh, relabel
from unreid_jax.state import (
  Parts,
  TrainState,
  first_state,
  make_parts,
  shardings,
)
from unreid_jax.writer import Writer


class Interrupted(Exception):
  """A signal asked the run to stop, and it did, with everything saved."""


def make_train_step(parts: Parts) -> Callable:
  """`step(state, batch, key) -> state, metrics`, pure, for any mesh."""

  def train_step(state: TrainState, batch: Batch, key: Array):
    step_key = jax.random.fold_in(key, state.step)
    augment_key, method_key = jax.random.split(step_key)
    images = parts.augment(augment_key, batch.images)

    def loss_of(params):
      features, updated = parts.encoder.apply(
        {"params": params, "batch_stats": state.batch_stats},
        images,
        train=True,
        mutable=["batch_stats"],
      )
      loss, metrics = parts.method.loss(
        state.method, features, batch, method_key
      )
      return loss, (features, updated["batch_stats"], metrics)

    grad = jax.value_and_grad(loss_of, has_aux=True)
    (loss, (features, batch_stats, metrics)), grads = grad(state.params)
    updates, opt_state = parts.optimizer.update(
      grads, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    new_state = TrainState(
      step=state.step + 1,
      params=params,
      batch_stats=batch_stats,
      opt_state=opt_state,
      method=parts.method.update(state.method, features, batch, method_key),
    )
    norms = {
      "grad_norm": optax.tree.norm(grads),
      "param_norm": optax.tree.norm(params),
    }
    return new_state, {"loss": loss} | norms | metrics

  return train_step


def compile_step(parts: Parts, state: TrainState, key: Array) -> Callable:
  """The train step for this state, compiled; it gives the old state away."""
  config, mesh = parts.config, parts.mesh
  array = functools.partial(
    jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, sharding.ROWS)
  )
  shape = (config.batch_size, config.dataset.height, config.dataset.width, 3)
  indices = array(shape[:1], jnp.int32)
  batch = Batch(array(shape, jnp.uint8), indices, indices, indices)
  out = shardings(mesh, state), NamedSharding(mesh, sharding.COPY)
  step = jax.jit(make_train_step(parts), donate_argnums=0, out_shardings=out)
  return step.lower(state, batch, key).compile()


def train(config: ConfigDict, workdir: str) -> None:
  """Trains, evaluates and saves; goes on from WORKDIR's last checkpoint.

  Raises:
    UserError: bad input, or a loss, gradient or weight that is not finite.
    Interrupted: a signal asked to stop; the same call goes on.
  """
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(sharding.make_mesh(config.num_devices)))
    check_workdir(workdir, config)
    make_parts(resolve(config, 1))  # mistakes show before the data are read
    writer = stack.enter_context(Writer(workdir))
    dataset = load_dataset(config, writer)
    images, camids = dataset.train.images, dataset.train.camids
    indices = np.arange(len(images), dtype=np.int32)
    if len(images) < config.batch_size:
      raise UserError(
        f"{len(images)} train images are fewer than batch_size="
        f"{config.batch_size}: lower batch_size"
      )
    steps_per_epoch = config.steps_per_epoch or len(images) // config.batch_size
    plan = functools.partial(
      sampler.plan,
      batch_size=config.batch_size,
      steps=steps_per_epoch,
      seed=config.seed,
      **config.sampler,
    )
    parts = make_parts(resolve(config, steps_per_epoch))
    # Not earlier: Orbax tidies up in a thread, which a quick exit would hit.
    checkpoints = stack.enter_context(Checkpoints(workdir))
    is_new = checkpoints.step("last") is None
    weights = config.encoder.pretrained if is_new else ""
    state = first_state(parts, len(images), weights)
    write_config(workdir, config)
    labels = np.full(len(images), -1, np.int32)
    if not is_new:
      saved = checkpoints.restore("last", {"state": state, "labels": labels})
      state, labels = saved["state"], np.asarray(saved["labels"])
    step, end = int(state.step), config.epochs * steps_per_epoch
    checkpoints.forget("best", after=step)
    writer.resume(step)
    if step:
      writer.log(f"goes on after step {step} of {end}")
    elif dataset.query is not None:
      writer.write(0, "evaluate", evaluate_state(parts, state, dataset, writer))

    key, fill_key = jax.device_put(
      tuple(jax.random.split(jax.random.key(config.seed))),
      NamedSharding(parts.mesh, sharding.COPY),
    )
    train_step = compile_step(parts, state, key) if step < end else None
    refresh = make_refresh(parts, state)
    due = {
      what: parts.config[f"{what}_every"] or end
      for what in ("evaluate", "checkpoint", "log")
    }
    preemption = stack.enter_context(Preemption())
    stop = False
    while step < end and not stop:
      epoch, done = divmod(step, steps_per_epoch)
      if done == 0 and (mode := parts.method.encode(epoch)):
        at_hand = (refresh, labels, dataset.train, mode, fill_key, writer)
        state, labels = relabel(parts, state, *at_hand)
      pauses = steps_per_epoch, due["evaluate"], due["checkpoint"]
      pause = min(end, *(step - step % every + every for every in pauses))
      rows_of_steps = plan(labels, camids, epoch)[done : done + pause - step]
      title, latest = f"epoch {epoch + 1}/{config.epochs}", None
      for rows in writer.track(rows_of_steps, title, scale=config.batch_size):
        arrays = (images, indices, labels, camids)
        batch = Batch(*(sharding.put_rows(parts.mesh, x, rows) for x in arrays))
        previous, (state, latest) = latest, train_step(state, batch, key)
        check_finite(previous, step)  # one late: the device has work meanwhile
        step += 1
        if step % due["log"] == 0:
          check_finite(latest, step)
          writer.write(step, "train", jax.device_get(latest))
        if stop := preemption.requested(step):
          break
      check_finite(latest, step)
      saved = {"state": state, "labels": labels}
      if step % steps_per_epoch == 0:
        report_epoch(parts, state, step, writer)
      if step == end or step % due["evaluate"] == 0:
        scores = evaluate_state(parts, state, dataset, writer)
        if scores:
          if is_best(scores, writer.history("evaluate")):
            checkpoints.save("best", step, saved)
          writer.write(step, "evaluate", scores)
      if stop or step == end or step % due["checkpoint"] == 0:
        checkpoints.save("last", step, saved)
    if stop and step < end:
      raise Interrupted(f"stopped after step {step} of {end}, which is saved")
    writer.table(writer.history("evaluate"))


def score(config: ConfigDict, workdir: str) -> None:
  """Scores WORKDIR's last and best checkpoint and trains nothing."""
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(sharding.make_mesh(config.num_devices)))
    if not pathlib.Path(workdir).is_dir():
      raise UserError(f"{workdir} is no folder: give a trained run's --workdir")
    check_workdir(workdir, config)
    if not list(pathlib.Path(workdir).glob("checkpoints/last/[0-9]*")):
      raise UserError(f"{workdir} holds no checkpoint yet: train there first")
    writer = stack.enter_context(Writer(workdir))
    dataset = load_dataset(config, writer)
    checkpoints = stack.enter_context(Checkpoints(workdir))
    labels = np.zeros(len(dataset.train.images), np.int32)
    parts = make_parts(resolve(config, 1))
    state = first_state(parts, len(labels), weights="")
    rows = {}
    for which in ("last", "best"):
      step = checkpoints.step(which)
      if step is not None and step not in rows:
        saved = checkpoints.restore(which, {"state": state, "labels": labels})
        scores = evaluate_state(parts, saved["state"], dataset, writer)
        rows[step] = {"step": step} | scores
    writer.table(list(rows.values()))


def load_dataset(config: ConfigDict, writer: Writer) -> data.Dataset:
  """The images of `config.dataset`, decoded or from the cache."""
  return data.load(**config.dataset, track=writer.track)


def evaluate_state(
  parts: Parts, state: TrainState, dataset: data.Dataset, writer: Writer
) -> dict[str, float]:
  """Scores the encoder; without queries, exports the train set's features."""
  step = int(state.step)
  if dataset.query is None:
    path = writer.folder / "features.npz"
    evaluate.export_features(parts, state, dataset.train, path, writer.track)
    writer.log(f"{f'step {step}':<20}features are in {path}")
    return {}
  scores = evaluate.evaluate(parts, state, dataset, writer.track)
  text = "  ".join(f"{name} {100 * x:.1f}" for name, x in scores.items())
  writer.log(f"{f'step {step}':<20}{text}")
  return scores


def report_epoch(
  parts: Parts, state: TrainState, step: int, writer: Writer
) -> None:
  """Writes what the method has gathered in an epoch, if anything."""
  scalars, notes = parts.method.report(state.method)
  if scalars:
    writer.write(step, "epoch", scalars)
  for note in notes:
    writer.log(f"{'':<20}{note}")


def is_best(scores: dict[str, float], history: list[dict]) -> bool:
  """Whether no trained encoder had a higher mAP; on the test set, as usual."""
  trained = [line for line in history if line["step"]]
  return bool(scores) and all(scores["mAP"] > x["mAP"] for x in trained)


def check_finite(metrics: dict[str, Array] | None, step: int) -> None:
  """Stops a run that is not finite any more, before it is saved."""
  for name in ("loss", "grad_norm", "param_norm"):
    if metrics and not np.isfinite(metrics[name]):
      raise UserError(
        f"{name} is {metrics[name]} at step {step}: the run stops, its last "
        "good checkpoint stays; lower optim.lr, in a new --workdir"
      )
