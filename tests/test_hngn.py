"""The reconstruction of HNGN against slow twins, and what it must not do.

There are no numbers of the authors': the twins compute, in float64 and with
loops over anchors and negatives, what the method's file says it does.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import KEY, make_batch, make_split, step_of

from unreid_jax import UserError, methods, sharding
from unreid_jax.config import resolve
from unreid_jax.methods import hngn
from unreid_jax.methods.hngn import negatives, training
from unreid_jax.methods.hngn.generator import Generator, interpolate
from unreid_jax.state import first_state, make_parts

T = 0.05
K, D, B, M = 30, 16, 16, 4
SMALL = {"generator_width": 32, "noise": 4, "num_generated": M}


def unit(rng, *shape):
  raw = rng.standard_normal(shape).astype(np.float32)
  return raw / np.linalg.norm(raw, axis=-1, keepdims=True)


def softplus(x):
  return np.logaddexp(x, 0)


def make(base=None, **hyperparameters):
  """The hyper-parameters and their method, the same for the same ones."""
  base = {"name": "cluster_contrast"} | (base or {})
  return cached(tuple(base.items()), tuple(sorted(hyperparameters.items())))


@functools.lru_cache
def cached(base, hyperparameters):
  options = {"base": dict(base)} | dict(hyperparameters)
  return hngn.Hyperparameters(**options), methods.make("hngn", **options)


class Case:
  """A memory of families of three look-alikes, and anchors from it."""

  def __init__(self, num=K, seed=0, **hyperparameters):
    rng = np.random.default_rng(seed)
    families = unit(rng, -(-num // 3), D).repeat(3, axis=0)[:num]
    self.centroids = families + unit(rng, num, D)
    self.centroids /= np.linalg.norm(self.centroids, axis=1, keepdims=True)
    self.labels = (np.arange(B) % num).astype(np.int32)
    self.features = self.centroids[self.labels] + unit(rng, B, D)
    self.features /= np.linalg.norm(self.features, axis=1, keepdims=True)
    self.hp, self.method = make(**SMALL | hyperparameters)
    size = max(2 * num, 130)
    all_labels = np.r_[np.arange(num), np.full(size - num, -1)]
    images = np.r_[self.centroids, unit(rng, size - num, D)]
    self.inputs = all_labels.astype(np.int32), images.astype(float_dtype())
    shapes = jax.ShapeDtypeStruct((size, D), float_dtype())
    self.key = jax.random.key(seed)
    self.state = self.refresh(self.method.init(self.key, shapes))

  def refresh(self, state, features=None, key=KEY):
    labels, images = self.inputs
    images = images if features is None else features
    given = {"base": images, "features": images}
    return compiled(self.method.refresh)(state, labels, given, key)

  def proxies(self):
    """Clusters of the nearest negatives of each anchor, most similar first."""
    similar = self.features @ self.centroids.T
    similar[np.arange(B), self.labels] = -np.inf
    return np.argsort(-similar, axis=1)[:, : min(M, len(self.centroids) - 1)]

  def memory(self, state=None):
    base = (self.state if state is None else state).base
    temperature = self.hp.base.get("temperature", T)
    return methods.Proxies(base.centroids, base.num_clusters, temperature)

  def propose(self, progress=1.0):
    """What `hngn.propose` returns so far along the ramp."""

    @jax.jit
    def run(generator, bank, num, features, progress):
      memory = methods.Proxies(bank, num, T)
      labels = jnp.asarray(self.labels)
      return hngn.propose(
        self.hp, generator, memory, features, labels, self.key, progress
      )

    memory, features = self.memory(), jnp.asarray(self.features)
    return run(self.state.generator, *memory[:2], features, progress)

  def step(self, state=None, step=0):
    """The `Outcome` of a step."""
    state = self.state if state is None else state
    run = compiled_step(self.method)
    batch = make_batch(self.labels, self.labels, step=step)
    return run(state, self.features.astype(float_dtype()), batch, self.key)


def float_dtype():
  return jax.dtypes.canonicalize_dtype(float)


@functools.lru_cache
def compiled(function):
  return jax.jit(function)


@functools.lru_cache
def compiled_step(method):
  return jax.jit(step_of(method))


@pytest.mark.parametrize("num", [K, 3])  # of three, two others and no more
@pytest.mark.parametrize("hardness", ["non_saturating", "min_max"])
def test_terms_of_the_generator(num, hardness):
  """Each term, and their weighed sum with the gradient's direction."""
  weights = {"hardness": 1.5, "identity": 0.7, "proximity": 0.3}
  options = {f"{name}_weight": x for name, x in weights.items()}
  case = Case(num, hardness=hardness, **options)
  clusters = case.proxies()
  generated = unit(np.random.default_rng(1), B, M, D)
  near, _, _ = case.propose()
  found = clusters.shape[1]
  np.testing.assert_array_equal(near.clusters[:, :found], clusters)
  np.testing.assert_array_equal(near.exist, [[j < found for j in range(M)]] * B)
  np.testing.assert_allclose(
    near.proxies[:, :found], case.centroids[clusters], 1e-6, 1e-7
  )

  f, c = case.features.astype(float), case.centroids.astype(float)
  twin = {name: [] for name in weights}
  names = ("to_anchor", "to_proxy", "proxy_to_anchor", "own_to_anchor")
  figures = {name: [] for name in (*names, "as_intended", "as_own")}
  for i, y in enumerate(case.labels):
    for j, n in enumerate(clusters[i]):
      g = generated[i, j].astype(float)
      pair = (f[i] @ g - f[i] @ c[y]) / T
      hard = (
        softplus(-pair) if hardness == "non_saturating" else -softplus(pair)
      )
      logits = c @ g / T
      twin["hardness"].append(hard)
      twin["identity"].append(np.logaddexp.reduce(logits) - logits[n])
      twin["proximity"].append(np.sum((g - c[n]) ** 2))
      for name, similarity in zip(
        names, (f[i] @ g, g @ c[n], f[i] @ c[n], f[i] @ c[y]), strict=True
      ):
        figures[name].append(similarity)
      figures["as_intended"].append(np.argmax(logits) == n)
      figures["as_own"].append(np.argmax(logits) == y)

  generated = jnp.asarray(generated)
  of_clusters = jax.jit(negatives.logits_of_clusters)
  logits = of_clusters(case.memory(), generated)
  terms = jax.jit(negatives.terms, static_argnums=(3, 4))
  terms = terms(near, generated, logits, T, hardness)
  for name in weights:
    np.testing.assert_allclose(terms[name], np.mean(twin[name]), 1e-5)
  taken = logits.argmax(axis=1).reshape(B, M)
  measured = jax.jit(negatives.figures)(near, generated, taken)
  for name, values in figures.items():
    np.testing.assert_allclose(measured[name], np.mean(values), 1e-5, 1e-6)


