"""Convolutions and max pooling, each with a second form for CPUs.

XLA's CPU code is slow at two gradients that a ResNet needs: a 1x1
convolution's weights (10 to 100 GFLOP/s, where a matrix product reaches 80 to
300) and 3x3 max pooling (95 ms for 8 maps of 128x64x64, the form below 9 ms).
With both replaced, a ResNet-50 training step takes half the processor time on
2 cores. For larger kernels no other form was clearly faster, except where a map
is smaller than the kernel: there XLA falls back to plain loops (20 ms for 32
maps of 4x2x128, the form below 0.9 ms). A depthwise convolution, of which XLA
makes plain loops too, is a sum of shifted products below, several times faster
in both directions (benchmarks/depthwise.py). Accelerators get the plain
operations.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from unreid_jax.models.norm import widen

KAIMING = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# In a depthwise kernel an output channel has one input channel.
_KAIMING_DEPTHWISE = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
_Maps = Float[Array, "b h w c"]
_Kernel = Float[Array, "k k 1 c"]


class Conv(nn.Module):
  """A layer of `conv`, initialised like those of torchvision's ResNets."""

  channels: int
  size: int
  stride: int = 1
  same: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W C"]:
    shape = (self.size, self.size, x.shape[-1], self.channels)
    kernel = self.param("kernel", KAIMING, shape)
    return conv(x, kernel.astype(x.dtype), self.stride, self.same)


class DepthwiseConv(nn.Module):
  """A layer of `depthwise`, initialised like those of EfficientNet."""

  size: int
  stride: int = 1

  @nn.compact
  def __call__(self, x: _Maps) -> Float[Array, "b H W c"]:
    shape = (self.size, self.size, 1, x.shape[-1])
    kernel = self.param("kernel", _KAIMING_DEPTHWISE, shape)
    return depthwise(x, kernel.astype(x.dtype), self.stride)


def conv(
  x: Float[Array, "b h w c"],
  kernel: Float[Array, "k k c C"],
  stride: int,
  same: bool = False,
) -> Float[Array, "b H W C"]:
  """Square convolution without bias, padded by k // 2 on every side.

  `same` pads as TensorFlow does: at stride 2 an even side has one pixel less
  on the left or top.
  """
  pad = kernel.shape[0] // 2
  is_narrow = min(x.shape[1:3]) < kernel.shape[0] and not same
  if jax.default_backend() == "cpu" and (is_narrow or not pad):
    x = jnp.concatenate(_shifted(x, kernel.shape[0], stride, 0.0), axis=3)
    # Two axes, not four: XLA multiplies these several times faster.
    out = x.reshape(-1, x.shape[-1]) @ kernel.reshape(-1, kernel.shape[-1])
    return out.reshape(*x.shape[:-1], -1)
  pads = "SAME" if same else ((pad, pad), (pad, pad))
  return _lax_conv(x, kernel, (stride, stride), pads)


_lax_conv = functools.partial(
  jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC")
)


