"""What a person sees of a run as it goes on: lines, progress, a final table."""

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import rich.box
import rich.console
import rich.progress
import rich.table

T = TypeVar("T")

_PLAIN_EVERY = 15.0  # seconds between two lines of progress in a log
_SCORES = ("mAP", "R1", "R5", "R10")


class Terminal:
  """Lines and progress on stderr, and the table on stdout."""

  def __init__(self):
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

  def close(self) -> None:
    """Takes the bar away of a phase whose loop is still referred to."""
    if self._bar.tasks:
      self._bar.stop()

  def out(self, text: str) -> None:
    """A line."""
    self._console.out(text, highlight=False)

  def track(
    self,
    items: Iterable[T],
    description: str,
    total: int | None,
    scale: int,
    unit: str,
    log: Callable[[str], None],
  ) -> Iterator[T]:
    """`progress.track`: shows how far the items are; logs a line at the end.

    A progress bar on a terminal; elsewhere a line every 15 seconds. Calls may
    be nested.
    """
    if total is None and hasattr(items, "__len__"):
      total = len(items) * scale
    done, start = 0, time.monotonic()
    show = self._show_bar if self._has_bar else self._show_lines
    shown = show(description, total)
    next(shown)
    try:
      for item in items:
        yield item
        done = min(done + scale, total or done + scale)
        shown.send((done, done / max(time.monotonic() - start, 1e-9)))
    finally:
      shown.close()
    seconds = max(time.monotonic() - start, 1e-9)
    log(
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

  def table(self, rows: Sequence[Mapping]) -> str:
    """Prints the first, the best and the last evaluation in percent.

    Args:
      rows: each with "step", mAP, R1, R5 and R10 (fractions of 1); and with
        "name" if its encoder is not called after its step.

    Returns:
      What it has printed.
    """
    rows = [row for row in rows if "mAP" in row]
    if not rows:
      return ""
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
    return text.getvalue()


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
