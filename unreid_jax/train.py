"""A run, from the images to the last checkpoint: read `train` first."""

import contextlib
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array
from ml_collections import ConfigDict

from unreid_jax import UserError, data, progress, sharding
from unreid_jax.config import check, check_weights, facts, resolve
from unreid_jax.data import sampler
from unreid_jax.earlier import check_same_images, find_earlier, fingerprint
from unreid_jax.evaluate import Evaluation
from unreid_jax.hosts import peers
from unreid_jax.preemption import Interrupted, Preemption
from unreid_jax.relabel import make_refresh, relabel
from unreid_jax.scoring import is_best, report_scores
from unreid_jax.state import (
  Parts,
  TrainState,
  first_state,
  keys,
  make_parts,
  shardings,
)
from unreid_jax.step import compile_step
from unreid_jax.workdir import Workdir
from unreid_jax.workdir.checkpoints import Checkpoints, read_card
from unreid_jax.workdir.sessions import Session
from unreid_jax.workdir.trace import Trace
from unreid_jax.workdir.writer import Writer


def train(config: ConfigDict, path: str, profile: int = 0) -> None:
  """Trains, evaluates and saves; goes on from the last checkpoint in `path`.

  Args:
    config: as the user has set it.
    path: the workdir.
    profile: how many steps, from the second one on, are traced by
      `jax.profiler`, with all that lies between them.

  Raises:
    UserError: bad input, or a loss, gradient or weight that is not finite.
    Interrupted: a signal asked to stop; the same call goes on.
  """
  with contextlib.ExitStack() as stack:
    run, state = _open(config, path, stack)
    if not state.step:
      _begin(run, state)
    copies = NamedSharding(run.parts.mesh, sharding.COPY)
    key, method_key = jax.device_put(keys(config.seed), copies)
    step, end = int(state.step), run.end
    train_step = compile_step(run.parts, state, key) if step < end else None
    out = shardings(run.parts.mesh, state.method)
    refresh = make_refresh(run.parts.method, out)
    trace = stack.enter_context(Trace(run.writer.workdir, step + 1, profile))
    run.preemption.defer()
    stop = False
    while step < end and not stop:
      if step % run.config.steps_per_epoch == 0:
        try:
          state = relabel(
            run.parts, state, refresh, run.dataset.train, method_key,
            run.writer, run.preemption.check,
          )  # fmt: skip
        except Interrupted:  # the epoch begins anew
          stop = True
          break
      state, stop = _advance(run, state, train_step, key, trace)
      step = int(state.step)
      stop = _pause(run, state, stop)
    if stop and step < end:
      if run.checkpoints.latest("last") != step:
        run.checkpoints.save("last", step, run.card, state)
        run.checkpoints.wait()
      raise Interrupted(f"stopped after step {step} of {end}, which is saved")
    run.writer.table(run.writer.history("evaluate"))


class Run(NamedTuple):
  """What a run has from its first step to its last."""

  parts: Parts
  dataset: data.Dataset
  card: dict[str, Any]
  checkpoints: Checkpoints
  session: Session
  preemption: Preemption
  writer: Writer

  @property
  def config(self) -> ConfigDict:
    """With all durations in steps."""
    return self.parts.config

  @property
  def end(self) -> int:
    """The last step."""
    return self.config.epochs * self.config.steps_per_epoch

  def is_due(self, what: str, step: int) -> bool:
    """Whether to "evaluate" or to write a "checkpoint" after this step."""
    return step == self.end or step % self.every(what) == 0

  def every(self, what: str) -> int:
    """After how many steps this is done again: as above, or "log"."""
    return self.config[f"{what}_every"] or self.end


def _open(
  config: ConfigDict, path: str, stack: contextlib.ExitStack
) -> tuple[Run, TrainState]:
  """A run as it begins or goes on, after all that may be wrong is checked."""
  peers.agree(facts(config))
  mesh = sharding.make_mesh(config.num_devices)
  stack.enter_context(jax.set_mesh(mesh))
  preemption = stack.enter_context(Preemption())
  check(config, mesh.size)
  workdir = Workdir(path)
  stack.enter_context(workdir.locked())
  workdir.check_shared()
  earlier = find_earlier(workdir, config) if peers.is_first() else None
  earlier = peers.decide(earlier and str(earlier))
  earlier = earlier and pathlib.Path(earlier)
  if not earlier:
    check_weights(config)
  writer = stack.enter_context(Writer(workdir))
  dataset, images = _load(config)
  num = images["number"]
  steps_per_epoch = config.steps_per_epoch or num // config.batch_size
  parts = make_parts(resolve(config, steps_per_epoch))
  card = parts.card | {"train_images": images}
  if earlier:
    check_same_images(read_card(earlier), card, earlier)
  # Not earlier: Orbax tidies up in a thread, which a quick exit would hit.
  checkpoints = stack.enter_context(Checkpoints(workdir))
  weights = "" if earlier else config.encoder.pretrained
  state = first_state(parts, num, weights)
  peers.agree({"the encoder's first weights": peers.checksum(state.params)})
  workdir.write_config(config)
  if earlier:
    state = checkpoints.restore("last", like=state)
  step, end = int(state.step), config.epochs * steps_per_epoch
  session = Session(workdir, mesh, step, end)
  writer.resume(step)
  checkpoints.keep("best", range(step + 1))
  if step:
    writer.log(f"goes on after step {step} of {end}")
  run = Run(parts, dataset, card, checkpoints, session, preemption, writer)
  return run, state


