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
  method: Method  # `distance` is jitted
  optimizer: optax.GradientTransformation
  augment: Callable  # (key, images u8) -> images f32
  encode: dict[str, Callable]  # batch-norm mode -> jitted encode step


def make_parts(config: ConfigDict) -> Parts:
  """The parts of a run on the mesh of `jax.set_mesh`.

  Args:
    config: as `config.resolve` returns it.

  Raises:
    UserError: a value that is none, such as an unknown name.
  """
  mesh = jax.sharding.get_mesh()
  for key in ("batch_size", "evaluate_batch_size"):
    if config[key] < 1 or config[key] % mesh.size:
      raise UserError(
        f"{key}={config[key]} is no multiple of {mesh.size} devices: change "
        "it or num_devices"
      )
  counts = {name: config[name] for name in ("epochs", "steps_per_epoch")}
  num_instances = config.sampler.num_instances
  for name, value in {**counts, "sampler.num_instances": num_instances}.items():
    if value < 0:
      raise UserError(f"{name} is {value}: set it to 0 or more")
  if num_instances and config.batch_size % num_instances:
    raise UserError(
      f"batch_size={config.batch_size} is no multiple of "
      f"sampler.num_instances={num_instances}: change either"
    )
  if memory.ROW_MULTIPLE % mesh.size:
    raise UserError(
      f"{mesh.size} devices cannot share a bank: set num_devices to a power "
      f"of two, {memory.ROW_MULTIPLE} at most"
    )
  options = {k: v for k, v in config.encoder.items() if k != "pretrained"}
  encoder = models.make(**options)
  augment_images = functools.partial(augment.augment, **config.augment)
  copies = NamedSharding(mesh, sharding.COPY)
  method = methods.make(**config.method.to_dict())
  return Parts(
    config=config,
    mesh=mesh,
    encoder=encoder,
    method=method._replace(
      distance=jax.jit(method.distance, out_shardings=copies)
    ),
    optimizer=optim.make(**config.optim),
    augment=augment_images,
    encode={
      mode: jax.jit(step(encoder, augment_images), out_shardings=copies)
      for mode, step in _ENCODE_STEPS.items()
    },
  )


def first_state(parts: Parts, num_images: int, weights: str) -> TrainState:
  """The state before the first step, with the encoder's `weights` if any."""
  config, mesh = parts.config, parts.mesh
  key, method_key = jax.random.split(jax.random.key(config.seed))
  shape = (config.dataset.height, config.dataset.width, 3)
  # On a CPU, full optimisation takes longer to compile and draws the same bits.
  on_cpu = jax.default_backend() == "cpu"
  options = {"xla_backend_optimization_level": 1} if on_cpu else None
  init_encoder = jax.jit(parts.encoder.init, compiler_options=options)
  variables = init_encoder(key, jnp.zeros((1, *shape)))
  if weights:
    variables = pretrained.load(weights, variables)
  images = jax.ShapeDtypeStruct((num_images, *shape), jnp.float32)
  features = jax.eval_shape(parts.encoder.apply, variables, images)
  init = jax.jit(lambda key: parts.method.init(key, features))
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    opt_state=jax.jit(parts.optimizer.init)(variables["params"]),
    method=init(method_key),
    **variables,
  )
  return jax.device_put(state, shardings(mesh, state))


def shardings(mesh: Mesh, tree):
  """Where each array belongs: a bank's rows are split, the rest is copied."""
  rows = NamedSharding(mesh, sharding.ROWS)
  copies = NamedSharding(mesh, sharding.COPY)

  def of(x):
    is_split = not x.sharding.is_fully_replicated
    return rows if is_split else copies

  return jax.tree.map(of, tree)


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
