"""Convolution and max pooling, each with a second form for CPUs.

XLA's CPU code is slow at two gradients that a ResNet needs: a 1x1
convolution's weights (10 to 100 GFLOP/s, where a matrix product reaches 80 to
300) and 3x3 max pooling (275 ms for 16 maps of 128x64x64, of which nine
shifted maxima need 78). With both replaced, a ResNet-50 training step takes
half the processor time on 2 cores. For larger kernels no form beat XLA's
convolution clearly: im2col, nine shifted products, one image at a time. But
where a map is smaller than the kernel, XLA falls back to plain loops (20 ms for
32 maps of 4x2x128, im2col 0.9). Accelerators always get the plain operations.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_KAIMING = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(nn.Module):
  """A layer of `conv`, initialised as torchvision's ResNets."""

  channels: int
  size: int
  stride: int = 1

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W C"]:
    shape = (self.size, self.size, x.shape[-1], self.channels)
    kernel = self.param("kernel", _KAIMING, shape)
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
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    ((pad, pad), (pad, pad)),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
  """3x3 maximum with stride 2, padded by 1.

  Where several pixels share the maximum, the CPU's form splits the gradient
  between them, the other gives it to the first.
  """
  if jax.default_backend() != "cpu":
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
  return functools.reduce(jnp.maximum, _shifted(x, 3, 2, -jnp.inf))


def _shifted(x, size, stride, fill):
  """The map as each of the kernel's size x size entries sees it."""
  pad = size // 2
  height, width = (-(-n // stride) * stride for n in x.shape[1:3])
  x = jnp.pad(
    x,
    ((0, 0), (pad, pad), (pad, pad), (0, 0)),
    constant_values=fill,
  )
  return [
    x[:, i : i + height - stride + 1 : stride, j : j + width - stride + 1 : stride]
    for i in range(size)
    for j in range(size)
  ]
