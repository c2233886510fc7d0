"""A method is one file with `Hyperparameters` and `make(**hyperparameters)`.

`make("selective")` imports `unreid_jax.methods.selective`; there is nothing to
register. The defaults stand in the file's `Hyperparameters`.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from typing import NamedTuple, no_type_check

import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from unreid_jax import UserError


@struct.dataclass
@no_type_check  # its leaves may also be shardings
class Batch:
  """One step's images, their positions in the train set and their labels."""

  images: UInt8[Array, "b h w c"]
  indices: Int[Array, " b"]
  labels: Int[Array, " b"]
  camids: Int[Array, " b"]


class Method(NamedTuple):
  """Pure functions, in the order in which a run calls them.

  `features` is what the encoder returns: an array [b, d], or a dict of them.
  `state` is the method's own pytree of arrays: banks, counters, networks.
  `pids` are the true identities: for the supervised bound, and for figures of
  diagnosis, but for nobody's labels.

  `report` tells at an epoch's end what the state has gathered in its steps.

  `encode` names the pass over the train set that an epoch begins with: "train"
  or "eval", which is batch norm's mode; "memory", no pass, `label` and
  `refresh` get None for features and work on the state; None, no new labels.
  """

  init: Callable  # (key, features of all images as ShapeDtypeStructs) -> state
  encode: Callable  # (epoch) -> "train", "eval", "memory" or None, see above
  label: Callable  # (state, features, camids, pids) -> Labelling, host
  refresh: Callable  # (state, features, labels, camids) -> state, jitted
  loss: Callable  # (state, features, batch, key) -> loss, metrics
  update: Callable  # (state, features, batch, key) -> state, after the gradient
  distance: Callable  # (query, gallery, query camids, gallery camids) -> [q, g]
  report: Callable = lambda state: ({}, ())  # -> scalars, notes; host


def euclidean_distance(
  query: Float[Array, "q d"],
  gallery: Float[Array, "g d"],
  query_camids: Int[Array, " q"],
  gallery_camids: Int[Array, " g"],
) -> Float[Array, "q g"]:
  """Squared Euclidean distance of unit features; cameras play no part."""
  del query_camids, gallery_camids
  return 2 - 2 * jnp.matmul(query, gallery.T, precision=lax.Precision.HIGHEST)


def size_of(features) -> tuple[int, int]:
  """n and d of features [n, d].

  Raises:
    UserError: the encoder returns others.
  """
  if isinstance(features, dict):
    raise UserError(
      "this method takes one feature an image, and encoder.head returns "
      f'{" and ".join(features)} ones: set it to "neck"'
    )
  return features.shape


def make(name: str, **hyperparameters) -> Method:
  """The method of that name.

  Args:
    name: a module in this package, such as "selective".
    **hyperparameters: fields of the module's `Hyperparameters`.

  Raises:
    UserError: no such method.
    TypeError: no such hyper-parameter.
  """
  return _module(name).make(**hyperparameters)


def defaults(name: str) -> dict:
  """Every hyper-parameter of a method with its default."""
  return dataclasses.asdict(_module(name).Hyperparameters())


def _module(name):
  known = [module.name for module in pkgutil.iter_modules(__path__)]
  if name not in known:
    raise UserError(f'no method "{name}"; there are: {", ".join(known)}')
  return importlib.import_module(f"{__name__}.{name}")
