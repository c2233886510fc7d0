"""One contract for every method: what the loop relies on."""

import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unreid_jax import UserError, memory, methods, sharding
from unreid_jax.methods import Batch

NAMES = [module.name for module in pkgutil.iter_modules(methods.__path__)]
N, B = 200, 16
CAMIDS = np.arange(N, dtype=np.int32) % 4


def make_features(name, num, seed):
  """Unit features as the encoder of that method's config returns them."""
  rng = np.random.default_rng(seed)
  head = importlib.import_module(f"configs.{name}").get_config().encoder.head
  raw = rng.standard_normal((num, 32), np.float32)
  if head == "stripes":
    raw = {"global": raw, "local": rng.standard_normal((num, 8, 4), np.float32)}
  return jax.tree.map(lambda x: memory.normalize(jnp.asarray(x)), raw)


def make_batch(seed, labels):
  """Images that have a label, as a sampler draws them."""
  rng = np.random.default_rng(seed)
  rows = rng.permutation(np.flatnonzero(labels >= 0))[:B].astype(np.int32)
  images = np.zeros((B, 1, 1, 3), np.uint8)
  return Batch(*map(jnp.asarray, (images, rows, labels[rows], CAMIDS[rows])))


def run(name, num_devices, labels_per_epoch):
  """Two epochs of two steps; all that comes out, and the compiled step."""
  method = methods.make(name)
  key = jax.random.key(0)
  with jax.set_mesh(sharding.make_mesh(num_devices)):
    features = make_features(name, N, 0)
    shapes = jax.eval_shape(lambda: features)
    state = jax.jit(lambda key: method.init(key, shapes))(key)
    refresh = jax.jit(method.refresh)

    @jax.jit
    def step(state, features, batch, key):
      loss = jax.value_and_grad(method.loss, 1, has_aux=True)
      (value, metrics), grads = loss(state, features, batch, key)
      return method.update(state, features, batch, key), value, metrics, grads

    outs = []
    for epoch, labels in enumerate(labels_per_epoch):
      state = refresh(state, features, labels, CAMIDS)
      for i in range(2):
        old = state
        inputs = make_features(name, B, 10 * epoch + i), make_batch(i, labels)
        state, *out = step(state, *inputs, key)
        outs.append(jax.device_get(out))
        for a, b in zip(*map(jax.tree.leaves, (old, state)), strict=True):
          assert (a.shape, a.dtype) == (b.shape, b.dtype)
          assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    return step, state, outs


@pytest.mark.parametrize("name", NAMES)
def test_one_device_equals_eight(name):
  epochs = [np.arange(N, dtype=np.int32) % 9] * 2
  (_, state, outs), (_, state8, outs8) = (run(name, n, epochs) for n in (1, 8))
  trees = jax.tree.leaves((state, outs)), jax.tree.leaves((state8, outs8))
  for one, eight in zip(*trees, strict=True):
    np.testing.assert_allclose(one, eight, 1e-5, 1e-5)
  split = [
    x
    for x in jax.tree.leaves(state8)
    if x.addressable_shards[0].data.size * 8 == x.size
  ]
  assert split, "no bank is split over the devices"


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_finite_and_the_step_compiles_once(name):
  one_cluster = np.full(N, -1, np.int32)
  one_cluster[:30] = 0
  step, _, outs = run(name, 8, [np.arange(N, dtype=np.int32) % 9, one_cluster])
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(outs))
  assert step._cache_size() == 1
  grads = outs[0][2]
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", sorted({*NAMES} - {"supervised"}))
def test_labels_do_not_depend_on_identities(name):
  method = methods.make(name)
  with jax.set_mesh(sharding.make_mesh(8)):
    features = jax.device_get(make_features(name, N, 0))
    shapes = jax.eval_shape(lambda: features)
    state = jax.jit(lambda key: method.init(key, shapes))(jax.random.key(0))
    pids = np.arange(N, dtype=np.int32) // 10
    one, two = (
      method.label(state, features, CAMIDS, x).labels for x in (pids, pids * 0)
    )
  np.testing.assert_array_equal(one, two)
  assert one.shape == (N,) and one.dtype == np.int32


def test_unknown_names():
  with pytest.raises(UserError, match=r"there are: .*selective"):
    methods.make("selectiv")
  with pytest.raises(TypeError, match="lambda_x"):
    methods.make("selective", lambda_x=1)
