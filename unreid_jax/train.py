"""A run, from the images to the last checkpoint: read `train` first."""

import contextlib
import functools
import pathlib
import zlib
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array
from ml_collections import ConfigDict

from unreid_jax import UserError, data, sharding
from unreid_jax.config import (
  check,
  check_same,
  check_weights,
  facts,
  resolve,
)
from unreid_jax.data import sampler
from unreid_jax.hosts import peers
from unreid_jax.preemption import Interrupted, Preemption
from unreid_jax.relabel import make_refresh, relabel
from unreid_jax.scoring import report_scores
from unreid_jax.state import (
  Parts,
  TrainState,
  first_state,
  keys,
  make_parts,
)
from unreid_jax.step import compile_step
from unreid_jax.workdir import Workdir
from unreid_jax.workdir.checkpoints import (
  Checkpoints,
  check_version,
  read_card,
)
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
    dataset = data.load(**config.dataset)
    if dataset.train is None:
      raise UserError(
        f"{config.dataset.root} holds no folder train: add one with the images "
        "to be trained on"
      )
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
    card = parts.card | {"train_images": fingerprint(dataset.train)}
    splits = zip(data.Dataset._fields, dataset, strict=True)
    prints = {f"the {k} images": x and fingerprint(x) for k, x in splits}
    peers.agree(prints)
    if earlier:
      check_same_images(read_card(earlier), card, earlier)
    # Not earlier: Orbax tidies up in a thread, which a quick exit would hit.
    checkpoints = stack.enter_context(Checkpoints(workdir))
    weights = "" if earlier else config.encoder.pretrained
    state = first_state(parts, len(images), weights)
    peers.agree({"the encoder's first weights": checksum(state.params)})
    workdir.write_config(config)
    if earlier:
      state = checkpoints.restore("last", like=state)
    step, end = int(state.step), config.epochs * steps_per_epoch
    session = Session(workdir, mesh, step, end)
    score_state = lambda state, step: report_scores(
      parts.encoder(state), parts.distance, dataset, np.array(state.labels),
      f"step {step}", config.evaluate_batch_size, writer,
    )  # fmt: skip
    writer.resume(step)
    checkpoints.keep("best", range(step + 1))
    if step:
      writer.log(f"goes on after step {step} of {end}")
    else:  # saved, so that a run without a last checkpoint is one that lost it
      checkpoints.keep("last", range(0))
      checkpoints.save("last", 0, card, state)
      checkpoints.wait()
      if dataset.query is not None:
        writer.write(0, "evaluate", score_state(state, 0).scores)

    copies = NamedSharding(mesh, sharding.COPY)
    key, method_key = jax.device_put(keys(config.seed), copies)
    train_step = compile_step(parts, state, key) if step < end else None
    refresh = make_refresh(parts, state)
    due = {
      what: parts.config[f"{what}_every"] or end
      for what in ("evaluate", "checkpoint", "log")
    }
    trace = stack.enter_context(Trace(workdir, step + 1, profile))
    preemption.defer()
    stop = False
    while step < end and not stop:
      epoch, done = divmod(step, steps_per_epoch)
      if done == 0:
        try:
          state = relabel(
            parts, state, refresh, dataset.train, method_key, writer,
            preemption.check,
          )  # fmt: skip
        except Interrupted:  # the epoch begins anew
          stop = True
          break
      labels = np.array(state.labels)  # the step gives the state away
      found = None
      pauses = steps_per_epoch, due["evaluate"], due["checkpoint"]
      pause = min(end, *(step - step % every + every for every in pauses))
      rows_of_steps = plan(labels, camids, epoch)[done : done + pause - step]
      title, latest = f"epoch {epoch + 1}/{config.epochs}", None
      arrays = {"images": images, "indices": indices, "camids": camids}
      arrays["labels"] = labels
      batches = sharding.batches(mesh, arrays, rows_of_steps)
      total, size = rows_of_steps.size, config.batch_size
      for batch in writer.track(batches, title, total, size):
        with trace.step(step, state):
          previous, (state, latest) = latest, train_step(state, batch, key)
        # One late: the device has work meanwhile.
        report_step(previous, step, due["log"], writer)
        step += 1
        if stop := preemption.requested(step):
          break
      report_step(latest, step, due["log"], writer)
      if step % steps_per_epoch == 0:
        report_epoch(parts, state, writer)
      if step == end or step % due["evaluate"] == 0:
        found = score_state(state, step)
        if found.scores:
          saved = checkpoints.latest("best")
          history = writer.history("evaluate")
          if peers.decide(is_best(found.scores, history, saved)):
            checkpoints.save("best", step, card | found.card, state)
          writer.write(step, "evaluate", found.scores)
      stop = stop or preemption.noticed
      if stop or step == end or step % due["checkpoint"] == 0:
        scored = found.card if found else {}
        note = functools.partial(session.save, step)
        checkpoints.save("last", step, card | scored, state, note)
      if step == end:
        checkpoints.keep("last", range(end, end + 1))
      if found and config.report:
        from unreid_jax import report  # not earlier: it takes a second

        report.write(
          parts.encoder(state), parts.distance, dataset, labels, found, step,
          parts.config, writer,
        )  # fmt: skip
    if stop and step < end:
      if checkpoints.latest("last") != step:
        checkpoints.save("last", step, card, state)
        checkpoints.wait()
      raise Interrupted(f"stopped after step {step} of {end}, which is saved")
    writer.table(writer.history("evaluate"))


