"""Selective contrastive learning: no clustering, several positives an image.

Pang, Zhang, Gao, et al., "Fully Unsupervised Person Re-identification via
Selective Contrastive Learning" (TOMM 2022, arXiv 2010.07608). The paper's text
gives the idea; what happens here follows the authors' code
(pangbo1997/Unsup_ReID), quirks included. Switches undo the quirks.

Each image has a row in three banks. The global and the local bank (8 stripes)
measure how close two images are; the nearest rows are an anchor's positives and
the next ones its negatives, chosen anew in every step. The mixture bank gives
the logits; an anchor writes its two features into its own row and into those of
its positives.
"""

import dataclasses
import functools
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from unreid_jax import UserError, losses, memory
from unreid_jax.config import check_values
from unreid_jax.methods import Batch, Method
from unreid_jax.pseudo_labels.clustering import Labelling


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
  """The authors' values, under the paper's letters in brackets.

  Attributes:
    num_positives: the nearest rows that are positives beside the image [K_p].
    num_negatives: the next nearest rows; fewer if there are fewer rows [K_n].
    temperature: of the logits; the authors multiply by t = 10.
    self_weight: of the image's own row among the positives [lambda_t].
    global_weight: of the global distance against the local one [lambda_g].
    local_loss_weight: of the local branch's loss against the global one's; .3
      in the authors' logs, .5 in their `test.yml` [lambda_p].
    camera_penalty: added to the distance of same-camera rows [lambda_c].
    alpha: scales the other positives' weight, alpha (1 - lambda_t) / K_p.
    bank_momentum: of the global and the local bank, weighs the old row.
    mixture_momentum: of the mixture bank, likewise.
    warmup: steps with random negatives and no positive but the image itself.
    bank_init: batch-norm mode of the pass that fills the banks, "train" as the
      authors do it, or "eval".
    gradient: "sequential" as in the authors' backward pass, whose later terms
      see a mixture bank that the earlier ones have already written to, or
      "frozen", with the bank as it was before the step. The loss is the same.
    normalize_local: the concatenated stripes have length sqrt(8), so that the
      local logits are that much sharper; True scales them to length 1.
    camera_at_test: whether the test-time distance has the camera penalty too.
    squared_at_test: test with squared distances, as in training; the authors
      train with squared ones and test with plain ones.
  """

  num_positives: int = 7
  num_negatives: int = 500
  temperature: float = 0.1
  self_weight: float = 0.5
  global_weight: float = 0.5
  local_loss_weight: float = 0.3
  camera_penalty: float = 0.05
  alpha: float = 1.75
  bank_momentum: float = 0.5
  mixture_momentum: float = 0.5
  warmup: int = 0
  bank_init: str = "train"
  gradient: str = "sequential"
  normalize_local: bool = False
  camera_at_test: bool = True
  squared_at_test: bool = False

  def __post_init__(self):
    choices = {
      "bank_init": ("train", "eval"),
      "gradient": ("sequential", "frozen"),
    }
    check_values(self, choices)


@struct.dataclass
@no_type_check  # its leaves may also be shardings
class State:
  """The three banks, the cameras of their rows (-1: no image) and the step."""

  global_bank: Float[Array, "k d"]
  local_bank: Float[Array, "k s e"]
  mixture: Float[Array, "k d"]
  camids: Int[Array, " k"]
  step: Int[Array, ""]


def make(**hyperparameters) -> Method:
  """Selective contrastive learning with these `Hyperparameters`."""
  hp = Hyperparameters(**hyperparameters)
  bind = functools.partial
  return Method(
    init=init,
    encode=lambda epoch: hp.bank_init if epoch == 0 else None,
    label=label,
    refresh=refresh,
    loss=bind(loss, hp),
    update=bind(update, hp),
    distance=bind(distance, hp),
  )


