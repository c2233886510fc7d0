"""Convolution and max pooling, each with a second form for CPUs.

XLA's CPU code is slow at two gradients that a ResNet needs: a 1x1
convolution's weights (10 to 100 GFLOP/s, where a matrix product reaches 80 to
300) and 3x3 max pooling (275 ms for 16 maps of 128x64x64, of which nine
shifted maxima need 78). With both replaced, a ResNet-50 training step takes
half the processor time on 2 cores. For larger kernels no form beat XLA's
convolution clearly: im2col, nine shifted products, one image at a time.
Accelerators always get the plain operations.
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
  if kernel.shape[0] == 1 and jax.default_backend() == "cpu":
    x = x[:, ::stride, ::stride]
    # Two axes, not four: XLA multiplies these several times faster.
    out = x.reshape(-1, x.shape[-1]) @ kernel[0, 0]
    return out.reshape(*x.shape[:-1], -1)
  pad = kernel.shape[0] // 2
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
  height, width = (size + size % 2 for size in x.shape[1:3])
  pad = ((0, 0), (1, 1), (1, 1), (0, 0))
  x = jnp.pad(x, pad, constant_values=-jnp.inf)
  shifted = [
    x[:, i : i + height - 1 : 2, j : j + width - 1 : 2]
    for i in range(3)
    for j in range(3)
  ]
  return functools.reduce(jnp.maximum, shifted)
