"""The reconstruction of DHCL-HNM against slow twins, and where it must end.

There are no numbers of the authors': the twins compute, in float64 and with a
loop over anchors and proxies, what the method's file says it does.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KEY, gives, make_batch, make_split, run_step, step_of

from unreid_jax import UserError, memory, methods
from unreid_jax.methods import dhcl_hnm
from unreid_jax.pseudo_labels import false_negatives
from unreid_jax.pseudo_labels.clustering import cluster
from unreid_jax.pseudo_labels.self_paced import outliers_alone

N, D, B = 90, 12, 10
DEBIAS = ("mask", "estimator", "none")


def unit(rng, *shape):
  raw = rng.standard_normal(shape, np.float32)
  return raw / np.linalg.norm(raw, axis=-1, keepdims=True)


class Case:
  """A memory of 90 rows in classes of several sizes, and a batch."""

  def __init__(self, seed=0, labels=None, loose=None):
    rng = np.random.default_rng(seed)
    self.bank, self.features = unit(rng, N, D), unit(rng, B, D)
    many = np.r_[np.arange(30), rng.integers(0, 12, 60)]
    self.labels = (many if labels is None else labels).astype(np.int32)
    num = self.labels.max() + 1
    self.loose = rng.integers(-1, 6, num) if loose is None else loose
    rows = rng.permutation(N)[:B]
    self.features += 1.5 * self.bank[rows]  # as near as in a training
    self.features /= np.linalg.norm(self.features, axis=1, keepdims=True)
    self.batch = make_batch(rows, self.labels[rows])

  def state(self, method):
    shapes = jax.eval_shape(lambda: jnp.asarray(self.bank))
    state = method.init(KEY, shapes)
    loose = np.full(len(state.labels), -1, np.int32)
    loose[: len(self.loose)] = self.loose
    given = {"features": self.bank, "loose": loose}
    return jax.jit(method.refresh)(state, self.labels, given, KEY)

  def run(self, **hyperparameters):
    """Loss, metrics and gradient."""
    method, step = compiled(tuple(hyperparameters.items()))
    return step(self.state(method), self.features, self.batch)[:3]


@functools.lru_cache
def compiled(hyperparameters):
  """The method and its step, compiled once for all tests."""
  method = methods.make("dhcl_hnm", **dict(hyperparameters))
  return method, jax.jit(step_of(method))


def slow(case, hp, features=None, frozen=None):
  """The loss; `frozen` features make the weights, if they are constants."""
  bank, labels = case.bank.astype(float), case.labels
  features = case.features.astype(float) if features is None else features
  frozen = features if frozen is None else frozen
  t, classes = hp.temperature, sorted(set(labels.tolist()))
  proxy = {c: bank[labels == c].mean(axis=0) for c in classes}
  clusters, instances, at_floor, effective, counts = [], [], [], [], []
  for f, g, y in zip(
    features, frozen, np.asarray(case.batch.labels), strict=True
  ):
    own = proxy[y] @ f / t
    negatives = []
    for c in classes:
      same = case.loose[c] == case.loose[y] >= 0
      if c != y and not (hp.debias == "mask" and same):
        negatives.append(c)
    members = [row @ f / t for row in bank[labels == y]]
    num = len(negatives)
    counts.append(num)
    if not num:
      for values in (clusters, instances, at_floor, effective):
        values.append(0.0)
      continue
    weights = [np.exp(hp.beta * (proxy[c] @ g) / t) for c in negatives]
    weights = [w / np.mean(weights) for w in weights]
    terms = [
      w * np.exp(proxy[c] @ f / t)
      for w, c in zip(weights, negatives, strict=True)
    ]
    mean, floor = np.mean(terms), np.exp(-1 / t)
    if hp.debias == "estimator":
      mean = (mean - hp.tau_plus * np.exp(own)) / (1 - hp.tau_plus)
      at_floor.append(float(mean <= floor))
      mean = max(mean, floor)
    else:
      at_floor.append(0.0)
    effective.append(np.sum(terms) ** 2 / np.sum(np.square(terms)))
    contrasts = [
      -np.log(np.exp(p) / (np.exp(p) + num * mean)) for p in (own, *members)
    ]
    clusters.append(contrasts[0])
    reduce = np.max if hp.positives == "hardest" else np.mean
    instances.append(reduce(contrasts[1:]))
  means = map(np.mean, (clusters, instances, at_floor, effective, counts))
  names = "loss_cluster", "loss_instance", "at_floor", "effective_negatives"
  found = dict(zip((*names, "negatives"), means, strict=True))
  cluster, instance = found["loss_cluster"], found["loss_instance"]
  return cluster + hp.instance_weight * instance, found


OPTIONS = [
  {"debias": debias, "beta": beta, "positives": positives}
  for debias, (beta, positives) in itertools.product(
    DEBIAS, [(0.1, "hardest"), (0.0, "all")]
  )
]
OPTIONS += [
  {"debias": "estimator", "tau_plus": 0.01},  # mostly at the floor
  {"debias": "estimator", "tau_plus": 0.1, "temperature": 0.5, "beta": 1.0},
  {"debias": "mask", "weight_gradient": True, "beta": 0.5},
  {"debias": "estimator", "weight_gradient": True, "instance_weight": 1.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_mode_equals_its_twin(options):
  """Loss, metrics, and the gradient by differences of the twin."""
  case, hp = Case(), dhcl_hnm.Hyperparameters(**options)
  loss, metrics, slope = case.run(**options)
  expected, found = slow(case, hp)
  np.testing.assert_allclose(loss, expected, 1e-5)
  assert metrics.keys() == found.keys()
  for name, value in metrics.items():
    np.testing.assert_allclose(value, found[name], 1e-4, err_msg=name)
  if options.get("tau_plus") == 0.01:
    assert 0 < metrics["at_floor"] < 1
  features = case.features.astype(float)
  frozen = None if hp.weight_gradient else features
  for place in [(0, 0), (3, 5), (7, 11), (9, 2)]:
    ends = []
    for step in (1e-5, -1e-5):
      moved = features.copy()
      moved[place] += step
      ends.append(slow(case, hp, moved, frozen)[0])
    expected = (ends[0] - ends[1]) / 2e-5
    np.testing.assert_allclose(slope[place], expected, 2e-3, 2e-4)


def test_without_its_parts_it_is_the_softmax_over_the_proxies():
  case = Case()
  loss, _, slope = case.run(debias="none", beta=0.0, instance_weight=0.0)

  def softmax(features):
    classes = np.unique(case.labels)
    proxies = [case.bank[case.labels == c].mean(axis=0) for c in classes]
    logits = features @ np.stack(proxies).T / 0.05
    at = np.searchsorted(classes, case.batch.labels)
    log_p = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_p, at[:, None], axis=1).mean()

  expected = jax.value_and_grad(softmax)(jnp.asarray(case.features))
  np.testing.assert_allclose(loss, expected[0], 1e-5)
  np.testing.assert_allclose(slope, expected[1], 1e-4, 1e-5)


def test_an_estimator_that_expects_nothing_is_none():
  none = Case().run(debias="none")
  for tau_plus, tolerance in ((0.0, 0), (1e-12, 1e-4)):
    estimator = Case().run(debias="estimator", tau_plus=tau_plus)
    pairs = zip(*map(jax.tree.leaves, (none, estimator)), strict=True)
    for a, b in pairs:
      np.testing.assert_allclose(a, b, tolerance, tolerance)


def test_the_floor_stops_the_gradient_of_the_negatives():
  """Where the floor holds, a negative proxy may be anywhere."""
  case = Case(labels=np.arange(N))
  options = {"debias": "estimator", "tau_plus": 0.9, "beta": 0.1}
  loss, metrics, slope = case.run(**options)
  assert metrics["at_floor"] == 1 and np.isfinite(slope).all()
  rows = np.asarray(case.batch.indices)
  others = np.setdiff1d(np.arange(N), rows)
  case.bank[others] = unit(np.random.default_rng(5), len(others), D) * 0.5
  moved = case.run(**options)
  np.testing.assert_allclose(moved[0], loss, 1e-6)
  np.testing.assert_allclose(moved[2], slope, 1e-5, 1e-6)


def test_barely_above_zero_the_gradient_is_finite():
  """tau_plus exp(own) equals the mean of the negatives up to rounding."""
  labels = np.arange(N)
  case = Case(labels=labels)
  case.bank[:] = case.bank[0]  # all logits are alike
  for tau_plus in (1 - 1e-7, 0.9999):
    options = {"debias": "estimator", "tau_plus": tau_plus, "beta": 0.0}
    loss, _, slope = case.run(**options)
    assert np.isfinite(loss) and np.isfinite(slope).all()


def test_a_mask_of_the_false_negatives_removes_their_gradient():
  """Two classes are of one identity: the loss is as if one were not there."""
  labels = np.repeat(np.arange(9), 10)
  twins = np.array([0, 1, -1, -1, 1, -1, 0, -1, -1])  # 0 and 6, 1 and 4
  case = Case(labels=labels, loose=twins)
  loss, metrics, slope = case.run()
  batch_labels = np.asarray(case.batch.labels)
  assert metrics["negatives"] == 8 - np.isin(batch_labels, [0, 1, 4, 6]).mean()
  for anchor in range(B):
    y = batch_labels[anchor]
    away = Case(labels=labels, loose=twins)
    hidden = (twins == twins[y]) & (twins >= 0) & (np.arange(9) != y)
    away.bank[np.isin(labels, np.flatnonzero(hidden))] *= -7
    moved = away.run()[2][anchor]
    np.testing.assert_allclose(moved, slope[anchor], 1e-5, 1e-6)
  assert np.isfinite(loss)


@pytest.mark.parametrize("debias", DEBIAS)
@pytest.mark.parametrize("positives", ["hardest", "all"])
def test_anchors_without_negatives_are_finite(debias, positives):
  """All classes in one looser cluster, or only one class."""
  for labels in (np.arange(N) % 5, np.zeros(N, int)):
    case = Case(labels=labels, loose=np.zeros(5, int))
    loss, metrics, slope = case.run(debias=debias, positives=positives)
    assert np.isfinite(jax.tree.leaves((loss, metrics))).all()
    assert np.isfinite(slope).all()
    if debias == "mask" or labels.max() == 0:
      assert loss == 0 and not slope.any() and metrics["negatives"] == 0


def test_logits_far_apart_are_finite():
  for debias in DEBIAS:
    options = {"debias": debias, "beta": 2.0, "temperature": 1e-3}
    loss, _, slope = Case().run(weight_gradient=True, **options)
    assert np.isfinite(loss) and np.isfinite(slope).all()


def test_sampled_negatives():
  """So many of each anchor's, others with another key; all if there are few."""
  case = Case()
  choose = {}
  for num in (0, 4, 1000):
    hp = dhcl_hnm.Hyperparameters(num_negatives=num)
    state = case.state(dhcl_hnm.make(num_negatives=num))
    draw = jax.jit(functools.partial(dhcl_hnm.negatives_of, hp))
    keys = jax.random.split(KEY)
    choose[num] = [np.asarray(draw(state, case.batch, key)) for key in keys]
  every = choose[0][0]
  np.testing.assert_array_equal(choose[1000][0], every)
  for some in choose[4]:
    assert not np.any(some & ~every)
    assert (some.sum(axis=1) == 4).all()
  assert np.any(choose[4][0] != choose[4][1])


