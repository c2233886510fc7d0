"""Signals that ask a run to stop: it keeps everything, and can go on.

This module is imported first, and quickly: signals count from there on.
"""

import contextlib
import os
import select
import signal
import sys
import threading

STATUS = 75  # the exit status of a run that was told to stop and can go on
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_deferred = threading.Event()  # see `Preemption.defer`
_PATIENCE = 3.0  # seconds that the main thread may be deaf, while it compiles


class Interrupted(BaseException):
  """A signal asked the run to stop, and it did, with everything saved.

  Not an `Exception`, which libraries on its way might catch.
  """


def exit_on_signals() -> None:
  """From now on, and outside of a `Preemption`, a signal ends the process."""
  for number in ours():
    signal.signal(number, lambda number, frame: _exit())


def notice() -> None:
  """Asks the run to stop, in one of several processes and from any thread.

  What happens is what a signal does; all of them must be told.
  """
  if not _deferred.is_set():
    _exit()
  # JAX's coordination service hears it, and finds a step for all to stop at.
  os.kill(os.getpid(), signal.SIGTERM)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
  signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


class Preemption:
  """Within it, a signal raises `Interrupted`, or is noticed between two steps.

  At first nothing would be lost by stopping at once, and so the signal does;
  after `defer` the run is asked to stop by `requested`. A second signal always
  ends the process at once. A thread watches, as the main one does not hear
  while it compiles. In a process that is one of several, and in a thread, only
  `requested` is of use: there JAX's coordination service makes a notice to one
  process a notice to all, which stop after the same step.
  """

  def __enter__(self) -> "Preemption":
    import jax  # takes a second

    self._notified = False
    _deferred.clear()
    self._old = {}
    self._is_alone, self._checks = jax.process_count() == 1, 0
    if self._is_alone and threading.current_thread() is threading.main_thread():
      self._pipe, written = os.pipe()
      os.set_blocking(written, False)
      numbers = ours()
      self._old = {n: signal.signal(n, self._notice) for n in numbers}
      self._old_wakeup = signal.set_wakeup_fd(written)
      self._written = written
      threading.Thread(target=self._watch, daemon=True).start()
    return self

  def __exit__(self, *error) -> None:
    if self._old:
      for number, handler in self._old.items():
        signal.signal(number, handler)
      signal.set_wakeup_fd(self._old_wakeup)
      os.close(self._written)
      self._old = {}

  def defer(self) -> None:
    """From now on a run has something to save before it stops."""
    _deferred.set()

  @property
  def noticed(self) -> bool:
    """Whether a signal has come; always False in one of several processes."""
    return self._notified

  def requested(self, step: int) -> bool:
    """Whether to save and stop after this step."""
    if self._is_alone:
      return self._notified
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)

  def check(self) -> None:
    """Raises `Interrupted` if the run is to stop, while it labels an epoch.

    Several processes must call it equally often, and stop at the same call.
    """
    from unreid_jax.hosts import peers  # which needs this file

    self._checks += 1
    if self._notified if self._is_alone else peers.stops(self._checks):
      raise Interrupted("stopped before an epoch")

  def _notice(self, number, frame):
    del number, frame
    is_first, self._notified = not self._notified, True
    if is_first and not _deferred.is_set():
      raise Interrupted("stopped before a step; nothing is lost")

  def _watch(self):
    """Hears the signals themselves, byte by byte, until the pipe is closed."""
    if self._hears():
      self._notified |= _deferred.is_set()
      what = "after this step or evaluation; a second signal: at once"
      _say(f"stops {what if _deferred.is_set() else 'now'}")
      patience = None if _deferred.is_set() else _PATIENCE
      is_ready = select.select([self._pipe], [], [], patience)[0]
      if not is_ready or self._hears():
        _exit()
    os.close(self._pipe)

  def _hears(self):
    """Waits for one of the signals; False when there can be none any more."""
    heard = os.read(self._pipe, 1)
    while heard and heard[0] not in self._old:
      heard = os.read(self._pipe, 1)
    return bool(heard)


def ours() -> list[signal.Signals]:
  """The signals to heed: not those that nohup or a shell lets us ignore."""
  ignored = (signal.SIG_IGN, None)
  return [n for n in _SIGNALS if signal.getsignal(n) not in ignored]


def _exit():
  """Ends the process without a word of Python's; a bar may hide the cursor."""
  show_cursor = "\x1b[?25h" if sys.stderr and sys.stderr.isatty() else ""
  _say(f"{show_cursor}stopped at once; the same command goes on")
  os._exit(STATUS)


def _say(text):
  if sys.stderr:
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: reentrant
      print(text, file=sys.stderr, flush=True)
