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
from collections.abc import Mapping
from typing import Annotated, Any, Literal, no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float

from unreid_jax import memory, methods, values
from unreid_jax.methods import Batch, Labels, Method, Proxies, StepResult
from unreid_jax.methods.hngn import negatives, training

_COLLAPSED = 0.25


@dataclasses.dataclass(frozen=True)
class Hyperparameters(values.Checked):
  """Ours, but for ISE's interpolation.

  Attributes:
    base: the wrapped method's name and hyper-parameters. It is any method that
      has `proxies`.
    generator: "learned", or "interpolation", which has no network.
    num_generated: m, the number of negatives of each anchor.
    hardness: "non_saturating", as above, or "min_max", the encoder's own loss
      of the pair with the sign turned, whose pull does not fade when the
      negative is nearer than the positive.
    hardness_weight: a, the weight of the hardness.
    identity_weight: b, the weight of the identity; without it and without a
      radius the generator collapses onto the anchor.
    proximity_weight: c, the weight of the proximity.
    radius: the trust region: how far a negative may move from its proxy; 0 sets
      no limit.
    generated_weight: eta, after the ramp.
    share: whether an anchor gets the others' negatives of its batch too.
    warmup: first steps, without generated negatives.
    ramp: steps in which eta grows to its value thereafter.
    alternate: "iteration": the generator steps after each step of the encoder,
      on the same features; "epoch": it is trained before each epoch, on the
      features of all images, while the encoder stands still. Then
      generator_steps should be about an epoch; one step trains next to nothing.
    generator_steps: how many steps the generator takes each time.
    phase_batch_size: the number of anchors in a step of such an epoch.
    generator_width: the width of its hidden layers.
    noise: how many dimensions its noise has.
    learning_rate: the rate of its Adam, whose first moment decays by .5.
    interpolation: the share of the way to the anchor, at the ramp's end.
  """

  base: Annotated[Mapping[str, Any], values.Nested(methods.fields)] = (
    dataclasses.field(
      default_factory=lambda: (
        {"name": "cluster_contrast"} | methods.defaults("cluster_contrast")
      )
    )
  )
  generator: Literal["learned", "interpolation"] = "learned"
  num_generated: Annotated[int, values.Range(1, memory.ROW_MULTIPLE)] = 8
  hardness: Literal["non_saturating", "min_max"] = "non_saturating"
  hardness_weight: values.NotNegative = 1.0
  identity_weight: values.NotNegative = 1.0
  proximity_weight: values.NotNegative = 0.0
  radius: values.NotNegative = 0.0
  generated_weight: values.NotNegative = 1.0
  share: bool = False
  warmup: values.Duration = 0
  ramp: values.Duration = 0
  alternate: Literal["iteration", "epoch"] = "iteration"
  generator_steps: Annotated[values.Duration, values.Range(1)] = 1
  phase_batch_size: values.Count = 256
  generator_width: values.Count = 1024
  noise: values.CountOrZero = 64
  learning_rate: values.Positive = 3.5e-4
  interpolation: values.BelowOne = 0.25

  @property
  def trains_by_epoch(self) -> bool:
    """Whether a network is trained between the epochs."""
    return self.generator == "learned" and self.alternate == "epoch"


@struct.dataclass
@no_type_check  # its leaves may also be shardings
class State:
  """The wrapped method's state and the generator's.

  `progress` is how far the ramp is in the next step; 0 in the warm-up.
  """

  base: Any
  generator: training.GeneratorState
  progress: Float[Array, ""]


def make(**hyperparameters) -> Method:
  """The reconstruction of HNGN with these `Hyperparameters`.

  Raises:
    UserError: the wrapped method takes no negatives.
  """
  hp = Hyperparameters(**hyperparameters)
  with values.section("base"):
    base = methods.make(**hp.base)
  if base.proxies is None:
    raise values.BadValue(
      "base.name",
      f'is "{hp.base["name"]}", whose loss takes no other negatives: set it to '
      "a method that has proxies, such as cluster_contrast",
    )
  bind = functools.partial
  return Method(
    init=bind(init, hp, base),
    label=bind(label, hp, base),
    refresh=bind(refresh, hp, base),
    step=bind(step, hp, base),
    distance=base.distance,
    notes=lambda means: base.notes(means) + notes(hp, means),
  )


def init(hp: Hyperparameters, base: Method, key, shapes) -> State:
  """The wrapped method's state, and a new generator."""
  # The wrapped method gets the key that it would get alone.
  generator_key = jax.random.fold_in(key, 1)
  return State(
    base=base.init(key, shapes),
    generator=training.init(hp, generator_key, shapes),
    progress=_progress(hp, jnp.zeros((), jnp.int32)),
  )


def label(
  hp, base: Method, state: State, encode, split, epoch: int
) -> Labels | None:
  """The wrapped method's labels; the features too, if the generator needs them.

  `given` holds what the wrapped method gives under "base".
  """
  features = None

  def encode_and_keep(train=False):
    nonlocal features
    features = encode(train)
    return features

  labels = base.label(state.base, encode_and_keep, split, epoch)
  if labels is None:
    return None
  given = {"base": labels.given}
  if hp.trains_by_epoch:
    given["features"] = encode() if features is None else features
  return labels._replace(given=given)