def test_the_generators_loss_is_the_weighed_sum(monkeypatch):
  weights = {"hardness": 1.5, "identity": 0.7, "proximity": 0.3}
  options = {f"{name}_weight": x for name, x in weights.items()}
  case = Case(**options)
  parts = {name: jnp.asarray(i + 1.0) for i, name in enumerate(weights)}
  monkeypatch.setattr(negatives, "terms", lambda *args: parts)
  value = jax.jit(functools.partial(training.generator_loss, case.hp))(
    case.state.generator.params,
    case.memory(),
    jnp.asarray(case.features),
    jnp.asarray(case.labels),
    case.key,
  )
  np.testing.assert_allclose(value, 1.5 * 1 + 0.7 * 2 + 0.3 * 3)


def slow_loss(case, features, generated, taken_for, weight, share):
  """Cluster Contrast with more negatives, in float64."""
  c, clusters = case.centroids.astype(float), case.proxies()
  total, t = 0, case.memory().temperature
  for i, y in enumerate(case.labels):
    denominator = np.exp(c @ features[i] / t).sum()
    for a in range(B) if share else [i]:
      for j in range(clusters.shape[1]):
        if clusters[a, j] != y and taken_for[a, j] != y:
          similar = features[i] @ generated[a, j].astype(float)
          denominator += weight * np.exp(similar / t)
    total += np.log(denominator) - c[y] @ features[i] / t
  return total / B


