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
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from unreid_jax import UserError


class BadValue(UserError):
  """A key with a value that it cannot have: "KEY is VALUE: set it to ..."."""

  def __init__(self, key: str, problem: str):
    super().__init__(f"{key} {problem}")
    self.key, self.problem = key, problem


class Range(NamedTuple):
  """The smallest and the largest value; "(" and ")" exclude them."""

  low: float
  high: float = math.inf
  ends: str = "[]"

  def holds(self, value: numbers.Real) -> bool:
    """Whether a value lies within."""
    at_end = {self.low: self.ends[0] == "[", self.high: self.ends[1] == "]"}
    return self.low < value < self.high or at_end.get(value, False)

  def __str__(self) -> str:
    if self.high < math.inf:
      return f"in {self.ends[0]}{self.low}, {self.high}{self.ends[1]}"
    low = self.low
    return f"of {low} or more" if self.ends[0] == "[" else f"above {low}"


class OneOf(NamedTuple):
  """Names that are only known when they are asked for, such as modules."""

  names: Callable[[], Iterable[str]]


class Nested(NamedTuple):
  """A section: from its values, the type of each of its keys."""

  fields: Callable[[Mapping[str, Any]], Mapping[str, Any]]


DURATION, FREE = object(), object()  # marks, see `Duration` and `Free`
T = typing.TypeVar("T")
Positive = Annotated[float, Range(0, ends="(]")]
NotNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
BelowOne = Annotated[float, Range(0, 1, "[)")]
InsideUnit = Annotated[float, Range(0, 1, "()")]
Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
# Steps; in a config also "10 epochs" or "500 steps", see `steps`.
Duration = Annotated[int, Range(0), DURATION]
# May change between two parts of a run: it says where the run happens and what
# it reports, not what it learns.
Free = Annotated[T, FREE]

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(?: (step|epoch)s?)?")
_PLAIN = {  # what a value of a type is an instance of, and what it is called
  bool: (bool, "True or False"),
  str: (str, "a text"),
  int: (numbers.Integral, "a whole number"),
  float: (numbers.Real, "a number"),
}


class Checked:
  """A dataclass whose values are checked by their types when it is made."""

  def __post_init__(self):
    names = [field.name for field in dataclasses.fields(self)]
    check(fields(type(self)), {name: getattr(self, name) for name in names})


def fields(owner: Callable) -> dict[str, Any]:
  """The type of each field of a dataclass, or of each argument."""
  kinds = typing.get_type_hints(owner, include_extras=True)
  return {name: kind for name, kind in kinds.items() if name != "return"}


def check(kinds: Mapping[str, Any], values: Mapping[str, Any]) -> None:
  """Refuses, by a `BadValue`, the first value that its type does not allow."""
  for key, value in values.items():
    if key not in kinds:
      raise BadValue(key, f"is unknown here; there are: {', '.join(kinds)}")
    with section(key):
      nested = nested_fields(kinds[key], value)
      if nested is not None:
        check(nested, value)
    if nested is None and (wanted := _objection(kinds[key], value)):
      shown = f'"{value}"' if isinstance(value, str) else str(value)
      raise BadValue(key, f"is {shown}: set it to {wanted}")


@contextlib.contextmanager
def section(name: str) -> Iterator[None]:
  """Within it, the key of a `BadValue` gets this prefix: "NAME.key"."""
  try:
    yield
  except BadValue as bad:
    raise BadValue(f"{name}.{bad.key}", bad.problem) from None


def nested_fields(kind: Any, value: Any) -> Mapping[str, Any] | None:
  """The types of the keys of a section; None for any other value."""
  mark = _mark(kind, Nested)
  return mark.fields(value) if mark and isinstance(value, Mapping) else None


def has(kind: Any, mark: object) -> bool:
  """Whether a type, or that of its items, has the mark DURATION or FREE."""
  items = typing.get_args(kind)
  marks = getattr(kind, "__metadata__", ())
  return mark in marks or any(has(item, mark) for item in items)


def steps(duration: int | str | tuple | list, steps_per_epoch: int) -> Any:
  """A duration, or some, as numbers of steps; at least one if it is not zero.

  Durations are "10 epochs", "500 steps" or a number of steps.
  """
  if isinstance(duration, tuple | list):
    return tuple(steps(one, steps_per_epoch) for one in duration)
  number, unit = _DURATION.fullmatch(str(duration)).groups()
  scale = steps_per_epoch if unit == "epoch" else 1
  return max(round(float(number) * scale), 1 if float(number) else 0)


def _mark(kind, of):
  marks = getattr(kind, "__metadata__", ())
  return next((x for x in reversed(marks) if isinstance(x, of)), None)


def _objection(kind, value) -> str | None:
  """What the value should be instead, or None."""
  limits, one_of = _mark(kind, Range), _mark(kind, OneOf)
  plain = kind.__origin__ if hasattr(kind, "__metadata__") else kind
  if one_of or typing.get_origin(plain) is Literal:
    names = list(one_of.names() if one_of else typing.get_args(plain))
    known = isinstance(value, str) and value in names
    return None if known else " or ".join(f'"{name}"' for name in names)
  if typing.get_origin(plain) is tuple:
    item = typing.get_args(plain)[0]
    some = value if isinstance(value, tuple | list) else [None]
    return next(filter(None, (_objection(item, x) for x in some)), None)
  if has(kind, DURATION):
    is_text = isinstance(value, str) and _DURATION.fullmatch(value)
    is_right = is_text or _objection(Annotated[int, limits], value) is None
    return None if is_right else 'a duration: "10 epochs" or "500 steps"'
  if plain not in _PLAIN:
    return None
  instance, wanted = _PLAIN[plain]
  fits = isinstance(value, instance) and isinstance(value, bool) == (
    plain is bool
  )
  fits = fits and (plain is not float or math.isfinite(value))
  if fits and (limits is None or limits.holds(value)):
    return None
  return f"{wanted} {limits}" if limits else wanted
