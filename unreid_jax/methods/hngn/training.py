"""How the generator of HNGN learns: its state, what it minimises, its steps."""

import functools
import math
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax
from jaxtyping import Array, Float

from unreid_jax import methods, optim, sharding
from unreid_jax.methods import Proxies
from unreid_jax.methods.hngn import negatives
from unreid_jax.methods.hngn.generator import Generator, interpolate


@struct.dataclass
@no_type_check  # its leaves may also be shardings
class GeneratorState:
  """The generator's own train state; empty for the interpolation."""

  params: Any
  opt_state: Any


def init(hp, key, shapes) -> GeneratorState:
  """A new generator, for features of these shapes."""
  if hp.generator == "interpolation":
    return GeneratorState({}, {})
  _, d = methods.size_of(shapes)
  key, _ = jax.random.split(key)
  zeros = functools.partial(jnp.zeros, dtype=shapes.dtype)
  examples = zeros((1, d)), zeros((1, 1, d)), key
  params = _network(hp).init(key, *examples)["params"]
  return GeneratorState(params, _optimizer(hp).init(params))


def generate(hp, params, near: negatives.Around, key, progress=1.0):
  """Generated negatives [b, m, d]; see `generator.py`."""
  anchors, proxies = near.anchors, near.proxies
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and len(anchors) % mesh.size == 0:
    # Each device moves the proxies of its own anchors.
    anchors, proxies = map(sharding.constrain_rows, (anchors, proxies))
  if hp.generator == "learned":
    return _network(hp).apply({"params": params}, anchors, proxies, key)
  growth = jnp.log1p((math.e - 1) * progress)  # as in ISE
  return interpolate(anchors, proxies, hp.interpolation * growth)


def generator_loss(
  hp, params, proxies: Proxies, features, labels, key
) -> Float[Array, ""]:
  """What the generator with these `params` minimises; see the package."""
  near = negatives.around(proxies, features, labels, hp.num_generated)
  generated = generate(hp, params, near, key)
  logits = negatives.logits_of_clusters(proxies, generated)
  temperature = proxies.temperature
  parts = negatives.terms(near, generated, logits, temperature, hp.hardness)
  return sum(getattr(hp, f"{name}_weight") * x for name, x in parts.items())


def train(
  hp, generator: GeneratorState, proxies: Proxies, batch, progress
) -> GeneratorState:
  """Steps of the generator on `batch(i)`; none in the warm-up."""

  def step(i, generator):
    slope = jax.grad(generator_loss, argnums=1)(
      hp, generator.params, proxies, *batch(i)
    )
    updates, opt_state = _optimizer(hp).update(
      slope, generator.opt_state, generator.params
    )
    params = optax.apply_updates(generator.params, updates)
    return GeneratorState(params, opt_state)

  steps = jnp.where(progress > 0, hp.generator_steps, 0)
  return lax.fori_loop(0, steps, step, generator)


def _network(hp):
  return Generator(hp.generator_width, hp.noise, hp.radius)


def _optimizer(hp):
  learning_rate = optax.scale_by_learning_rate(hp.learning_rate)
  return optax.chain(optim.scale_by_adam(b1=0.5), learning_rate)
