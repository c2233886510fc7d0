"""Optimizers that step as PyTorch's do, and their learning rates."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr, tree_map_with_path
from jaxtyping import Array, Float, Int

from unreid_jax.values import BelowOne, Duration, NotNegative, Positive

# The end of the path of a constant parameter: the bias of the BN neck. Its
# gradient is zero, but weight decay would shrink a loaded one.
FROZEN = "head/bn/bias"


def make(
  name: Literal["adam", "sgd"],
  lr: Positive,
  weight_decay: NotNegative,
  momentum: BelowOne,
  nesterov: bool,
  **schedule,
) -> optax.GradientTransformation:
  """SGD or Adam with weight decay in the gradient, as in `torch.optim`.

  The decay acts on every parameter and goes through the moments ("coupled
  L2"; AdamW's does not). `FROZEN` parameters are never changed.

  Args:
    name: the algorithm; Adam has betas 0.9 and 0.999 and eps 1e-8.
    weight_decay: the share of a parameter that is added to its gradient.
    momentum, nesterov: what SGD does with earlier gradients; Adam ignores it.
    lr, **schedule: see `step_decay`.
  """
  return optax.chain(
    optax.add_decayed_weights(weight_decay),
    scale_by_adam() if name == "adam" else optax.trace(momentum, nesterov),
    optax.scale_by_learning_rate(step_decay(lr, **schedule)),
    optax.masked(optax.set_to_zero(), _is_frozen),
  )


def scale_by_adam(b1: float = 0.9) -> optax.GradientTransformation:
  """Optax's Adam, also where JAX promotes no dtypes, which Optax relies on."""
  adam = optax.scale_by_adam(b1)

  def update(*args):
    with jax.numpy_dtype_promotion("standard"):
      return adam.update(*args)

  return optax.GradientTransformation(adam.init, update)


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
  rise = steps / max(warmup, 1) if warmup_curve == "linear" else 0.0
  factors = warmup_factor + (1 - warmup_factor) * rise
  first = factors * decayed[np.searchsorted(milestones, steps, "right")]
  # Computed here in float64, and only looked up in the step.
  table = np.append(first, decayed).astype(np.float32)

  def schedule(step: Int[Array, ""] | int) -> Float[Array, ""]:
    passed = sum(jnp.where(step >= m, 1, 0) for m in milestones)
    index = jnp.where(step < warmup, step, warmup + passed)
    return jnp.asarray(table)[index]

  return schedule


def _is_frozen(params):
  name = lambda path: keystr(path, simple=True, separator="/")
  return tree_map_with_path(lambda p, _: name(p).endswith(FROZEN), params)
