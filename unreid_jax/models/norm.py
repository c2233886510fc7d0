"""Batch normalisation over groups of images ("ghost" batch norm)."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from unreid_jax import UserError

_X = Float[Array, "b *hw c"]
_Groups = Float[Array, "g c"]


class GhostBatchNorm(nn.Module):
  """Batch norm whose statistics come from groups of consecutive images.

  With `group_size=64` a batch of 256 is normalised as four batches of 64. That
  is what PyTorch's DataParallel does on four GPUs, here on any number of
  devices. As in PyTorch, the running variance is the unbiased one. The running
  statistics follow the "first" group, as with DataParallel and in the published
  numbers, or the "mean" of all groups.
  """

  group_size: int = 0  # images in a group; 0: the whole batch
  running: str = "first"
  train_bias: bool = True  # False freezes its initial or loaded value
  epsilon: float = 1e-5  # is added to the variance
  momentum: float = 0.0  # the weight of the old running statistics; 0: `own`
  own: float = 0.9  # the backbone's own momentum

  @nn.compact
  def __call__(self, x: _X, train: bool) -> _X:
    channels = x.shape[-1]
    scale, bias = _scale_and_bias(self, x)
    mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
    var = self.variable("batch_stats", "var", jnp.ones, (channels,))
    if not self.train_bias:
      bias = jax.lax.stop_gradient(bias)
    if not train:
      mean, var = (v.value.astype(scale.dtype) for v in (mean, var))
      return _affine(x, mean, jax.lax.rsqrt(var + self.epsilon) * scale, bias)
    size = self.group_size or len(x)
    if len(x) % size:
      raise UserError(
        f"bn_group_size={size} does not divide the batch of {len(x)} images: "
        "choose a divisor, or 0 for the whole batch"
      )
    num_groups = len(x) // size
    out, group_mean, group_var = _batch_norm(
      x, scale, bias, num_groups, self.epsilon
    )
    if not self.is_initializing():
      pixels = x.size // channels // num_groups
      unbiased = group_var * (pixels / max(pixels - 1, 1))
      for running, values in ((mean, group_mean), (var, unbiased)):
        new = values[0] if self.running == "first" else values.mean(0)
        new = jax.lax.stop_gradient(new).astype(running.value.dtype)
        old = self.momentum or self.own
        running.value = old * running.value + (1 - old) * new
    return out


def widen(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """In float32, or in float64 if it has that."""
  return x.astype(_wide(x))


def _wide(x):
  return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def _scale_and_bias(module, x):
  """The parameters of a norm, in the dtype in which it is computed."""
  scale = module.param("scale", nn.initializers.ones, x.shape[-1:])
  bias = module.param("bias", nn.initializers.zeros, x.shape[-1:])
  return scale.astype(_wide(x)), bias.astype(_wide(x))


# The hand-written gradient reads the activations less often than autodiff's.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _batch_norm(
  x: _X,
  scale: Float[Array, " c"],
  bias: Float[Array, " c"],
  num_groups: int,
  epsilon: float,
) -> tuple[_X, _Groups, _Groups]:
  """Normalised x, and the mean and the biased variance of each group.

  Only the first has a gradient; the others count as constants.
  """
  return _forward(x, scale, bias, num_groups, epsilon)[0]


def _forward(x, scale, bias, num_groups, epsilon):
  wide = widen(x)
  mean = _group_mean(wide, num_groups)
  var = _group_mean(jnp.square(wide - _spread(mean, x)), num_groups)
  inverse = jax.lax.rsqrt(var + epsilon)
  out = _affine(x, _spread(mean, x), _spread(inverse * scale[None], x), bias)
  return (out, mean, var), (x, scale, mean, inverse)


def _backward(num_groups, _, residuals, cotangents):
  x, scale, mean, inverse = residuals
  grad = widen(cotangents[0])
  unit = (widen(x) - _spread(mean, x)) * _spread(inverse, x)
  grad_bias = _group_mean(grad, num_groups)
  grad_scale = _group_mean(grad * unit, num_groups)
  grad_x = grad - _spread(grad_bias, x) - unit * _spread(grad_scale, x)
  grad_x = grad_x * _spread(inverse * scale[None], x)
  size = x.size // x.shape[-1] // num_groups
  sums = (means.sum(0) * size for means in (grad_scale, grad_bias))
  return grad_x.astype(x.dtype), *sums


_batch_norm.defvjp(_forward, _backward)


def _group_mean(x: _X, num_groups: int) -> _Groups:
  """Means over the images and pixels of each group.

  Reduces every image to [c] first: only [b, c] sums ever cross devices,
  wherever the borders of the groups and of the shards lie.
  """
  x = x.mean(tuple(range(1, x.ndim - 1)))
  return x.reshape(num_groups, -1, x.shape[-1]).mean(1)


def _spread(values: _Groups, x: _X) -> Float[Array, "b *one c"]:
  """The values of each group, once for each of its images."""
  values = jnp.repeat(values, x.shape[0] // values.shape[0], axis=0)
  return jnp.expand_dims(values, tuple(range(1, x.ndim - 1)))


def _affine(x, *values):
  """(x - mean) * factor + bias; what has one axis has a value a channel."""
  axes = tuple(range(x.ndim - 1))
  mean, factor, bias = (
    jnp.expand_dims(v, axes) if v.ndim == 1 else v for v in values
  )
  return ((widen(x) - mean) * factor + bias).astype(x.dtype)


class InstanceNorm(nn.Module):
  """Instance norm with a scale and a bias, the same in training and test."""

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    return _batch_norm(x, *_scale_and_bias(self, x), len(x), 1e-5)[0]


class InstanceBatchNorm(nn.Module):
  """IBN-a: instance norm of half of the channels, batch norm of the others.

  Source: Pan et al., ECCV 2018 (IBN-Net).
  """

  norm: Callable[..., nn.Module] = GhostBatchNorm

  @nn.compact
  def __call__(self, x: _X, train: bool) -> _X:
    half = x.shape[-1] // 2
    first = InstanceNorm(name="IN")(x[..., :half])
    rest = self.norm(name="BN")(x[..., half:], train)
    return jnp.concatenate([first, rest], -1)
