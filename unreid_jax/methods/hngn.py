"""HNGN, self-guided hard negative generation: a reconstruction.

Li, Wang, Wang, et al., "Self-Guided Hard Negative Generation for Unsupervised
Person Re-Identification" (IJCAI 2022). Its abstract is public; its text, values
and results were not at hand, and there is no code. So this is a method after
the abstract, not the paper's:

  known     from the abstract: a network that continuously generates harder
            negatives, for a contrastive loss; trained alternately with the
            encoder, as its adversary, and guided by it; gone at inference.
  inferred  from the same authors' ISE (CVPR 2022): Cluster Contrast beneath,
            and vectors, not images, that are generated.
  ours      the network, its input, its terms and their weights; the nearest
            negative centroids as starting points; trust region, mask, warm-up,
            ramp; every default that is not ISE's.

For an anchor f of cluster y, centroids c and its m nearest negatives n_j:

  g_j  = generator(f, c_{n_j}, noise)
  generator: mean of a softplus((f c_y - f g_j) / t)            hard: near f,
           + b -log softmax_k(g_j c_k / t)[n_j]        identity: still of n_j,
           + c |g_j - c_{n_j}|^2                      proximity: near its proxy
  encoder:   the wrapped method's loss, with eta exp(f g_j / t) added to its
             denominator, where g_j is not taken for the anchor's own cluster

Features and centroids are constants to the generator ("self-guided": they are
its only judges), and generated negatives are constants to the encoder.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from unreid_jax import UserError, hard_negatives, memory, methods, sharding
from unreid_jax.config import check_values
from unreid_jax.methods import Batch, Method
from unreid_jax.models.generator import Generator, interpolate

_BASES = ("cluster_contrast", "hhcl", "supervised")
_COLLAPSED = 0.25


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
  """Ours, but for ISE's interpolation; a duration is a number of steps here.

  Attributes:
    base: the wrapped method's name and hyper-parameters.
    generator: "learned", or "interpolation", which has no network.
    num_generated: m, negatives for each anchor.
    hardness: "non_saturating", as above, or "min_max", the encoder's own loss
      of the pair with the sign turned, whose pull does not fade when the
      negative is nearer than the positive.
    hardness_weight: a.
    identity_weight: b; without it and without a radius the generator collapses
      onto the anchor.
    proximity_weight: c.
    radius: of the trust region around the proxy; 0: none.
    generated_weight: eta, after the ramp.
    share: whether an anchor gets the others' negatives of its batch too.
    warmup: steps without generated negatives.
    ramp: steps in which eta grows to its value thereafter.
    alternate: "iteration": the generator steps after each step of the encoder,
      on the same features; "epoch": it is trained before each epoch, on the
      features of all images, while the encoder stands still; then one step,
      the default, is next to nothing.
    generator_steps: of the generator, each time.
    phase_batch_size: anchors in a step of such an epoch.
    generator_width: of its hidden layers.
    noise: dimensions of its noise.
    learning_rate: of its Adam, whose first moment decays by .5.
    interpolation: share of the way to the anchor, at the ramp's end.
  """

  base: Mapping[str, Any] = dataclasses.field(
    default_factory=lambda: (
      {"name": "cluster_contrast"} | methods.defaults("cluster_contrast")
    )
  )
  generator: str = "learned"
  num_generated: int = 8
  hardness: str = "non_saturating"
  hardness_weight: float = 1.0
  identity_weight: float = 1.0
  proximity_weight: float = 0.0
  radius: float = 0.0
  generated_weight: float = 1.0
  share: bool = False
  warmup: int = 0
  ramp: int = 0
  alternate: str = "iteration"
  generator_steps: int = 1
  phase_batch_size: int = 256
  generator_width: int = 1024
  noise: int = 64
  learning_rate: float = 3.5e-4
  interpolation: float = 0.25

  def __post_init__(self):
    choices = {
      "generator": ("learned", "interpolation"),
      "hardness": ("non_saturating", "min_max"),
      "alternate": ("iteration", "epoch"),
    }
    check_values(self, choices, _RANGES)
    if self.base.get("name") not in _BASES:
      raise UserError(
        f'method.base.name is "{self.base.get("name")}", which has no '
        f"centroids: set it to {' or '.join(_BASES)}"
      )


_POSITIVE = ("generator_steps", "phase_batch_size", "generator_width")
_NOT_NEGATIVE = ("hardness_weight", "identity_weight", "proximity_weight")
_NOT_NEGATIVE += ("radius", "generated_weight", "warmup", "ramp", "noise")
_RANGES = (
  *((name, lambda x: x >= 1, "to 1 or more") for name in _POSITIVE),
  *((name, lambda x: x >= 0, "to 0 or more") for name in _NOT_NEGATIVE),
  ("num_generated", lambda x: 1 <= x <= memory.ROW_MULTIPLE, "from 1 to 128"),
  ("learning_rate", lambda x: x > 0, "above 0"),
  ("interpolation", lambda x: 0 <= x < 1, "to 0 or more, below 1"),
)


@struct.dataclass
@no_type_check  # its leaves may also be shardings
class GeneratorState:
  """The generator's own train state; empty for the interpolation."""

  params: Any
  opt_state: Any


