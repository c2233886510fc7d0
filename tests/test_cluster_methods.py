"""Cluster Contrast, HHCL and the supervised bound against the references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KEY, gives, make_batch, make_split, run_step

from unreid_jax import UserError, losses, memory, methods
from unreid_jax.methods import cluster_contrast, hhcl

TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}
GRADIENT = {"rtol": 1e-5, "atol": 1e-5}  # of similarities / .05


def batch_of(targets):
  return make_batch(targets, targets)


def check(method, state, golden, bank_after):
  """Loss, gradient and bank after the step, in the golden's layout."""
  batch = batch_of(golden["targets"])
  found = run_step(method, state, golden["inputs"], batch)
  np.testing.assert_allclose(found.loss, golden["loss_f64"], **TOLERANCE)
  np.testing.assert_allclose(found.slope, golden["grad_inputs"], **GRADIENT)
  after = np.concatenate(bank_after(found.state))
  np.testing.assert_allclose(after, golden["bank_after"], **TOLERANCE)


@pytest.mark.parametrize("ragged", ["", "_ragged"])
@pytest.mark.parametrize(
  "name, update", [("mean", "momentum"), ("hard", "hardest")]
)
def test_cluster_contrast_golden(golden, name, update, ragged):
  z = golden(f"cm_cc_{name}{ragged}")
  momentum = 0.2 if name == "hard" else 0.1
  method = methods.make(
    "cluster_contrast", bank_update=update, momentum=momentum
  )
  num = len(z["bank_before"])
  bank = memory.create(jnp.asarray(z["bank_before"]))
  state = cluster_contrast.State(bank, jnp.array(num))
  check(method, state, z, lambda state: [state.centroids[:num]])


