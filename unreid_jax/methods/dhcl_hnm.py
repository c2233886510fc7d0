"""DHCL-HNM, debiased hybrid contrast with hard negatives: a reconstruction.

Zhao, Shu, "Debiased hybrid contrastive learning with hard negative mining"
(Digital Signal Processing 156, 2025, 104826). Its abstract and keywords are
public; its equations, values and results were not at hand, and there is no
code. So this is a method after the abstract, not the paper's:

  known     from the abstract: a bank with a row for each train image, clustered
            each epoch into clusters and outliers; negative proxies chosen so as
            to avoid false ones ("debiasing"); negative proxies weighed by
            their similarity to the anchor; both in one hybrid contrast, for
            similarity within a class and for discrimination of instances.
  inferred  from the works that it stands on: SpCL's memory, proxies and
            momentum (the bank and the outliers are SpCL's in all but name);
            the debiased estimator (Chuang et al., NeurIPS 2020) and the
            weights exp(beta s / t) (Robinson et al., ICLR 2021), with proxies
            for samples; a term for classes plus one for instances.
  ours      the mask by looser clusters; every default but SpCL's; the hardest
            positive; lambda; stop-gradient; sums in log space.

For an anchor with logits l (similarity / temperature) to the proxies, y its
own, N the negative ones and w_n = exp(beta l_n), scaled to a mean of 1 over N:

  G = mean_N(w_n exp(l_n))
  G = max((G - tau_plus exp(l_y)) / (1 - tau_plus), exp(-1/t))    ("estimator")
  L(p) = -log(exp(p) / (exp(p) + |N| G))
  loss = L(l_y) + lambda L(logit of the hardest row of its own class)
"""

import dataclasses
import functools
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.nn import logsumexp, softplus
from jaxtyping import Array, Bool, Float, Int

from unreid_jax import memory
from unreid_jax.config import check_values
from unreid_jax.methods import Batch, Method, euclidean_distance, spcl
from unreid_jax.pseudo_labels import false_negatives
from unreid_jax.pseudo_labels.clustering import Clustering, Labelling
from unreid_jax.pseudo_labels.self_paced import (
  check_gap,
  cluster_at,
  outliers_alone,
)


@dataclasses.dataclass(frozen=True)
class Hyperparameters(Clustering):
  """SpCL's values where it has them (inferred), else ours.

  Attributes:
    temperature: t, of the logits.
    momentum: weighs the old row.
    recluster: as in `spcl`.
    debias: "mask" leaves out the proxies that fall into one cluster with the
      anchor's own at a looser eps; "estimator" subtracts what false negatives
      are expected to contribute; "none".
    mask_gap: how much looser.
    tau_plus: share of false negatives that the estimator assumes. At a
      temperature of .05 the estimator's floor is soon reached, from where
      negatives have no gradient (`at_floor`): hence so small.
    beta: sharpness of the weights; 0: all equal. Robinson's 1 at their
      temperature of .5 is about .1 at .05.
    weight_gradient: whether the gradient flows through the weights too, as in
      Robinson's code.
    instance_weight: lambda, of the instance term.
    positives: of the instance term: "hardest", the least similar row of the
      own class, or "all", the mean over its rows.
    num_negatives: draws so many proxies of N anew in each step; 0: all.
  """

  temperature: float = 0.05
  momentum: float = 0.2
  recluster: str = "memory"
  debias: str = "mask"
  mask_gap: float = 0.05
  tau_plus: float = 1e-4
  beta: float = 0.1
  weight_gradient: bool = False
  instance_weight: float = 0.5
  positives: str = "hardest"
  num_negatives: int = 0

  def __post_init__(self):
    super().__post_init__()
    if self.debias == "mask":
      check_gap("mask_gap", self.eps, self.mask_gap)
    choices = {
      "recluster": spcl.RECLUSTER,
      "debias": ("mask", "estimator", "none"),
      "positives": ("hardest", "all"),
    }
    ranges = (
      ("tau_plus", lambda x: 0 <= x < 1, "to 0 or more, below 1"),
      ("beta", lambda x: x >= 0, "to 0 or more"),
      ("instance_weight", lambda x: x >= 0, "to 0 or more"),
      ("num_negatives", lambda x: x >= 0, "to 0 or more"),
    )
    check_values(self, choices, ranges)


@struct.dataclass
@no_type_check  # its leaves may also be shardings
class State:
  """As SpCL's; and the looser cluster of each class (-1: of none)."""

  bank: Float[Array, "k d"]
  labels: Int[Array, " k"]
  sizes: Int[Array, " k"]
  epoch: Int[Array, ""]
  loose: Int[Array, " k"]


def make(**hyperparameters) -> Method:
  """The reconstruction of DHCL-HNM with these `Hyperparameters`."""
  hp = Hyperparameters(**hyperparameters)
  bind = functools.partial
  return Method(
    init=init,
    encode=bind(spcl.encode, hp),
    label=bind(label, hp),
    refresh=spcl.refresh,
    loss=bind(loss, hp),
    update=bind(spcl.update, hp),
    distance=euclidean_distance,
  )


def init(key, features) -> State:
  """An empty memory for these features, [n, d]."""
  del key
  fields = spcl.empty(features)
  return State(**fields, loose=jnp.full_like(fields["labels"], -1))


