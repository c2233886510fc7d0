"""SpCL against the authors' numbers, and against slow twins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KEY, gives, make_batch, make_split, run_step, step_of

from unreid_jax import UserError, memory, methods, sharding
from unreid_jax.pseudo_labels import self_paced
from unreid_jax.pseudo_labels.clustering import describe


@pytest.fixture
def mesh():
  mesh = sharding.make_mesh(8)
  with jax.set_mesh(mesh):
    yield mesh


def unit(rng, *shape):
  raw = rng.standard_normal(shape, np.float32)
  return raw / np.linalg.norm(raw, axis=-1, keepdims=True)


def make_state(method, bank, labels):
  bank, labels = np.asarray(bank), np.asarray(labels, np.int32)
  state = method.init(KEY, jax.eval_shape(lambda: jnp.asarray(bank)))
  return jax.jit(method.refresh)(state, labels, {"features": bank}, KEY)


def batch_of(indices, labels):
  indices = np.asarray(indices)
  return make_batch(indices, np.asarray(labels)[indices])


@pytest.mark.parametrize("suffix", ["", "_dupidx"])
def test_golden(mesh, golden, suffix):
  z = golden(f"hm_spcl{suffix}")
  method = methods.make("spcl")
  state = make_state(method, z["bank_before"], z["labels"])
  batch = batch_of(z["indexes"], z["labels"])
  loss, _, slope, state = run_step(method, state, z["inputs"], batch)
  np.testing.assert_allclose(loss, z["loss_f64"], 1e-5)
  np.testing.assert_allclose(slope, z["grad_inputs"], 1e-5, 1e-5)
  after = state.bank[: len(z["bank_after"])]
  np.testing.assert_allclose(after, z["bank_after"], 1e-5, 2e-6)


def slow_loss(bank, labels, features, targets, temperature):
  """The softmax with its two epsilons, a loop over anchors and classes."""
  total = 0.0
  for feature, target in zip(features, targets, strict=True):
    exps = {
      c: np.exp(np.mean(bank[labels == c] @ feature) / temperature)
      for c in set(labels.tolist()) - {-1}
    }
    p = exps[target] / (sum(exps.values()) + 1e-6)
    total -= np.log(p + 1e-6) / len(features)
  return total


@pytest.mark.parametrize("temperature", [0.05, 0.3])
def test_loss_and_gradient_of_holes_and_rows_without_a_class(temperature):
  rng = np.random.default_rng(0)
  bank, features = unit(rng, 150, 8), unit(rng, 16, 8)
  labels = rng.choice([-1, 0, 3, 4, 9, 140], 150)  # class 140 of 150 rows
  method = methods.make("spcl", temperature=temperature)
  state = make_state(method, bank, labels)
  batch = batch_of(np.flatnonzero(labels >= 0)[:16], labels)
  bank, features = bank.astype(float), features.astype(float)
  targets = np.asarray(batch.labels)
  expected = slow_loss(bank, labels, features, targets, temperature)
  loss, _, slope, _ = run_step(method, state, features.astype("f4"), batch)
  np.testing.assert_allclose(loss, expected, 1e-5)
  for place in [(0, 0), (5, 3), (15, 7)]:
    ends = []
    for step in (1e-5, -1e-5):
      moved = features.copy()
      moved[place] += step
      ends.append(slow_loss(bank, labels, moved, targets, temperature))
    expected = (ends[0] - ends[1]) / 2e-5
    np.testing.assert_allclose(slope[place], expected, 1e-3, 1e-5)


def test_class_sums(mesh):
  rng = np.random.default_rng(1)
  values = rng.standard_normal((6, 256), np.float32)
  classes = jnp.asarray(rng.integers(-1, 256, 256), jnp.int32)
  expected = np.zeros_like(values)
  for column, c in enumerate(classes.tolist()):
    if c >= 0:
      expected[:, c] += values[:, column]
  sums = jax.jit(memory.class_sums)
  np.testing.assert_allclose(sums(values, classes), expected, 1e-5, 1e-6)
  weights = rng.standard_normal((6, 256), np.float32)
  value = lambda x: jnp.vdot(weights, memory.class_sums(x, classes))
  slope = jax.jit(jax.grad(value))(jnp.asarray(values))
  expected = np.where(classes < 0, 0, weights[:, classes])
  np.testing.assert_allclose(slope, expected, 1e-6)


@pytest.mark.parametrize("name", ["spcl", "dhcl_hnm"])
def test_the_bank_is_never_gathered(name, collective_sizes):
  """Reads the compiled step: what travels is [b, k] at most."""
  b, d, n = 16, 128, 2048
  rng = np.random.default_rng(0)
  method = methods.make(name)
  labels = np.arange(n) // 2
  with jax.set_mesh(sharding.make_mesh(8)):
    state = make_state(method, unit(rng, n, d), labels)
    batch = batch_of(np.arange(b), labels)
    step = jax.jit(step_of(method)).lower(state, unit(rng, b, d), batch, KEY)
    text = step.compile().as_text()
  sizes = collective_sizes(text)
  assert sizes and max(sizes) <= b * n


@pytest.mark.parametrize("epoch", [0, 1])
def test_self_paced_golden(golden, epoch):
  z = golden("selfpaced_spcl")
  of = lambda name: z[f"e{epoch}_{name}"]
  labels, tight, loose = (
    of(f"dbscan{x}").astype(np.int32) for x in ("", "_tight", "_loose")
  )
  alone = self_paced.outliers_alone
  for name, other in (("comp", tight), ("indep", loose)):
    score = self_paced.disagreement(alone(labels), alone(other))
    np.testing.assert_array_equal(score, of(f"R_{name}"))
  before = z["e0_indep_thres_f64"].item() if epoch else np.nan
  refined, threshold = self_paced.refine(labels, tight, loose, before)
  np.testing.assert_array_equal(refined, of("refined"))
  assert threshold == of("indep_thres_f64")


def slow_refine(labels, tight, loose, threshold):
  """Comparisons of all pairs, and a loop over the images."""
  n = len(labels)
  alone = [self_paced.outliers_alone(x) for x in (labels, tight, loose)]
  same = [x[:, None] == x for x in alone]
  score = lambda a, b: (
    np.float32(1) - ((a & b).sum(1).astype("f4") / (a | b).sum(1).astype("f4"))
  )
  compact, independent = score(same[0], same[1]), score(same[0], same[2])
  best = lambda scores, i: scores[same[0][i]].min()
  if np.isnan(threshold):
    clusters = [i for i in range(n) if same[0][i].sum() > 1]
    ranked = {labels[i]: best(independent, i) for i in clusters}
    ranked = sorted(ranked.values())
    if ranked:
      place = min(len(ranked) - 1, int(np.round(len(ranked) * 0.9)))
      threshold = ranked[place]
  out, number = alone[0].copy(), alone[0].max() + 1
  for i in range(n):
    keeps = best(independent, i) <= threshold
    if not (keeps and compact[i] <= best(compact, i)):
      out[i], number = number, number + 1
  return out, threshold


@pytest.mark.parametrize("seed", range(6))
def test_refine(seed):
  """Against its slow twin, on clusters that merge, split and lose images."""
  rng = np.random.default_rng(seed)
  dense = lambda x: np.unique(np.append(-1, x), return_inverse=True)[1][1:] - 1
  loose = rng.integers(-1, 12, 120)
  labels = np.where(loose < 0, -1, loose * 2 + (rng.random(120) < 0.2))
  labels[rng.random(120) < 0.1] = -1
  tight = np.where(rng.random(120) < 0.15, -1, labels)
  trio = [dense(x).astype(np.int32) for x in (labels, tight, loose)]
  threshold = np.nan
  for _ in range(2):
    expected = slow_refine(*trio, threshold)
    got, threshold = self_paced.refine(*trio, threshold)
    np.testing.assert_array_equal(got, expected[0])
    assert threshold == expected[1]
    trio = [np.roll(x, 1) for x in trio]


def test_refine_without_clusters():
  nothing = np.full(5, -1, np.int32)
  labels, threshold = self_paced.refine(nothing, nothing, nothing)
  assert len(set(labels)) == 5 and np.isnan(threshold)


def groups(rng, num, size, noise=0.3):
  centers = np.repeat(unit(rng, num, 16), size, axis=0)
  raw = centers + noise * unit(rng, num * size, 16)
  return (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype("f4")


def run_label(method, state, features, camids, epoch=1):
  found = method.label(state, gives(features), make_split(camids), epoch)
  labels = found.values
  # Every image has a class, and no class is without an image.
  np.testing.assert_array_equal(np.unique(labels), np.arange(labels.max() + 1))
  return found, jax.jit(method.refresh)(state, labels, found.given, KEY)


@pytest.mark.parametrize("name", ["spcl", "dhcl_hnm"])
def test_labels_of_the_memory(mesh, name):
  """After the first epoch clusters are those of the memory, which stays."""
  rng = np.random.default_rng(0)
  features, camids = groups(rng, 10, 8), np.arange(80, dtype=np.int32) % 4
  options = {"k1": 10, "k2": 3, "instance_epochs": 1, "center_cameras": True}
  method = methods.make(name, **options)
  state = method.init(KEY, jax.eval_shape(lambda: features))
  found, state = run_label(method, state, features, camids, epoch=0)
  np.testing.assert_array_equal(found.values, np.arange(80))
  assert not found.clustered
  of_memory, after = run_label(method, state, None, camids)
  np.testing.assert_array_equal(after.bank, state.bank)
  fresh = methods.make(name, recluster="features", **options)
  of_features, _ = run_label(fresh, state, features, camids)
  np.testing.assert_array_equal(of_memory.values, of_features.values)
  # Twin images may still part from their cluster; most do not.
  found = describe(of_memory.values, np.arange(80) // 8)
  assert found["clusters"] == 10 and found["recall"] > 0.6
  assert len(of_memory.values) - found["outliers"] > 60
  sizes = np.bincount(of_memory.values)
  np.testing.assert_array_equal(after.sizes[: len(sizes)], sizes)
  assert not np.any(after.sizes[len(sizes) :])
  assert np.all(after.labels[80:] == -1)


@pytest.mark.parametrize("name", ["spcl", "dhcl_hnm"])
def test_without_outliers_they_change_nothing(name):
  """They have no label; neither loss nor gradient knows their rows."""
  rng = np.random.default_rng(0)
  features = np.concatenate([groups(rng, 10, 8), unit(rng, 16, 16)])
  features = features[rng.permutation(96)]
  camids = np.zeros(96, np.int32)
  options = {"k1": 8, "k2": 3, "eps": 0.4, "outliers": "none"}
  options["recluster"] = "features"
  method = methods.make(name, **options)
  all_of_them = methods.make(name, **options | {"outliers": "classes"})
  state = method.init(KEY, jax.eval_shape(lambda: features))
  split, encode = make_split(camids), gives(features)
  found, with_them = (
    x.label(state, encode, split, 0) for x in (method, all_of_them)
  )
  alone = np.bincount(with_them.values)[with_them.values] == 1
  assert 0 < alone.sum() < 60
  np.testing.assert_array_equal(found.values < 0, alone)
  kept = found.values[~alone]
  np.testing.assert_array_equal(np.unique(kept), np.arange(kept.max() + 1))
  pairs = np.stack([kept, with_them.values[~alone]])
  assert len(np.unique(pairs, axis=1).T) == kept.max() + 1
  rows = np.flatnonzero(~alone)[:8]
  batch = make_batch(rows, found.values[rows])
  loss_of = lambda x, state: method.step(state, x, batch, KEY)[0]
  of_step, refresh = (
    jax.jit(jax.value_and_grad(loss_of)),
    jax.jit(method.refresh),
  )
  outs = []
  for other in features, np.where(alone[:, None], features[::-1], features):
    given = dict(found.given) | {"features": other}
    state = refresh(state, found.values, given, KEY)
    outs.append(of_step(features[rows], state))
  for a, b in zip(*map(jax.tree.leaves, outs), strict=True):
    np.testing.assert_array_equal(a, b)


def test_the_threshold_is_that_of_the_first_clusters():
  rng = np.random.default_rng(0)
  camids = np.arange(90, dtype=np.int32) % 3
  options = {"min_samples": 2, "eps_gap": 0.2, "recluster": "features"}
  method = methods.make("spcl", k1=8, k2=2, **options)
  features = groups(rng, 15, 6, 1.2)
  state = method.init(KEY, jax.eval_shape(lambda: features))
  assert np.isnan(state.threshold)
  _, state = run_label(method, state, features, camids)
  first = float(state.threshold)
  assert 0 < first < 1
  other = groups(rng, 15, 6, 0.8)
  assert run_label(method, state, other, camids)[1].threshold == first
  anew = method.init(KEY, jax.eval_shape(lambda: features))
  assert run_label(method, anew, other, camids)[1].threshold != first


def test_bad_values():
  for name in ("spcl", "dhcl_hnm"):
    with pytest.raises(UserError, match=r'^outliers is "none", .*recluster to'):
      methods.make(name, outliers="none")
    with pytest.raises(UserError, match=r'^recluster is "bank": set'):
      methods.make(name, recluster="bank")
  with pytest.raises(UserError, match=r"^eps_gap is 0.5: set it to 0"):
    methods.make("spcl", eps_gap=0.5)
  with pytest.raises(UserError, match=r"^mask_gap is -0.1: set it to"):
    methods.make("dhcl_hnm", mask_gap=-0.1)
