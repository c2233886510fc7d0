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
from typing import Literal, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from unreid_jax import UserError, losses, memory, values
from unreid_jax.methods import Batch, Labels, Method, StepResult, one_each


@dataclasses.dataclass(frozen=True)
class Hyperparameters(values.Checked):
  """The authors' values, under the paper's letters in brackets.

  Attributes:
    num_positives: how many of the nearest rows are positives beside the image
      itself [K_p].
    num_negatives: how many of the next nearest rows are negatives; fewer if
      there are fewer rows [K_n].
    temperature: divides the similarities; the authors multiply by t = 10.
    self_weight: the weight of the image's own row among the positives
      [lambda_t].
    global_weight: the weight of the global distance; the local one has the rest
      [lambda_g].
    local_loss_weight: the weight of the local branch's loss; the global one's
      has the rest. It is .3 in the authors' logs, .5 in their `test.yml`
      [lambda_p].
    camera_penalty: is added to the distance of same-camera rows [lambda_c].
    alpha: scales the weight of each other positive, alpha (1 - lambda_t) / K_p.
    bank_momentum: the weight of the old row in the global and the local bank.
    mixture_momentum: the weight of the old row in the mixture bank.
    warmup: first steps, with random negatives and with no positive but the
      image itself.
    bank_init: how the images are encoded that first fill the banks: "train", in
      training mode and augmented, as the authors do it, or "eval".
    gradient: "sequential" as in the authors' backward pass, whose later terms
      see a mixture bank that the earlier ones have already written to, or
      "frozen", with the bank as it was before the step. The loss is the same.
    normalize_local: the concatenated stripes have length sqrt(8), so that the
      local logits are that much sharper; True scales them to length 1.
    camera_at_test: whether the test-time distance has the camera penalty too.
    squared_at_test: test with squared distances, as in training; the authors
      train with squared ones and test with plain ones.
  """

  num_positives: values.CountOrZero = 7
  num_negatives: values.CountOrZero = 500
  temperature: values.Positive = 0.1
  self_weight: values.Fraction = 0.5
  global_weight: values.Fraction = 0.5
  local_loss_weight: values.Fraction = 0.3
  camera_penalty: values.NotNegative = 0.05
  alpha: values.NotNegative = 1.75
  bank_momentum: values.BelowOne = 0.5
  mixture_momentum: values.BelowOne = 0.5
  warmup: values.Duration = 0
  bank_init: Literal["train", "eval"] = "train"
  gradient: Literal["sequential", "frozen"] = "sequential"
  normalize_local: bool = False
  camera_at_test: values.Free[bool] = True
  squared_at_test: values.Free[bool] = False


@struct.dataclass
@no_type_check  # its leaves may also be shardings
class State:
  """The three banks, and the cameras of their rows (-1: no image)."""

  global_bank: Float[Array, "k d"]
  local_bank: Float[Array, "k s e"]
  mixture: Float[Array, "k d"]
  camids: Int[Array, " k"]


class Choice(NamedTuple):
  """The rows that a batch is contrasted with.

  Which rows; whether they exist; the weights of the first p as positives.
  """

  rows: Int[Array, "b m"]
  valid: Bool[Array, "b m"]
  weights: Float[Array, " p"]


def make(**hyperparameters) -> Method:
  """Selective contrastive learning with these `Hyperparameters`."""
  hp = Hyperparameters(**hyperparameters)
  bind = functools.partial
  return Method(
    init=init,
    label=bind(label, hp),
    refresh=refresh,
    step=bind(step, hp),
    distance=bind(distance, hp),
  )


def init(key, shapes) -> State:
  """Empty banks for features "global" [n, d] and "local" [n, s, e]."""
  del key
  _check(shapes)
  n, dim = shapes["global"].shape
  local_dim = np.prod(shapes["local"].shape[1:])
  if dim != local_dim:
    raise UserError(
      "one mixture bank serves both branches: set encoder.embedding_dim to "
      f"{local_dim}, the dimension of all stripes; it is {dim}"
    )
  zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()}
  return State(
    global_bank=memory.create(zeros["global"]),
    local_bank=memory.create(zeros["local"]),
    mixture=memory.create(zeros["global"]),
    camids=jnp.full(memory.capacity(n), -1, jnp.int32),
  )


def label(hp, state: State, encode, split, epoch: int) -> Labels | None:
  """In the first epoch every image is a class, for ever."""
  del state
  if epoch:
    return None
  if hp.num_positives >= len(split.camids):
    raise UserError(
      f"method.num_positives={hp.num_positives}: set it below the number of "
      f"train images, {len(split.camids)}"
    )
  features = encode(train=hp.bank_init == "train")
  given = {"camids": split.camids, "features": features}
  return one_each(len(split.camids), given)


def refresh(state: State, labels, given, key) -> State:
  """Fills the global and the local bank; the mixture bank starts at zero."""
  del labels, key
  features, camids = given["features"], given["camids"]
  empty = len(state.camids) - len(camids)
  return state.replace(
    global_bank=memory.create(features["global"]),
    local_bank=memory.create(features["local"]),
    camids=jnp.pad(camids, (0, empty), constant_values=-1),
  )


