"""Where the time of some steps goes, for TensorBoard and Perfetto."""

import contextlib

import jax
from jaxtyping import PyTree

from unreid_jax.hosts import peers
from unreid_jax.workdir import Workdir, named


class Trace:
  """Traces steps, and what lies between them, into WORKDIR/profile.

  There a folder for each start has perfetto_trace.json.gz, for
  ui.perfetto.dev, and xplane.pb, for TensorBoard's plugin "profile". Of several
  processes the first one is traced.

  Args:
    workdir: where it writes.
    first: the step that is traced first; steps count from 0.
    num: the number of steps; 0: nothing is traced.
  """

  def __init__(self, workdir: Workdir, first: int, num: int):
    self._folder = workdir.profile
    self._first, self._end = first, first + (num if peers.is_first() else 0)
    self._is_on = False

  def __enter__(self) -> "Trace":
    return self

  def __exit__(self, *_) -> None:
    self._stop()

  def step(self, step: int, state: PyTree) -> contextlib.AbstractContextManager:
    """In it a step, of the state before it, is handed to the devices."""
    if step == self._end:
      jax.block_until_ready(state)  # what was traced has an end
      self._stop()
    elif step == self._first:
      jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
      self._is_on = True
    return jax.profiler.StepTraceAnnotation("train", step_num=step)

  def _stop(self):
    if self._is_on:
      self._is_on = False
      with named(self._folder):
        jax.profiler.stop_trace()
