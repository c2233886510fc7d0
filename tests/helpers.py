"""What several tests of methods share: batches, splits, one compiled step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unreid_jax.data import Split
from unreid_jax.methods import Batch

KEY = jax.random.key(0)


class Outcome(NamedTuple):
  """What a step gives: see `methods.Step`."""

  loss: Any
  figures: dict
  slope: Any  # the gradient in the features
  state: Any


def make_batch(indices, labels, camids=None, step=0, epoch=0):
  """A batch of images that nobody looks at; labels and camids of each."""
  rows = (jnp.asarray(x, jnp.int32) for x in (indices, labels))
  indices, labels = rows
  camids = labels % 3 if camids is None else jnp.asarray(camids, jnp.int32)
  images = jnp.zeros((len(indices), 1, 1, 3), jnp.uint8)
  clock = (jnp.asarray(x, jnp.int32) for x in (step, epoch))
  return Batch(images, indices, labels, camids, *clock)


def make_split(camids, pids=None):
  """A train set without a picture."""
  num = len(camids)
  pids = np.full(num, -1, np.int32) if pids is None else pids
  images = np.zeros((num, 1, 1, 3), np.uint8)
  names = tuple(map(str, range(num)))
  return Split(images, np.asarray(pids, np.int32), camids, names)


def gives(features):
  """An `Encode` with this result; None: it must not be called."""

  def encode(train=False):
    assert features is not None, "there is nothing to encode"
    return features

  return encode


def step_of(method):
  """The method's step with its gradient: arguments to an `Outcome`."""
  grad = jax.value_and_grad(method.step, 1, has_aux=True)

  def step(state, features, batch, key=KEY):
    (loss, (after, figures)), slope = grad(state, features, batch, key)
    return Outcome(loss, figures, slope, after)

  return step


def run_step(method, state, features, batch, key=KEY):
  """One step, compiled."""
  step = jax.jit(step_of(method))
  return step(state, jax.tree.map(jnp.asarray, features), batch, key)