def label(hp: Hyperparameters, state: State, features, camids, pids):
  """Clusters, outliers as classes of their own, and the looser clusters."""
  loose = np.full(len(state.labels), -1, np.int32)
  if int(state.epoch) < hp.instance_epochs:
    labels = np.arange(len(camids), dtype=np.int32)
    return Labelling(labels, state={"loose": loose})
  features = spcl.rows_to_cluster(state, features, camids)
  gaps = (0.0, hp.mask_gap) if hp.debias == "mask" else (0.0,)
  found, seconds = cluster_at(hp, features, camids, *gaps)
  labels = outliers_alone(found[0])
  num = labels.max() + 1
  if hp.debias == "mask":
    loose[:num] = false_negatives.merged_into(labels, found[1])
  scalars = {"eps": hp.eps} | false_negatives.report(labels, loose[:num], pids)
  return Labelling(labels, scalars, seconds, state={"loose": loose})


def loss(hp: Hyperparameters, state: State, features, batch: Batch, key):
  """The hybrid contrast; see the top of the file."""
  logits = memory.similarities(state.bank, features) / hp.temperature
  proxies = spcl.class_means(state, logits)
  is_own = batch.labels[:, None] == jnp.arange(proxies.shape[1])
  own = jnp.where(is_own, proxies, 0).sum(axis=1)
  negatives = negatives_of(hp, state, batch, key)
  log_sum, metrics = log_negatives(hp, proxies, own, negatives)

  def contrast(positive):  # [b] or [b, k]
    total = jnp.expand_dims(log_sum, tuple(range(1, positive.ndim)))
    # An anchor without negatives has nothing to be contrasted with.
    some = jnp.isfinite(total)
    return jnp.where(some, softplus(jnp.where(some, total, 0) - positive), 0)

  is_member = batch.labels[:, None] == state.labels
  if hp.positives == "hardest":
    hardest = jnp.min(jnp.where(is_member, logits, jnp.inf), axis=1)
    instance = contrast(hardest).mean()
  else:
    each = jnp.where(is_member, contrast(logits), 0).sum(axis=1)
    instance = jnp.mean(each / jnp.maximum(is_member.sum(axis=1), 1))
  cluster = contrast(own).mean()
  parts = {"loss_cluster": cluster, "loss_instance": instance}
  return cluster + hp.instance_weight * instance, parts | metrics


def negatives_of(
  hp: Hyperparameters, state: State, batch: Batch, key
) -> Bool[Array, "b k"]:
  """Which proxies an anchor is contrasted with."""
  classes = jnp.arange(len(state.sizes))
  negatives = (state.sizes > 0) & (classes != batch.labels[:, None])
  if hp.debias == "mask":
    loose = state.loose[batch.labels][:, None]
    negatives &= (loose < 0) | (loose != state.loose)
  if hp.num_negatives:
    draws = jax.random.uniform(key, negatives.shape)
    draws = jnp.where(negatives, draws, jnp.inf)
    num = min(hp.num_negatives, len(state.sizes))
    negatives &= draws <= memory.nearest(draws, num)[0][:, -1:]
  return negatives


def log_negatives(
  hp: Hyperparameters,
  proxies: Float[Array, "b k"],
  own: Float[Array, " b"],
  negatives: Bool[Array, "b k"],
) -> tuple[Float[Array, " b"], dict[str, Float[Array, ""]]]:
  """log(|N| G) of each anchor, -inf without negatives; and metrics.

  effective_negatives is (sum x)^2 / sum x^2 of their weighed terms x, at_floor
  the share of anchors whose negatives are at the estimator's floor.
  """
  some = negatives.any(axis=1)
  # Where there are none, sums over all: finite, and left out in the end.
  at = negatives | ~some[:, None]
  log_num = jnp.log(at.sum(axis=1))
  sharp = proxies if hp.weight_gradient else lax.stop_gradient(proxies)
  log_weights = hp.beta * sharp
  scale = logsumexp(log_weights, axis=1, where=at) - log_num
  terms = proxies + log_weights - scale[:, None]
  log_total = logsumexp(terms, axis=1, where=at)
  square = logsumexp(2 * terms, axis=1, where=at)
  metrics = {
    "negatives": jnp.mean(negatives.sum(axis=1) * 1.0),
    "effective_negatives": jnp.mean(some * jnp.exp(2 * log_total - square)),
    "at_floor": jnp.zeros(()),
  }
  if hp.debias == "estimator":
    floor = -1 / hp.temperature
    floor += log_num
    log_total = _debiased(log_total, log_num + own, hp.tau_plus, floor)
    metrics["at_floor"] = jnp.mean(some & (log_total <= floor))
  return jnp.where(some, log_total, -jnp.inf), lax.stop_gradient(metrics)


def _debiased(log_total, log_own, tau_plus, floor):
  """log of (total - tau_plus own) / (1 - tau_plus), not below the floor."""
  expected = jnp.log(tau_plus) + log_own - log_total
  is_positive = expected < 0
  rest = jnp.log(-jnp.expm1(jnp.where(is_positive, expected, -1)))
  debiased = log_total + (rest - jnp.log1p(-tau_plus))
  return jnp.where(is_positive, jnp.maximum(debiased, floor), floor)