@struct.dataclass
@no_type_check  # its leaves may also be shardings
class State:
  """The wrapped method's state, the generator's, and an epoch's figures."""

  base: Any
  generator: GeneratorState
  step: Int[Array, ""]  # of the encoder
  key: UInt32[Array, " two"]  # of the phases between epochs
  sums: dict[str, Float[Array, ""]]  # of the steps with generated negatives


def make(**hyperparameters) -> Method:
  """The reconstruction of HNGN with these `Hyperparameters`."""
  hp = Hyperparameters(**hyperparameters)
  name = hp.base["name"]
  known = methods.defaults(name)
  for key in hp.base.keys() - known.keys() - {"name"}:
    raise UserError(
      f"method.base.{key} is no hyper-parameter of {name}: leave it out, or "
      f"choose {name} by --config=configs/hngn.py:DATASET,{name}"
    )
  options = known | dict(hp.base)
  hp = dataclasses.replace(hp, base=options)
  try:
    base = methods.make(**options)
  except UserError as error:
    text = str(error).replace("method.", "method.base.", 1)
    raise UserError(text) from None
  bind = functools.partial
  return Method(
    init=bind(init, hp, base),
    encode=base.encode,
    label=lambda state, *args: base.label(state.base, *args),
    refresh=bind(refresh, hp, base),
    loss=bind(loss, hp, base),
    update=bind(update, hp, base),
    distance=base.distance,
    report=bind(report, hp),
  )


def init(hp: Hyperparameters, base: Method, key, features) -> State:
  """The wrapped method's state, and a new generator, for features [n, d]."""
  # The wrapped method gets the key that it would get alone.
  network_key, phase_key = jax.random.split(jax.random.fold_in(key, 1))
  params = opt_state = {}
  if hp.generator == "learned":
    _, d = methods.size_of(features)
    examples = jnp.zeros((1, d)), jnp.zeros((1, 1, d)), network_key
    params = _network(hp).init(network_key, *examples)["params"]
    opt_state = _optimizer(hp).init(params)
  return State(
    base=base.init(key, features),
    generator=GeneratorState(params, opt_state),
    step=jnp.zeros((), jnp.int32),
    key=jax.random.key_data(phase_key),
    sums=_no_sums(),
  )


def refresh(hp: Hyperparameters, base: Method, state, features, labels, camids):
  """The wrapped method's; and an epoch of the generator, if they alternate so.

  The generator's batches are cut from a shuffle of the images with a label,
  from the start again when it ends.
  """
  banks = base.refresh(state.base, features, labels, camids)
  state = state.replace(base=banks, sums=_no_sums())
  if hp.alternate == "iteration" or hp.generator == "interpolation":
    return state
  key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
  draws = jax.random.uniform(key, labels.shape)
  order = jnp.argsort(jnp.where(labels < 0, jnp.inf, draws))
  num = jnp.maximum(jnp.sum(labels >= 0), 1)

  def batch(i):
    start = i * hp.phase_batch_size
    rows = order[(start + jnp.arange(hp.phase_batch_size)) % num]
    return features[rows], labels[rows], jax.random.fold_in(key, i)

  return _train(hp, state, batch)


def loss(hp: Hyperparameters, base: Method, state, features, batch: Batch, key):
  """The wrapped method's loss, with generated negatives; and their figures."""
  near, generated, taken_for = propose(hp, state, features, batch.labels, key)
  unit = memory.normalize(features)
  clusters, exist, taken = near.clusters, near.exist, taken_for
  if hp.share:
    flat = generated.reshape(-1, generated.shape[-1])
    logits = jnp.matmul(unit, flat.T, precision=lax.Precision.HIGHEST)
    clusters, exist, taken = (
      x.reshape(1, -1) for x in (clusters, exist, taken)
    )
  else:
    logits = hard_negatives.dot(unit[:, None], generated)
  own = batch.labels[:, None]
  usable = exist & (clusters != own) & (taken != own)
  log_weight = jnp.log(hp.generated_weight * _progress(hp, state.step))
  logits = logits / hp.base["temperature"] + log_weight
  logits = jnp.where(usable, logits, -jnp.inf)
  rest = state.base, features, batch, key
  value, metrics = base.loss(*rest, negatives=logits)
  plain, _ = base.loss(*rest)
  figures = hard_negatives.figures(near, generated, taken_for)
  figures["loss_share"] = (value - plain) / jnp.maximum(value, 1e-12)
  return value, metrics | lax.stop_gradient(figures)


def update(hp: Hyperparameters, base: Method, state, features, batch, key):
  """The wrapped method's write, and the generator's steps.

  The generator learns from the features and the memory that the encoder's
  step has just used; the encoder's next step meets what it has learned.
  """
  _, figures = loss(hp, base, state, features, batch, key)
  figures |= {"steps": jnp.ones(())}
  counts = jnp.where(state.step < hp.warmup, 0, 1)
  sums = {name: x + counts * figures[name] for name, x in state.sums.items()}
  new = state
  if hp.alternate == "iteration" and hp.generator == "learned":
    keys = lambda i: jax.random.fold_in(key, i)
    new = _train(hp, state, lambda i: (features, batch.labels, keys(i)))
  return new.replace(
    base=base.update(state.base, features, batch, key),
    step=state.step + 1,
    sums=sums,
  )