@pytest.mark.parametrize(
  "share, num, temperature", [(False, K, 0.05), (True, K, 0.1), (False, 3, 0.1)]
)
def test_loss_and_gradient_of_the_encoder(share, num, temperature):
  """In the middle of the ramp, with negatives that are left out."""
  changes = {"generated_weight": 0.9, "warmup": 2, "ramp": 3}
  changes |= {"base": {"temperature": temperature}}
  case = Case(num, share=share, **changes)
  near, generated, taken_for = case.propose()
  # Some that the memory takes for the anchor's own cluster.
  generated = np.array(generated)
  generated[::3, 1] = case.centroids[case.labels[::3]]
  taken_for = np.argmax(generated @ case.centroids.T, axis=-1)
  assert np.any(taken_for == case.labels[:, None])

  def propose(*args):
    return near, jnp.asarray(generated), jnp.asarray(taken_for)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(hngn, "propose", propose)
    args = case.state, jnp.asarray(case.features)
    batch = make_batch(case.labels, case.labels, step=3)
    loss, metrics, slope, _ = jax.jit(step_of(case.method))(*args, batch)
  weight = 0.9 * (3 + 1 - 2) / (3 + 1)
  twin = functools.partial(
    slow_loss,
    case,
    generated=generated,
    taken_for=taken_for,
    weight=weight,
    share=share,
  )
  features = case.features.astype(float)
  np.testing.assert_allclose(loss, twin(features), 1e-5)
  plain = slow_loss(case, features, generated, taken_for, 0, share)
  share_of_loss = 1 - plain / twin(features)
  np.testing.assert_allclose(metrics["loss_share"], share_of_loss, 1e-3)
  direction = unit(np.random.default_rng(5), B, D).astype(float)
  # Features are normalised: only what is orthogonal to them counts.
  along = np.sum(direction * features, axis=1, keepdims=True)
  direction -= along * features
  ahead, behind = (twin(features + s * direction) for s in (1e-5, -1e-5))
  np.testing.assert_allclose(
    np.sum(np.asarray(slope) * direction), (ahead - behind) / 2e-5, 1e-3, 1e-5
  )


BASES = [
  {"name": "cluster_contrast", "bank_update": "hardest"},
  {"name": "hhcl", "loss_weights": "convex"},
  {"name": "hhcl", "memory": "instances", "num_instances": 3},
  {"name": "supervised"},
]


def run_alone(case, base):
  """A step of the wrapped method without HNGN."""
  options = dict(base)
  plain = methods.make(options.pop("name"), **options)
  batch = make_batch(case.labels, case.labels)
  return compiled_step(plain)(case.state.base, case.features, batch, case.key)


@pytest.mark.parametrize(
  "base, changes",
  [
    (BASES[0], {"warmup": 1}),
    *((base, {"generator": "interpolation"}) for base in BASES),
  ],
)
def test_without_weight_it_is_the_wrapped_method(base, changes):
  """Its loss, its gradient, and its bank bit by bit."""
  if "warmup" not in changes:
    changes = changes | {"generated_weight": 0.0}
  case = Case(base=base, **changes)
  found, alone = case.step(), run_alone(case, base)
  np.testing.assert_allclose(found.loss, alone.loss, 1e-6)
  np.testing.assert_allclose(found.slope, alone.slope, 1e-5, 1e-6)
  jax.tree.map(np.testing.assert_array_equal, found.state.base, alone.state)


@pytest.mark.parametrize("base", BASES[:3])
def test_every_memory_meets_the_negatives(base):
  case = Case(base=base, generator="interpolation")
  found, alone = case.step(), run_alone(case, base)
  assert found.loss > alone.loss + 0.05
  share = 1 - alone.loss / found.loss
  np.testing.assert_allclose(found.figures["loss_share"], share, 1e-4)
  assert found.figures.keys() >= alone.figures.keys()  # HHCL's two terms


