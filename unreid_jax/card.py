"""What builds an encoder and makes its input, with or without its weights."""

from collections.abc import Callable
from typing import Annotated, Any, TypedDict

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from unreid_jax import UserError, models, sharding, values
from unreid_jax.data import augment
from unreid_jax.values import Count, Positive


class Card(TypedDict):
  """What builds an encoder and makes its input; JSON.

  Attributes:
    encoder: the arguments of `models.make`.
    height, width: the size of its images, in pixels.
    mean, std: of the images' three channels, in units of the largest value.
  """

  encoder: Annotated[dict, values.Nested(lambda _: values.fields(models.make))]
  height: Count
  width: Count
  mean: tuple[float, ...]
  std: tuple[Positive, ...]


def build(
  card: dict, where: str, remedy: str = "restore it, or train again"
) -> tuple[Any, PyTree]:
  """The network that a card describes, and the shapes of its variables.

  Raises:
    UserError: the card describes none; the line names where it lies, and what
      to do.
  """
  kinds = values.fields(Card)
  try:
    values.check(kinds, {key: card[key] for key in kinds})
    module = models.make(**card["encoder"])
    shapes = jax.eval_shape(_init(module, card), jax.random.key(0))
  except Exception as error:
    if isinstance(error, UserError) and not isinstance(error, values.BadValue):
      raise
    reason = f"it has no {error}" if isinstance(error, KeyError) else error
    raise UserError(f"{where} is damaged ({reason}): {remedy}") from None
  return module, shapes


def draw(module: Any, card: dict, key: jax.Array) -> PyTree:
  """The variables of an encoder that has learnt nothing."""
  # On a CPU, full optimisation takes longer to compile and draws the same bits.
  on_cpu = jax.default_backend() == "cpu"
  options = {"xla_backend_optimization_level": 1} if on_cpu else None
  return jax.jit(_init(module, card), compiler_options=options)(key)


def _init(module, card):
  """From a key to variables, in float64 if that is the encoder's dtype."""
  shape = (1, card["height"], card["width"], len(card["mean"]))

  def init(key):
    variables = module.init(key, jnp.zeros(shape, jnp.float32))
    is_wide = card["encoder"]["dtype"] == "float64"
    cast = lambda x: x.astype(float) if is_wide else x
    return jax.tree.map(cast, variables)

  return init


def make_apply(module: Any, card: dict, mesh: Mesh) -> Callable:
  """`apply(variables, images u8) -> features`, jitted, at test time."""
  colour = tuple(card["mean"]), tuple(card["std"])

  def apply(variables, images):
    images = augment.normalise(images, *colour)
    return module.apply(variables, images, train=False)

  return jax.jit(apply, out_shardings=NamedSharding(mesh, sharding.COPY))
