"""Checkpoints through Orbax: the last state, the best one, preemption."""

import pathlib
import signal

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils


class Checkpoints:
  """WORKDIR/checkpoints/last and .../best, one checkpoint each.

  A checkpoint is a pytree of arrays and counts once it is whole: what a killed
  run left half-written is ignored. It can be restored on another number of
  devices.
  """

  def __init__(self, workdir: str):
    folder = pathlib.Path(workdir).resolve() / "checkpoints"
    options = ocp.CheckpointManagerOptions(
      max_to_keep=1,
      create=True,
      cleanup_tmp_directories=True,
      enable_async_checkpointing=False,
    )
    self._managers = {
      which: ocp.CheckpointManager(folder / which, options=options)
      for which in ("last", "best")
    }

  def __enter__(self):
    return self

  def __exit__(self, *error):
    for manager in self._managers.values():
      manager.close()

  def step(self, which: str) -> int | None:
    """Step of the "last" or the "best" checkpoint, None if there is none."""
    return self._managers[which].latest_step()

  def save(self, which: str, step: int, tree) -> None:
    """Saves it in the place of an earlier one."""
    args = ocp.args.StandardSave(tree)
    self._managers[which].save(step, args=args, force=True)

  def forget(self, which: str, after: int) -> None:
    """Deletes checkpoints of later steps, which a killed run has left."""
    for step in self._managers[which].all_steps():
      if step > after:
        self._managers[which].delete(step)

  def restore(self, which: str, like):
    """The checkpoint, with the shapes and shardings of `like`."""
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    args = ocp.args.StandardRestore(abstract)
    return self._managers[which].restore(self.step(which), args=args)


class Preemption:
  """Turns SIGTERM and SIGINT into a question asked between two steps.

  On several hosts a notice to one of them is a notice to all, through JAX's
  coordination service, and all stop after the same step.
  """

  _SIGNALS = (signal.SIGTERM, signal.SIGINT)

  def __enter__(self):
    self._notified = False
    self._old = {}
    if jax.process_count() == 1:
      self._old = {n: signal.signal(n, self._notice) for n in self._SIGNALS}
    return self

  def __exit__(self, *error):
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _notice(self, number, frame):
    del frame
    self._notified = True
    print("stops after this step or evaluation; a second signal: at once")
    signal.signal(number, self._old[number])  # a second one ends it at once

  def requested(self, step: int) -> bool:
    """Whether to save and stop after this step."""
    if jax.process_count() == 1:
      return self._notified
    return multihost_utils.reached_preemption_sync_point(step)