def report(
  hp: Hyperparameters, state: State
) -> tuple[dict[str, float], tuple[str, ...]]:
  """An epoch's means of the figures, and a warning of a collapse."""
  sums = {name: float(x) for name, x in jax.device_get(state.sums).items()}
  steps = sums.pop("steps")
  if not steps:
    return {}, ()
  mean = {name: x / steps for name, x in sums.items()}
  notes = (
    f"generated: similarity to the anchor {mean['to_anchor']:.2f} (of its own "
    f"cluster {mean['own_to_anchor']:.2f}, of the proxies "
    f"{mean['proxy_to_anchor']:.2f}), to the proxies {mean['to_proxy']:.2f}",
    f"{100 * mean['as_intended']:.0f} % are taken for their proxy's cluster, "
    f"{100 * mean['as_own']:.0f} % for the anchor's; "
    f"{100 * mean['loss_share']:.0f} % of the loss is theirs",
  )
  remedy = "lower method.interpolation"
  if hp.generator == "learned":
    remedy = "raise method.identity_weight, or set method.radius to .5"
  if mean["as_own"] > _COLLAPSED:
    notes += (
      "warning: the negatives collapse onto the anchors; what is taken for "
      "their own cluster is left out of the loss, which leaves little to learn "
      f"from: {remedy}",
    )
  return mean, notes


def propose(hp: Hyperparameters, state: State, features, labels, key):
  """Negatives for features [b, d] of clusters [b]; constants, all of it.

  Returns:
    What is around the anchors, the generated negatives [b, m, d], and the
    clusters that the memory takes them for [b, m].
  """
  near = _around(hp, state, lax.stop_gradient(features), labels)
  generated = generate(hp, state, near.anchors, near.proxies, key)
  generated = lax.stop_gradient(generated)
  logits = _logits(hp, state, generated)
  _, nearest = memory.nearest(-logits, 1)
  return near, generated, nearest.reshape(near.clusters.shape)


def generate(hp: Hyperparameters, state: State, anchors, proxies, key):
  """Generated negatives [b, m, d]; see `models.generator`."""
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and len(anchors) % mesh.size == 0:
    # Each device moves the proxies of its own anchors.
    split = sharding.constrain_rows
    anchors, proxies = split(anchors), split(proxies)
  if hp.generator == "learned":
    variables = {"params": state.generator.params}
    return _network(hp).apply(variables, anchors, proxies, key)
  growth = jnp.log1p((math.e - 1) * _progress(hp, state.step))  # as in ISE
  return interpolate(anchors, proxies, hp.interpolation * growth)


def generator_loss(
  hp: Hyperparameters, params, state: State, features, labels, key
) -> Float[Array, ""]:
  """What the generator with these `params` minimises; see above."""
  state = state.replace(generator=state.generator.replace(params=params))
  near = _around(hp, state, features, labels)
  generated = generate(hp, state, near.anchors, near.proxies, key)
  logits = _logits(hp, state, generated)
  temperature = hp.base["temperature"]
  parts = hard_negatives.terms(
    near, generated, logits, temperature, hp.hardness
  )
  return sum(getattr(hp, f"{name}_weight") * x for name, x in parts.items())


def _train(hp, state, batch):
  """Steps of the generator on `batch(i)`; none in the warm-up."""

  def step(i, generator):
    slope = jax.grad(generator_loss, argnums=1)(
      hp, generator.params, state, *batch(i)
    )
    updates, opt_state = _optimizer(hp).update(
      slope, generator.opt_state, generator.params
    )
    params = optax.apply_updates(generator.params, updates)
    return GeneratorState(params, opt_state)

  steps = jnp.where(state.step < hp.warmup, 0, hp.generator_steps)
  return state.replace(generator=lax.fori_loop(0, steps, step, state.generator))


def _around(hp, state, features, labels):
  bank, num_clusters = state.base.centroids, state.base.num_clusters
  return hard_negatives.around(
    bank, num_clusters, features, labels, hp.num_generated
  )


def _logits(hp, state, generated):
  return hard_negatives.logits_of_clusters(
    state.base.centroids,
    state.base.num_clusters,
    generated,
    hp.base["temperature"],
  )


def _progress(hp, step):
  """0 in the warm-up, then rising to 1."""
  return jnp.clip((step + 1 - hp.warmup) / (hp.ramp + 1), 0, 1)


def _network(hp):
  return Generator(hp.generator_width, hp.noise, hp.radius)


def _optimizer(hp):
  return optax.adam(hp.learning_rate, b1=0.5)


def _no_sums():
  return {name: jnp.zeros(()) for name in _SUMS}


_SUMS = ("to_anchor", "to_proxy", "proxy_to_anchor", "own_to_anchor")
_SUMS += ("as_intended", "as_own", "loss_share", "steps")
