import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unreid_jax import UserError, optim

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


@pytest.mark.parametrize("source", ["formula", "timm"])
@pytest.mark.parametrize("cosine, warmup", [(40, 0), (40, 5), (3, 8)])
def test_the_cosine(source, cosine, warmup):
  """The rates of each epoch of timm's scheduler, as TransReID calls it."""
  lr, end, factor = 0.008, 0.002, 0.01
  if source == "timm":
    pytest.importorskip("torch", reason="torch is not here to compare with")
    reason = "timm is not here to compare with"
    scheduler = pytest.importorskip("timm.scheduler", reason=reason)
    torch = pytest.importorskip("torch")
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr)
    timm = scheduler.CosineLRScheduler(
      sgd, cosine, lr_min=end * lr, warmup_t=warmup, warmup_lr_init=factor * lr
    )
    rate = lambda t: timm._get_lr(t)[0]
  else:

    def rate(t):
      if t < warmup:
        return lr * (factor + (1 - factor) * t / warmup)
      share = min(t / cosine, 1)
      return lr * (end + (1 - end) * (1 + math.cos(math.pi * share)) / 2)

  want = [rate(t) for t in range(50)]
  got = optim.cosine_decay(lr, cosine, end, warmup, factor, "linear")
  np.testing.assert_allclose(jax.vmap(got)(jnp.arange(50)), want, 1e-6)
  optimizer = make(
    "sgd", lr, 0.0, 0.0, cosine=cosine, cosine_end=end, warmup=warmup
  )
  path = run(optimizer, jnp.array(0.0), -jnp.ones(50))
  np.testing.assert_allclose(path, np.cumsum(want), 1e-5)


def transformer(depth):
  """Ones, named as the parameters of a vision transformer and a neck."""
  names = ("cls_token", "pos_embed", "patch_embed_proj", "norm_pre", "norm")
  names += ("proj", *(f"blocks_{i}" for i in range(depth)))
  backbone = {name: {"kernel": jnp.ones(2)} for name in names}
  return {"backbone": backbone, "head": {"bn": {"scale": jnp.ones(2)}}}


def test_the_learning_rate_decays_by_layers():
  """Of 11 blocks, so that the tenth is not taken for the second."""
  params = transformer(11)
  optimizer = make("sgd", 1.0, 0.0, 0.0, layer_decay=0.5)
  grads = jax.tree.map(lambda x: jnp.ones((1, *x.shape)), params)
  new = run(optimizer, params, grads)
  steps = jax.tree.map(lambda a, b: float((a - b[0])[0]), params, new)
  flat = {k: x["kernel"] for k, x in steps["backbone"].items()}
  want = {f"blocks_{i}": 0.5 ** (11 - i) for i in range(11)}
  want |= {"norm": 1, "proj": 1}
  first = "cls_token", "pos_embed", "patch_embed_proj", "norm_pre"
  assert flat == want | dict.fromkeys(first, 0.5**12)
  assert steps["head"]["bn"]["scale"] == 1


def test_frozen_layers():
  params = transformer(2)
  frozen = ("patch_embed_proj", "blocks_1")
  optimizer = make("adam", 0.1, 0.5, frozen=frozen)
  grads = jax.tree.map(lambda x: jnp.ones((2, *x.shape)), params)
  new = run(optimizer, params, grads)
  moved = jax.tree.map(lambda a, b: bool((a != b[1]).all()), params, new)
  still = [k for k, x in moved["backbone"].items() if not x["kernel"]]
  assert sorted(still) == sorted(frozen)
  assert moved["head"]["bn"]["scale"]


def test_layers_that_the_encoder_has_not():
  params = {"backbone": {"conv1": jnp.ones(1), "blocks_0_1": jnp.ones(1)}}
  optimizer = make("sgd", 0.1, 0.0, frozen=("conv1", "conv2"))
  with pytest.raises(UserError, match=r'"conv2", .*are blocks_0_1, conv1'):
    optimizer.init(params)
  optimizer = make("sgd", 0.1, 0.0, layer_decay=0.8)
  with pytest.raises(UserError, match=r"layer_decay is for vision transf"):
    optimizer.update(params, optimizer.init(params), params)