def _load(config: ConfigDict) -> tuple[data.Dataset, dict[str, int]]:
  """A data set that can be trained on, and the train images' fingerprint."""
  dataset = data.load(**config.dataset)
  if dataset.train is None:
    raise UserError(
      f"{config.dataset.root} holds no folder train: add one with the images "
      "to be trained on"
    )
  num = len(dataset.train.images)
  if num < config.batch_size:
    raise UserError(
      f"{num} train images are fewer than batch_size={config.batch_size}: "
      "lower batch_size"
    )
  splits = zip(data.Dataset._fields, dataset, strict=True)
  prints = {name: split and fingerprint(split) for name, split in splits}
  peers.agree({f"the {name} images": x for name, x in prints.items()})
  return dataset, prints["train"]


def _begin(run: Run, state: TrainState) -> None:
  """Saves and scores an encoder that has learnt nothing yet."""
  if (
    run.config.dataset.name != "synthetic" and not run.config.encoder.pretrained
  ):
    run.writer.log(
      "the encoder starts from random weights, published figures from trained "
      "ones: --config.encoder.pretrained=FILE"
    )
  # So that a run without a last checkpoint is one that lost it.
  run.checkpoints.keep("last", range(0))
  run.checkpoints.save("last", 0, run.card, state)
  run.checkpoints.wait()
  if run.dataset.query is not None:
    run.writer.write(0, "evaluate", _score(run, state).scores)


def _advance(
  run: Run, state: TrainState, train_step: Callable, key: Array, trace: Trace
) -> tuple[TrainState, bool]:
  """Trains up to the next pause; the flag says whether the run is to stop."""
  config, step = run.config, int(state.step)
  epoch, done = divmod(step, config.steps_per_epoch)
  pauses = (
    config.steps_per_epoch,
    run.every("evaluate"),
    run.every("checkpoint"),
  )
  pause = min(run.end, *(step - step % every + every for every in pauses))
  train_set, labels = run.dataset.train, np.array(state.labels)
  rows_of_steps = sampler.plan(
    labels, train_set.camids, epoch, batch_size=config.batch_size,
    steps=config.steps_per_epoch, seed=config.seed, **config.sampler,
  )[done : done + pause - step]  # fmt: skip
  indices = np.arange(len(labels), dtype=np.int32)
  arrays = {"images": train_set.images, "indices": indices}
  arrays |= {"camids": train_set.camids, "labels": labels}
  batches = sharding.batches(run.parts.mesh, arrays, rows_of_steps)
  title = f"epoch {epoch + 1}/{config.epochs}"
  latest, stop = None, False
  for batch in progress.track(
    batches, title, rows_of_steps.size, config.batch_size
  ):
    with trace.step(step, state):
      previous, (state, latest) = latest, train_step(state, batch, key)
    # One late: the device has work meanwhile.
    report_step(previous, step, run)
    step += 1
    if stop := run.preemption.requested(step):
      break
  report_step(latest, step, run)
  if step % config.steps_per_epoch == 0:
    report_epoch(run.parts, state, run.writer)
  return state, stop


def _pause(run: Run, state: TrainState, stop: bool) -> bool:
  """Scores, saves and reports what is due; returns whether to stop."""
  step, found = int(state.step), None
  if run.is_due("evaluate", step):
    found = _score(run, state)
    if found.scores:
      saved = run.checkpoints.latest("best")
      history = run.writer.history("evaluate")
      if peers.decide(is_best(found.scores, history, saved)):
        run.checkpoints.save("best", step, run.card | found.card, state)
      run.writer.write(step, "evaluate", found.scores)
  stop = stop or run.preemption.noticed
  if stop or run.is_due("checkpoint", step):
    card = run.card | (found.card if found else {})
    note = functools.partial(run.session.save, step)
    run.checkpoints.save("last", step, card, state, note)
  if step == run.end:
    run.checkpoints.keep("last", range(step, step + 1))
  if found and run.config.report:
    from unreid_jax import report  # not earlier: it takes a second

    report.write(
      run.parts.encoder(state), run.parts.distance, run.dataset,
      np.array(state.labels), found, step, run.config, run.writer,
    )  # fmt: skip
  return stop


def _score(run: Run, state: TrainState) -> Evaluation:
  return report_scores(
    run.parts.encoder(state), run.parts.distance, run.dataset,
    np.array(state.labels), f"step {int(state.step)}",
    run.config.evaluate_batch_size, run.writer,
  )  # fmt: skip


def report_step(figures: dict[str, Array] | None, step: int, run: Run) -> None:
  """Checks the figures of a step, if there are any, and writes those due."""
  check_finite(figures, step)
  if figures and step % run.every("log") == 0:
    run.writer.write(step, "train", jax.device_get(figures))


def report_epoch(parts: Parts, state: TrainState, writer: Writer) -> None:
  """Writes what the method has to say of an epoch's figures, if anything."""
  num = parts.config.steps_per_epoch
  means = {k: float(x) / num for k, x in jax.device_get(state.sums).items()}
  if notes := parts.method.notes(means):
    writer.write(int(state.step), "epoch", means)
  for note in notes:
    writer.log(f"{'':<20}{note}")


def check_finite(figures: dict[str, Array] | None, step: int) -> None:
  """Stops a run that is not finite any more, before it is saved."""
  for name in ("loss", "grad_norm", "param_norm"):
    if figures and not np.isfinite(figures[name]):
      raise UserError(
        f"{name} is {figures[name]} at step {step}: the run stops, its last "
        "good checkpoint stays; lower optim.lr, in a new --workdir"
      )
