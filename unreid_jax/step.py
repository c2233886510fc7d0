"""The train step: augment, encode, the method's step, the optimizer's."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from unreid_jax import sharding
from unreid_jax.methods import Batch
from unreid_jax.state import Parts, TrainState, shardings


def make_train_step(parts: Parts) -> Callable:
  """The step, `step(state, rows, key) -> state, figures`; pure, for any mesh.

  `rows` are a dict of the batch's images, indices, labels and camids.
  """
  config = parts.config
  steps_per_epoch = config.steps_per_epoch

  def train_step(state: TrainState, rows: dict[str, Array], key: Array):
    step_key = jax.random.fold_in(key, state.step)
    augment_key, method_key = jax.random.split(step_key)
    epoch = state.step // steps_per_epoch
    batch = Batch(**rows, step=state.step, epoch=epoch)
    images = parts.augment(augment_key, batch.images)

    def encode(params):
      variables = {"params": params, "batch_stats": state.batch_stats}
      apply = lambda images, first: parts.module.apply(
        variables | {"batch": {"backbone": {"first": first}}},
        images,
        train=True,
        mutable=["batch_stats"],
        rngs={"drop_path": step_key},  # Flax mixes in the place of each use
      )
      num, running = config.micro_batches, config.encoder.bn_running
      return in_micro_batches(apply, images, num, running)

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
    if config.ema:
      mix = lambda old, new: config.ema * old + (1 - config.ema) * new
      average = jax.tree.map(mix, state.average, new_state.variables)
      new_state = new_state.replace(average=average)
    norms = {
      "grad_norm": optax.tree.norm(grads),
      "param_norm": optax.tree.norm(params),
    }
    return new_state, {"loss": loss} | norms | figures

  return train_step


def in_micro_batches(
  apply: Callable, images: Float[Array, "b h w 3"], num: int, running: str
) -> tuple[Any, Any]:
  """The encoder of one part of the batch after the other, in training mode.

  Of each part only the images are kept for the gradient, which encodes it once
  more. The parts are encoded by a loop, which XLA cannot unroll into parts that
  are in memory at the same time.

  Args:
    apply: `apply(images, first) -> features, variables`, where the variables
      are the running statistics after the images, the first of which is the
      batch's image `first`.
    images: a batch.
    num: the number of parts; each has whole groups of batch norm.
    running: see `norm.GhostBatchNorm`.

  Returns:
    What `apply` returns for the whole batch, but for rounding.
  """
  if num == 1:
    return apply(images, 0)
  # Parts are consecutive images, and so are the groups of batch norm: they stay
  # the same on any number of devices. Each part is dealt out to all of them
  # anew, which moves the images of a batch, and its features back.
  split = lambda x: x.reshape(num, -1, *x.shape[1:])
  starts = jnp.arange(0, len(images), len(images) // num, dtype=jnp.int32)
  images = sharding.constrain(split(images), sharding.ROWS_OF_PARTS)
  one = jax.checkpoint(lambda part: apply(*part), prevent_cse=False)
  features, updated = jax.lax.map(one, (images, starts))
  join = lambda x: sharding.constrain_rows(x.reshape(-1, *x.shape[2:]))
  of_batch = lambda x: x[0] if running == "first" else x.mean(0)
  return jax.tree.map(join, features), jax.tree.map(of_batch, updated)


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
  step = step.lower(state, rows, key)
  # XLA would run operations side by side on a CPU, each of which has work for
  # all threads, which takes a tenth longer.
  alone = {"xla_cpu_enable_concurrency_optimized_scheduler": False}
  try:
    return step.compile(alone if jax.default_backend() == "cpu" else None)
  except jax.errors.JaxRuntimeError as error:
    if "No such compile option" not in str(error):
      raise
    return step.compile()  # XLA's options come and go
