"""OSNet against torchreid's own code, which has filled the golden.

It was torchreid/models/osnet.py of KaiyangZhou/deep-person-reid, with PyTorch
2.13.0 and the weights of `_weight`.
"""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from numpy.testing import assert_allclose

from unreid_jax.models import pretrained
from unreid_jax.models.backbones import osnet
from unreid_jax.models.norm import GhostBatchNorm


def _weight(key, shape):
  """Weights under which no activation dies or grows."""
  n = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
  if key.endswith("running_var"):
    n = 0.5 + abs(n)
  elif len(shape) > 1:
    n *= np.sqrt(2 / np.prod(shape[1:]))
  else:
    n = 0.1 * n + key.endswith("weight")
  return n.astype(np.float32)


def _images(shape):
  return _weight("images", (*shape, 1))[..., 0] * 0.7


def _state(tree, name):
  """The arrays of variables by PyTorch's names, in PyTorch's order of axes."""
  state = {}
  for path, x in traverse_util.flatten_dict(tree).items():
    axes = (3, 2, 0, 1) if x.ndim == 4 else (1, 0)
    x = np.asarray(x).transpose(axes) if path[-1] == "kernel" else x
    state[name(path)] = np.asarray(x)
  return state


def test_features_equal_torchreid(golden, make_encoder):
  """Map and feature, all names, and odd sizes."""
  z = golden("osnet")
  encoder = make_encoder(arch="osnet_x0_25", head="neck", pooling="token")
  images = jnp.asarray(_images((2, 64, 40, 3)))
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), images)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
  name = functools.partial(pretrained.torch_name, encoder)
  backbone = {kind: {"backbone": x["backbone"]} for kind, x in zeros.items()}
  sizes = {key: x.shape for key, x in _state(backbone, name).items()}
  rest = {"classifier.weight", "classifier.bias"}
  others = {x for x in z["names"] if x.endswith("num_batches_tracked")}
  assert sizes.keys() == set(z["names"]) - rest - others

  state = {f"module.{key}": _weight(key, x) for key, x in sizes.items()}
  loaded = pretrained.from_torch(state, encoder, zeros)
  loaded = {kind: x["backbone"] for kind, x in loaded.items()}
  apply = jax.jit(encoder.backbone.apply, static_argnums=2)
  out = apply(loaded, images, False)
  assert_allclose(out.maps, z["maps"], 1e-4, 1e-5 * abs(z["maps"]).max())
  scale = abs(z["features"]).max()
  assert_allclose(out.token, z["features"], 1e-4, 1e-5 * scale)


def test_a_block_equals_torchreid(golden):
  """In training: the output, all gradients, the running statistics."""
  z = golden("osnet")
  block = osnet.Block(64, GhostBatchNorm)
  x = jnp.asarray(_images((3, 6, 5, 16)))
  init = functools.partial(block.init, train=True)
  shapes = jax.eval_shape(init, jax.random.key(0), x)
  leaves = pretrained._LEAVES

  def name(path):
    *rest, leaf = osnet.OSNet.torch_name(path).split(".")
    return ".".join([*rest, leaves.get(leaf, leaf)])

  def value(path, leaf):
    key = name(tuple(part.key for part in path[1:]))
    if path[-1].key != "kernel":
      return jnp.asarray(_weight(key, leaf.shape))
    axes = [leaf.shape[i] for i in (3, 2, 0, 1)]
    return jnp.asarray(_weight(key, tuple(axes)).transpose(2, 3, 1, 0))

  variables = jax.tree_util.tree_map_with_path(value, shapes)

  def loss(params):
    out, new = block.apply(
      variables | {"params": params}, x, True, mutable=["batch_stats"]
    )
    return (out * _images(out.shape)).sum(), (out, new)

  grads, (out, new) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
  assert_allclose(out, z["block"], 1e-4, 1e-5)
  grads = _state(grads, name)
  assert {f"grad/{k}" for k in grads} == {k for k in z.files if "grad/" in k}
  for key, x in grads.items():
    norm, product = z[f"grad/{key}"]
    got = np.linalg.norm(x), (x * _weight(key, x.shape)).sum()
    assert_allclose(got, [norm, product], 2e-4, 1e-4 * max(norm, 1))
  stats = _state(new["batch_stats"], name)
  for key in "conv1.bn", "conv2d.3.bn":
    for kind in "running_mean", "running_var":
      want = z[f"{key}.{kind}"]
      assert_allclose(stats[f"{key}.{kind}"], want, 1e-4, 1e-5)
