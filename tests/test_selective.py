"""Selective contrastive learning against the authors' code and a slow twin."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gives, make_batch, make_split, run_step

from unreid_jax import evaluate, memory, methods, sharding
from unreid_jax.methods import selective


def setup(z, **hyperparameters):
  """State, features and batch of the golden, under a mesh."""
  features = {
    "global": jnp.asarray(z["global_feats"]),
    "local": jnp.asarray(z["local_feats"]).swapaxes(0, 1),
  }
  bank = {
    "global": jnp.asarray(z["bank_global_before"]),
    "local": jnp.asarray(z["bank_local_before"]).swapaxes(0, 1),
  }
  camids = jnp.asarray(z["cams"], jnp.int32)
  small = {"num_positives": 5, "num_negatives": 7}
  method = methods.make("selective", **small | hyperparameters)
  state = method.init(jax.random.key(0), jax.eval_shape(lambda: bank))
  found = method.label(state, gives(bank), make_split(np.asarray(camids)), 0)
  assert method.label(state, gives(None), None, 1) is None
  state = jax.jit(method.refresh)(state, found.values, found.given, None)
  state = state.replace(mixture=memory.create(jnp.asarray(z["M_before"])))
  indices = jnp.asarray(z["index"])
  batch = make_batch(indices, indices, camids[indices])
  return method, state, features, batch


@pytest.mark.parametrize("num_devices", [1, 8])
def test_authors_loss_gradients_and_banks(golden, num_devices):
  z = golden("scl_unsup")
  n, key = len(z["cams"]), jax.random.key(0)
  with jax.set_mesh(sharding.make_mesh(num_devices)):
    method, state, features, batch = setup(z)
    hp = selective.Hyperparameters(num_positives=5, num_negatives=7)
    choose = jax.jit(functools.partial(selective.choose, hp))
    rows, valid, _ = choose(state, features, batch, key)
    np.testing.assert_array_equal(rows[:, :6], z["positive_idx"])
    np.testing.assert_array_equal(rows[:, 6:], z["negative_idx"])
    assert valid.all()
    value, metrics, grads, after = run_step(method, state, features, batch)
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


def test_authors_test_time_distance_and_scores(golden):
  z = golden("scl_eval")
  m = 15
  method = methods.make("selective")
  features = {
    "global": z["global_feats"],
    "local": z["local_feats"].swapaxes(0, 1),
  }
  query = {name: x[:m] for name, x in features.items()}
  gallery = {name: x[m:] for name, x in features.items()}
  camids = z["cams"].astype(np.int32)
  distance = jax.jit(method.distance)
  got = distance(query, gallery, camids[:m], camids[m:])
  np.testing.assert_allclose(got, z["distmat"], 0, 2e-6)
  splits = (
    make_split(camids[i], z["pids"][i]) for i in (slice(m), slice(m, None))
  )
  scores = evaluate.score(query, gallery, *splits, distance)
  assert scores["mAP"] == pytest.approx(float(z["map_f64"]), abs=1e-6)
  for k in (1, 5, 10):
    assert scores[f"R{k}"] == pytest.approx(float(z["cmc"][k - 1]), abs=1e-6)


def test_warmup_draws_the_same_negatives_for_the_whole_batch(golden):
  z, key = golden("scl_unsup"), jax.random.key(3)
  method, state, features, batch = setup(z, warmup=1)
  hp = selective.Hyperparameters(num_positives=5, num_negatives=7, warmup=1)
  choose = jax.jit(functools.partial(selective.choose, hp))
  rows, valid, weights = choose(state, features, batch, key)
  assert valid.all()
  np.testing.assert_array_equal(weights, [0.5, 0, 0, 0, 0, 0])
  np.testing.assert_array_equal(rows[:, 0], batch.indices)
  order = np.argsort(jax.random.uniform(key, state.camids.shape))
  order = [i for i in order if i < len(z["cams"])]
  for row, index in zip(rows, batch.indices, strict=True):
    others = [i for i in order if i != index]
    np.testing.assert_array_equal(row[1:], others[:12])
  # Only the anchors' own rows are written, and the warm-up ends.
  after = run_step(method, state, features, batch).state
  changed = np.any(after.mixture != state.mixture, axis=1)
  assert set(np.flatnonzero(changed)) == set(np.asarray(batch.indices))
  batch = batch.replace(step=jnp.asarray(1, jnp.int32))
  weights = choose(after, features, batch, key)[2]
  np.testing.assert_allclose(weights, [0.5, *[1.75 * 0.5 / 5] * 5])


def test_frozen_gradient_is_the_losses_own(golden):
  z, key = golden("scl_unsup"), jax.random.key(0)
  method, state, features, batch = setup(z, gradient="frozen")
  value, _, slope, _ = run_step(method, state, features, batch, key)
  hp = selective.Hyperparameters(num_positives=5, num_negatives=7)
  choose = jax.jit(functools.partial(selective.choose, hp))
  rows, _, weights = choose(state, features, batch, key)

  def twin(features):
    total = 0.0
    local = features["local"].reshape(len(rows), -1)
    for x, branch in ((local, 0.3), (features["global"], 0.7)):
      logits = 10 * jnp.einsum("bd,bmd->bm", x, state.mixture[rows])
      entropies = -jax.nn.log_softmax(logits)[:, :6]
      total += branch * (entropies @ weights).mean()
    return total

  slopes = slope, jax.jit(jax.grad(twin))(features)
  for a, b in zip(*map(jax.tree.leaves, slopes), strict=True):
    np.testing.assert_allclose(a, b, 0, 1e-6)
  sequential, *_ = setup(z)
  same = run_step(sequential, state, features, batch, key).loss
  np.testing.assert_allclose(same, value, 1e-6)


def test_fewer_images_than_negatives(golden):
  """All other images are negatives, and rows without an image are not."""
  z, key = golden("scl_unsup"), jax.random.key(0)
  method, state, features, batch = setup(z, num_negatives=500)
  hp = selective.Hyperparameters(num_positives=5, num_negatives=500)
  choose = jax.jit(functools.partial(selective.choose, hp))
  rows, valid, _ = choose(state, features, batch, key)
  for row, exists in zip(np.asarray(rows), np.asarray(valid), strict=True):
    assert sorted(row[exists]) == list(range(80))
  assert np.isfinite(run_step(method, state, features, batch).loss)
