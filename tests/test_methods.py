"""One contract for every method: what the loop relies on."""

import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unreid_jax import UserError, memory, methods, sharding
from unreid_jax.methods import Batch

NAMES = [module.name for module in pkgutil.iter_modules(methods.__path__)]
N, B = 200, 16


def make_features(num, seed):
  """Unit features as an encoder with that head returns them."""
  rng = np.random.default_rng(seed)
  raw = {
    "global": rng.standard_normal((num, 32), np.float32),
    "local": rng.standard_normal((num, 8, 4), np.float32),
  }
  return jax.tree.map(lambda x: memory.normalize(jnp.asarray(x)), raw)


def make_batch(seed):
  rng = np.random.default_rng(seed)
  rows = rng.permutation(N)[:B].astype(np.int32)
  images = np.zeros((B, 1, 1, 3), np.uint8)
  return Batch(*map(jnp.asarray, (images, rows, rows % 7, rows % 4)))


def run(name, num_devices, labels_per_epoch):
  """Two epochs of two steps; all that comes out, and the compiled step."""
  method = methods.make(name)
  camids = np.arange(N, dtype=np.int32) % 4
  key = jax.random.key(0)
  with jax.set_mesh(sharding.make_mesh(num_devices)):
    features = make_features(N, 0)
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
      state = refresh(state, features, labels, camids)
      for i in range(2):
        old = state
        state, *out = step(
          state, make_features(B, 10 * epoch + i), make_batch(i), key
        )
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
    np.testing.assert_allclose(one, eight, 1e-5, 1e-6)
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


def test_unknown_names():
  with pytest.raises(UserError, match=r"there are: .*selective"):
    methods.make("selectiv")
  with pytest.raises(TypeError, match="lambda_x"):
    methods.make("selective", lambda_x=1)
