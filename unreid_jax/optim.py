"""Optimizers that step as PyTorch's do, and their learning rates."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr, tree_map_with_path
from jaxtyping import Array, Float, Int

from unreid_jax import UserError

# Constant parameters, by the end of their path: the bias of the BN neck.
# Its gradient is zero, but weight decay would shrink a loaded one.
FROZEN = "head/bn/bias"


def make(
  name: str,
  lr: float,
  weight_decay: float,
  momentum: float,
  nesterov: bool,
  **schedule,
) -> optax.GradientTransformation:
  """SGD or Adam with weight decay in the gradient, as in `torch.optim`.

  The decay acts on every parameter and goes through the moments ("coupled
  L2"; AdamW's does not). `FROZEN` parameters are never changed.

  Args:
    name: "adam" (betas 0.9 and 0.999, eps 1e-8) or "sgd".
    lr: learning rate, before the schedule.
    weight_decay: times the parameter, is added to its gradient.
    momentum: of SGD.
    nesterov: of SGD.
    **schedule: the other arguments of `step_decay`.

  Raises:
    UserError: an unknown name.
  """
  if name not in ("adam", "sgd"):
    raise UserError(f"optim.name={name!r} is unknown: choose adam or sgd")
  sgd, adam = optax.trace(momentum, nesterov), optax.scale_by_adam()
  return optax.chain(
    optax.add_decayed_weights(weight_decay),
    adam if name == "adam" else sgd,
    optax.scale_by_learning_rate(step_decay(lr, **schedule)),
    optax.masked(optax.set_to_zero(), _is_frozen),
  )


def step_decay(
  lr: float,
  milestones: Sequence[int],
  gamma: float,
  warmup: int,
  warmup_factor: float,
  warmup_curve: str,
) -> optax.Schedule:
  """The learning rate of step 0, 1, ...: `lr * gamma ** milestones passed`.

  Args:
    lr: the rate before the first milestone.
    milestones: steps with which a lower rate begins, ascending.
    gamma: factor at each milestone.
    warmup: the first so many steps have a smaller rate, in addition.
    warmup_factor: of step 0, times the rate above.
    warmup_curve: "linear", up to 1 after the warm-up, or "constant".

  Raises:
    UserError: an unknown curve.

  Source: `WarmupMultiStepLR` of pangbo1997/Unsup_ReID, which counts epochs.
  """
  if warmup_curve not in ("linear", "constant"):
    raise UserError(
      f"optim.warmup_curve={warmup_curve!r} is unknown: choose linear or "
      "constant"
    )
  steps = np.arange(warmup)
  decayed = lr * gamma ** np.arange(len(milestones) + 1.0)
  rise = steps / max(warmup, 1) if warmup_curve == "linear" else 0.0
  factors = warmup_factor + (1 - warmup_factor) * rise
  first = factors * decayed[np.searchsorted(milestones, steps, "right")]
  # Computed here in float64, and only looked up in the step.
  table = np.append(first, decayed).astype(np.float32)

  def schedule(step: Int[Array, ""] | int) -> Float[Array, ""]:
    passed = sum(step >= m for m in milestones)
    index = jnp.where(step < warmup, step, warmup + passed)
    return jnp.asarray(table)[index]

  return schedule


def _is_frozen(params):
  def is_frozen(path, _):
    return keystr(path, simple=True, separator="/").endswith(FROZEN)

  return tree_map_with_path(is_frozen, params)
