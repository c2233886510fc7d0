"""Optimizers that step as PyTorch's do, and their learning rates."""

import functools
import math
import re
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr, tree_map_with_path
from jaxtyping import Array, Float, Int

from unreid_jax import UserError
from unreid_jax.values import BelowOne, Duration, NotNegative, Positive, Range

# The end of the path of a constant parameter: the bias of the BN neck. Its
# gradient is zero, but weight decay would shrink a loaded one.
FROZEN = "head/bn/bias"
_BLOCK = re.compile(r"backbone/blocks_(\d+)/")  # of a vision transformer
_EMBEDDING = re.compile(r"backbone/(patch_embed|cls_token|pos_embed|norm_pre)")


def make(
  name: Literal["adam", "sgd"],
  lr: Positive,
  weight_decay: NotNegative,
  momentum: BelowOne,
  nesterov: bool,
  frozen: tuple[str, ...],
  layer_decay: Annotated[float, Range(0, 1, "(]")],
  **rest,
) -> optax.GradientTransformation:
  """SGD or Adam with weight decay in the gradient, as in `torch.optim`.

  The decay acts on every parameter and goes through the moments ("coupled
  L2"; AdamW's does not). `FROZEN` parameters are never changed. The
  transformation raises a UserError where parameters do not have such names or
  layers.

  Args:
    name: the algorithm; Adam has betas 0.9 and 0.999 and eps 1e-8.
    weight_decay: the share of a parameter that is added to its gradient.
    momentum, nesterov: what SGD does with earlier gradients; Adam ignores them.
    frozen: layers of the backbone or the head that are never changed, either.
    layer_decay: what the learning rate is multiplied by for each layer of a
      vision transformer, from the last one down: BEiT (Bao et al., ICLR 2022).
    lr, **rest: see `schedule`.
  """
  parts = [
    optax.add_decayed_weights(weight_decay),
    scale_by_adam() if name == "adam" else optax.trace(momentum, nesterov),
    optax.scale_by_learning_rate(schedule(lr, **rest)),
    optax.masked(
      optax.set_to_zero(), functools.partial(_is_frozen, names=frozen)
    ),
  ]
  if layer_decay < 1:
    decay = functools.partial(_decay_layers, layer_decay)
    parts.append(optax.stateless(decay))
  return optax.chain(*parts)


def scale_by_adam(b1: float = 0.9) -> optax.GradientTransformation:
  """Optax's Adam; it promotes dtypes, even where JAX is told not to."""
  adam = optax.scale_by_adam(b1)

  def update(*args):
    with jax.numpy_dtype_promotion("standard"):
      return adam.update(*args)

  return optax.GradientTransformation(adam.init, update)


def schedule(
  lr: Positive,
  milestones: tuple[Duration, ...],
  gamma: Positive,
  cosine: Duration,
  cosine_end: NotNegative,
  warmup: Duration,
  warmup_factor: NotNegative,
  warmup_curve: Literal["linear", "constant"],
) -> optax.Schedule:
  """A `cosine_decay`; or, where the cosine has 0 steps, a `step_decay`."""
  rise = warmup, warmup_factor, warmup_curve
  if cosine:
    return cosine_decay(lr, cosine, cosine_end, *rise)
  return step_decay(lr, milestones, gamma, *rise)


def step_decay(
  lr: Positive,
  milestones: tuple[Duration, ...],
  gamma: Positive,
  warmup: Duration,
  warmup_factor: NotNegative,
  warmup_curve: Literal["linear", "constant"],
) -> optax.Schedule:
  """The learning rate of step 0, 1, ...: `lr * gamma ** milestones passed`.

  Args:
    lr: the learning rate before the first milestone.
    milestones: the steps with which a lower rate begins, in any order.
    gamma: what the rate is multiplied by at each milestone.
    warmup: how many steps at the start have a rate that is smaller still.
    warmup_factor: what the rate of step 0 is multiplied by in a warm-up.
    warmup_curve: whether that factor grows to 1 over the warm-up, or stays.

  Source: `WarmupMultiStepLR` of pangbo1997/Unsup_ReID, which counts epochs.
  """
  steps, milestones = np.arange(warmup), sorted(milestones)
  decayed = lr * gamma ** np.arange(len(milestones) + 1.0)
  factors = _warm_up(warmup, warmup_factor, warmup_curve)
  first = factors * decayed[np.searchsorted(milestones, steps, "right")]
  # Computed here in float64, and only looked up in the step.
  table = np.append(first, decayed).astype(np.float32)

  def schedule(step: Int[Array, ""] | int) -> Float[Array, ""]:
    passed = sum(jnp.where(step >= m, 1, 0) for m in milestones)
    index = jnp.where(step < warmup, step, warmup + passed)
    return jnp.asarray(table)[index]

  return schedule


def cosine_decay(
  lr: Positive,
  cosine: Duration,
  cosine_end: NotNegative,
  warmup: Duration,
  warmup_factor: NotNegative,
  warmup_curve: Literal["linear", "constant"],
) -> optax.Schedule:
  """The learning rate of step 0, 1, ...: half a period of a cosine.

  Args:
    lr: the learning rate where the cosine begins, at step 0.
    cosine: the step from which on the rate is `cosine_end * lr`.
    warmup, warmup_factor, warmup_curve: as in `step_decay`, but times lr alone:
      in the warm-up its rate takes the place of the cosine's.

  Source: `CosineLRScheduler` of timm, which TransReID calls once an epoch.
  """
  steps = np.minimum(np.arange(max(cosine, warmup) + 1), cosine)
  falls = 0.5 * (1 + np.cos(math.pi * steps / max(cosine, 1)))
  factors = cosine_end + (1 - cosine_end) * falls
  factors[:warmup] = _warm_up(warmup, warmup_factor, warmup_curve)
  table = (lr * factors).astype(np.float32)

  def schedule(step: Int[Array, ""] | int) -> Float[Array, ""]:
    return jnp.asarray(table)[jnp.minimum(step, len(table) - 1)]

  return schedule


def _warm_up(warmup, factor, curve):
  """What the rate of each step of the warm-up is multiplied by."""
  rise = np.arange(warmup) / max(warmup, 1) * (curve == "linear")
  return factor + (1 - factor) * rise


def _name(path):
  return keystr(path, simple=True, separator="/")


def _names(params):
  return [_name(path) for path, _ in jax.tree.leaves_with_path(params)]


def _is_frozen(params, names):
  """Which parameters are frozen, and whether all names are of some."""
  part = lambda name: name.partition("/")[2].partition("/")[0]
  parts = set(map(part, _names(params)))
  if unknown := sorted(set(names) - parts):
    raise UserError(
      f'optim.frozen has "{unknown[0]}", which the encoder does not have: '
      f"there are {', '.join(sorted(parts))}"
    )
  is_frozen = lambda name: name.endswith(FROZEN) or part(name) in names
  return tree_map_with_path(lambda path, _: is_frozen(_name(path)), params)


def _decay_layers(decay, updates, params):
  """The updates, each times `decay` once for each layer above its own."""
  found = [_BLOCK.match(name) for name in _names(updates)]
  blocks = [int(x[1]) for x in found if x]
  if not blocks:
    raise UserError(
      "optim.layer_decay is for vision transformers: set 1.0, or another "
      "encoder.arch"
    )

  def layer(name):
    block = _BLOCK.match(name)
    first = 0 if _EMBEDDING.match(name) else max(blocks) + 2
    return int(block[1]) + 1 if block else first

  scale = lambda path, x: x * decay ** (max(blocks) + 2 - layer(_name(path)))
  return tree_map_with_path(scale, updates)