def find_earlier(workdir: Workdir, config: ConfigDict) -> pathlib.Path | None:
  """The checkpoint that a run with this config goes on from, if there is one.

  Raises:
    UserError: the folder holds a run that cannot go on with it.
  """
  earlier = workdir.newest("last")
  if not earlier:
    workdir.check_unused()
  elif earlier.name == "0" and not workdir.newest("best"):
    return None  # nothing has been learnt yet
  else:
    check_version(earlier)
    check_same(workdir.stored_config(), config)
    workdir.check_metrics()
  return earlier


def checksum(tree: Any) -> int:
  """A number that tells one tree of replicated arrays from another."""
  arrays = map(np.ascontiguousarray, jax.tree.leaves(jax.device_get(tree)))
  return functools.reduce(lambda crc, x: zlib.crc32(x, crc), arrays, 0)


def report_step(
  figures: dict[str, Array] | None, step: int, every: int, writer: Writer
) -> None:
  """Checks the figures of a step, if there are any, and writes those due."""
  check_finite(figures, step)
  if figures and step % every == 0:
    writer.write(step, "train", jax.device_get(figures))


def report_epoch(parts: Parts, state: TrainState, writer: Writer) -> None:
  """Writes what the method has to say of an epoch's figures, if anything."""
  num = parts.config.steps_per_epoch
  means = {k: float(x) / num for k, x in jax.device_get(state.sums).items()}
  if notes := parts.method.notes(means):
    writer.write(int(state.step), "epoch", means)
  for note in notes:
    writer.log(f"{'':<20}{note}")


def fingerprint(split: data.Split) -> dict[str, int]:
  """What tells one set of images from another: of its pixels, a sample."""
  num = len(split.names)
  crc = zlib.crc32("\0".join(split.names).encode("utf-8", "surrogateescape"))
  for array in split.pids, split.camids, split.images[:: max(num // 500, 1)]:
    crc = zlib.crc32(np.ascontiguousarray(array), crc)
  return {"number": num, "crc32": crc}


def check_same_images(stored: dict, card: dict, path: pathlib.Path) -> None:
  """Refuses, by their cards, to go on from a checkpoint with other images."""
  then, now = stored.get("train_images"), card["train_images"]
  if then is not None and then != now:
    what = "their names, cameras or pixels differ"
    number = then.get("number") if isinstance(then, dict) else "?"
    if number != now["number"]:
      what = f"{number} then, {now['number']} now"
    raise UserError(
      f"{path} was trained on other train images ({what}): bring them back, or "
      "choose another --workdir"
    )


def is_best(
  scores: dict[str, float], history: list[dict], saved: int | None
) -> bool:
  """Whether mAP is higher than that of the best encoder, saved at a step.

  It is the test set's, as usual. What a killed run had found to be better, but
  has lost, does not count.
  """
  best = [line["mAP"] for line in history if line["step"] == saved]
  return bool(scores) and all(scores["mAP"] > mAP for mAP in best)


def check_finite(figures: dict[str, Array] | None, step: int) -> None:
  """Stops a run that is not finite any more, before it is saved."""
  for name in ("loss", "grad_norm", "param_norm"):
    if figures and not np.isfinite(figures[name]):
      raise UserError(
        f"{name} is {figures[name]} at step {step}: the run stops, its last "
        "good checkpoint stays; lower optim.lr, in a new --workdir"
      )