def init(key, features) -> State:
  """Empty banks for these features, "global" [n, d] and "local" [n, s, e]."""
  del key
  if not isinstance(features, dict):
    raise UserError(
      "selective takes features of the stripes of an image too: set "
      'encoder.head to "stripes"'
    )
  dim, local_dim = features["global"].shape[1], features["local"].shape[1:]
  if dim != np.prod(local_dim):
    raise UserError(
      "one mixture bank serves both branches: set encoder.embedding_dim to "
      f"{np.prod(local_dim)}, the dimension of all stripes; it is {dim}"
    )
  empty = lambda name: memory.create(jnp.zeros(features[name].shape))
  return State(
    global_bank=empty("global"),
    local_bank=empty("local"),
    mixture=empty("global"),
    camids=jnp.full(
      memory.capacity(features["global"].shape[0]), -1, jnp.int32
    ),
    step=jnp.zeros((), jnp.int32),
  )


def label(state: State, features, camids, pids) -> Labelling:
  """Every image is a class of its own."""
  del state, features, pids
  return Labelling(np.arange(len(camids), dtype=np.int32))


def refresh(state: State, features, labels, camids) -> State:
  """Fills the global and the local bank; the mixture bank starts at zero."""
  del labels
  empty = len(state.camids) - len(camids)
  return state.replace(
    global_bank=memory.create(features["global"]),
    local_bank=memory.create(features["local"]),
    camids=jnp.pad(camids, (0, empty), constant_values=-1),
  )


def loss(hp: Hyperparameters, state: State, features, batch: Batch, key):
  """Multi-positive loss of both branches against the mixture bank."""
  rows, valid, weights = choose(hp, state, features, batch, key)
  inputs = _branches(hp, features)
  logits = jnp.stack([_logits(hp, state.mixture, x, rows) for x in inputs])
  per_image = jax.vmap(losses.multi_positive_cross_entropy, (0, None, None))
  per_branch = per_image(logits, weights, valid).mean(axis=1)
  value = jnp.vdot(per_branch, jnp.array(_branch_weights(hp)))
  if hp.gradient == "sequential":
    _, slope = _walk(hp, state.mixture, inputs, rows, valid, weights, logits)
    value = losses.with_gradient(value, inputs, slope)
  best = jnp.argmax(jnp.where(valid, logits, -jnp.inf), axis=2)
  metrics = {"loss_local": per_branch[0], "loss_global": per_branch[1]}
  return value, metrics | {"self_is_nearest": jnp.mean(best == 0)}


def update(hp: Hyperparameters, state: State, features, batch: Batch, key):
  """Writes the features into the mixture bank, then into the other two."""
  rows, valid, weights = choose(hp, state, features, batch, key)
  inputs = _branches(hp, features)
  mixture, _ = _walk(hp, state.mixture, inputs, rows, valid, weights)
  write = functools.partial(memory.write, momentum=hp.bank_momentum)
  return state.replace(
    global_bank=write(state.global_bank, batch.indices, features["global"]),
    local_bank=write(state.local_bank, batch.indices, features["local"]),
    mixture=mixture,
    step=state.step + 1,
  )


def choose(
  hp: Hyperparameters, state: State, features, batch: Batch, key
) -> tuple[Int[Array, "b m"], Bool[Array, "b m"], Float[Array, " p"]]:
  """Each anchor's row, its positives and its negatives, nearest first.

  During the warm-up the order of the rows is random, the same for the whole
  batch, and no row but the anchor's own is a positive.

  Returns:
    The rows, whether they exist, and the weights of the first p as positives.
  """
  features = lax.stop_gradient(features)
  warmup = state.step < hp.warmup
  distances = _bank_distances(hp, state, features)
  same_camera = batch.camids[:, None] == state.camids
  distances += hp.camera_penalty * same_camera
  distances = jnp.where(
    warmup, jax.random.uniform(key, state.camids.shape), distances
  )
  is_self = batch.indices[:, None] == jnp.arange(len(state.camids))
  distances = jnp.where(is_self | (state.camids < 0), jnp.inf, distances)
  num = min(hp.num_positives + hp.num_negatives, len(state.camids) - 1)
  nearest, rows = memory.nearest(distances, num)
  rows = jnp.concatenate([batch.indices[:, None], rows], axis=1)
  valid = jnp.isfinite(nearest)
  valid = jnp.pad(valid, ((0, 0), (1, 0)), constant_values=True)
  others = hp.alpha * (1 - hp.self_weight) / max(hp.num_positives, 1)
  weights = jnp.full(1 + hp.num_positives, jnp.where(warmup, 0, others))
  return rows, valid, weights.at[0].set(hp.self_weight)