def depthwise(
  x: _Maps, kernel: _Kernel, stride: int
) -> Float[Array, "b H W c"]:
  """Convolves each channel with a kernel of its own; padding as in TensorFlow.

  That is "SAME": ceil(h / stride) rows come out, and of an odd number of pixels
  of padding the last one is on the right or bottom.
  """
  is_exported = not isinstance(x.shape[0], int)  # of any size
  if jax.default_backend() == "cpu" and not is_exported:
    return _depthwise(x, kernel, stride)
  strides, groups = (stride, stride), x.shape[-1]
  return _lax_conv(x, kernel, strides, "SAME", feature_group_count=groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise(x, kernel, stride):
  shape = [-(-n // stride) for n in x.shape[1:3]]
  out = _correlate(_pad_same(x, kernel, stride), kernel, shape, stride)
  return out.astype(x.dtype)


def _depthwise_backward(stride, residuals, grad):
  x, kernel = residuals
  grad_x = _input_gradient(kernel, grad, x.shape, stride)
  grad_kernel = _kernel_gradient(x, kernel, grad, stride)
  return grad_x.astype(x.dtype), grad_kernel.astype(x.dtype)


_depthwise.defvjp(
  lambda x, k, s: (_depthwise(x, k, s), (x, k)), _depthwise_backward
)


def _input_gradient(kernel, grad, shape, stride):
  """The gradient in a map of this shape.

  Rows and columns that are `stride` apart meet the same entries of the kernel.
  So the gradient in each such part is a correlation of its own with `grad`.
  """
  size, (height, width) = len(kernel), grad.shape[1:3]
  margin = -(-size // stride)
  pads = ((0, 0), (margin, margin), (margin, margin), (0, 0))
  grad = jnp.pad(grad, pads)

  def parts(length):
    """Each part's first entry of the kernel, and where it starts in `grad`."""
    before, _ = _same_pads(length, size, stride)
    for i in range(before, before + stride):
      start, entry = divmod(i, stride)
      yield entry, margin + 1 + start - len(range(entry, size, stride))

  rows = []
  for i, top in parts(shape[1]):
    row = []
    for j, left in parts(shape[2]):
      entries = kernel[i::stride, j::stride][::-1, ::-1]
      row.append(_correlate(grad[:, top:, left:], entries, (height, width)))
    rows.append(jnp.stack(row, 3))
  whole = (shape[0], height * stride, width * stride, shape[3])
  return jnp.stack(rows, 2).reshape(whole)[:, : shape[1], : shape[2]]


def _kernel_gradient(x, kernel, grad, stride):
  """The gradient in the kernel, from two images of each device at a time.

  Their pixels stay in its cache for all entries of the kernel. A batch that
  cannot be split like that is taken as a whole.
  """
  at_once = 2 * max(jax.sharding.get_abstract_mesh().size, 1)
  rows = at_once if len(x) % at_once == 0 else len(x)
  split = lambda a: a.reshape(rows, -1, *a.shape[1:])
  x, grad = split(_pad_same(x, kernel, stride)), split(grad)

  def add(i, total):
    one = (jax.lax.dynamic_index_in_dim(a, i, 1, False) for a in (x, grad))
    pixels, slope = jax.lax.optimization_barrier(tuple(one))
    met = _met(pixels, kernel.shape, slope.shape[1:3], stride)
    products = (widen(part) * widen(slope) for part in met)
    # Images are added up at the end, lest devices should meet in every turn.
    return total + jnp.stack([p.sum((1, 2)) for p in products], 1)

  flat = (rows, kernel.shape[0] * kernel.shape[1], kernel.shape[3])
  total = jnp.zeros(flat, widen(grad).dtype)
  total = jax.lax.fori_loop(0, x.shape[1], add, total)
  return total.sum(0).reshape(kernel.shape)


def _correlate(x, kernel, shape, stride=1):
  """Each entry of the kernel times the pixels that it meets, added up."""
  entries = widen(kernel).reshape(-1, 1, 1, 1, kernel.shape[-1])
  met = _met(x, kernel.shape, shape, stride)
  products = (widen(x) * k for x, k in zip(met, entries, strict=True))
  return functools.reduce(jnp.add, products)


def _pad_same(x, kernel, stride):
  size = len(kernel)
  pads = (_same_pads(length, size, stride) for length in x.shape[1:3])
  return jnp.pad(x, ((0, 0), *pads, (0, 0)))


def _same_pads(length, size, stride):
  """TensorFlow's number of pixels before and after this many."""
  total = max((-(-length // stride) - 1) * stride + size - length, 0)
  return total // 2, total - total // 2


def max_pool(
  x: Float[Array, "b h w c"], padded: bool = True
) -> Float[Array, "b H W c"]:
  """3x3 maximum with stride 2, padded by 1.

  Not `padded`, the windows begin with the first pixel, and a last one that goes
  beyond the edge counts, as with `ceil_mode` in PyTorch (fast-reid).
  """
  if not padded:  # the same windows, but for a first one
    x = jnp.pad(x, ((0, 0), (1, 0), (1, 0), (0, 0)))
    return max_pool(x)[:, 1:, 1:]
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
  shape = [-(-n // stride) for n in x.shape[1:3]]
  pad = (size // 2, size // 2)
  x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)), constant_values=fill)
  return _met(x, (size, size), shape, stride)


def _met(x, size, shape, stride=1):
  """The pixels of x, already padded, that each entry of a kernel meets."""
  slices = lambda axis: [
    slice(i, i + (shape[axis] - 1) * stride + 1, stride)
    for i in range(size[axis])
  ]
  return [x[:, i, j] for i in slices(0) for j in slices(1)]
