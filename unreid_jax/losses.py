"""Contrastive losses as plain functions of arrays."""

import jax.numpy as jnp
from jax import lax
from jax.nn import logsumexp
from jaxtyping import Array, Bool, Float, Int


def multi_positive_cross_entropy(
  logits: Float[Array, "b m"],
  weights: Float[Array, " p"],
  valid: Bool[Array, "b m"],
) -> Float[Array, " b"]:
  """A weighted sum of softmax cross-entropies, one for each positive.

  The first p columns of the logits are the positives, the rest negatives. The
  positives compete: each stays in the denominator of the others.

  Args:
    logits: similarities divided by the temperature.
    weights: weight of each positive's cross-entropy; 0 leaves it out.
    valid: which columns exist.

  Returns:
    sum_j weights[j] * -log softmax(logits)[:, j], Pang et al. 2020; "ExLoss" in
    pangbo1997/Unsup_ReID, engine/loss.py.
  """
  log_partition = logsumexp(logits, axis=1, where=valid)
  positives = logits[:, : len(weights)]
  terms = jnp.where(weights > 0, log_partition[:, None] - positives, 0.0)
  return terms @ weights


def cross_entropy(
  logits: Float[Array, "b k"],
  targets: Int[Array, " b"],
  num_classes: Int[Array, ""],
  label_smoothing: float = 0.0,
  negatives: Float[Array, "b e"] | None = None,
) -> Float[Array, ""]:
  """Softmax cross-entropy over the first `num_classes` columns, batch mean.

  Args:
    logits: similarities divided by the temperature; may be split by column.
    targets: column of each row's class.
    num_classes: columns that exist.
    label_smoothing: share of the target that is spread evenly: over the
      num_classes // 50 most probable classes if these are two or more, else
      over all of them (CrossEntropyLabelSmooth with topk_smoothing in
      bupt-ai-cz/HHCL-ReID, where the share is .1).
    negatives: more logits of each row, which are in the denominator alone;
      -inf where there is none.
  """
  columns = jnp.arange(logits.shape[1])
  exists = columns < num_classes
  chosen = jnp.where(columns == targets[:, None], logits, 0).sum(axis=1)
  if label_smoothing:
    num_top = num_classes // 50
    known = lax.stop_gradient(jnp.where(exists, logits, -jnp.inf))
    best = lax.top_k(known, max(logits.shape[1] // 50, 1))[0]
    least = jnp.take(best, jnp.maximum(num_top, 1) - 1, axis=1)
    gets = jnp.where(num_top > 1, known >= least[:, None], exists)
    spread = logits.mean(axis=1, where=gets)
    chosen = (1 - label_smoothing) * chosen + label_smoothing * spread
  total = logsumexp(logits, axis=1, where=exists)
  if negatives is not None:
    # Finite, so that a row without negatives has a gradient.
    negatives = jnp.maximum(negatives, jnp.finfo(negatives.dtype).min / 2)
    total = jnp.logaddexp(total, logsumexp(negatives, axis=1))
  return jnp.mean(total - chosen)


def softmax_with_epsilon(
  logits: Float[Array, "b k"],
  targets: Int[Array, " b"],
  exists: Bool[Array, " k"],
  epsilon: float = 1e-6,
) -> Float[Array, ""]:
  """Cross-entropy of a softmax that is kept away from 0 and 1, batch mean.

  -log(p + epsilon) with p = exp(l_y) / (sum_c exp(l_c) + epsilon). As p falls,
  the gradient fades: an anchor far from its class has no say.

  Args:
    logits: similarities divided by the temperature; may be split by column.
    targets: column of each row's class.
    exists: which columns there are.
    epsilon: 1e-6 in the authors' code.

  Source: HybridMemory in yxgeee/SpCL, here without exponentials that overflow.
  """
  small = jnp.log(epsilon)
  columns = jnp.arange(logits.shape[1])
  chosen = jnp.where(columns == targets[:, None], logits, 0).sum(axis=1)
  total = jnp.logaddexp(logsumexp(logits, axis=1, where=exists), small)
  return -jnp.mean(jnp.logaddexp(chosen - total, small))


def with_gradient(
  value: Float[Array, ""], x: Float[Array, "*d"], slope: Float[Array, "*d"]
) -> Float[Array, ""]:
  """The same value, with `slope` as its gradient in x."""
  linear = jnp.vdot(x, lax.stop_gradient(slope))
  return lax.stop_gradient(value) + (linear - lax.stop_gradient(linear))