def step(
  hp: Hyperparameters, state: State, features, batch: Batch, key
) -> StepResult:
  """Multi-positive loss of both branches, then the writes to the three banks.

  The loss is that of the mixture bank before the step. Its gradient is the
  authors', which depends on the writes, or the loss's own (`hp.gradient`).
  """
  choice = choose(hp, state, features, batch, key)
  inputs = _branches(hp, features)
  logits = jnp.stack([_logits(hp, state.mixture, x, choice) for x in inputs])
  per_image = jax.vmap(losses.multi_positive_cross_entropy, (0, None, None))
  per_branch = per_image(logits, choice.weights, choice.valid).mean(axis=1)
  loss = jnp.vdot(per_branch, jnp.array(_branch_weights(hp), logits.dtype))
  mixture, slope = _walk(hp, state.mixture, inputs, choice, logits)
  if hp.gradient == "sequential":
    loss = losses.with_gradient(loss, inputs, slope)
  write = functools.partial(memory.write, momentum=hp.bank_momentum)
  state = state.replace(
    global_bank=write(state.global_bank, batch.indices, features["global"]),
    local_bank=write(state.local_bank, batch.indices, features["local"]),
    mixture=mixture,
  )
  best = jnp.argmax(jnp.where(choice.valid[None], logits, -jnp.inf), axis=2)
  figures = {"loss_local": per_branch[0], "loss_global": per_branch[1]}
  figures["self_is_nearest"] = jnp.mean(best == 0, dtype=logits.dtype)
  return loss, (state, figures)


def choose(
  hp: Hyperparameters, state: State, features, batch: Batch, key
) -> Choice:
  """Each anchor's row, its positives and its negatives, nearest first.

  During the warm-up the order of the rows is random, the same for the whole
  batch, and no row but the anchor's own is a positive.
  """
  features = lax.stop_gradient(features)
  warmup = batch.step < hp.warmup
  distances = _bank_distances(hp, state, features)
  row_camids = state.camids[None]
  same_camera = batch.camids[:, None] == row_camids
  distances += jnp.where(same_camera, hp.camera_penalty, 0)
  draws = jax.random.uniform(key, row_camids.shape, distances.dtype)
  distances = jnp.where(warmup, draws, distances)
  is_self = batch.indices[:, None] == jnp.arange(len(state.camids))[None]
  distances = jnp.where(is_self | (row_camids < 0), jnp.inf, distances)
  num = min(hp.num_positives + hp.num_negatives, len(state.camids) - 1)
  nearest, rows = memory.nearest(distances, num)
  rows = jnp.concatenate([batch.indices[:, None], rows], axis=1)
  valid = jnp.isfinite(nearest)
  valid = jnp.pad(valid, ((0, 0), (1, 0)), constant_values=True)
  others = hp.alpha * (1 - hp.self_weight) / max(hp.num_positives, 1)
  weights = jnp.full(1 + hp.num_positives, jnp.where(warmup, 0, others))
  return Choice(rows, valid, weights.at[0].set(hp.self_weight))


def distance(
  hp: Hyperparameters, query, gallery, query_camids, gallery_camids
) -> Float[Array, "q g"]:
  """Global and mean local Euclidean distance, plus the camera penalty."""
  _check(query)

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
    same_camera = query_camids[:, None] == gallery_camids[None]
    fused += jnp.where(same_camera, hp.camera_penalty, 0)
  return fused


def _check(features):
  if not isinstance(features, dict):
    raise UserError(
      "selective takes features of the stripes of an image too: set "
      'encoder.head to "stripes", or choose the method that the encoder was '
      "trained with"
    )


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


def _logits(hp, mixture, x, choice):
  similarities = memory.similarities(mixture, x)
  return memory.select(similarities, choice.rows) / hp.temperature


def _walk(hp, mixture, inputs, choice, logits):
  """Passes through the loss terms in the order of the authors' backward pass.

  Local before global, the farthest positive first and the anchor's own row
  last: each term yields its gradient with the bank as it then is, and writes
  the anchors' features into the rows of that positive.

  Returns:
    The bank after all writes, and the gradient in the inputs [2, b, d].
  """
  rows, valid, weights = choice
  num_terms = len(weights)
  branch, term = np.divmod(np.arange(2 * num_terms), num_terms)
  term = num_terms - 1 - term
  scale = np.array(_branch_weights(hp)) / inputs.shape[1]
  inputs, logits = lax.stop_gradient((inputs, logits))

  def step(mixture, at):
    branch, term = at
    x = inputs[branch]
    error = jax.nn.softmax(logits[branch], axis=1, where=valid)
    error -= jax.nn.one_hot(term, rows.shape[1], dtype=error.dtype)[None]
    error *= weights[term] * jnp.array(scale, error.dtype)[branch]
    slope = jax.vjp(lambda x: _logits(hp, mixture, x, choice), x)[1](error)[0]
    targets = jnp.where(weights[term] > 0, rows[:, term], -1)
    return memory.write(mixture, targets, x, hp.mixture_momentum), slope

  mixture, slopes = lax.scan(step, mixture, (branch, term))
  return mixture, slopes.reshape(2, num_terms, *inputs.shape[1:]).sum(axis=1)
