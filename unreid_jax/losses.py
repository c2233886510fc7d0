"""Contrastive losses as plain functions of arrays."""

import jax.numpy as jnp
from jax import lax
from jax.nn import logsumexp, softplus
from jaxtyping import Array, Bool, Float, Int


def multi_positive_cross_entropy(
  logits: Float[Array, "b m"],
  weights: Float[Array, " p"],
  valid: Bool[Array, "b m"],
) -> Float[Array, " b"]:
  """A weighted sum of softmax cross-entropies, one for each positive.

  The first p columns of the logits are the positives, the rest are negatives.
  The positives compete: each stays in the denominator of the others.

  Args:
    logits: similarities divided by the temperature.
    weights: the weight of each positive's cross-entropy; 0 leaves it out.
    valid: which columns exist.

  Returns:
    sum_j weights[j] * -log softmax(logits)[:, j]. It is the loss of Pang et
    al. 2020, and "ExLoss" in pangbo1997/Unsup_ReID, engine/loss.py.
  """
  log_partition = logsumexp(logits, axis=1, where=valid)
  positives = logits[:, : len(weights)]
  terms = jnp.where(weights[None] > 0, log_partition[:, None] - positives, 0.0)
  return terms @ weights


def cross_entropy(
  logits: Float[Array, "b k"],
  targets: Int[Array, " b"],
  num_classes: Int[Array, ""],
  label_smoothing: float = 0.0,
) -> Float[Array, ""]:
  """The batch mean of the softmax cross-entropy over the existing classes.

  Args:
    logits: similarities divided by the temperature; may be split by column.
    targets: the column of each row's class.
    num_classes: how many columns exist: the first ones.
    label_smoothing: the share of the target that is spread evenly: over the
      num_classes // 50 most probable classes if these are two or more, else
      over all of them (CrossEntropyLabelSmooth with topk_smoothing in
      bupt-ai-cz/HHCL-ReID, where the share is .1).
  """
  exists, chosen = _exists(logits, num_classes), _chosen(logits, targets)
  if label_smoothing:
    num_top = num_classes // 50
    known = lax.stop_gradient(jnp.where(exists, logits, -jnp.inf))
    best = lax.top_k(known, max(logits.shape[1] // 50, 1))[0]
    least = jnp.take(best, jnp.maximum(num_top, 1) - 1, axis=1)
    gets = jnp.where(num_top > 1, known >= least[:, None], exists)
    spread = logits.mean(axis=1, where=gets)
    chosen = (1 - label_smoothing) * chosen + label_smoothing * spread
  return jnp.mean(logsumexp(logits, axis=1, where=exists) - chosen)


def added_by_negatives(
  logits: Float[Array, "b k"],
  num_classes: Int[Array, ""],
  negatives: Float[Array, "b e"],
) -> Float[Array, ""]:
  """What more logits in the denominator add to `cross_entropy`.

  Args:
    logits: similarities divided by the temperature; may be split by column.
    num_classes: how many columns exist: the first ones.
    negatives: more logits of each row, which are in the denominator alone;
      -inf where there is none.
  """
  # Finite, so that a row without negatives has a gradient.
  negatives = jnp.maximum(negatives, jnp.finfo(negatives.dtype).min / 2)
  known = logsumexp(logits, axis=1, where=_exists(logits, num_classes))
  return jnp.mean(softplus(logsumexp(negatives, axis=1) - known))


def softmax_with_epsilon(
  logits: Float[Array, "b k"],
  targets: Int[Array, " b"],
  exists: Bool[Array, " k"],
  epsilon: float = 1e-6,
) -> Float[Array, ""]:
  """The batch mean of a cross-entropy with a softmax kept away from 0 and 1.

  It is -log(p + epsilon) with p = exp(l_y) / (sum_c exp(l_c) + epsilon). As p
  falls, the gradient fades: an anchor far from its class has no say.

  Args:
    logits: similarities divided by the temperature; may be split by column.
    targets: the column of each row's class.
    exists: which columns there are.
    epsilon: what keeps the softmax away from 0 and 1.

  Source: HybridMemory in yxgeee/SpCL, here without exponentials that overflow.
  """
  small, chosen = jnp.log(epsilon), _chosen(logits, targets)
  total = logsumexp(logits, axis=1, where=exists[None])
  total = jnp.logaddexp(total, small)
  return -jnp.mean(jnp.logaddexp(chosen - total, small))


def with_gradient(
  value: Float[Array, ""], x: Float[Array, "*d"], slope: Float[Array, "*d"]
) -> Float[Array, ""]:
  """Returns the value, which now has `slope` as its gradient in x."""
  linear = jnp.vdot(x, lax.stop_gradient(slope))
  return lax.stop_gradient(value) + (linear - lax.stop_gradient(linear))


def _exists(logits, num_classes):
  """Which columns exist, [1, k]."""
  columns = jnp.arange(logits.shape[1], dtype=num_classes.dtype)[None]
  return columns < num_classes


def _chosen(logits, targets):
  """The logit of each row's own class."""
  columns = jnp.arange(logits.shape[1], dtype=targets.dtype)[None]
  return jnp.where(columns == targets[:, None], logits, 0).sum(axis=1)
