"""What a configurable value may be: types for fields, and one check of them.

A field, or an argument, that a config sets has one of these types, a `Literal`,
`bool`, `int`, `float` or `str`. The type is the only place that knows what is
allowed: the check, its sentence, the conversion of durations and the question
whether a stored run may go on with another value all read it.
"""

import contextlib
import dataclasses
import math
import numbers
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from unreid_jax import UserError


class BadValue(UserError):
  """A key with a value that it cannot have: "KEY is VALUE: set it to ..."."""

  def __init__(self, key: str, problem: str):
    super().__init__(f"{key} {problem}")
    self.key, self.problem = key, problem


class Range(NamedTuple):
  """The smallest and the largest value; an open end is itself not allowed."""

  low: float
  high: float = math.inf
  open_low: bool = False
  open_high: bool = False

  def holds(self, value: numbers.Real) -> bool:
    """Whether a value lies within."""
    above = value > self.low if self.open_low else value >= self.low
    return above and (
      value < self.high if self.open_high else value <= self.high
    )

  def __str__(self) -> str:
    low = f"above {self.low}" if self.open_low else f"of {self.low} or more"
    if self.high == math.inf:
      return low
    if self.open_low and self.open_high:
      return f"between {self.low} and {self.high}"
    if not self.open_high:
      return f"from {self.low} to {self.high}"
    return f"{low}, below {self.high}"


class OneOf(NamedTuple):
  """Names that are only known when they are asked for, such as modules."""

  names: Callable[[], typing.Iterable[str]]


class Nested(NamedTuple):
  """A mapping with typed keys of its own; see `fields`."""

  fields: Callable[[Mapping[str, Any]], Mapping[str, Any]]


DURATION, FREE = object(), object()  # marks, see `Duration` and `Free`
T = typing.TypeVar("T")
Positive = Annotated[float, Range(0, open_low=True)]
NotNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
BelowOne = Annotated[float, Range(0, 1, open_high=True)]
InsideUnit = Annotated[float, Range(0, 1, open_low=True, open_high=True)]
Count = Annotated[int, Range(1)]
CountOrNone = Annotated[int, Range(0)]
# Steps; in a config also "10 epochs" or "500 steps", see `steps`.
Duration = Annotated[int, Range(0), DURATION]
# May change between two parts of a run: it says where the run happens and what
# it reports, not what it learns.
Free = Annotated[T, FREE]


def fields(owner: Callable) -> dict[str, Any]:
  """The type of each field of a dataclass, or of each argument."""
  kinds = typing.get_type_hints(owner, include_extras=True)
  return {name: kind for name, kind in kinds.items() if name != "return"}


def check(kinds: Mapping[str, Any], values: Mapping[str, Any]) -> None:
  """Refuses the first value that its type does not allow.

  Args:
    kinds: the type of each key, from `fields`.
    values: the value of each key.

  Raises:
    BadValue: which key, and what it may be set to.
  """
  for key, value in values.items():
    if key not in kinds:
      raise BadValue(key, f"is unknown here; there are: {', '.join(kinds)}")
    kind = kinds[key]
    nested = nested_fields(kind, value)
    if nested is not None:
      with section(key):
        check(nested, value)
    elif hint := _objection(kind, value):
      shown = f'"{value}"' if isinstance(value, str) else str(value)
      raise BadValue(key, f"is {shown}: set it to {hint}")


class Checked:
  """A dataclass whose values are checked by their types when it is made."""

  def __post_init__(self):
    names = [field.name for field in dataclasses.fields(self)]
    check(fields(type(self)), {name: getattr(self, name) for name in names})


@contextlib.contextmanager
def section(name: str) -> Iterator[None]:
  """Within it, the key of a `BadValue` gets this prefix: "NAME.key"."""
  try:
    yield
  except BadValue as bad:
    raise BadValue(f"{name}.{bad.key}", bad.problem) from None


def nested_fields(kind: Any, value: Any) -> Mapping[str, Any] | None:
  """The types of the keys of a mapping; None for any other value."""
  mark = _mark(kind, Nested)
  return mark.fields(value) if mark and isinstance(value, Mapping) else None


def has(kind: Any, mark: object) -> bool:
  """Whether a type, or that of its items, has the mark DURATION or FREE."""
  metadata = getattr(kind, "__metadata__", ())
  items = typing.get_args(kind)
  return mark in metadata or any(has(item, mark) for item in items)


def steps(duration: int | str | tuple | list, steps_per_epoch: int) -> Any:
  """A duration as a number of steps, at least one if it is not zero.

  Args:
    duration: "10 epochs", "500 steps" or a number of steps, or some of them.
    steps_per_epoch: how many steps an epoch has.
  """
  if isinstance(duration, tuple | list):
    return tuple(steps(one, steps_per_epoch) for one in duration)
  number, unit = _DURATION.fullmatch(str(duration)).groups()
  scale = steps_per_epoch if unit == "epoch" else 1
  return max(round(float(number) * scale), 1 if float(number) else 0)


_DURATION = re.compile(r"(\d+(?:\.\d+)?)(?: (step|epoch)s?)?")
_DURATION_HINT = 'a duration, such as "10 epochs" or "500 steps"'
_NOUNS = {bool: "True or False", str: "a text", int: "a whole number"}
_NOUNS |= {float: "a number"}
_TYPES = {bool: bool, str: str, int: numbers.Integral, float: numbers.Real}


def _mark(kind, of):
  marks = getattr(kind, "__metadata__", ())
  return next((x for x in reversed(marks) if isinstance(x, of)), None)


def _objection(kind, value) -> str | None:
  """What the value should be instead, or None."""
  limits, one_of = _mark(kind, Range), _mark(kind, OneOf)
  if has(kind, DURATION) and isinstance(value, str):
    return None if _DURATION.fullmatch(value) else _DURATION_HINT
  plain = kind.__origin__ if hasattr(kind, "__metadata__") else kind
  if typing.get_origin(plain) is Literal or one_of:
    names = one_of.names() if one_of else typing.get_args(plain)
    known = isinstance(value, str) and value in (names := list(names))
    return None if known else " or ".join(f'"{name}"' for name in names)
  if typing.get_origin(plain) is tuple:
    item = typing.get_args(plain)[0]
    if not isinstance(value, tuple | list):
      return f"a list, each item {_objection(item, None)}"
    return next(filter(None, (_objection(item, x) for x in value)), None)
  if plain not in _TYPES:
    return None
  fits = isinstance(value, _TYPES[plain])
  fits &= plain is bool or not isinstance(value, bool)
  fits = fits and (plain is not float or math.isfinite(value))
  if fits and (limits is None or limits.holds(value)):
    return None
  if has(kind, DURATION):
    return _DURATION_HINT
  return f"{_NOUNS[plain]} {limits}" if limits else _NOUNS[plain]
