import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unreid_jax import optim

CONSTANT = {
  "frozen": (),
  "layer_decay": 1.0,
  "cosine": 0,
  "cosine_end": 0.0,
  "milestones": (),
  "gamma": 0.1,
  "warmup": 0,
  "warmup_factor": 0.01,
  "warmup_curve": "linear",
}

OPTIMIZERS = {
  "adam_wd0": ("adam", 3.5e-4, 0.0),
  "adam_wd5e4": ("adam", 3.5e-4, 5e-4),
  "adam_wd1e1": ("adam", 0.01, 0.1),
  "sgd_nesterov": ("sgd", 0.01, 5e-4, 0.9, True),
}
SCHEDULES = {
  "steplr20": ((20, 40), 0.1, 0, 0.01, "linear"),
  "warmup_unsup_default": ((30, 55), 0.1, 500, 1 / 3, "linear"),
  "warmup10_4070": ((40, 70), 0.1, 10, 0.01, "linear"),
  "warmup10_const": ((20,), 0.5, 5, 0.1, "constant"),
}


def make(name, lr, weight_decay, momentum=0.9, nesterov=False, **schedule):
  schedule = CONSTANT | schedule
  return optim.make(name, lr, weight_decay, momentum, nesterov, **schedule)


def run(optimizer, params, grads):
  """The parameters after each step, jitted."""

  @jax.jit
  def step(carry, grad):
    params, state = carry
    updates, state = optimizer.update(grad, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), params

  return jax.lax.scan(step, (params, optimizer.init(params)), grads)[1]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_golden_optimizers(golden, name):
  want = golden("optim")
  optimizer = make(*OPTIMIZERS[name])
  got = run(optimizer, jnp.asarray(want["p0"]), jnp.asarray(want["grads"]))
  np.testing.assert_allclose(got, want[name], atol=2e-6)


def test_sgd_without_nesterov():
  optimizer = make("sgd", 0.1, 0.5)
  with jax.enable_x64():
    got = run(optimizer, jnp.array(1.0), jnp.array([1.0, 2.0]))
  assert got.dtype == np.float64
  first = 1 - 0.1 * 1.5
  second = first - 0.1 * (0.9 * 1.5 + 2 + 0.5 * first)
  np.testing.assert_allclose(got, [first, second], rtol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_golden_schedules(golden, name):
  want = golden("optim")[f"{name}_f64"]
  schedule = optim.step_decay(3.5e-4, *SCHEDULES[name])
  # That trainer moves the schedule on before an epoch, the others after it.
  first = 1 if name == "warmup_unsup_default" else 0
  got = jax.vmap(schedule)(first + jnp.arange(len(want)))
  np.testing.assert_allclose(got, want, rtol=1e-7)


def test_the_schedule_follows_the_optimizers_count():
  optimizer = make("sgd", 1.0, 0.0, momentum=0.0, milestones=(2,), gamma=0.5)
  got = run(optimizer, jnp.array(0.0), -jnp.ones(4))
  np.testing.assert_allclose(got, [1, 2, 2.5, 3])


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_only_the_bias_of_the_neck_is_frozen(make_encoder, name):
  encoder = make_encoder(arch="resnet18", width=0.125)
  images = jnp.zeros((1, 32, 16, 3))
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), images)["params"]
  shapes["backbone"] = shapes["backbone"]["layer4_0"]  # enough, and quick
  params = jax.tree.map(lambda x: jnp.ones(x.shape), shapes)
  grads = jax.tree.map(lambda x: jnp.zeros((1, *x.shape)), params)
  new = run(make(name, 0.1, 0.5), params, grads)
  same = jax.tree.map(lambda a, b: bool((a == b[0]).any()), params, new)
  assert same["head"]["bn"].pop("bias")
  assert not any(jax.tree.leaves(same))
