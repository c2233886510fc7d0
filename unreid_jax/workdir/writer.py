"""What a run reports: metrics, TensorBoard, a log, progress, a final table."""

import contextlib
import errno
import io
import json
import logging
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import jax
import rich.box
import rich.console
import rich.progress
import rich.table
from jax.typing import ArrayLike
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from unreid_jax import UserError, printable, progress
from unreid_jax.workdir import Workdir, named, read_json, whole_file

T = TypeVar("T")

_PLAIN_EVERY = 15.0  # seconds between two lines of progress in a log
_FLUSH_EVERY = 10.0  # seconds until TensorBoard sees what is written
_SCORES = ("mAP", "R1", "R5", "R10")


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
    console = self._console = _console(sys.stderr)
    self._has_bar = console.is_terminal and not console.is_dumb_terminal
    self._bar = rich.progress.Progress(
      "{task.description:<20}",
      rich.progress.BarColumn(),
      rich.progress.TaskProgressColumn(),
      "{task.fields[rate]}",
      rich.progress.TimeRemainingColumn(compact=True),
      "left",
      console=console,
      transient=True,
    )

  def __enter__(self) -> "Writer":
    self._stack.enter_context(progress.shown_by(self.track))
    self._stack.enter_context(sent_to(self.log))
    return self

  def __exit__(self, *_) -> None:
    self._stack.close()
    if self._bar.tasks:  # of a phase whose loop is still referred to
      self._bar.stop()
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
      self._console.out(text, highlight=False)
      self._to_log(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")

  def track(
    self,
    iterable: Iterable[T],
    description: str,
    total: int | None = None,
    scale: int = 1,
    unit: str = "images",
  ) -> Iterator[T]:
    """`progress.track`: shows how far the items are; logs a line at the end.

    A progress bar on a terminal; elsewhere a line every 15 seconds. Calls may
    be nested.
    """
    if not self._is_main:
      yield from iterable
      return
    if total is None and hasattr(iterable, "__len__"):
      total = len(iterable) * scale
    done, start = 0, time.monotonic()
    show = self._show_bar if self._has_bar else self._show_lines
    shown = show(description, total)
    next(shown)
    try:
      for item in iterable:
        yield item
        done = min(done + scale, total or done + scale)
        shown.send((done, done / max(time.monotonic() - start, 1e-9)))
    finally:
      shown.close()
    seconds = max(time.monotonic() - start, 1e-9)
    self.log(
      f"{description:<20}{done:>8,} {unit} in {duration(seconds)} "
      f"({_rate(done / seconds)})"
    )

  def _show_bar(self, description, total):
    """Draws each (done, rate) that it is sent."""
    self._bar.start()
    task = self._bar.add_task(description, total=total, rate="")
    try:
      while True:
        done, rate = yield
        self._bar.update(task, completed=done, rate=_rate(rate))
    finally:
      self._bar.remove_task(task)
      if not self._bar.tasks:
        self._bar.stop()

  def _show_lines(self, description, total):
    """Writes now and then one of the (done, rate) that it is sent."""
    last = time.monotonic()
    while True:
      done, rate = yield
      if time.monotonic() - last < _PLAIN_EVERY:
        continue
      last = time.monotonic()
      rest = f"{done:,}"
      if total:
        left = duration((total - done) / rate)
        rest = f"{100 * done // total:3}%  {left} left"
      self._console.out(f"{description:<20}{_rate(rate):>10}  {rest}")

  def table(self, rows: Sequence[Mapping]) -> None:
    """Prints the first, the best and the last evaluation in percent.

    To stdout and log.txt.

    Args:
      rows: each with "step", mAP, R1, R5 and R10 (fractions of 1); and with
        "name" if its encoder is not called after its step.
    """
    rows = [row for row in rows if "mAP" in row]
    if not rows or not self._is_main:
      return
    best = max(rows, key=lambda row: (row["step"] > 0, row["mAP"]))
    table = rich.table.Table("", *_SCORES, box=rich.box.SIMPLE)
    for column in table.columns[1:]:
      column.justify = "right"
    chosen = {row["step"]: row for row in (rows[0], best, rows[-1])}
    for step, row in sorted(chosen.items()):
      title = f"after {step:,} steps" if step else "before training"
      title = row.get("name", title)
      note = " (best)" if row is best and step else ""
      scores = (f"{100 * row[key]:.1f}" for key in _SCORES)
      table.add_row(title + note, *scores)
    _console(sys.stdout).print(table)
    text = io.StringIO()
    rich.console.Console(file=text, force_terminal=False).print(table)
    self._to_log(text.getvalue())

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


class _Patient:
  """A stream, or none, that may break: a run goes on without its terminal."""

  def __init__(self, stream):
    self._stream = stream

  def __getattr__(self, name):
    return getattr(self._stream, name)

  def isatty(self) -> bool:
    return bool(self._stream) and self._stream.isatty()

  def write(self, text: str) -> int:
    with contextlib.suppress(OSError, AttributeError):
      self._stream.write(text)
    return len(text)

  def flush(self) -> None:
    with contextlib.suppress(OSError, AttributeError):
      self._stream.flush()


def _console(stream):
  stream = _Patient(stream)
  return rich.console.Console(file=stream, force_terminal=stream.isatty())


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


def duration(seconds: float) -> str:
  """Such as "12.0 s", "2 min 05 s" or "3 h 20 min"."""
  if seconds < 60:
    return f"{seconds:.1f} s"
  minutes = round(seconds / 60)
  if minutes < 60:
    return f"{int(seconds) // 60} min {int(seconds) % 60:02} s"
  return f"{minutes // 60} h {minutes % 60:02} min"


def _rate(rate: float) -> str:
  return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2f}/s"
