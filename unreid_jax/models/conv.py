"""Convolution and max pooling."""

import flax.linen as nn
import jax
from jaxtyping import Array, Float

_KAIMING = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(nn.Module):
  """Square convolution without bias, padded by k // 2 on every side."""

  channels: int
  size: int
  stride: int = 1

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W C"]:
    shape = (self.size, self.size, x.shape[-1], self.channels)
    kernel = self.param("kernel", _KAIMING, shape).astype(x.dtype)
    return conv(x, kernel, self.stride)


def conv(
  x: Float[Array, "b h w c"], kernel: Float[Array, "k k c C"], stride: int
) -> Float[Array, "b H W C"]:
  """Square convolution, padded by k // 2 on every side."""
  pad = kernel.shape[0] // 2
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    ((pad, pad), (pad, pad)),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
  """3x3 maximum with stride 2, padded by 1."""
  padding = ((1, 1), (1, 1))
  return nn.max_pool(x, (3, 3), (2, 2), padding)