def test_each_step_moves_its_own_network():
  """The encoder's loss has no slope in the generator, nor the other way."""
  case = Case()
  params = case.state.generator.params
  batch = make_batch(case.labels, case.labels)

  def encoder_loss(params):
    state = case.state.replace(generator=training.GeneratorState(params, {}))
    frozen = hngn.make(**SMALL, alternate="epoch")
    features = jnp.asarray(case.features)
    return frozen.step(state, features, batch, case.key)[0]

  slopes = jax.tree.leaves(jax.jit(jax.grad(encoder_loss))(params))
  assert not any(np.any(x) for x in slopes)
  after = case.step().state
  moved = jax.tree.map(
    lambda a, b: np.any(a != b), params, after.generator.params
  )
  assert all(jax.tree.leaves(moved))
  # The bank is moved by the real features alone, whatever was generated.
  silent = Case(generator="interpolation")
  assert not jax.tree.leaves(silent.state.generator)
  for a, b in zip(
    *(jax.tree.leaves(x.step().state.base) for x in (case, silent)), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_warm_up_and_ramp():
  case = Case(warmup=2, ramp=2, generated_weight=0.6)
  state, weights = case.state, []
  for step in range(6):
    before, found = state, case.step(state, step)
    state = found.state
    weights.append(0.6 * found.figures["ramp"])
    assert (found.figures["loss_share"] > 0) == (step >= 2)
    pairs = zip(
      *(jax.tree.leaves(x.generator) for x in (before, state)), strict=True
    )
    assert any(np.any(a != b) for a, b in pairs) == (step >= 2)
  np.testing.assert_allclose(weights, [0, 0, 0.2, 0.4, 0.6, 0.6], 1e-6)
  assert int(state.generator.opt_state[0].count) == 4  # Adam's steps
  assert case.method.notes({"ramp": 0.0}) == ()


def train_generator(num_steps, **changes):
  """The figures of the last step, and what is said of them."""
  case = Case(learning_rate=1e-2, ramp=10**6, **changes)
  state, memory = case.state, case.state.base
  for i in range(num_steps):
    case.key = jax.random.key(i)
    found = case.step(state, i)
    state = found.state.replace(base=memory)
  figures = {name: float(x) for name, x in found.figures.items()}
  return figures, case.method.notes(figures)


def test_a_careless_interpolation_is_reported():
  case = Case(generator="interpolation", interpolation=0.9)
  figures = case.step().figures
  notes = case.method.notes({name: float(x) for name, x in figures.items()})
  assert any("lower method.interpolation" in note for note in notes)


def test_collapse_is_reported_and_the_defaults_do_not():
  """Without identity term and trust region a negative becomes the anchor."""
  figures, notes = train_generator(100, identity_weight=0.0)
  assert figures["as_own"] > 0.6 and figures["to_anchor"] > 0.9
  assert any("collapse onto" in note for note in notes)
  for safe in ({}, {"identity_weight": 0.0, "radius": 0.3}):
    figures, notes = train_generator(100, **safe)
    assert figures["as_own"] < 0.02 and figures["as_intended"] > 0.9
    assert not any("collapse onto" in note for note in notes)
    assert figures["to_anchor"] > figures["proxy_to_anchor"] + 0.05


def test_generator_starts_at_the_proxy_and_stays_in_its_region():
  rng = np.random.default_rng(0)
  anchors, proxies = map(jnp.asarray, (unit(rng, B, D), unit(rng, B, M, D)))
  key = jax.random.key(0)
  for radius in (0.0, 0.4):
    network = Generator(width=32, noise=4, radius=radius)
    variables = network.init(key, anchors, proxies, key)
    new = network.apply(variables, anchors, proxies, key)
    assert np.abs(new - proxies).max() < 0.05
    wild = jax.tree.map(lambda x: 100 * x, variables)
    out = network.apply(wild, anchors, proxies, key)
    cosine = np.sum(out * proxies, axis=-1)
    # A move of at most r turns a unit vector by at most arcsin(r).
    limit = np.sqrt(1 - radius**2)
    assert (cosine.min() >= limit - 1e-6) == bool(radius)
    again = network.apply(wild, anchors, proxies, jax.random.key(1))
    assert np.abs(again - out).max() > 1e-3  # the noise has a say
    np.testing.assert_allclose(np.linalg.norm(out, axis=-1), 1, 1e-5)


def test_interpolation():
  """A share of the way that grows as ISE's: .25 at its end."""
  case = Case(generator="interpolation")
  for progress in (0, 4 / 9, 1):
    _, generated, _ = case.propose(progress)
    amount = 0.25 * np.log((np.e - 1) * progress + 1)
    proxies = case.centroids[case.proxies()]
    mixed = (1 - amount) * proxies + amount * case.features[:, None]
    mixed /= np.linalg.norm(mixed, axis=-1, keepdims=True)
    np.testing.assert_allclose(generated, mixed, 1e-5, 1e-6)
  anchors = jnp.asarray(case.features)
  same = interpolate(anchors, jnp.asarray(proxies, anchors.dtype), 0.0)
  np.testing.assert_allclose(same, proxies, 1e-5, 1e-6)


def slow_phase(case, state, num_steps, key):
  """The generator's steps before an epoch, one by one."""
  labels, features = case.inputs
  draws = jax.random.uniform(key, labels.shape)
  shuffled = np.array([i for i in np.argsort(draws) if labels[i] >= 0])
  optimizer = optax.adam(case.hp.learning_rate, b1=0.5)
  memory, generator = case.memory(state), state.generator

  @jax.jit
  def slope_of(params, features, labels, key):
    loss = functools.partial(training.generator_loss, case.hp)
    return jax.grad(loss)(params, memory, features, labels, key)

  for i in range(num_steps):
    rows = [shuffled[(8 * i + j) % len(shuffled)] for j in range(8)]
    drawn = jnp.asarray(features[rows]), jnp.asarray(labels[rows])
    slope = slope_of(generator.params, *drawn, jax.random.fold_in(key, i))
    with jax.numpy_dtype_promotion("standard"):
      slope, moments = optimizer.update(slope, generator.opt_state)
    params = optax.apply_updates(generator.params, slope)
    generator = training.GeneratorState(params, moments)
  return generator


def test_alternating_by_epoch(float64):
  """Before each epoch after the warm-up, on all images, and in no step."""
  options = {"alternate": "epoch", "generator_steps": 5, "warmup": 3}
  case = Case(phase_batch_size=8, learning_rate=1e-2, **options)

  def network(state):
    leaves = jax.tree.leaves(getattr(state, "generator", state))
    return np.concatenate([np.ravel(x) for x in leaves])

  early = case.step(step=1).state
  np.testing.assert_array_equal(network(case.refresh(early)), network(early))
  late = case.step(step=2).state  # the next step is after the warm-up
  trained = case.refresh(late)
  assert np.abs(network(trained) - network(late)).max() > 0.01
  start = trained.replace(generator=late.generator)
  twin = network(slow_phase(case, start, 5, KEY))
  np.testing.assert_allclose(network(trained), twin, 1e-6, 1e-7)
  np.testing.assert_array_equal(network(trained), network(case.refresh(late)))
  after = case.step(trained, step=3).state
  np.testing.assert_array_equal(network(trained), network(after))
  # Images without a label are not among the anchors.
  labels, features = case.inputs
  other = np.where(labels[:, None] < 0, -features, features)
  changed = case.refresh(late, other)
  np.testing.assert_array_equal(network(trained), network(changed))


@pytest.mark.parametrize("alternate", ["iteration", "epoch"])
def test_features_for_the_generator(alternate):
  """They are handed over if it trains between the epochs, encoded once."""
  rng, calls = np.random.default_rng(0), []
  method = methods.make("hngn", alternate=alternate, generator_width=8)
  features = unit(rng, 60, D)

  def encode(train=False):
    calls.append(train)
    return features

  split = make_split(np.zeros(60, np.int32))
  state = method.init(KEY, jax.eval_shape(lambda: features))
  found = method.label(state, encode, split, 0)
  assert calls == [False] and ("features" in found.given) == (
    alternate == "epoch"
  )


def test_one_device_equals_eight(float64):
  """A step, and a phase of the generator with the moments of its Adam."""
  trees = []
  for num_devices in (1, 8):
    with jax.set_mesh(sharding.make_mesh(num_devices)):
      case = Case(alternate="epoch", generator_steps=2)
      outcome = case.step()
      trees.append((case.refresh(outcome.state), outcome))
  for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
    np.testing.assert_allclose(a, b, 1e-5, 1e-9)


def test_the_bank_is_never_gathered(collective_sizes):
  """Reads the compiled step: proxies, negatives and the network travel."""
  b, m, d, n = 16, 4, 32, 2048
  method = methods.make("hngn", generator_width=64, num_generated=m)
  rng = np.random.default_rng(0)
  with jax.set_mesh(sharding.make_mesh(8)):
    features = unit(rng, n, d)
    state = method.init(KEY, jax.eval_shape(lambda: features))
    labels = np.arange(n, dtype=np.int32) // 2
    refresh = jax.jit(method.refresh)
    state = refresh(state, labels, {"base": features}, KEY)
    batch = make_batch(np.arange(b), np.arange(b))
    step = jax.jit(step_of(method)).lower(state, features[:b], batch, KEY)
    sizes = collective_sizes(step.compile().as_text())
  params = max(x.size for x in jax.tree.leaves(state.generator.params))
  assert sizes and max(sizes) <= max(b * m * d, params) < n // 2 * d / 2


def test_nothing_is_left_at_inference():
  """As many parameters as the baseline, and the very same program."""
  texts, counts = [], []
  for name in ("cluster_contrast", "hngn"):
    config = importlib.import_module(f"configs.{name}").get_config()
    config.encoder.width = 0.125
    with jax.set_mesh(sharding.make_mesh(1)):
      parts = make_parts(resolve(config, 4))
      state = first_state(parts, 130, weights="")
      images = jnp.zeros((8, 64, 32, 3), jnp.uint8)
      texts.append(parts.apply.lower(state.variables, images).as_text())
      counts.append(jax.tree.map(jnp.shape, state.variables))
  assert texts[0] == texts[1]
  assert counts[0] == counts[1]


def test_half_an_epoch_is_a_step_at_least():
  config = importlib.import_module("configs.hngn").get_config()
  config.method.generator_steps = "0.5 epochs"
  for steps_per_epoch, expected in ((1, 1), (10, 5)):
    resolved = resolve(config, steps_per_epoch)
    assert resolved.method.generator_steps == expected


def test_notes_of_the_wrapped_method_are_kept(monkeypatch):
  base = methods.make("cluster_contrast")
  base = base._replace(notes=lambda means: (f"loss {means['loss']}",))
  monkeypatch.setattr(methods, "make", lambda **_: base)
  assert hngn.make().notes({"loss": 1.5, "ramp": 0.0}) == ("loss 1.5",)


def test_bad_values():
  for changes, text in (
    ({"generator": "gan"}, '^generator is "gan": set it to "learned" or "int'),
    ({"num_generated": 0}, "^num_generated is 0: set it to a whole number in"),
    ({"radius": -1.0}, "^radius is -1.0: set it to a number of 0 or more"),
    ({"warmup": -1}, "^warmup is -1: set it to a number of steps"),
    (
      {"base": {"name": "hhcl", "bank_update": "momentum"}},
      "^base.bank_update is unknown here; there are: name, clustering",
    ),
    ({"base": {"name": "spcl"}}, 'base.name is "spcl", whose loss takes no'),
    (
      {"base": {"name": "hhcl", "memory": "x"}},
      '^base.memory is "x": set it to "two_rows" or "instances"',
    ),
  ):
    with pytest.raises(UserError, match=text):
      methods.make("hngn", **changes)