def distance(
  hp: Hyperparameters, query, gallery, query_camids, gallery_camids
) -> Float[Array, "q g"]:
  """Global and mean local Euclidean distance, plus the camera penalty."""

  def euclidean(q, g):
    squared = memory.squared_distances(g, q)
    return squared if hp.squared_at_test else jnp.sqrt(jnp.maximum(squared, 0))

  stripes = range(query["local"].shape[1])
  local = sum(
    euclidean(query["local"][:, s], gallery["local"][:, s]) for s in stripes
  )
  fused = hp.global_weight * euclidean(query["global"], gallery["global"])
  fused += (1 - hp.global_weight) * local / len(stripes)
  if hp.camera_at_test:
    fused += hp.camera_penalty * (query_camids[:, None] == gallery_camids)
  return fused


def _branches(hp, features):
  """The inputs of the two losses, [2, b, d]: all stripes, then global."""
  local = features["local"].reshape(len(features["local"]), -1)
  local = memory.normalize(local) if hp.normalize_local else local
  return jnp.stack([local, features["global"]])


def _branch_weights(hp):
  return hp.local_loss_weight, 1 - hp.local_loss_weight


def _bank_distances(hp, state, features):
  """Fused squared distance to all rows, [b, k]; the stripes' is their mean."""
  num_stripes = features["local"].shape[1]
  flat = lambda x: x.reshape(len(x), -1)
  far = memory.squared_distances(state.global_bank, features["global"])
  local_far = memory.squared_distances(
    flat(state.local_bank), flat(features["local"])
  )
  local_weight = (1 - hp.global_weight) / num_stripes
  return hp.global_weight * far + local_weight * local_far


def _logits(hp, mixture, x, rows):
  similarities = memory.similarities(mixture, x)
  return memory.select(similarities, rows) / hp.temperature


def _walk(hp, mixture, inputs, rows, valid, weights, logits=None):
  """Passes through the loss terms in the order of the authors' backward pass.

  Local before global, the farthest positive first and the anchor's own row
  last: each term yields its gradient with the bank as it then is, and writes
  the anchors' features into the rows of that positive.

  Returns:
    The bank after all writes, and the gradient in the inputs [2, b, d], if
    the logits are given.
  """
  num_terms = len(weights)
  branch, term = np.divmod(np.arange(2 * num_terms), num_terms)
  term = num_terms - 1 - term
  scale = np.array(_branch_weights(hp)) / inputs.shape[1]

  def step(mixture, at):
    branch, term = at
    x, slope = inputs[branch], jnp.zeros_like(inputs[branch])
    if logits is not None:
      probabilities = jax.nn.softmax(logits[branch], axis=1, where=valid)
      error = probabilities - jax.nn.one_hot(term, rows.shape[1])
      error *= weights[term] * jnp.array(scale)[branch]
      slope = jax.vjp(lambda x: _logits(hp, mixture, x, rows), x)[1](error)[0]
    targets = jnp.where(weights[term] > 0, rows[:, term], -1)
    return memory.write(mixture, targets, x, hp.mixture_momentum), slope

  inputs = lax.stop_gradient(inputs)
  logits = None if logits is None else lax.stop_gradient(logits)
  mixture, slopes = lax.scan(step, mixture, (branch, term))
  return mixture, slopes.reshape(2, num_terms, *inputs.shape[1:]).sum(axis=1)
