"""The CPU's convolution and pooling against XLA's own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from unreid_jax import sharding
from unreid_jax.models import conv


def _assert_same(f, g, *args):
  """Values and all gradients of two functions agree."""

  @jax.jit
  def both(*args):
    runs = [jax.vjp(function, *args) for function in (f, g)]
    cotangent = jax.random.normal(jax.random.key(1), runs[0][0].shape)
    return [(out, *pullback(cotangent)) for out, pullback in runs]

  for a, b in zip(*both(*args), strict=True):
    assert_allclose(a, b, 1e-4, 1e-4)


def _random(*shape):
  return jax.random.normal(jax.random.key(0), shape)


@pytest.mark.parametrize("shape", [(2, 8, 6, 5), (3, 7, 5, 4)])
@pytest.mark.parametrize(
  "size, stride", [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)]
)
def test_conv(shape, size, stride):
  kernel = _random(size, size, shape[-1], 6)

  def plain(x, kernel):
    pads = ((size // 2, size // 2),) * 2
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
      x, kernel, (stride, stride), pads, dimension_numbers=dims
    )

  _assert_same(lambda *a: conv.conv(*a, stride), plain, _random(*shape), kernel)


def _plain_same(x, kernel, stride, **options):
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), "SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"), **options,
  )  # fmt: skip


@pytest.mark.parametrize("shape", [(2, 8, 6, 5), (3, 7, 5, 4), (1, 1, 2, 3)])
def test_conv_padded_as_in_tensorflow(shape):
  kernel = _random(3, 3, shape[-1], 6)
  ours = lambda x, kernel: conv.conv(x, kernel, 2, same=True)
  plain = lambda x, kernel: _plain_same(x, kernel, 2)
  _assert_same(ours, plain, _random(*shape), kernel)


@pytest.mark.parametrize(
  "shape", [(4, 8, 6, 5), (3, 7, 5, 4), (1, 1, 2, 3), (2, 9, 10, 3)]
)
@pytest.mark.parametrize("size, stride", [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_depthwise(shape, size, stride):
  options = {"feature_group_count": shape[-1]}
  ours = lambda x, kernel: conv.depthwise(x, kernel, stride)
  plain = lambda x, kernel: _plain_same(x, kernel, stride, **options)
  _assert_same(ours, plain, _random(*shape), _random(size, size, 1, shape[-1]))


def test_depthwise_in_bfloat16_adds_up_in_float32():
  x, kernel = _random(64, 8, 4, 3), _random(5, 5, 1, 3)
  narrow = (a.astype("bfloat16") for a in (x, kernel))
  call = jax.jit(lambda x, k: jax.vjp(lambda *a: conv.depthwise(*a, 1), x, k))
  runs = [call(*args) for args in ((x, kernel), narrow)]
  cotangent = _random(64, 8, 4, 3)
  exact, close = ((y, *back(cotangent.astype(y.dtype))) for y, back in runs)
  for a, b in zip(exact, close, strict=True):
    assert b.dtype == jnp.bfloat16
    assert_allclose(b.astype("float32"), a, 0, 0.01 * abs(a).max())


@pytest.mark.parametrize("num_images", [24, 32])
def test_depthwise_gradients_stay_on_their_devices(
  num_images, collective_sizes
):
  x, kernel, slope = (
    _random(num_images, 4, 4, 6), _random(3, 3, 1, 6),
    _random(num_images, 2, 2, 6),
  )  # fmt: skip

  def gradients(x, kernel, slope):
    return jax.vjp(lambda *a: conv.depthwise(*a, 2), x, kernel)[1](slope)

  want = jax.jit(gradients)(x, kernel, slope)
  mesh = sharding.make_mesh(8)
  put = lambda x: jax.device_put(x, jax.NamedSharding(mesh, sharding.ROWS))
  with jax.set_mesh(mesh):
    args = put(x), kernel, put(slope)
    program = jax.jit(gradients).lower(*args).compile()
    for a, b in zip(program(*args), want, strict=True):
      assert_allclose(a, b, 1e-4, 1e-4)
  sizes = collective_sizes(program.as_text())
  assert max(sizes) == kernel.size


@pytest.mark.parametrize("shape", [(2, 8, 6, 5), (3, 7, 5, 4), (1, 1, 2, 3)])
def test_max_pool(shape):
  def plain(x):
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))

  _assert_same(conv.max_pool, plain, _random(*shape))
  ties = jnp.round(_random(*shape))  # the gradient goes to the first
  _assert_same(conv.max_pool, plain, ties)


def test_accelerators_get_the_plain_operations(monkeypatch):
  def everything(x, one, each):
    x = conv.conv(conv.max_pool(x), one, 1)
    return conv.depthwise(x, each, 2)

  args = _random(2, 8, 6, 5), _random(1, 1, 5, 4), _random(3, 3, 1, 4)
  names = "conv_general", "reduce_window", "feature_group_count=4"
  found = {}
  for backend in "cpu", "gpu":
    monkeypatch.setattr(jax, "default_backend", lambda name=backend: name)
    # Another function each time, or the first program would be taken again.
    jaxpr = str(jax.make_jaxpr(lambda *a: everything(*a))(*args))
    found[backend] = [name for name in names if name in jaxpr]
  assert found == {"cpu": [], "gpu": list(names)}


@pytest.mark.parametrize("shape", [(8, 6), (9, 6), (3, 4), (5, 3)])
def test_windows_without_padding(shape):
  """Each begins at an even pixel and ends at the edge at the latest."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, *shape, 3)).astype(np.float32)
  rows, columns = (range(0, n - 1, 2) for n in shape)
  want = [
    [x[:, i : i + 3, j : j + 3].max((1, 2)) for j in columns] for i in rows
  ]
  got = conv.max_pool(jnp.asarray(x), padded=False)
  assert_array_equal(got, np.array(want).transpose(2, 0, 1, 3))


def test_depthwise_of_any_number_of_images():
  """As an exported program has it, in which the number is a symbol."""
  kernel = _random(3, 3, 1, 4)
  (num,) = jax.export.symbolic_shape("b")
  images = jax.ShapeDtypeStruct((num, 7, 6, 4), jnp.float32)
  program = jax.jit(lambda x: conv.depthwise(x, kernel, 2))
  program = jax.export.export(program)(images)
  x = _random(3, 7, 6, 4)
  assert_allclose(program.call(x), conv.depthwise(x, kernel, 2), 1e-5, 1e-5)
