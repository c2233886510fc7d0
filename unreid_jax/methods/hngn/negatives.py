"""Hard negatives around a memory: their proxies, terms and figures.

What the reconstruction computes of generated negatives [b, m, d], whoever has
made them. Everything is of unit length.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.nn import logsumexp, softplus
from jaxtyping import Array, Bool, Float, Int

from unreid_jax import memory
from unreid_jax.methods import Proxies


class Around(NamedTuple):
  """Anchors, and the proxies in the memory that are around them.

  Attributes:
    anchors: their unit features.
    labels: the anchors' clusters.
    own: the proxies of the anchors' clusters.
    proxies: the most similar proxies of other clusters.
    clusters: the clusters that these belong to.
    exist: which of them exist; there may be less than m other clusters.
  """

  anchors: Float[Array, "b d"]
  labels: Int[Array, " b"]
  own: Float[Array, "b 1 d"]
  proxies: Float[Array, "b m d"]
  clusters: Int[Array, "b m"]
  exist: Bool[Array, "b m"]

  def mean(self, x: Float[Array, "b m"]) -> Float[Array, ""]:
    """The mean over the proxies that exist; 0 without any."""
    num = jnp.maximum(self.exist.sum(), 1).astype(x.dtype)
    return jnp.where(self.exist, x, 0).sum() / num


def around(
  proxies: Proxies,
  features: Float[Array, "b d"],
  labels: Int[Array, " b"],
  num: int,
) -> Around:
  """The `num` negative proxies that are most similar to each feature."""
  bank, anchors = proxies.bank, memory.normalize(features)
  columns = jnp.arange(len(bank))[None]
  is_other = (columns < proxies.num_clusters) & (columns != labels[:, None])
  similar = memory.similarities(bank, anchors)
  distances, clusters = memory.nearest(
    jnp.where(is_other, -similar, jnp.inf), num
  )
  return Around(
    anchors,
    labels,
    own=memory.take(bank, labels[:, None]),
    proxies=memory.take(bank, clusters),
    clusters=clusters,
    exist=jnp.isfinite(distances),
  )


def logits_of_clusters(
  proxies: Proxies, generated: Float[Array, "b m d"]
) -> Float[Array, "bm k"]:
  """What the memory takes negatives for; -inf where there is no cluster."""
  flat = generated.reshape(-1, generated.shape[-1])
  logits = memory.similarities(proxies.bank, flat) / proxies.temperature
  columns = jnp.arange(len(proxies.bank))[None]
  return jnp.where(columns < proxies.num_clusters, logits, -jnp.inf)


def terms(
  near: Around,
  generated: Float[Array, "b m d"],
  logits: Float[Array, "bm k"],
  temperature: float,
  hardness: str,
) -> dict[str, Float[Array, ""]]:
  """What a generator minimises, as means over all negatives.

  Takes the negatives, the anchors and proxies that they start from, and what
  `logits_of_clusters` returns for them.

  Returns:
    hardness: softplus((f c_y - f g) / t), or -softplus((f g - f c_y) / t):
      falls as the negative g comes nearer to the anchor f than f's proxy c_y.
    identity: cross-entropy of the negative's being of its proxy's cluster.
    proximity: squared distance from the proxy.
  """
  anchors = near.anchors[:, None]
  gap = (dot(anchors, generated) - dot(anchors, near.own)) / temperature
  is_min_max = hardness == "min_max"
  total = logsumexp(logits, axis=1).reshape(gap.shape)
  each = {
    "hardness": -softplus(gap) if is_min_max else softplus(-gap),
    "identity": total - dot(generated, near.proxies) / temperature,
    "proximity": jnp.square(generated - near.proxies).sum(axis=-1),
  }
  return {name: near.mean(x) for name, x in each.items()}


def figures(
  near: Around,
  generated: Float[Array, "b m d"],
  taken_for: Int[Array, "b m"],
) -> dict[str, Float[Array, ""]]:
  """How hard negatives are, and which cluster the memory takes them for.

  Returns:
    to_anchor, to_proxy: mean similarity of a negative to its anchor, and to
      the proxy that it was made of.
    proxy_to_anchor, own_to_anchor: that proxy's similarity to the anchor, and
      that of the anchor's own cluster, to compare with.
    as_intended, as_own: share that is taken for the proxy's cluster, and for
      the anchor's own.
  """
  anchors = near.anchors[:, None]
  own_to_anchor = dot(anchors, near.own)
  each = {
    "to_anchor": dot(anchors, generated),
    "to_proxy": dot(generated, near.proxies),
    "proxy_to_anchor": dot(anchors, near.proxies),
    "own_to_anchor": jnp.broadcast_to(own_to_anchor, taken_for.shape),
    "as_intended": (taken_for == near.clusters).astype(generated.dtype),
    "as_own": (taken_for == near.labels[:, None]).astype(generated.dtype),
  }
  return {name: near.mean(x) for name, x in each.items()}


def dot(
  x: Float[Array, "*#batch d"], y: Float[Array, "*#batch d"]
) -> Float[Array, "*batch"]:
  """Inner products along the last axis, in full precision."""
  return jnp.sum(x * y, axis=-1)
