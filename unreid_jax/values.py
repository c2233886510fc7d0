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
import os
import pathlib
import re
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from unreid_jax import UserError


class BadValue(UserError):
  """A key with a value that it cannot have: "KEY is VALUE: set it to ..."."""

  def __init__(self, key: str, problem: str):
    super().__init__(f"{key} {problem}")
    self.key, self.problem = key, problem


_MOST = 10**8  # more of anything is a slip of the finger, and fills the memory


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
    if self.high not in (_MOST, math.inf):
      return f"in {self.ends[0]}{self.low}, {self.high}{self.ends[1]}"
    low = self.low
    return f"of {low} or more" if self.ends[0] == "[" else f"above {low}"


class OneOf(NamedTuple):
  """Names that are only known when they are asked for, such as modules."""

  names: Callable[[], Iterable[str]]


class Nested(NamedTuple):
  """Marks a section: `fields(values)` returns the type of each of its keys."""

  fields: Callable[[Mapping[str, Any]], Mapping[str, Any]]


DURATION, FREE = object(), object()  # marks, see `Duration` and `Free`
T = typing.TypeVar("T")
Positive = Annotated[float, Range(0, ends="(]")]
NotNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
BelowOne = Annotated[float, Range(0, 1, "[)")]
InsideUnit = Annotated[float, Range(0, 1, "()")]
Count = Annotated[int, Range(1, _MOST)]
CountOrZero = Annotated[int, Range(0, _MOST)]
# Steps; in a config also "10 epochs" or "500 steps", see `steps`.
Duration = Annotated[int, Range(0, _MOST), DURATION]
# May change between two parts of a run: it says where the run happens and what
# it reports, not what it learns.
Free = Annotated[T, FREE]

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(?: (step|epoch)s?)")
_PLAIN = {  # what a value of a type is an instance of, and what it is called
  bool: (bool, "True or False"),
  str: (str, "a text"),
  int: (numbers.Integral, "a whole number"),
  float: (numbers.Real, "a number"),
}


class Checked:
  """A dataclass whose values are checked by their types when it is made.

  Its durations are numbers of steps.
  """

  def __post_init__(self):
    names = [field.name for field in dataclasses.fields(self)]
    given = {name: getattr(self, name) for name in names}
    check(fields(type(self)), given, in_steps=True)


def fields(owner: Callable) -> dict[str, Any]:
  """The type of each field of a dataclass, or of each argument."""
  kinds = typing.get_type_hints(owner, include_extras=True)
  return {name: kind for name, kind in kinds.items() if name != "return"}


def check(
  kinds: Mapping[str, Any], values: Mapping[str, Any], in_steps: bool = False
) -> None:
  """Refuses, by a `BadValue`, the first value that its type does not allow.

  With `in_steps`, a duration must be a number of steps.
  """
  for key, value in values.items():
    if key not in kinds:
      raise BadValue(key, f"is unknown here; there are: {', '.join(kinds)}")
    with section(key):
      nested = nested_fields(kinds[key], value)
      if nested is not None:
        check(nested, value, in_steps)
        continue
    if wanted := _objection(kinds[key], value, in_steps):
      raise BadValue(key, f"is {_show(value)}: set it to {wanted}")


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
  if not isinstance(duration, str):
    return duration
  number, unit = _DURATION.fullmatch(duration).groups()
  scale = steps_per_epoch if unit == "epoch" else 1
  return max(round(float(number) * scale), 1 if float(number) else 0)


def expand(path: str | os.PathLike, key: str) -> pathlib.Path:
  """The path with "~" replaced by the home directory; `key` sets it."""
  try:
    return pathlib.Path(path).expanduser()
  except RuntimeError:
    raise UserError(
      f"{path}: the home directory is not known: set {key} to a full path"
    ) from None


def _mark(kind, of):
  marks = getattr(kind, "__metadata__", ())
  return next((x for x in reversed(marks) if isinstance(x, of)), None)


def _show(value) -> str:
  return f'"{value}"' if isinstance(value, str) else str(value)


def _objection(kind, value, in_steps=False) -> str | None:
  """What the value should be instead, or None."""
  limits, one_of = _mark(kind, Range), _mark(kind, OneOf)
  plain = kind.__origin__ if hasattr(kind, "__metadata__") else kind
  if one_of or typing.get_origin(plain) is Literal:
    names = list(one_of.names() if one_of else typing.get_args(plain))
    known = any(type(x) is type(value) and x == value for x in names)
    return None if known else " or ".join(map(_show, names))
  if typing.get_origin(plain) is tuple:
    item = typing.get_args(plain)[0]
    if not isinstance(value, tuple | list):
      return f"a tuple, each of it {_objection(item, None, in_steps)}"
    each = (_objection(item, x, in_steps) for x in value)
    return next(filter(None, each), None)
  if has(kind, DURATION):
    is_text = isinstance(value, str) and not in_steps
    number = (
      steps(value, 1) if is_text and _DURATION.fullmatch(value) else value
    )
    is_right = _objection(Annotated[int, limits], number) is None
    least = f" of {limits.low} step or more" if limits.low else ""
    wanted = f'a duration{least}: "10 epochs" or "500 steps"'
    return None if is_right else "a number of steps" if in_steps else wanted
  if _mark(kind, Nested):
    return "a section with keys of its own"
  instance, wanted = _PLAIN[plain]
  fits = isinstance(value, instance) and (
    plain is bool or type(value) is not bool
  )
  fits = fits and (plain is not float or abs(value) <= sys.float_info.max)
  if fits and (limits is None or limits.holds(value)):
    return None
  if fits and limits.high == _MOST and value > _MOST:
    return f"{wanted} of {_MOST} or less"
  return f"{wanted} {limits}" if limits else wanted
