"""The contract of a method: one file with `Hyperparameters` and `make`.

`make("selective")` imports `unreid_jax.methods.selective`; there is nothing to
register. `Hyperparameters` is a dataclass whose fields carry their defaults and
say by their types what they may be set to (see `unreid_jax.values`), and
`make(**hyperparameters)` returns a `Method`, a tuple of pure functions.

The loop calls them in this order. Each epoch begins with `label`, on the host.
If it returns labels of two classes or more, `refresh` rebuilds the state's
banks with them; else the last ones stay. Then each step of the epoch calls
`step`, inside the gradient. `distance` ranks a gallery.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import (
  Annotated,
  Any,
  NamedTuple,
  Protocol,
  no_type_check,
  runtime_checkable,
)

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int, PyTree, UInt8

from unreid_jax import UserError, values

Figures = dict[str, Float[Array, ""]]
State = Any  # a pytree of arrays: a method's banks, networks and optimizers
StepResult = tuple[Float[Array, ""], tuple[State, Figures]]
Features = PyTree  # what the encoder returns: unit [b, d], or a dict of such


@struct.dataclass
@no_type_check  # its leaves may also be shardings
class Batch:
  """The images of a step, and where the run is.

  `indices` are their positions in the train set, `labels` their pseudo labels.
  `step` and `epoch` count from 0.
  """

  images: UInt8[Array, "b h w c"]
  indices: Int[Array, " b"]
  labels: Int[Array, " b"]
  camids: Int[Array, " b"]
  step: Int[Array, ""]
  epoch: Int[Array, ""]


class Labels(NamedTuple):
  """Pseudo labels of all train images, and what else an epoch begins with.

  Attributes:
    values: the label of each image, int32, from 0; -1 is an outlier, which is
      not trained on.
    given: a pytree of arrays on the host that `label` hands over to `refresh`,
      such as the features that the labels were made of.
    figures: numbers to be reported, by name.
    seconds: how long each part took, by name.
    notes: lines that a user should read.
    clustered: whether the labels come from a clustering, and are worth a
      report of their number, sizes and truth.
  """

  values: Int[np.ndarray, " n"]
  given: PyTree = None
  figures: Mapping[str, float] = {}
  seconds: Mapping[str, float] = {}
  notes: tuple[str, ...] = ()
  clustered: bool = True


class Proxies(NamedTuple):
  """A unit vector for each cluster, to which negatives can be related."""

  bank: Float[Array, "k d"]
  num_clusters: Int[Array, ""]  # only the first so many rows are clusters
  temperature: float


@runtime_checkable
class Init(Protocol):
  """Makes the first state; called once, jitted."""

  def __call__(self, key: Array, shapes: Features) -> State:
    """Takes `ShapeDtypeStruct`s of the features of all n train images."""


@runtime_checkable
class Encode(Protocol):
  """Gives the features of all train images, arrays [n, ...] on the host."""

  def __call__(self, train: bool = False) -> Features:
    """With `train`, the pass is one in training mode.

    The images come shuffled and augmented, batch norm uses the statistics of
    each batch, and its running statistics are updated.
    """


@runtime_checkable
class Label(Protocol):
  """Decides which images belong together; called each epoch, on the host."""

  def __call__(
    self, state: State, encode: Encode, split: Any, epoch: int
  ) -> Labels | None:
    """Returns labels, or None if the last epoch's labels and banks stay.

    Args:
      state: the method's.
      encode: gives the features of all train images, if they are wanted.
      split: the train set, a `data.Split`; its `pids` serve for diagnosis and
        for the supervised bound alone.
      epoch: counted from 0.
    """


@runtime_checkable
class Refresh(Protocol):
  """Rebuilds the banks for new labels; called after `label`, jitted."""

  def __call__(
    self, state: State, labels: Int[Array, " n"], given: PyTree, key: Array
  ) -> State:
    """Keeps the state's shapes, dtypes and shardings.

    Args:
      state: the method's.
      labels: `Labels.values`.
      given: `Labels.given`.
      key: random; another one in each epoch.
    """


@runtime_checkable
class Step(Protocol):
  """The loss of a batch, and the state after it; called in each step.

  The gradient of the loss is taken in the features. A method with `proxies`
  takes a further argument, `negatives=None`: logits [b, e] that are added to
  the denominator of its loss, -inf where there is none. If it gets some, it
  reports what they add to the loss as the figure "loss_negatives".
  """

  def __call__(
    self, state: State, features: Features, batch: Batch, key: Array
  ) -> StepResult:
    """Returns the loss, and as auxiliary output the next state and figures.

    Args:
      state: the method's. The loss and every write read a bank as it was
        before the step.
      features: what the encoder has made of the batch.
      batch: whose images these are, and where the run is.
      key: random; another one in each step.
    """


@runtime_checkable
class Distance(Protocol):
  """How far apart images are at test time; jitted."""

  def __call__(
    self,
    query: Features,
    gallery: Features,
    query_camids: Int[Array, " q"],
    gallery_camids: Int[Array, " g"],
  ) -> Float[Array, "q g"]:
    """The distances of some queries to a part of the gallery."""


def euclidean_distance(
  query: Float[Array, "q d"],
  gallery: Float[Array, "g d"],
  query_camids: Int[Array, " q"],
  gallery_camids: Int[Array, " g"],
) -> Float[Array, "q g"]:
  """Squared Euclidean distance of unit features; cameras play no part."""
  size_of(query)
  return 2 - 2 * jnp.matmul(query, gallery.T, precision=lax.Precision.HIGHEST)


class Method(NamedTuple):
  """A method's functions.

  Attributes:
    init, label, refresh, step, distance: see the protocol of each.
    notes: lines for the user at an epoch's end, from the means of the loss and
      of the figures of `step`; if there are any lines, the means are written to
      metrics.jsonl.
    proxies: the clusters' proxies in a state. A method that has them can be
      wrapped by one that adds negatives to its loss; see `Step`.
  """

  init: Init
  label: Label
  refresh: Refresh
  step: Step
  distance: Distance = euclidean_distance
  notes: Callable[[dict[str, float]], tuple[str, ...]] = lambda means: ()
  proxies: Callable[[State], Proxies] | None = None


def one_each(num: int, given: PyTree = None) -> Labels:
  """Every image is a class of its own, without a clustering."""
  return Labels(np.arange(num, dtype=np.int32), given, clustered=False)


def size_of(features: Features) -> tuple[int, int]:
  """The number and the dimension of features [n, d]; refuses all others."""
  if isinstance(features, dict):
    raise UserError(
      "this method takes one feature an image, and the encoder returns "
      f'{" and ".join(features)} ones: set encoder.head to "neck", or choose '
      "the method that the encoder was trained with"
    )
  return features.shape


def names() -> list[str]:
  """Every method that there is."""
  return [module.name for module in pkgutil.iter_modules(__path__)]


def fields(section: Mapping[str, Any]) -> dict[str, Any]:
  """The types of a method's hyper-parameters, and of its `section["name"]`."""
  of_name = {"name": Annotated[str, values.OneOf(names)]}
  values.check(of_name, {"name": section.get("name")})
  return of_name | values.fields(_module(section["name"]).Hyperparameters)


def make(name: str, **hyperparameters: Any) -> Method:
  """The method of that name.

  Args:
    name: a module in this package, such as "selective".
    **hyperparameters: fields of the module's `Hyperparameters`.

  Raises:
    UserError: there is no such method, or no such hyper-parameter, or it cannot
      have that value.
  """
  values.check(fields({"name": name}), hyperparameters, in_steps=True)
  return _module(name).make(**hyperparameters)


def defaults(name: str) -> dict[str, Any]:
  """Every hyper-parameter of a method with its default."""
  return dataclasses.asdict(_module(name).Hyperparameters())


def _module(name):
  return importlib.import_module(f"{__name__}.{name}")
