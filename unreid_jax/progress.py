"""Progress of long phases, drawn by whoever has been asked to draw it.

A function that loops over many items says so with `track`, and takes no
argument for it. Unless somebody has asked, nothing is drawn.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_show: contextvars.ContextVar[Callable | None] = contextvars.ContextVar(
  "show", default=None
)


def track(
  items: Iterable[T],
  description: str,
  total: int | None = None,
  scale: int = 1,
  unit: str = "images",
) -> Iterator[T]:
  """Yields the items, and lets the display know how far they are.

  Args:
    items: what is worked on, one after the other.
    description: the name of the phase, in a few words.
    total: how many units there are; by default `scale` for each item.
    scale: how many units an item has; the last one may have fewer.
    unit: what is counted.
  """
  show = _show.get()
  if show is None:
    return iter(items)
  return show(items, description, total, scale, unit)


@contextlib.contextmanager
def shown_by(show: Callable) -> Iterator[None]:
  """Within it, `show` gets each `track`'s arguments, and yields its items."""
  token = _show.set(show)
  try:
    yield
  finally:
    _show.reset(token)
