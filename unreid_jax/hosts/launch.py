"""The process that starts a run's processes on this machine, and watches them.

It does not compute. So it hears signals at once, and can say in one line what
has become of a process that the system or JAX's C++ code has ended.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

from absl import flags

from unreid_jax import UserError, preemption
from unreid_jax.hosts import place

PLACE = "UNREID_JAX_PLACE"  # tells a process that it is a child, and where
LOST = 76  # the exit status of a run that has lost a process and can go on
PATIENCE = 60  # seconds that the others have to end after one has failed
_SAID = (2, preemption.STATUS, LOST)  # these say in a line of their own why
# What C++ writes when another process is gone; kept back until the end.
_CRASH = re.compile(rb"[EF]\d{4} \d\d:.*(coordination|client\.h)")
_ERROR = re.compile(rb"error: (?:process \d+: )?(.*)")
# What C++ and Orbax write while all goes well.
_NOISE = re.compile(rb"\[Gloo\] Rank|[WE]\d{4} \d\d:.*(preemption|SIGTERM)")
_FLAGS = flags.FlagValues()
flags.DEFINE_enum(
  "distributed", "auto", place.WAYS, "How to find the other processes.",
  flag_values=_FLAGS,
)  # fmt: skip
flags.DEFINE_string(
  "coordinator", None, "HOST:PORT of process 0.", flag_values=_FLAGS
)
flags.DEFINE_integer(
  "num_processes", None, "How many processes there are.", flag_values=_FLAGS
)
flags.DEFINE_integer(
  "process_id", None, "Which of them this is, from 0.", flag_values=_FLAGS
)
flags.DEFINE_integer(
  "launch", 0, "Start this many processes here, to try several.", lower_bound=0,
  flag_values=_FLAGS,
)  # fmt: skip
flags.DEFINE_integer(
  "restarts", 0, "Start again up to this often when a process is lost.",
  lower_bound=0, flag_values=_FLAGS,
)  # fmt: skip
flags.FLAGS.append_flag_values(_FLAGS)


def launch(argv: list[str]) -> int | None:
  """Runs the command in processes of their own, if there are several.

  Args:
    argv: the command line, with the flags of this module and any others.

  Returns:
    The exit status of the run: 0, or that of the process that has failed; None
    if this process is alone, or is itself one of them.

  Raises:
    UserError: the flags or the environment are not enough to find the others.
  """
  if PLACE in os.environ:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # see `peers`
    return None
  given = _FLAGS(argv, known_only=True) and _FLAGS.flag_values_dict()
  where = place.find(given["distributed"], given, os.environ)
  if given["launch"] and where:
    raise UserError("--launch is for one machine: leave it, or the place, out")
  num = given["launch"]
  if num < 2 and not where:
    return None
  for attempt in range(given["restarts"] + 1):
    if attempt:
      _say(f"starts again ({attempt} of {given['restarts']})")
    places = [where] if where else place.local(num, _free_port(), os.environ)
    family = _Family(argv, places)
    status = family.wait()
    if status != LOST or family.is_stopping:
      break
  return status


class _Family:
  """The processes of a run on this machine.

  Attributes:
    is_stopping: whether a signal has asked the run to stop.
  """

  def __init__(self, argv, places):
    self.is_stopping, self._forwards, self._places = False, [], places
    self._errors = set()
    self._children = [self._start(argv, own, len(places)) for own in places]
    for number in preemption.ours():
      signal.signal(number, self._stop)

  def wait(self) -> int:
    """Waits for all of them, and returns the status that tells most."""
    until = None
    while any(child.poll() is None for child in self._children):
      if until is None and any(child.poll() for child in self._children):
        until = time.monotonic() + PATIENCE + 10  # JAX finds it out by then
      if until is not None and time.monotonic() > until:
        self._kill()
      time.sleep(0.05)
    for thread in self._forwards:
      thread.join()
    statuses = [child.returncode for child in self._children]
    for status in (1, 2, preemption.STATUS):
      if status in statuses:
        return status
    if not any(statuses):
      return 0
    killed = {
      own["process_id"]: signal.Signals(-status).name
      for own, status in zip(self._places, statuses, strict=True)
      if status < 0 and status != -signal.SIGABRT  # JAX's, of the others
    }
    for process, name in killed.items():
      _say(f"process {process} was ended by {name}")
    if not killed and LOST not in statuses:
      _say("another process is lost")
    _say("the run has ended; the same command goes on")
    return LOST

  def _start(self, argv, own, num):
    env = os.environ | {PLACE: json.dumps(own), "PYTHONUNBUFFERED": "1"}
    child = subprocess.Popen(
      [sys.executable, *argv],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      env=env,
      start_new_session=True,  # a Ctrl-C is for this process alone
    )
    prefix = f"[{own['process_id']}] ".encode() if num > 1 else b""
    for source, to in (child.stdout, sys.stdout), (child.stderr, sys.stderr):
      thread = threading.Thread(
        target=_forward,
        args=(source, to.buffer, prefix, self._errors),
        daemon=True,
      )
      thread.start()
      self._forwards.append(thread)
    return child

  def _stop(self, number, frame):
    """Passes a first signal on; at a second one all ends at once."""
    del number, frame
    if self.is_stopping:
      self._kill()
      _say("stopped at once; the same command goes on")
      os._exit(preemption.STATUS)
    self.is_stopping = True
    for child in self._children:
      with contextlib.suppress(OSError):  # it has ended
        child.stdin.write(b"stop\n")
        child.stdin.flush()

  def _kill(self):
    for child in self._children:
      with contextlib.suppress(OSError):
        child.kill()


def _forward(source, to, prefix, errors):
  """Copies lines, but not the stack of a process that has lost another one.

  An error that ends several processes is shown once; `errors` are those so far.
  """
  held = []
  for line in source:
    error = _ERROR.match(line)
    if _NOISE.match(line) or (error and error[1] in errors):
      continue
    if error:
      errors.add(error[1])
    if held or _CRASH.match(line):
      held.append(line)
      continue
    to.write(prefix + line)
    to.flush()
  if held and not any(b"distributed service detected" in x for x in held):
    to.write(b"".join(prefix + line for line in held))
    to.flush()


def _free_port():
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


def _say(text):
  print(text, file=sys.stderr, flush=True)
