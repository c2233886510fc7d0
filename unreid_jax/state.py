"""From a config to what a run is made of: its parts and its first state."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from unreid_jax import encode, methods, models, optim, sharding, values
from unreid_jax.about import made_by
from unreid_jax.card import Card, build, draw, make_apply
from unreid_jax.config import encoder_options
from unreid_jax.data import augment
from unreid_jax.methods import Batch, Method
from unreid_jax.models import pretrained


@struct.dataclass
@no_type_check  # its leaves may also be shardings
class TrainState:
  """Everything that a run changes: arrays, and nothing else.

  `labels` are the pseudo labels of all train images; `sums` are the figures of
  the epoch's steps so far, added up; `average` is an exponential moving
  average of parameters and running statistics (`config.ema`), or None.
  """

  step: Int[Array, ""]
  params: Any
  batch_stats: Any
  opt_state: Any
  method: Any
  labels: Int[Array, " n"]
  sums: dict[str, Float[Array, ""]]
  average: Any = None

  @property
  def variables(self) -> dict[str, Any]:
    """What is trained: the encoder's parameters and running statistics."""
    return {"params": self.params, "batch_stats": self.batch_stats}

  @property
  def encoder(self) -> dict[str, Any]:
    """What is evaluated: their average, or they; a checkpoint's first part."""
    return self.average or self.variables

  @property
  def training(self) -> dict[str, Any]:
    """Everything else; the second part of a checkpoint."""
    first = {"average"} if self.average else {"average", *self.variables}
    return {k: v for k, v in vars(self).items() if k not in first}

  def restored(self, encoder: Any, training: Any) -> "TrainState":
    """A state from the two parts of a checkpoint."""
    first = {"average": encoder} if self.average else encoder
    return self.replace(**first, **training)


class Parts(NamedTuple):
  """What a run is made of; none of it changes."""

  config: ConfigDict  # durations in steps
  mesh: Mesh
  card: dict  # what builds the encoder
  module: Any  # the encoder's network
  method: Method
  optimizer: optax.GradientTransformation
  augment: Callable  # (key, images u8) -> images f32
  apply: Callable  # (variables, images u8) -> features; jitted, at test time
  adapt: Callable  # (variables, images u8, key) -> variables, features; jitted
  distance: Callable  # the method's, jitted

  def encoder(self, state: TrainState) -> encode.Encoder:
    """The encoder as the state has it."""
    return encode.Encoder(self.card, state.encoder, self.apply, self.mesh)


def make_card(config: ConfigDict) -> Card:
  """What builds a config's encoder."""
  options = encoder_options(config)
  backbone = models.make(**options).backbone
  size = {key: config.dataset[key] for key in ("height", "width")}
  colour = {"mean": backbone.mean, "std": backbone.std}
  return {"encoder": options} | size | colour


def make_parts(config: ConfigDict) -> Parts:
  """The parts of a run, of a resolved config, on the mesh of `jax.set_mesh`."""
  mesh = jax.sharding.get_mesh()
  copies = NamedSharding(mesh, sharding.COPY)
  card = make_card(config) | {"made_by": made_by(mesh.size)}
  module = models.make(**card["encoder"])
  colour = {key: card[key] for key in ("mean", "std")}
  with values.section("method"):
    method = methods.make(**config.method.to_dict())
  transform = functools.partial(augment.augment, **config.augment, **colour)

  def adapt(variables, images, key):
    features, updated = module.apply(
      variables,
      transform(key, images),
      train=True,
      mutable=["batch_stats"],
      rngs={"drop_path": key},  # Flax mixes in the place of each use
    )
    return variables | updated, features

  return Parts(
    config=config,
    mesh=mesh,
    card=card,
    module=module,
    method=method,
    optimizer=optim.make(**config.optim),
    augment=transform,
    apply=make_apply(module, card, mesh),
    adapt=jax.jit(adapt, out_shardings=copies),
    distance=jax.jit(method.distance, out_shardings=copies),
  )


def first_state(parts: Parts, num_images: int, weights: str) -> TrainState:
  """The state before the first step.

  Args:
    parts: what the run is made of.
    num_images: how many train images there are.
    weights: a file with the encoder's weights; "" draws them.
  """
  config, mesh, module = parts.config, parts.mesh, parts.module
  key, method_key = keys(config.seed)
  variables = draw(module, parts.card, key)
  if weights:
    size = config.dataset.height, config.dataset.width
    variables = pretrained.load(weights, module, variables, size)
  init, like = _init_method(parts, num_images, variables)
  state = _with_zeros(parts, num_images, variables, init(method_key), like)
  return jax.device_put(state, shardings(mesh, state))


def shapes_of_state(parts: Parts, num_images: int) -> TrainState:
  """As `first_state`, but the shapes and shardings alone; nothing is drawn."""
  key = jax.eval_shape(lambda: keys(0)[0])
  variables = build(parts.card, "the card")[1]
  init, like = _init_method(parts, num_images, variables)
  with_sharding = lambda x, where: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=where
  )
  copies = NamedSharding(parts.mesh, sharding.COPY)
  rest = functools.partial(_with_zeros, parts, num_images, like=like)
  method = jax.eval_shape(init, key)
  state = jax.eval_shape(rest, variables, method)
  state = jax.tree.map(lambda x: with_sharding(x, copies), state)
  places = init.lower(key).compile().output_shardings
  method = jax.tree.map(with_sharding, method, places)
  return state.replace(method=method)


def _init_method(parts, num_images, variables):
  """The method's jitted `init`, and the shapes of a batch's features."""
  config = parts.config
  shape = (config.batch_size, config.dataset.height, config.dataset.width, 3)
  images = jax.ShapeDtypeStruct(shape, jnp.float32)
  like = jax.eval_shape(parts.module.apply, variables, images)
  of_all = lambda x: jax.ShapeDtypeStruct((num_images, *x.shape[1:]), x.dtype)
  shapes = jax.tree.map(of_all, like)
  return jax.jit(lambda key: parts.method.init(key, shapes)), like


def _with_zeros(parts, num_images, variables, method, like) -> TrainState:
  """The state that has these variables, and has learnt nothing."""
  size = parts.config.batch_size
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    opt_state=jax.jit(parts.optimizer.init)(variables["params"]),
    method=method,
    labels=jnp.full(num_images, -1, jnp.int32),
    sums=_no_figures(parts.method, method, like, size),
    average=jax.tree.map(jnp.copy, variables) if parts.config.ema else None,
    **variables,
  )


def keys(seed: int) -> tuple[Array, Array]:
  """The keys of a run: of the encoder and the steps, and of the method."""
  return tuple(jax.random.split(jax.random.key(seed)))


def shardings(mesh: Mesh, tree: Any) -> Any:
  """Where each array belongs: a bank's rows are split, the rest is copied."""
  rows = NamedSharding(mesh, sharding.ROWS)
  copies = NamedSharding(mesh, sharding.COPY)
  is_copied = lambda x: x.sharding.is_fully_replicated
  return jax.tree.map(lambda x: copies if is_copied(x) else rows, tree)


def _no_figures(method, state, features, batch_size):
  """A zero for each figure of the method's step, and for the loss."""
  integer = jax.ShapeDtypeStruct((), jnp.int32)
  rows = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
  images = jax.ShapeDtypeStruct((batch_size, 1, 1, 3), jnp.uint8)
  batch = Batch(images, rows, rows, rows, integer, integer)
  key = jax.eval_shape(lambda: jax.random.key(0))
  loss, (_, figures) = jax.eval_shape(method.step, state, features, batch, key)
  figures = {"loss": loss} | figures
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), figures)