def noisy_groups(rng):
  """24 identities of 6 images; noise tears some of them apart."""
  centers = np.repeat(unit(rng, 24, 16), 6, axis=0)
  raw = centers + 0.9 * unit(rng, 144, 16)
  return (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype("f4")


def test_labels_and_looser_clusters():
  rng = np.random.default_rng(1)
  features, camids = noisy_groups(rng), np.arange(144, dtype=np.int32) % 3
  pids = np.arange(144, dtype=np.int32) // 6
  options = {"k1": 6, "k2": 2, "min_samples": 3, "eps": 0.35}
  method = methods.make("dhcl_hnm", mask_gap=0.25, **options)
  hp = dhcl_hnm.Hyperparameters(mask_gap=0.25, **options)
  labels, loose = cluster(hp, features, camids, (0.0, 0.25)).labels
  state = method.init(KEY, jax.eval_shape(lambda: features))
  split, encode = make_split(camids, pids), gives(features)
  got = method.label(state, encode, split, 0)
  np.testing.assert_array_equal(got.values, outliers_alone(labels))
  found = got.given["loose"]
  for c in set(got.values):
    values, counts = np.unique(loose[got.values == c], return_counts=True)
    assert counts[values == found[c]] == counts.max()
  assert np.all(found[got.values.max() + 1 :] == -1)
  assert 0 < got.figures["mask_precision"] <= 1
  assert 0 < got.figures["mask_missed"] < 1
  unknown = method.label(state, encode, make_split(camids), 0)
  assert unknown.figures == {"eps": 0.35}
  plain = methods.make("dhcl_hnm", debias="none", **options)
  plain = plain.label(state, encode, split, 0)
  assert np.all(plain.given["loose"] == -1)
  assert plain.figures["mask_missed"] == 1
  assert "mask_precision" not in plain.figures


@pytest.mark.parametrize("seed", range(4))
def test_report(seed):
  """Against a loop over all anchors and proxies."""
  rng = np.random.default_rng(seed)
  labels = np.r_[np.arange(14), rng.integers(0, 14, 66)].astype(np.int32)
  loose = rng.integers(-1, 4, 14).astype(np.int32)
  pids = (labels // 3 + (rng.random(80) < 0.3)).astype(np.int32) * 1000
  whose = false_negatives.merged_into(labels, pids)
  for c in range(14):
    values, counts = np.unique(pids[labels == c], return_counts=True)
    assert counts[values == whose[c]] == counts.max()
  total = false = masked = caught = 0
  for i, c in itertools.product(range(80), range(14)):
    if c != labels[i]:
      is_false = whose[c] == pids[i]
      is_masked = loose[c] == loose[labels[i]] >= 0
      total, false = total + 1, false + is_false
      masked, caught = masked + is_masked, caught + (is_false and is_masked)
  expected = {
    "false_negatives": false / total,
    "mask_precision": caught / masked,
    "mask_missed": 1 - caught / false,
  }
  assert false_negatives.report(labels, loose, pids) == pytest.approx(expected)


def test_update_moves_the_rows_of_the_images():
  case, method = Case(), methods.make("dhcl_hnm")
  state = case.state(method)
  after = run_step(method, state, case.features, case.batch).state
  rows = np.asarray(case.batch.indices)
  expected = case.bank.copy()
  mixed = jnp.asarray(0.2 * expected[rows] + 0.8 * case.features)
  expected[rows] = memory.normalize(mixed)
  np.testing.assert_allclose(after.bank[:N], expected, 1e-5, 1e-6)


def test_bad_values():
  for name, value in (("debias", "all"), ("positives", "easiest")):
    with pytest.raises(UserError, match=f'^{name} is "{value}": set it'):
      methods.make("dhcl_hnm", **{name: value})
  with pytest.raises(UserError, match=r"^tau_plus is 1.0: set it to a num"):
    methods.make("dhcl_hnm", tau_plus=1.0)
