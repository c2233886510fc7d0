"""From a config to what a run is made of: its parts and its first state."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from unreid_jax import (
  UserError,
  memory,
  methods,
  models,
  optim,
  sharding,
)
from unreid_jax.config import to_steps
from unreid_jax.data import augment
from unreid_jax.methods import Method
from unreid_jax.models import pretrained


@struct.dataclass
@no_type_check  # its leaves may also be shardings
class TrainState:
  """Everything that a step changes: arrays, and nothing else."""

  step: Int[Array, ""]
  params: Any
  batch_stats: Any
  opt_state: Any
  method: Any

  @property
  def variables(self) -> dict:
    """What the encoder is applied to."""
    return {"params": self.params, "batch_stats": self.batch_stats}


class Parts(NamedTuple):
  """What a run is made of; none of it changes."""

  config: ConfigDict
  mesh: Mesh
  encoder: Any
  method: Method  # `refresh` and `distance` are jitted
  optimizer: optax.GradientTransformation
  augment: Callable  # (key, images u8) -> images f32
  encode: dict[str, Callable]  # batch-norm mode -> jitted encode step
  steps_per_epoch: int


def build(
  config: ConfigDict, num_images: int, steps_per_epoch: int
) -> tuple[Parts, TrainState]:
  """The parts of a run on the mesh of `jax.set_mesh`, and its first state."""
  mesh = jax.sharding.get_mesh()
  if config.batch_size % mesh.size or memory.ROW_MULTIPLE % mesh.size:
    raise UserError(
      f"{mesh.size} devices do not divide batch_size={config.batch_size} and "
      f"{memory.ROW_MULTIPLE} rows of a bank: change num_devices or batch_size"
    )
  options = {
    section: {
      key: to_steps(value, steps_per_epoch)
      for key, value in config[section].items()
    }
    for section in ("method", "optim", "encoder")
  }
  weights = options["encoder"].pop("pretrained")
  encoder = models.make(**options["encoder"])
  optimizer = optim.make(**options["optim"])
  method = methods.make(**options["method"])
  state = _first_state(config, num_images, encoder, optimizer, method, weights)
  state = jax.device_put(state, shardings(mesh, state))
  augment_images = functools.partial(augment.augment, **config.augment)
  copies = NamedSharding(mesh, sharding.COPY)
  encode = {
    mode: jax.jit(step(encoder, augment_images), out_shardings=copies)
    for mode, step in _ENCODE_STEPS.items()
  }
  banks = shardings(mesh, state.method)
  method = method._replace(
    refresh=jax.jit(method.refresh, out_shardings=banks),
    distance=jax.jit(method.distance),
  )
  parts = Parts(
    config=config,
    mesh=mesh,
    encoder=encoder,
    method=method,
    optimizer=optimizer,
    augment=augment_images,
    encode=encode,
    steps_per_epoch=steps_per_epoch,
  )
  return parts, state


def shardings(mesh: Mesh, tree):
  """Where each array belongs: a bank's rows are split, the rest is copied."""
  rows = NamedSharding(mesh, sharding.ROWS)
  copies = NamedSharding(mesh, sharding.COPY)

  def of(x):
    is_split = not x.sharding.is_fully_replicated
    return rows if is_split else copies

  return jax.tree.map(of, tree)


def _first_state(config, num_images, encoder, optimizer, method, weights):
  key, method_key = jax.random.split(jax.random.key(config.seed))
  shape = (config.dataset.height, config.dataset.width, 3)
  variables = jax.jit(encoder.init)(key, jnp.zeros((1, *shape)))
  if weights:
    variables = pretrained.load(weights, variables)
  images = jax.ShapeDtypeStruct((num_images, *shape), jnp.float32)
  features = jax.eval_shape(encoder.apply, variables, images)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    opt_state=jax.jit(optimizer.init)(variables["params"]),
    method=jax.jit(lambda key: method.init(key, features))(method_key),
    **variables,
  )


def _eval_step(encoder, augment_images):
  """Test-time transform, running statistics."""
  del augment_images

  def step(variables, images, key):
    del key
    images = augment.normalise(images)
    return variables, encoder.apply(variables, images, train=False)

  return step


def _train_step(encoder, augment_images):
  """Training transform, batch statistics; the running ones move on."""

  def step(variables, images, key):
    features, updated = encoder.apply(
      variables,
      augment_images(key, images),
      train=True,
      mutable=["batch_stats"],
    )
    return variables | updated, features

  return step


# step(variables, images u8, key) -> variables, features
_ENCODE_STEPS = {"eval": _eval_step, "train": _train_step}
