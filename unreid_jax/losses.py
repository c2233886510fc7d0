"""Contrastive losses as plain functions of arrays.

The logits are similarities divided by the temperature, and may be sharded by
column: a column is a class, a cluster or a row of a bank.
"""

import jax.numpy as jnp
from jax import lax
from jax.nn import logsumexp, softplus
from jaxtyping import Array, Bool, Float, Int

Logits = Float[Array, "b k"]
Scalar = Float[Array, ""]


def multi_positive_cross_entropy(
  logits: Logits, weights: Float[Array, " p"], valid: Bool[Array, "b k"]
) -> Float[Array, " b"]:
  """A weighted sum of softmax cross-entropies, one for each positive.

  It is sum_j weights[j] * -log softmax(logits)[:, j] over the columns that
  exist (`valid`). The first p are the positives, the rest are negatives. The
  positives compete: each stays in the denominator of the others. A weight of 0
  leaves one out.

  Source: Pang et al. 2020; "ExLoss" in pangbo1997/Unsup_ReID, engine/loss.py.
  """
  log_partition = logsumexp(logits, axis=1, where=valid)
  positives = logits[:, : len(weights)]
  terms = jnp.where(weights[None] > 0, log_partition[:, None] - positives, 0.0)
  return terms @ weights


def cross_entropy(
  logits: Logits,
  targets: Int[Array, " b"],
  num_classes: Int[Array, ""],
  label_smoothing: float = 0.0,
) -> Scalar:
  """The batch mean of the softmax cross-entropy over the existing classes.

  These are the first `num_classes` columns; `targets` are the columns of the
  rows' classes. The share `label_smoothing` of a target is spread evenly: over
  the num_classes // 50 most probable classes if these are two or more, else
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
  logits: Logits, num_classes: Int[Array, ""], negatives: Float[Array, "b e"]
) -> Scalar:
  """What more logits in the denominator add to `cross_entropy`.

  The `negatives` are in the denominator alone, and -inf where there is none.
  """
  # Finite, so that a row without negatives has a gradient.
  negatives = jnp.maximum(negatives, jnp.finfo(negatives.dtype).min / 2)
  known = logsumexp(logits, axis=1, where=_exists(logits, num_classes))
  return jnp.mean(softplus(logsumexp(negatives, axis=1) - known))


def softmax_with_epsilon(
  logits: Logits, targets: Int[Array, " b"], exists: Bool[Array, " k"]
) -> Scalar:
  """The batch mean of a cross-entropy with a softmax kept away from 0 and 1.

  It is -log(p + 1e-6) with p = exp(l_y) / (sum_c exp(l_c) + 1e-6), over the
  columns that exist. As p falls, the gradient fades: an anchor far from its
  class has no say.

  Source: HybridMemory in yxgeee/SpCL, here without exponentials that overflow.
  """
  small, chosen = jnp.log(1e-6), _chosen(logits, targets)
  total = logsumexp(logits, axis=1, where=exists[None])
  total = jnp.logaddexp(total, small)
  return -jnp.mean(jnp.logaddexp(chosen - total, small))


def with_gradient(
  value: Scalar, x: Float[Array, "*d"], slope: Float[Array, "*d"]
) -> Scalar:
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
