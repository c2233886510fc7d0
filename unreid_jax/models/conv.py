"""Convolution and max pooling, each with a second form for CPUs.

XLA's CPU code is slow at two gradients that a ResNet needs: a 1x1
convolution's weights (10 to 100 GFLOP/s, where a matrix product reaches 80 to
300) and 3x3 max pooling (95 ms for 8 maps of 128x64x64, the form below 9 ms).
With both replaced, a ResNet-50 training step takes half the processor time on
2 cores. For larger kernels no other form was clearly faster, except where a map
is smaller than the kernel: there XLA falls back to plain loops (20 ms for 32
maps of 4x2x128, the form below 0.9 ms). Accelerators get the plain operations.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

KAIMING = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(nn.Module):
  """A layer of `conv`, initialised like those of torchvision's ResNets."""

  channels: int
  size: int
  stride: int = 1

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W C"]:
    shape = (self.size, self.size, x.shape[-1], self.channels)
    kernel = self.param("kernel", KAIMING, shape)
    return conv(x, kernel.astype(x.dtype), self.stride)


def conv(
  x: Float[Array, "b h w c"], kernel: Float[Array, "k k c C"], stride: int
) -> Float[Array, "b H W C"]:
  """Square convolution without bias, padded by k // 2 on every side."""
  pad = kernel.shape[0] // 2
  is_narrow = min(x.shape[1:3]) < kernel.shape[0]
  if jax.default_backend() == "cpu" and (is_narrow or not pad):
    x = jnp.concatenate(_shifted(x, kernel.shape[0], stride, 0.0), axis=3)
    # Two axes, not four: XLA multiplies these several times faster.
    out = x.reshape(-1, x.shape[-1]) @ kernel.reshape(-1, kernel.shape[-1])
    return out.reshape(*x.shape[:-1], -1)
  pads, dims = ((pad, pad), (pad, pad)), ("NHWC", "HWIO", "NHWC")
  convolve = jax.lax.conv_general_dilated
  return convolve(x, kernel, (stride, stride), pads, dimension_numbers=dims)


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
  """3x3 maximum with stride 2, padded by 1."""
  if jax.default_backend() == "cpu":
    return _max_pool(x)
  return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


@jax.custom_vjp
def _max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
  return functools.reduce(jnp.maximum, _shifted(x, 3, 2, -jnp.inf))


def _max_pool_backward(x, grad):
  """Sends each gradient to the first maximum of its window."""
  top, winner = -jnp.inf, jnp.zeros(grad.shape, jnp.int8)
  for i, pixel in enumerate(_shifted(x, 3, 2, -jnp.inf)):
    winner = jnp.where(pixel > top, jnp.int8(i), winner)
    top = jnp.maximum(pixel, top)
  part = [jnp.where(winner == i, grad, 0) for i in range(9)]
  # A window is centred on the pixel (even row, even column); its last row and
  # column are the first ones of the next window.
  even = _interleave(part[4], part[5], part[3], axis=2)
  below = _interleave(part[7], part[8], part[6], axis=2)
  above = _interleave(part[1], part[2], part[0], axis=2)
  full = _interleave(even, below, above, axis=1)
  return (full[:, : x.shape[1], : x.shape[2]],)


def _interleave(centre, last, first, axis):
  """Doubles an axis: each centre is followed by the sum of its neighbours."""
  pad = [(0, int(i == axis)) for i in range(centre.ndim)]
  first = jax.lax.slice_in_dim(jnp.pad(first, pad), 1, None, axis=axis)
  shape = list(centre.shape)
  shape[axis] *= 2
  return jnp.stack([centre, last + first], axis + 1).reshape(shape)


_max_pool.defvjp(lambda x: (_max_pool(x), x), _max_pool_backward)


def _shifted(x, size, stride, fill):
  """The pixels that each of the kernel's size x size entries meets."""
  height, width = (-(-n // stride) * stride for n in x.shape[1:3])
  pad = (size // 2, size // 2)
  x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)), constant_values=fill)
  slices = lambda n: [slice(i, i + n - stride + 1, stride) for i in range(size)]
  return [x[:, i, j] for i in slices(height) for j in slices(width)]
