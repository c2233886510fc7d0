"""Selective contrastive learning against the authors' code and a slow twin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unreid_jax import memory, methods, sharding
from unreid_jax.methods import Batch, selective


def setup(z, **hyperparameters):
  """State, features and batch of the golden, under a mesh."""
  n = len(z["cams"])
  features = {
    "global": jnp.asarray(z["global_feats"]),
    "local": jnp.asarray(z["local_feats"]).swapaxes(0, 1),
  }
  bank = {
    "global": jnp.asarray(z["bank_global_before"]),
    "local": jnp.asarray(z["bank_local_before"]).swapaxes(0, 1),
  }
  camids = jnp.asarray(z["cams"], jnp.int32)
  method = methods.make(
    "selective", num_positives=5, num_negatives=7, **hyperparameters
  )
  state = method.init(jax.random.key(0), jax.eval_shape(lambda: bank))
  state = method.refresh(state, bank, jnp.arange(n), camids)
  state = state.replace(mixture=memory.create(jnp.asarray(z["M_before"])))
  indices = jnp.asarray(z["index"])
  images = jnp.zeros((len(indices), 1, 1, 3), jnp.uint8)
  batch = Batch(images, indices, indices, camids[indices])
  return method, state, features, batch


@pytest.mark.parametrize("num_devices", [1, 8])
def test_authors_loss_gradients_and_banks(golden, num_devices):
  z = golden("scl_unsup")
  n, key = len(z["cams"]), jax.random.key(0)
  with jax.set_mesh(sharding.make_mesh(num_devices)):
    method, state, features, batch = setup(z)
    hp = selective.Hyperparameters(num_positives=5, num_negatives=7)
    rows, valid, _ = selective.choose(hp, state, features, batch, key)
    np.testing.assert_array_equal(rows[:, :6], z["positive_idx"])
    np.testing.assert_array_equal(rows[:, 6:], z["negative_idx"])
    assert valid.all()
    value = lambda f: method.loss(state, f, batch, key)
    (value, metrics), grads = jax.jit(jax.value_and_grad(value, has_aux=True))(
      features
    )
    after = jax.jit(method.update)(state, features, batch, key)
  close = lambda a, b, tol: np.testing.assert_allclose(a, b, 0, tol)
  close(value, z["loss_f64"], 2e-5)
  close(metrics["loss_local"], z["loss_local_f64"], 2e-5)
  close(metrics["loss_global"], z["loss_global_f64"], 2e-5)
  close(grads["global"], z["grad_global"], 2e-6)
  close(grads["local"].swapaxes(0, 1), z["grad_local"], 2e-6)
  close(after.mixture[:n], z["M_after"], 2e-6)
  close(after.global_bank[:n], z["bank_global_after"], 2e-6)
  local = after.local_bank[:n].swapaxes(0, 1)
  close(local, z["bank_local_after"], 2e-6)
