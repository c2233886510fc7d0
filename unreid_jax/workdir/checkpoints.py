"""Checkpoints through Orbax, in two parts: the encoder, and the training."""

import contextlib
import errno
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Int, PyTree

from unreid_jax import UserError
from unreid_jax.values import expand
from unreid_jax.workdir import Workdir, read_json, whole_file


def _is_news(record: logging.LogRecord) -> bool:
  """Whether a log record says what `Checkpoints` does not say in one line."""
  is_traceback = record.exc_info and "orbax" in record.pathname
  return not is_traceback and "_SignalingThread" not in record.getMessage()


class Checkpoints:
  """The last checkpoint of a run, the one before it, and the best one.

  Each is a folder with three items: `encoder`, the parameters and the running
  statistics; `card`, what builds the encoder; `training`, all else. It counts
  once it is whole: what a killed run left half-written is ignored. It can be
  restored on another number of devices. They are written in the background, one
  after the other: a "last" one is never there before the "best" of its step.
  """

  def __init__(self, workdir: Workdir):
    options = lambda num: ocp.CheckpointManagerOptions(
      max_to_keep=num,
      create=True,
      cleanup_tmp_directories=True,
    )
    logging.getLogger("absl").addFilter(_is_news)
    self._workdir, self._pending = workdir, None
    self._managers = {
      which: ocp.CheckpointManager(
        workdir.checkpoints(which).resolve(), options=options(num)
      )
      for which, num in {"last": 2, "best": 1}.items()
    }

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind=None, *error) -> None:
    try:
      with contextlib.suppress(*[UserError] if kind else []):
        self.wait()
    finally:
      for manager in self._managers.values():
        manager.close()

  def save(
    self,
    which: str,
    step: int,
    card: dict,
    state: Any,
    then: Callable[[], None] = lambda: None,
  ) -> None:
    """Begins to save a `TrainState` as the "last" or the "best" one.

    The state may change, or be given away, once this has returned. `then` is
    called when it is known to be saved.

    Raises:
      UserError: it cannot be written, or the one before it could not be; the
        earlier ones stay.
    """
    self.wait()
    args = ocp.args.Composite(
      card=ocp.args.JsonSave(card),
      encoder=ocp.args.StandardSave(state.encoder),
      training=ocp.args.StandardSave(state.training),
    )
    size = sum(x.nbytes for x in jax.tree.leaves(vars(state)))
    self._pending = which, step, size, then
    with self._writing():
      free = shutil.disk_usage(self._workdir.checkpoints(which)).free
      if free < size:  # Orbax would leave a mess
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
      self._managers[which].save(step, args=args, force=True)

  def wait(self) -> None:
    """Waits until what is being saved is saved.

    Raises:
      UserError: it cannot be written.
    """
    if self._pending:
      with self._writing():
        self._managers[self._pending[0]].wait_until_finished()
      then, self._pending = self._pending[-1], None
      then()

  @contextlib.contextmanager
  def _writing(self):
    """Within it, what cannot be written is a UserError, and leaves nothing."""
    which, step, size, _ = self._pending
    try:
      yield
    except Exception as error:  # of Orbax, TensorStore or the system
      self._pending = None
      with contextlib.suppress(Exception):
        self._managers[which].wait_until_finished()
      folder = self._workdir.checkpoints(which)
      for part in folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(part, ignore_errors=True)
      raise UserError(
        f"{folder}: step {step} cannot be saved ({_reason(error)}): it needs "
        f"{size / 2**20:,.1f} MB; make room, and the same command goes on from "
        "the last checkpoint"
      ) from None

  def latest(self, which: str) -> int | None:
    """The step of the newest checkpoint of a kind."""
    self.wait()
    return self._managers[which].latest_step()

  def keep(self, which: str, steps: range) -> None:
    """Deletes the checkpoints of all other steps.

    A killed run has left later ones, and an ended one needs its last alone.
    """
    self.wait()
    for step in self._managers[which].all_steps():
      if step not in steps:
        self._managers[which].delete(step)

  def restore(self, which: str, like: Any) -> Any:
    """The `TrainState`, with the shapes and shardings of another one."""
    args = ocp.args.Composite(
      encoder=ocp.args.StandardRestore(_abstract(like.encoder)),
      training=ocp.args.StandardRestore(_abstract(like.training)),
    )
    newest = self._workdir.newest(which)
    steps = sorted(self._managers[which].all_steps())
    advice = ""
    if len(steps) > 1:
      advice = "; if it is damaged, move it away, and the same command goes on "
      advice += f"after step {steps[-2]}"
    with _whole(newest, advice):
      found = self._managers[which].restore(int(newest.name), args=args)
    return like.restored(found["encoder"], found["training"])


