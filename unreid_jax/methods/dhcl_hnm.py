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
from typing import Literal, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.nn import logsumexp, softplus
from jaxtyping import Array, Bool, Float, Int

from unreid_jax import memory
from unreid_jax.methods import Batch, Labels, Method, StepResult, one_each, spcl
from unreid_jax.pseudo_labels import false_negatives
from unreid_jax.pseudo_labels.clustering import Clustering, cluster
from unreid_jax.pseudo_labels.self_paced import check_gap, outliers_alone
from unreid_jax.values import BelowOne, CountOrZero, NotNegative, Positive


@dataclasses.dataclass(frozen=True)
class Hyperparameters(Clustering):
  """SpCL's values where it has them (inferred), else ours.

  Attributes:
    temperature: t, which divides the similarities; the result are the logits.
    momentum: the weight of the old row.
    recluster, outliers: as in `spcl`.
    debias: "mask" leaves out the proxies that fall into one cluster with the
      anchor's own at a looser eps; "estimator" subtracts what false negatives
      are expected to contribute; "none" does neither.
    mask_gap: how much looser than eps the mask's clusters are.
    tau_plus: the share of false negatives that the estimator assumes. At a
      temperature of .05 the estimator's floor is soon reached, from where
      negatives have no gradient (`at_floor`): hence so small.
    beta: how sharp the weights are; at 0 all are equal. Robinson's 1 at their
      temperature of .5 is about .1 at .05.
    weight_gradient: whether the gradient flows through the weights too, as in
      Robinson's code.
    instance_weight: lambda, the weight of the instance term.
    positives: the positives of the instance term: "hardest", the least similar
      row of the own class, or "all", the mean over its rows.
    num_negatives: how many proxies of N are drawn anew in each step; 0 takes
      all of them.
  """

  temperature: Positive = 0.05
  momentum: BelowOne = 0.2
  recluster: spcl.Recluster = "memory"
  outliers: spcl.Outliers = "classes"
  debias: Literal["mask", "estimator", "none"] = "mask"
  mask_gap: NotNegative = 0.05
  tau_plus: BelowOne = 1e-4
  beta: NotNegative = 0.1
  weight_gradient: bool = False
  instance_weight: NotNegative = 0.5
  positives: Literal["hardest", "all"] = "hardest"
  num_negatives: CountOrZero = 0

  def __post_init__(self):
    super().__post_init__()
    if self.debias == "mask":
      check_gap("mask_gap", self.eps, self.mask_gap)
    spcl.check_outliers(self)


@struct.dataclass
@no_type_check  # its leaves may also be shardings
class State:
  """SpCL's fields; and the looser cluster of each class (-1: it has none)."""

  bank: Float[Array, "k d"]
  labels: Int[Array, " k"]
  sizes: Int[Array, " k"]
  loose: Int[Array, " k"]


def make(**hyperparameters) -> Method:
  """The reconstruction of DHCL-HNM with these `Hyperparameters`."""
  hp = Hyperparameters(**hyperparameters)
  bind = functools.partial
  return Method(
    init=init, label=bind(label, hp), refresh=spcl.refresh, step=bind(step, hp)
  )


def init(key, shapes) -> State:
  """An empty memory for features [n, d]."""
  del key
  fields = spcl.empty(shapes)
  return State(**fields, loose=jnp.full_like(fields["labels"], -1))


def label(hp, state: State, encode, split, epoch: int) -> Labels:
  """Clusters, outliers as classes of their own or not, looser clusters."""
  num = len(split.camids)
  features, given = spcl.features_to_cluster(hp, state, encode, num, epoch)
  loose = given["loose"] = np.full(len(state.labels), -1, np.int32)
  if epoch < hp.instance_epochs:
    return one_each(num, given)
  gaps = (0.0, hp.mask_gap) if hp.debias == "mask" else (0.0,)
  with_outliers = hp.outliers == "classes"
  found = cluster(hp, features, split.camids, gaps, with_outliers)
  labels = found.labels[0]
  labels = outliers_alone(labels) if with_outliers else labels
  own = labels >= 0
  k = labels.max(initial=-1) + 1
  if hp.debias == "mask":
    loose[:k] = false_negatives.merged_into(labels[own], found.labels[1][own])
  figures = false_negatives.report(labels[own], loose[:k], split.pids[own])
  figures = {"eps": found.eps} | figures
  return Labels(labels, given, figures, found.seconds, found.notes)