def refresh(hp, base: Method, state: State, labels, given, key) -> State:
  """The wrapped method's; and an epoch of the generator, if they alternate so.

  The generator's batches are cut from a shuffle of the images with a label,
  from the start again when it ends.
  """
  state = state.replace(
    base=base.refresh(state.base, labels, given["base"], key)
  )
  if not hp.trains_by_epoch:
    return state
  features = given["features"]
  draws = jax.random.uniform(key, labels.shape)
  order = jnp.argsort(jnp.where(labels < 0, jnp.inf, draws))
  num = jnp.maximum(jnp.sum(labels >= 0), 1)

  def batch(i):
    start = i * hp.phase_batch_size
    rows = order[(start + jnp.arange(hp.phase_batch_size)) % num]
    return features[rows], labels[rows], jax.random.fold_in(key, i)

  proxies, progress = base.proxies(state.base), state.progress
  generator = training.train(hp, state.generator, proxies, batch, progress)
  return state.replace(generator=generator)


def step(
  hp, base: Method, state: State, features, batch: Batch, key
) -> StepResult:
  """The wrapped method's step, with generated negatives; the generator's steps.

  The generator learns from the features and the memory that the encoder's
  step uses; the encoder's next step meets what it has learned.
  """
  proxies, progress = base.proxies(state.base), _progress(hp, batch.step)
  near, generated, taken_for = propose(
    hp, state.generator, proxies, features, batch.labels, key, progress
  )
  logits = _negative_logits(hp, features, batch, near, generated, taken_for)
  logits = logits / proxies.temperature
  logits += jnp.log(hp.generated_weight * progress)
  rest = features, batch, key
  loss, (memory_after, figures) = base.step(state.base, *rest, negatives=logits)
  figures |= negatives.figures(near, generated, taken_for)
  added = figures.pop("loss_negatives")
  figures["loss_share"] = added / jnp.maximum(loss, 1e-12)
  figures["ramp"] = progress
  generator, fixed = state.generator, lax.stop_gradient(features)
  if hp.alternate == "iteration" and hp.generator == "learned":
    drawn = lambda i: (fixed, batch.labels, jax.random.fold_in(key, i))
    generator = training.train(hp, generator, proxies, drawn, progress)
  after = State(memory_after, generator, _progress(hp, batch.step + 1))
  return loss, (after, lax.stop_gradient(figures))


def notes(hp: Hyperparameters, means: dict[str, float]) -> tuple[str, ...]:
  """How hard an epoch's negatives were, and a warning of a collapse."""
  if not means["ramp"]:
    return ()
  lines = (
    f"generated: similarity to the anchor {means['to_anchor']:.2f} (of its own "
    f"cluster {means['own_to_anchor']:.2f}, of the proxies "
    f"{means['proxy_to_anchor']:.2f}), to the proxies {means['to_proxy']:.2f}",
    f"{100 * means['as_intended']:.0f} % are taken for their proxy's cluster, "
    f"{100 * means['as_own']:.0f} % for the anchor's; "
    f"{100 * means['loss_share']:.0f} % of the loss is theirs",
  )
  remedy = "lower method.interpolation"
  if hp.generator == "learned":
    remedy = "raise method.identity_weight, or set method.radius to .3"
  if means["as_own"] > _COLLAPSED:
    lines += (
      "warning: the negatives collapse onto the anchors; what is taken for "
      "their own cluster is left out of the loss, which leaves little to learn "
      f"from: {remedy}",
    )
  return lines


def propose(hp, generator, proxies: Proxies, features, labels, key, progress):
  """Negatives for features [b, d] of clusters [b]; constants, all of it.

  Returns:
    What is around the anchors, the generated negatives [b, m, d], and the
    clusters that the memory takes them for [b, m].
  """
  features = lax.stop_gradient(features)
  near = negatives.around(proxies, features, labels, hp.num_generated)
  generated = training.generate(hp, generator.params, near, key, progress)
  generated = lax.stop_gradient(generated)
  logits = negatives.logits_of_clusters(proxies, generated)
  _, nearest = memory.nearest(-logits, 1)
  return near, generated, nearest.reshape(near.clusters.shape)


def _negative_logits(hp, features, batch, near, generated, taken_for):
  """Similarities of anchors and negatives; -inf where one is not used."""
  unit, own = memory.normalize(features), batch.labels[:, None]
  clusters, exist = near.clusters, near.exist
  if hp.share:
    flat = generated.reshape(-1, generated.shape[-1])
    similar = jnp.matmul(unit, flat.T, precision=lax.Precision.HIGHEST)
    flat = (x.reshape(1, -1) for x in (clusters, exist, taken_for))
    clusters, exist, taken_for = flat
  else:
    similar = negatives.dot(unit[:, None], generated)
  usable = exist & (clusters != own) & (taken_for != own)
  return jnp.where(usable, similar, -jnp.inf)


def _progress(hp, step):
  """0 in the warm-up, then rising to 1."""
  done = (step + 1 - hp.warmup).astype(jnp.float32)
  return jnp.clip(done / (hp.ramp + 1), 0, 1)
