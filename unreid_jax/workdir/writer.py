"""What a run reports: metrics, TensorBoard, a log, progress, a final table."""

import contextlib
import errno
import functools
import json
import logging
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
from jax.typing import ArrayLike
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from unreid_jax import UserError, printable, progress
from unreid_jax.terminal import Terminal
from unreid_jax.workdir import Workdir, named, read_json, whole_file

_FLUSH_EVERY = 10.0  # seconds until TensorBoard sees what is written


class Writer:
  """Reports a run on the terminal (stderr) and in its workdir.

  WORKDIR/metrics.jsonl holds a JSON object a line, without times, so that it
  is the same for a run that was interrupted; TensorBoard has the times. Of
  several processes only the first one writes, but each knows the history.
  While the writer is open, it shows whatever calls `progress.track`, and what
  the library's modules log.
  """

  def __init__(self, workdir: Workdir, keeps_log: bool = True):
    self.workdir, self._keeps_log = workdir, keeps_log
    self._lines = read_metrics(workdir.metrics)
    self._events, self._flushed = None, 0.0
    self._stack = contextlib.ExitStack()
    self._is_main = jax.process_index() == 0
    if self._is_main:
      workdir.path.mkdir(parents=True, exist_ok=True)
    self._terminal = Terminal()

  def __enter__(self) -> "Writer":
    if self._is_main:
      show = functools.partial(self._terminal.track, log=self.log)
      self._stack.enter_context(progress.shown_by(show))
    self._stack.enter_context(sent_to(self.log))
    return self

  def __exit__(self, *_) -> None:
    self._stack.close()
    self._terminal.close()
    if self._events:
      with named(self.workdir.events):
        self._events.close()

  def resume(self, step: int) -> None:
    """Forgets what was written after this step's checkpoint.

    Lines of the step itself stay: they are written before it is saved. At
    step 0 nothing has been saved, and nothing stays.
    """
    had_lines = bool(self._lines)
    self._lines = [x for x in self._lines if step and x["step"] <= step]
    if not self._is_main:
      return
    text = "".join(json.dumps(x) + "\n" for x in self._lines)
    with whole_file(self.workdir.metrics) as file:
      file.write(text.encode())
    if had_lines:
      self._events = self._open_events(purge_step=step + 1 if step else 0)

  def write(
    self, step: int, kind: str, scalars: Mapping[str, ArrayLike]
  ) -> None:
    """Appends scalars: to the file at once, to TensorBoard within 10 s.

    Args:
      step: how many steps are done.
      kind: what they are about, such as "train" or "evaluate".
      scalars: numbers, or arrays of one number.
    """
    values = {name: float(value) for name, value in scalars.items()}
    line = {"step": int(step), "kind": kind} | values
    self._lines.append(line)
    if not self._is_main:
      return
    with (
      named(self.workdir.metrics),
      open(self.workdir.metrics, "a", encoding="utf-8") as file,
    ):
      file.write(json.dumps(line) + "\n")
    self._events = self._events or self._open_events()
    with named(self.workdir.events):
      for name, value in values.items():
        scalar = summary.scalar(f"{kind}/{name}", value)
        event = Event(wall_time=time.time(), step=int(step), summary=scalar)
        self._events.write_event(event)
      if time.monotonic() - self._flushed > _FLUSH_EVERY:
        self._events.flush()
        self._flushed = time.monotonic()

  def history(self, kind: str) -> list[dict]:
    """All lines of a kind, each with "step" and the scalars."""
    return [line for line in self._lines if line["kind"] == kind]

  def log(self, text: str) -> None:
    """A line on the terminal and, with the time, in WORKDIR/log.txt."""
    if self._is_main:
      self._terminal.out(text)
      self._to_log(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")

  def table(self, rows: Sequence[Mapping]) -> None:
    """`Terminal.table`; it stands in log.txt too."""
    if self._is_main:
      self._to_log(self._terminal.table(rows))

  def _to_log(self, text):
    """Appends to log.txt, unless none is kept or the folder is read-only."""
    if not self._keeps_log:
      return
    with named(self.workdir.log):
      try:
        with open(self.workdir.log, "a", encoding="utf-8") as file:
          file.write(text)
      except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
          raise

  def _open_events(self, purge_step: int | None = None):
    with named(self.workdir.events):
      self.workdir.events.mkdir(exist_ok=True)
      events = EventsWriter(str(self.workdir.events / "events"))
      if purge_step is not None:  # TensorBoard hides what was written after it
        start = SessionLog(status=SessionLog.START)
        events.write_event(Event(step=purge_step, session_log=start))
    return events


@contextlib.contextmanager
def sent_to(log: Callable[[str], None]) -> Iterator[None]:
  """Within it, `log` gets the lines that the library's modules log."""
  logger, handler = logging.getLogger("unreid_jax"), logging.Handler()
  handler.emit = lambda record: log(printable(record.getMessage()))
  before = logger.level, logger.propagate
  logger.setLevel(logging.INFO)
  logger.propagate = False  # the terminal has it from `log`
  logger.addHandler(handler)
  try:
    yield
  finally:
    logger.removeHandler(handler)
    logger.setLevel(before[0])
    logger.propagate = before[1]


def read_metrics(path: pathlib.Path) -> list[dict]:
  """The lines of a metrics file without the last one if it is torn."""
  if not path.exists():
    return []
  whole, lines = path.read_bytes().split(b"\n")[:-1], []
  for number, text in enumerate(whole, 1):
    where = f"line {number} of {path}"
    line = read_json(text, where, "mend it, or choose another --workdir")
    step, kind, *rest = line.get("step"), line.get("kind"), *line.values()
    is_number = lambda x: type(x) in (int, float)
    if type(step) is not int or type(kind) is not str:
      raise UserError(f"{where} has no step or kind: mend it")
    if not all(is_number(x) or x is kind for x in rest):
      raise UserError(f"{where} has no numbers: mend it")
    lines.append(line)
  return lines