SUFFIXES = ["", "_ragged", "_smooth", "_smooth_C120"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("mode", ["CM", "CMhard"])
def test_hhcl_single_row_golden(golden, mode, suffix):
  """Cluster Contrast's updates, of features that are not normalised again."""
  z = golden(f"cm_hhcl_{mode}{suffix}")
  num = len(z["bank_before"])
  write = {"CM": memory.write, "CMhard": memory.write_hardest}[mode]
  smoothing = 0.1 if "smooth" in suffix else 0.0

  def step(bank, features, batch, key):
    logits = memory.similarities(bank, features) / 0.05
    targets = batch.labels
    loss = losses.cross_entropy(logits, targets, jnp.array(num), smoothing)
    return loss, (write(bank, targets, features, 0.1), {})

  method = methods.make("cluster_contrast")._replace(step=step)
  bank = memory.create(jnp.asarray(z["bank_before"]))
  check(method, bank, z, lambda bank: [bank[:num]])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_hhcl_two_rows_golden(golden, suffix):
  z = golden(f"cm_hhcl_CMhybrid{suffix}")
  smoothing = 0.1 if "smooth" in suffix else 0.0
  method = methods.make("hhcl", label_smoothing=smoothing)
  num = len(z["bank_before"]) // 2
  hard, mean = (memory.create(jnp.asarray(x)) for x in _split(z, 2))
  state = hhcl_state(mean, hard, num)
  check(
    method, state, z, lambda state: [state.hard[:num], state.centroids[:num]]
  )


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_hhcl_instances_golden(golden, suffix):
  z = golden(f"cm_hhcl_CMhybrid_v2{suffix}")
  method = methods.make(
    "hhcl",
    memory="instances",
    num_instances=4,
    label_smoothing=0.1 if "smooth" in suffix else 0.0,
  )
  centroids, *instances = _split(z, 5)
  num = len(centroids)
  blocks = memory.create(jnp.stack(list(map(jnp.asarray, instances)), axis=1))
  state = hhcl_state(memory.create(jnp.asarray(centroids)), blocks, num)
  check(
    method,
    state,
    z,
    lambda state: [
      state.centroids[:num],
      *np.moveaxis(np.asarray(state.hard[:num]), 1, 0),
    ],
  )


def _split(z, parts):
  return np.split(z["bank_before"], parts)


def hhcl_state(centroids, hard, num):
  return hhcl.State(centroids, hard, jnp.array(num))


def test_hhcl_weights():
  """The code's bracket makes .5 and .25; convex weights are .5 and .5."""
  rng = np.random.default_rng(0)
  hard, mean, features = (
    memory.normalize(jnp.asarray(rng.standard_normal((8, 4), np.float32)))
    for _ in range(3)
  )
  state = hhcl_state(memory.create(mean), memory.create(hard), 8)
  batch = batch_of(np.arange(8))
  for name, rest in (("code", 0.25), ("convex", 0.5)):
    method = methods.make("hhcl", loss_weights=name)
    loss, parts, *_ = run_step(method, state, features, batch)
    assert parts["loss_hard"] != parts["loss_mean"]
    expected = 0.5 * parts["loss_hard"] + rest * parts["loss_mean"]
    np.testing.assert_allclose(loss, expected, 1e-6)


def test_centroids_golden(golden):
  z = golden("centroids")
  method = methods.make("cluster_contrast")
  state = method.init(None, jax.ShapeDtypeStruct((120, 24), jnp.float32))
  labels = z["labels"].astype(np.int32)
  state = jax.jit(method.refresh)(state, labels, z["features"], KEY)
  num = int(state.num_clusters)
  np.testing.assert_allclose(state.centroids[:num], z["bank"], 1e-5, 2e-6)
  assert not np.any(state.centroids[num:])


def test_hhcl_first_instances():
  """Members of their own cluster, others in each epoch; outliers nowhere."""
  method = methods.make("hhcl", memory="instances", num_instances=6)
  labels = np.array([2, 0, -1, 1, 1, 0, 2, 1, -1, 1], np.int32)
  features = np.eye(10, dtype=np.float32)
  state = method.init(jax.random.key(0), jax.eval_shape(lambda: features))
  refresh, drawn = jax.jit(method.refresh), []
  for epoch in range(20):
    key = jax.random.fold_in(KEY, epoch)
    state = refresh(state, labels, features, key)
    drawn.append(np.asarray(state.hard[:3].argmax(axis=-1)))
    assert np.all(np.asarray(state.hard[:3]).sum(axis=-1) == 1)
    assert not np.any(state.hard[3:])
  drawn = np.stack(drawn)
  for cluster in range(3):
    members = set(np.flatnonzero(labels == cluster))
    assert set(drawn[:, cluster].ravel()) == members
  assert np.any(drawn[0] != drawn[1])


def test_instances_beyond_the_memory_are_dropped():
  method = methods.make("hhcl", memory="instances", num_instances=2)
  eye = jnp.eye(6)
  blocks = memory.create(eye[:4].reshape(2, 2, 6))
  state = hhcl_state(memory.create(eye[:2]), blocks, 2)
  features = eye[jnp.array([4, 5, 3])]
  state = run_step(method, state, features, batch_of([0, 0, 0])).state
  np.testing.assert_allclose(state.hard[:2], [eye[4:6], eye[2:4]])


@pytest.mark.parametrize("write", [memory.write_hardest, memory.write_mean])
def test_a_row_is_written_once(write):
  """Against a loop over the clusters; ties go to the first feature."""
  rng = np.random.default_rng(3)
  raw = (rng.standard_normal((n, 8)).astype(np.float32) for n in (128, 24))
  bank, features = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in raw)
  features[7] = features[3]  # a tie
  rows = rng.integers(0, 6, 24).astype(np.int32)
  rows[7] = rows[3]
  rows[5] = -1
  expected = bank.copy()
  for row in set(rows) - {-1}:
    members = features[rows == row]
    new = members[np.argmin(members @ bank[row])]
    new = members.mean(axis=0) if write is memory.write_mean else new
    mixed = 0.1 * bank[row] + 0.9 * new
    expected[row] = mixed / np.linalg.norm(mixed)
  out = write(*map(jnp.asarray, (bank, rows, features)), 0.1)
  np.testing.assert_allclose(out, expected, 1e-5, 1e-6)


def test_bad_values():
  for name, key, value in (
    ("hhcl", "memory", "CMhybrid"),
    ("hhcl", "loss_weights", "paper"),
    ("cluster_contrast", "bank_update", "mean"),
    ("cluster_contrast", "clustering", "kmeans"),
    ("cluster_contrast", "eps", 1.5),
    ("cluster_contrast", "k1", 1),
    ("cluster_contrast", "temperature", 0.0),
    ("supervised", "momentum", 1.5),
    ("hhcl", "num_instances", 0),
  ):
    with pytest.raises(UserError, match=f"^{key} is .*{value}.*: set it to"):
      methods.make(name, **{key: value})


def test_supervised_labels():
  """Identities in ascending order, junk left out, and nobody else sees them."""
  method = methods.make("supervised")
  pids = np.array([7, -1, 3, 7, 3, 9, 9], np.int32)
  split = make_split(np.zeros(7, int), pids)
  found = method.label(None, gives("features"), split, 0)
  np.testing.assert_array_equal(found.values, [1, -1, 0, 1, 0, 2, 2])
  assert found.given == "features"
  with pytest.raises(UserError, match="no identities"):
    method.label(None, gives(None), make_split(np.zeros(7, int)), 0)