def find(path: str | pathlib.Path) -> pathlib.Path:
  """The checkpoint that a path means.

  Args:
    path: a workdir, whose last checkpoint is meant; its checkpoints/last or
      checkpoints/best; or one checkpoint in there.

  Raises:
    UserError: there is no checkpoint.
  """
  path = pathlib.Path(os.path.abspath(expand(path, "the path")))
  found = Workdir(path).newest("last")
  if not found and path.parent.name == "checkpoints":
    found = Workdir(path.parent.parent).newest(path.name)
  if not found and path.parent.parent.name == "checkpoints" and path.is_dir():
    found = path
  if not found:
    raise UserError(
      f"{path} holds no checkpoint: give a workdir in which a run has saved "
      "one, or a file of weights"
    )
  check_version(found)
  return found


def read_card(checkpoint: pathlib.Path) -> dict[str, Any]:
  """What builds the encoder of a checkpoint."""
  path = checkpoint / "card" / "metadata"
  with _whole(checkpoint):
    text = path.read_bytes()
  return read_json(text, path, "restore it, or train again")


def read_encoder(checkpoint: pathlib.Path, like: PyTree) -> PyTree:
  """The encoder's arrays, with the shapes and shardings of `like`."""
  with _whole(checkpoint), ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(checkpoint / "encoder", _abstract(like))


def write_card(checkpoint: pathlib.Path, card: dict[str, Any]) -> None:
  """Replaces the card of a checkpoint."""
  with whole_file(checkpoint / "card" / "metadata") as file:
    file.write(json.dumps(card).encode())


def read_labels(checkpoint: pathlib.Path) -> Int[np.ndarray, " n"]:
  """The pseudo labels of all train images."""
  wanted = {"labels": ocp.RestoreArgs(restore_type=np.ndarray)}
  args = ocp.args.PyTreeRestore(
    item={"labels": 0}, restore_args=wanted, partial_restore=True
  )
  with (
    _whole(checkpoint),
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer,
  ):
    return checkpointer.restore(checkpoint / "training", args)["labels"]


def check_version(checkpoint: pathlib.Path) -> None:
  """Refuses a checkpoint whose parts are not those of this version."""
  if (checkpoint / "default").is_dir():
    raise UserError(
      f"{checkpoint} was written by an earlier version of unreid_jax, whose "
      "checkpoints had one part: train again in another --workdir"
    )


@contextlib.contextmanager
def _whole(checkpoint, advice=""):
  """Whatever goes wrong in it, the checkpoint and what is asked for differ."""
  try:
    yield
  except Exception as error:
    raise UserError(
      f"{checkpoint} cannot be restored ({_reason(error)}): it is damaged, or "
      "belongs to another encoder or another number of train images"
      f"{advice}"
    ) from None


def _reason(error):
  """The first line of an error of a library, or the cause that hides in it."""
  full = os.strerror(errno.ENOSPC)
  text = full if full in str(error) else str(error).strip()
  return text.partition("\n")[0][:200] or type(error).__name__


def _abstract(tree):
  return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
