"""The door of the functions of numpy arrays: what comes in, and as what.

Behind it numba runs without a check of any index, so nothing gets in that is
not what the annotations say.
"""

import functools
import inspect
import numbers
import types
import typing
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from jaxtyping import Int

from unreid_jax import UserError, values

_Function = TypeVar("_Function", bound=Callable)


def checked(function: _Function) -> _Function:
  """Makes a function take what its annotations mean, and refuse the rest.

  An array may be a list or the array of another library, of any real dtype and
  in any order of memory. The function gets a numpy array in the order of C:
  float32, or float64 where that would round; int32 or else int64. Axes of one
  name have one size in all arguments. A number has the range of its type, as in
  a config; a plain `float` may be anything.

  The function raises a `UserError` that names the argument.
  """
  kinds, signature = values.fields(function), inspect.signature(function)

  @functools.wraps(function)
  def with_checks(*args, **kwargs):
    given, sizes = signature.bind(*args, **kwargs), {}
    for name, value in given.arguments.items():
      given.arguments[name] = _take(name, kinds.get(name), value, sizes)
    return function(*given.args, **given.kwargs)

  return with_checks


def as_floats(name: str, value: Any) -> np.ndarray:
  """The numbers as float32, or as float64 where that would round."""
  array = _as_array(name, value)
  is_single = np.can_cast(array.dtype, np.float32)
  return np.asarray(array, np.float32 if is_single else np.float64, order="C")


def as_whole_numbers(name: str, value: Any) -> np.ndarray:
  """The numbers as they are if they are int32, else as int64."""
  array = _as_array(name, value)
  if array.dtype == np.int32:
    return np.asarray(array, np.int32, order="C")
  with np.errstate(invalid="ignore"):
    whole = np.asarray(array, np.int64, order="C")
  if (wrong := array[whole != array]).size:
    raise UserError(f"{name} has the value {wrong[0]}: pass whole numbers")
  return whole


def _as_array(name, value) -> np.ndarray:
  try:
    array = np.asarray(value)
  except Exception as error:  # whatever another library raises
    reason = str(error).partition("\n")[0].partition(". ")[0]
    raise UserError(f"{name} is no array of numbers: {reason}") from None
  if not np.can_cast(array.dtype, np.float64, "same_kind"):
    raise UserError(f"{name} has the dtype {array.dtype}: pass real numbers")
  if np.ma.is_masked(value):
    raise UserError(f"{name} has masked values: fill them, or leave them out")
  return array


def _take(name, kind, value, sizes):
  """The value as the function wants it; `sizes` knows the axes so far."""
  if typing.get_origin(kind) in (typing.Union, types.UnionType):
    is_plain = lambda x: isinstance(x, type) and not hasattr(x, "dim_str")
    plain = tuple(filter(is_plain, typing.get_args(kind)))
    if isinstance(value, plain):  # such as None
      return value
    (kind,) = set(typing.get_args(kind)) - set(plain)
  if hasattr(kind, "dim_str"):
    convert = as_whole_numbers if kind.dtype is Int else as_floats
    array = convert(name, value)
    _check_shape(name, array.shape, kind.dim_str, sizes)
    return array
  if kind in (bool, int) or hasattr(kind, "__metadata__"):
    return _as_number(name, kind, value)
  return value


def _check_shape(name, shape, axes, sizes):
  wanted = f"pass [{', '.join(axes.split())}]"
  if len(shape) != len(axes.split()):
    raise UserError(f"{name} has the shape {shape}: {wanted}")
  for axis, size in zip(axes.split(), shape, strict=True):
    known, owner = sizes.setdefault(axis, (size, name))
    if size != known:
      problem = f"{axis} is {known} in {owner}"
      raise UserError(f"{name} has the shape {shape}, but {problem}: {wanted}")


def _as_number(name, kind, value):
  if getattr(value, "ndim", None) == 0:  # a scalar of numpy or of JAX
    value = value.item()
  if not isinstance(value, numbers.Number | str | None):
    value = type(value)  # for a message of one line
  values.check({name: kind}, {name: value})
  return getattr(kind, "__origin__", kind)(value)


def compiled(**options: bool | set[str]) -> Callable[[_Function], _Function]:
  """Compiles a function by numba, which keeps it where it can be written.

  Otherwise each process compiles anew.
  """

  def compile_it(function):
    function = inspect.unwrap(function)  # the tests' checks do not compile
    try:
      return numba.njit(function, cache=True, **options)
    except RuntimeError:
      warnings.warn(
        "numba finds no folder for what it compiles, and will compile again in "
        "each process: set NUMBA_CACHE_DIR to one that can be written",
        stacklevel=1,
      )
      return numba.njit(function, **options)

  return compile_it
