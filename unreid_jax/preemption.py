"""A signal that asks a run to stop, noticed between two of its steps."""

import signal

import jax
from jax.experimental import multihost_utils


class Preemption:
  """Turns SIGTERM and SIGINT into a question asked between two steps.

  On several hosts a notice to one of them is a notice to all, through JAX's
  coordination service, and all stop after the same step.
  """

  _SIGNALS = (signal.SIGTERM, signal.SIGINT)

  def __enter__(self) -> "Preemption":
    self._notified = False
    self._old = {}
    if jax.process_count() == 1:
      self._old = {n: signal.signal(n, self._notice) for n in self._SIGNALS}
    return self

  def __exit__(self, *error) -> None:
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
