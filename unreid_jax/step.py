"""The train step: augment, encode, the method's step, the optimizer's."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array

from unreid_jax import sharding
from unreid_jax.methods import Batch
from unreid_jax.state import Parts, TrainState, shardings


def make_train_step(parts: Parts) -> Callable:
  """The step, `step(state, rows, key) -> state, figures`; pure, for any mesh.

  `rows` are a dict of the batch's images, indices, labels and camids.
  """
  steps_per_epoch = parts.config.steps_per_epoch

  def train_step(state: TrainState, rows: dict[str, Array], key: Array):
    step_key = jax.random.fold_in(key, state.step)
    augment_key, method_key = jax.random.split(step_key)
    epoch = state.step // steps_per_epoch
    batch = Batch(**rows, step=state.step, epoch=epoch)
    images = parts.augment(augment_key, batch.images)

    def encode(params):
      variables = {"params": params, "batch_stats": state.batch_stats}
      return parts.module.apply(
        variables,
        images,
        train=True,
        mutable=["batch_stats"],
        rngs={"drop_path": step_key},  # Flax mixes in the place of each use
      )

    features, pull_back, updated = jax.vjp(encode, state.params, has_aux=True)
    in_features = jax.value_and_grad(parts.method.step, 1, has_aux=True)
    (loss, (method, figures)), slope = in_features(
      state.method, features, batch, method_key
    )
    (grads,) = pull_back(slope)
    updates, opt_state = parts.optimizer.update(
      grads, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    goes_on = state.step % steps_per_epoch > 0
    figures = {"loss": loss} | figures
    new_state = TrainState(
      step=state.step + 1,
      params=params,
      batch_stats=updated["batch_stats"],
      opt_state=opt_state,
      method=method,
      labels=state.labels,
      sums={
        k: jnp.where(goes_on, state.sums[k], 0) + figures[k] for k in figures
      },
    )
    norms = {
      "grad_norm": optax.tree.norm(grads),
      "param_norm": optax.tree.norm(params),
    }
    return new_state, {"loss": loss} | norms | figures

  return train_step


def compile_step(parts: Parts, state: TrainState, key: Array) -> Callable:
  """The train step for this state, compiled; it gives the old state away."""
  config, mesh = parts.config, parts.mesh
  array = functools.partial(
    jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, sharding.ROWS)
  )
  shape = (config.batch_size, config.dataset.height, config.dataset.width, 3)
  names = ("indices", "labels", "camids")
  rows = dict.fromkeys(names, array(shape[:1], jnp.int32))
  rows["images"] = array(shape, jnp.uint8)
  out = shardings(mesh, state), NamedSharding(mesh, sharding.COPY)
  step = jax.jit(make_train_step(parts), donate_argnums=0, out_shardings=out)
  return step.lower(state, rows, key).compile()
