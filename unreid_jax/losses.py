"""Contrastive losses as plain functions of arrays."""

import jax.numpy as jnp
from jax import lax
from jax.nn import logsumexp
from jaxtyping import Array, Bool, Float


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


def with_gradient(
  value: Float[Array, ""], x: Float[Array, "*d"], slope: Float[Array, "*d"]
) -> Float[Array, ""]:
  """The same value, with `slope` as its gradient in x."""
  linear = jnp.vdot(x, lax.stop_gradient(slope))
  return lax.stop_gradient(value) + (linear - lax.stop_gradient(linear))
