"""The CPU's convolution and pooling against XLA's own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose

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


@pytest.mark.parametrize("shape", [(2, 8, 6, 5), (3, 7, 5, 4), (1, 1, 2, 3)])
def test_max_pool(shape):
  def plain(x):
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))

  _assert_same(conv.max_pool, plain, _random(*shape))
  ties = jnp.round(_random(*shape))  # the gradient goes to the first
  _assert_same(conv.max_pool, plain, ties)


def test_accelerators_get_the_plain_operations(monkeypatch):
  x, kernel = _random(2, 8, 6, 5), _random(1, 1, 5, 4)
  names = {}
  for backend in "cpu", "gpu":
    monkeypatch.setattr(jax, "default_backend", lambda name=backend: name)
    jaxpr = str(
      jax.make_jaxpr(lambda x, k: conv.conv(conv.max_pool(x), k, 1))(x, kernel)
    )
    names[backend] = {
      n for n in ("conv_general", "reduce_window") if n in jaxpr
    }
  assert names == {"cpu": set(), "gpu": {"conv_general", "reduce_window"}}
