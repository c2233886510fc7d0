"""EfficientNet-Lite against a slow twin, its published sizes and PyTorch's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from numpy.testing import assert_allclose, assert_array_equal

from unreid_jax import UserError
from unreid_jax.models import backbones, pretrained
from unreid_jax.models.backbones import efficientnet_lite
from unreid_jax.models.norm import GhostBatchNorm

# Parameters of each size, as published, with a classifier of 1000 classes.
_COUNTS = 4652008, 5416680, 6092072, 8197096, 13006568
_SIZES = range(5)


def _arch(size, **changes):
  options = {"width": 1.0, "norm": GhostBatchNorm, "dtype": "float32"}
  return backbones.archs()[f"efficientnet_lite{size}"](**options | changes)


def _shapes(backbone, height=64, width=32):
  images = jnp.zeros((2, height, width, 3))
  init = lambda key: backbone.init_with_output(key, images, True)
  return jax.eval_shape(init, jax.random.key(0))


def _fill(shapes, seed=0):
  """Random variables under which no activation dies or grows."""
  rng = np.random.default_rng(seed)

  def value(path, leaf):
    if leaf.ndim > 1:
      fan_in = np.prod(leaf.shape[:-1])
      return rng.normal(0, (2 / fan_in) ** 0.5, leaf.shape).astype("f")
    noise = rng.uniform(0, 0.5, leaf.shape).astype("f")
    return noise + (path[-1].key in ("scale", "var"))

  return jax.tree_util.tree_map_with_path(value, shapes)


@pytest.mark.parametrize("size", _SIZES)
def test_the_published_sizes(size):
  backbone = _arch(size)
  maps, variables = _shapes(backbone, 65, 33)
  assert maps.shape == (2, 5, 3, 1280)
  count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
  assert count == _COUNTS[size] - 1281 * 1000


def test_the_last_stride():
  backbone = _arch(0, width=0.25, last_stride=2)
  maps, _ = _shapes(backbone, 65, 33)
  assert maps.shape == (2, 3, 2, 320)
  assert (backbone.stride, _arch(0).stride) == (32, 16)


def test_width_scales_all_channels():
  maps, variables = _shapes(_arch(0, width=0.25))
  shapes = jax.tree.map(lambda leaf: leaf.shape, variables["params"])
  assert maps.shape[-1] == shapes["bn2"]["bias"][0] == 320
  assert shapes["conv_stem"]["kernel"] == (3, 3, 3, 8)
  assert shapes["blocks_5_0"]["conv_pwl"]["kernel"] == (1, 1, 6 * 32, 48)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_it_computes_in_its_dtype(dtype):
  with jax.enable_x64(True):
    maps, _ = _shapes(_arch(0, width=0.25, dtype=dtype))
  assert maps.dtype == dtype


def _same_conv(x, kernel, stride, depthwise):
  """Convolution with TensorFlow's "SAME" padding, pixel by pixel."""
  size, (b, height, width, _) = len(kernel), x.shape
  out = [-(-n // stride) for n in (height, width)]
  pads = [
    max((m - 1) * stride + size - n, 0)
    for m, n in zip(out, (height, width), strict=True)
  ]
  pads = [(pad // 2, pad - pad // 2) for pad in pads]
  x = np.pad(x, ((0, 0), *pads, (0, 0)))
  y = np.zeros((b, *out, kernel.shape[-1]))
  for row in range(out[0]):
    for column in range(out[1]):
      top, left = row * stride, column * stride
      window = x[:, top : top + size, left : left + size]
      if depthwise:
        y[:, row, column] = (window * kernel[:, :, 0]).sum((1, 2))
      else:
        y[:, row, column] = np.tensordot(window, kernel, 3)
  return y


def _slow_block(x, params, stats, stride):
  """An MBConv block at test time."""

  def norm(x, name):
    mean, var = (stats[name][k] for k in ("mean", "var"))
    scale, bias = (params[name][k] for k in ("scale", "bias"))
    return (x - mean) / np.sqrt(var + 1e-3) * scale + bias

  relu6 = lambda x: np.clip(x, 0, 6)
  layer = lambda x, name, stride=1, depthwise=False: _same_conv(
    x, params[name]["kernel"], stride, depthwise
  )
  y = relu6(norm(layer(x, "conv_pw"), "bn1"))
  y = relu6(norm(layer(y, "conv_dw", stride, True), "bn2"))
  y = norm(layer(y, "conv_pwl"), "bn3")
  return y + x if stride == 1 and y.shape == x.shape else y


@pytest.mark.parametrize("shape", [(8, 6), (7, 5), (1, 2)])
@pytest.mark.parametrize("stride, out", [(1, 8), (1, 16), (2, 8)])
def test_a_block_equals_its_slow_twin(shape, stride, out):
  norm = functools.partial(GhostBatchNorm, epsilon=1e-3, own=0.99)
  block = efficientnet_lite.Block(out, 5, stride, 6, norm)
  x = jax.random.normal(jax.random.key(0), (2, *shape, 8))
  init = functools.partial(block.init, train=False)
  variables = _fill(jax.eval_shape(init, jax.random.key(0), x))
  got = jax.jit(block.apply, static_argnums=2)(variables, x, False)
  parts = (jax.tree.map(np.asarray, variables[k]) for k in sorted(variables))
  stats, params = parts
  want = _slow_block(np.asarray(x, float), params, stats, stride)
  assert_allclose(got, want, 1e-4, 1e-4)


def test_images_skip_blocks_in_training():
  """By their row in the whole batch; at test time none does."""
  norm, key = functools.partial(GhostBatchNorm, epsilon=1e-3), jax.random.key(1)
  whole, skipped = (
    efficientnet_lite.Block(8, 3, 1, 6, norm, drop) for drop in (0.0, 0.25)
  )
  x = jax.random.normal(jax.random.key(0), (64, 4, 2, 8))
  variables = jax.jit(whole.init, static_argnums=2)(key, x, False)
  options = {"mutable": ["batch_stats"], "rngs": {"drop_path": key}}
  added = whole.apply(variables, x, True, **options)[0] - x
  got = skipped.apply(variables, x, True, **options)[0] - x
  is_skipped = (got == 0).all((1, 2, 3))
  assert 8 <= is_skipped.sum() <= 24
  want = np.where(is_skipped[:, None, None, None], 0, added / 0.75)
  assert_allclose(got, want, 1e-4, 1e-5)
  last = skipped.apply(variables, x[32:], True, 32, **options)[0] - x[32:]
  assert_array_equal((last == 0).all((1, 2, 3)), is_skipped[32:])
  at_test = (block.apply(variables, x, False) for block in (whole, skipped))
  assert_array_equal(*at_test)


def test_the_rates_grow_and_the_last_stride(make_encoder):
  """And each block knows which rows of the batch it has."""
  found, key = [], jax.random.key(0)

  def note(block, x, train, first):
    found.append((block.drop_path, first))
    return x

  encoder = make_encoder(
    arch="efficientnet_lite0", drop_path=0.32, last_stride=2
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(efficientnet_lite, "drop_images", note)
    x = jax.ShapeDtypeStruct((1, 64, 32, 3), jnp.float32)
    init = lambda x: encoder.backbone.init(key, x, False)
    run = lambda variables, x: encoder.backbone.apply(
      variables | {"batch": {"first": 32}}, x, True, mutable=["batch_stats"]
    )[0]
    out = jax.eval_shape(lambda x: run(init(x), x), x)
  assert out.shape == (1, 2, 1, 1280)
  rates, rows = zip(*found[9:], strict=True)  # those before are of `init`
  assert_allclose(rates, 0.02 * np.array([2, 4, 6, 7, 9, 10, 12, 13, 14]))
  assert set(rows) == {32}
  assert make_encoder(arch="efficientnet_lite0").backbone.stride == 16


@pytest.mark.parametrize("given, old", [(0.0, 0.99), (0.75, 0.75)])
def test_how_fast_the_running_statistics_follow(make_encoder, given, old):
  net = make_encoder(arch="efficientnet_lite0", bn_momentum=given).backbone
  norm = net.norm(epsilon=1e-3, own=0.99)
  x = jax.random.normal(jax.random.key(0), (8, 2, 2, 3)) + 5
  variables = norm.init(jax.random.key(1), x, False)
  _, updated = norm.apply(variables, x, True, mutable=["batch_stats"])
  want = (1 - old) * x.mean((0, 1, 2))
  assert_allclose(updated["batch_stats"]["mean"], want, 1e-5)


def test_relu6_has_no_gradient_at_its_ends():
  x = jnp.float32([-1, 0, 3, 6, 7])
  slope = jax.vmap(jax.grad(efficientnet_lite.relu6))(x)
  assert_array_equal(slope, [0, 0, 1, 0, 0])


def test_running_statistics_move_as_published(monkeypatch):
  stages = efficientnet_lite._STAGES[:2]  # compile soon
  monkeypatch.setattr(efficientnet_lite, "_STAGES", stages)
  backbone = _arch(0, width=0.125)
  images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
  _, variables = _shapes(backbone)
  variables = _fill(variables)
  apply = jax.jit(
    functools.partial(backbone.apply, mutable=["batch_stats"]),
    static_argnums=2,
  )
  _, new = apply(variables, images, True)
  maps = _same_conv(
    images, variables["params"]["conv_stem"]["kernel"], 2, depthwise=False
  )
  old, new = variables["batch_stats"]["bn1"], new["batch_stats"]["bn1"]
  want = 0.99 * old["mean"] + 0.01 * maps.mean((0, 1, 2))
  assert_allclose(new["mean"], want, 1e-4, 1e-5)


def _pip_name(name, depths):
  """timm's name as efficientnet_lite_pytorch has it."""
  parts = name.split(".")
  if parts[0] != "blocks":
    outer = {"bn1": "bn0", "bn2": "bn1", "classifier": "fc"}
    return ".".join(["_" + outer.get(parts[0], parts[0]), *parts[1:]])
  stage, block = int(parts[1]), int(parts[2])
  layers = {"conv_pw": "expand_conv", "conv_dw": "depthwise_conv"}
  layers |= {"conv_pwl": "project_conv"}
  layers |= {f"bn{i}": f"bn{i - 1}" for i in (1, 2, 3)}
  if stage == 0:  # nothing is expanded
    layers |= {"conv_pw": "project_conv", "bn1": "bn1", "bn2": "bn2"}
  number = sum(depths[:stage]) + block
  return f"_blocks.{number}._{layers[parts[3]]}.{parts[4]}"


# The number of blocks in each stage.
_DEPTHS = (1, 2, 2, 3, 3, 4, 1), (1, 3, 3, 4, 4, 5, 1), (1, 3, 3, 4, 4, 5, 1)
_DEPTHS += (1, 3, 3, 5, 5, 6, 1), (1, 4, 4, 6, 6, 8, 1)


@pytest.mark.parametrize("size", _SIZES)
def test_both_spellings_of_names(size):
  backbone = _arch(size)
  _, variables = _shapes(backbone)
  paths = traverse_util.flatten_dict(variables["params"])
  names = [backbone.torch_name(path) for path in paths]
  assert "blocks.0.0.conv_dw.kernel" in names
  spelled = [_pip_name(name, _DEPTHS[size]) for name in names]
  assert len(set(spelled)) == len(names)
  assert [backbone.torch_key(key) for key in spelled] == names
  others = "_fc.weight", "_bn1.running_var", "feat_bn.weight"
  mapped = [backbone.torch_key(key) for key in others]
  assert mapped == ["classifier.weight", "bn2.running_var", "feat_bn.weight"]


@pytest.mark.parametrize(
  "key",
  [
    "_blocks.16._bn0.weight",  # of Lite1
    "blocks.1.2.conv_dw.weight",  # of Lite1
    "_blocks.3._se_reduce.weight",  # of EfficientNet-B0
    "blocks.2.0.se.conv_reduce.weight",  # of EfficientNet-B0
  ],
)
def test_weights_of_another_network_are_refused(key):
  with pytest.raises(UserError, match=r"another network.*encoder\.arch"):
    _arch(0).torch_key(key)


def test_features_equal_those_of_torch(make_encoder):
  """A network of the same layers written in PyTorch, padding and all."""
  torch = pytest.importorskip("torch")
  encoder = make_encoder(arch="efficientnet_lite0", width=0.25)
  images = np.random.default_rng(0).normal(size=(3, 67, 36, 3)).astype("f")
  x = jnp.asarray(images)
  variables = _fill(jax.eval_shape(encoder.init, jax.random.key(0), x))
  state = {}
  for path, leaf in traverse_util.flatten_dict(variables).items():
    if path[1] == "backbone":
      leaf = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf
      state[pretrained.torch_name(encoder, path)] = leaf.copy()
  zeros = jax.tree.map(np.zeros_like, variables)
  for pip in False, True:
    spell = lambda key, pip=pip: _pip_name(key, _DEPTHS[0]) if pip else key
    spelled = {spell(key): value for key, value in state.items()}
    loaded = pretrained.from_torch(spelled, encoder, zeros)
    loaded = {kind: tree["backbone"] for kind, tree in loaded.items()}
    for kind, tree in loaded.items():
      jax.tree.map(assert_array_equal, tree, variables[kind]["backbone"])
  got = jax.jit(encoder.backbone.apply, static_argnums=2)(loaded, x, False)
  state = {key: torch.from_numpy(value) for key, value in state.items()}
  want = _torch_features(torch, state, images)
  # Random weights make more of a rounding than trained ones.
  assert_allclose(got, want, 0, 2e-3)
  assert want.max() > 1


def _torch_features(torch, state, images):
  ops = torch.nn.functional

  def conv(x, name, stride=1):
    kernel = state[f"{name}.weight"]
    pads = []
    for n in reversed(x.shape[2:]):
      total = max((-(-n // stride) - 1) * stride + kernel.shape[2] - n, 0)
      pads += [total // 2, total - total // 2]
    groups = x.shape[1] if name.endswith("conv_dw") else 1
    return ops.conv2d(ops.pad(x, pads), kernel, None, stride, groups=groups)

  def norm(x, name):
    names = "running_mean", "running_var", "weight", "bias"
    values = (state[f"{name}.{key}"] for key in names)
    return ops.batch_norm(x, *values, eps=1e-3)

  x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
  x = ops.relu6(norm(conv(x, "conv_stem", 2), "bn1"))
  strides = 1, 2, 2, 2, 1, 1, 1
  for stage, (depth, stride) in enumerate(
    zip(_DEPTHS[0], strides, strict=True)
  ):
    for block in range(depth):
      at, shortcut = f"blocks.{stage}.{block}", x
      norms = iter(f"{at}.bn{i}" for i in (1, 2, 3))
      if stage:
        x = ops.relu6(norm(conv(x, f"{at}.conv_pw"), next(norms)))
      x = conv(x, f"{at}.conv_dw", 1 if block else stride)
      x = ops.relu6(norm(x, next(norms)))
      last = "conv_pwl" if stage else "conv_pw"
      x = norm(conv(x, f"{at}.{last}"), next(norms))
      x = x + shortcut if x.shape == shortcut.shape else x
  x = ops.relu6(norm(conv(x, "conv_head"), "bn2"))
  return x.permute(0, 2, 3, 1).numpy()