def step(
  hp: Hyperparameters, state: State, features, batch: Batch, key
) -> StepResult:
  """The hybrid contrast (see the top of the file), then SpCL's writes."""
  logits = memory.similarities(state.bank, features) / hp.temperature
  proxies = spcl.class_means(state, logits)
  labels = batch.labels[:, None]
  is_own = labels == jnp.arange(proxies.shape[1])[None]
  own = jnp.where(is_own, proxies, 0).sum(axis=1)
  negatives = negatives_of(hp, state, batch, key)
  log_sum, figures = log_negatives(hp, proxies, own, negatives)

  def contrast(positive):  # [b] or [b, k]
    total = jnp.expand_dims(log_sum, tuple(range(1, positive.ndim)))
    # An anchor without negatives has nothing to be contrasted with.
    some = jnp.isfinite(total)
    return jnp.where(some, softplus(jnp.where(some, total, 0) - positive), 0)

  is_member = labels == state.labels[None]
  if hp.positives == "hardest":
    hardest = jnp.min(jnp.where(is_member, logits, jnp.inf), axis=1)
    instance = contrast(hardest).mean()
  else:
    each = jnp.where(is_member, contrast(logits), 0).sum(axis=1)
    members = jnp.maximum(is_member.sum(axis=1), 1)
    instance = jnp.mean(each / members.astype(each.dtype))
  cluster = contrast(own).mean()
  loss = cluster + hp.instance_weight * instance
  figures |= {"loss_cluster": cluster, "loss_instance": instance}
  return loss, (spcl.write(hp, state, features, batch), figures)


def negatives_of(
  hp: Hyperparameters, state: State, batch: Batch, key
) -> Bool[Array, "b k"]:
  """Which proxies an anchor is contrasted with."""
  classes, exists = jnp.arange(len(state.sizes))[None], state.sizes[None] > 0
  negatives = exists & (classes != batch.labels[:, None])
  if hp.debias == "mask":
    loose = state.loose[batch.labels][:, None]
    negatives &= (loose < 0) | (loose != state.loose[None])
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
  """What the negatives add to the denominator, and figures of it.

  Args:
    hp: the hyper-parameters.
    proxies: the logits of all classes.
    own: the logit of each anchor's own class.
    negatives: which classes an anchor is contrasted with.

  Returns:
    log(|N| G) of each anchor, -inf where it has no negatives; and the figures
    negatives, how many an anchor has; effective_negatives, (sum x)^2 / sum x^2
    of their weighed terms x; and at_floor, the share of anchors whose negatives
    are at the estimator's floor.
  """
  some = negatives.any(axis=1)
  # Where there are none, sums over all: finite, and left out in the end.
  at = negatives | ~some[:, None]
  log_num = jnp.log(at.sum(axis=1).astype(own.dtype))
  sharp = proxies if hp.weight_gradient else lax.stop_gradient(proxies)
  log_weights = hp.beta * sharp
  scale = logsumexp(log_weights, axis=1, where=at) - log_num
  terms = proxies + log_weights - scale[:, None]
  log_total = logsumexp(terms, axis=1, where=at)
  square = logsumexp(2 * terms, axis=1, where=at)
  effective = jnp.where(some, jnp.exp(2 * log_total - square), 0)
  figures = {
    "negatives": jnp.mean(negatives.sum(axis=1).astype(own.dtype)),
    "effective_negatives": jnp.mean(effective),
    "at_floor": jnp.zeros((), own.dtype),
  }
  if hp.debias == "estimator":
    floor = -1 / hp.temperature
    floor += log_num
    log_total = _debiased(log_total, log_num + own, hp.tau_plus, floor)
    figures["at_floor"] = jnp.mean(some & (log_total <= floor), dtype=own.dtype)
  return jnp.where(some, log_total, -jnp.inf), lax.stop_gradient(figures)


def _debiased(log_total, log_own, tau_plus, floor):
  """The log of (total - tau_plus own) / (1 - tau_plus), at least the floor."""
  expected = jnp.log(tau_plus) + log_own - log_total
  is_positive = expected < 0
  rest = jnp.log(-jnp.expm1(jnp.where(is_positive, expected, -1)))
  debiased = log_total + (rest - jnp.log1p(-tau_plus))
  return jnp.where(is_positive, jnp.maximum(debiased, floor), floor)
