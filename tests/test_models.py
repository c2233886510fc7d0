"""Encoders against the references' own, and their parts against slow twins."""

import functools
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from numpy.testing import assert_allclose, assert_array_equal

from unreid_jax import UserError, sharding
from unreid_jax.models import backbones, heads, norm, pretrained


def _bn(name, channels):
  keys = "weight", "bias", "running_mean", "running_var"
  return {f"{name}.{key}": (channels,) for key in keys}


_LAYERS = tuple(f"layer{i}" for i in range(1, 5))
_BASE = tuple(f"base.{i}" for i in (0, 1, 4, 5, 6, 7))
_CNN = tuple(f"CNN.{k}" for k in ("conv1", "bn1", *_LAYERS))


def _resnet50_shapes(ibn=False, base=_BASE):
  """Name and shape of each weight of the references' ResNet-50."""
  conv1, bn1, *layers = base
  shapes = {f"{conv1}.weight": (64, 3, 7, 7), **_bn(bn1, 64)}
  width_in = 64
  for i, blocks in enumerate((3, 4, 6, 3)):
    c = 64 * 2**i
    for j in range(blocks):
      p = f"{layers[i]}.{j}"
      shapes[f"{p}.conv1.weight"] = (c, width_in, 1, 1)
      shapes[f"{p}.conv2.weight"] = (c, c, 3, 3)
      shapes[f"{p}.conv3.weight"] = (4 * c, c, 1, 1)
      if ibn and i < 3:
        shapes |= {f"{p}.bn1.IN.{k}": (c // 2,) for k in ("weight", "bias")}
        shapes |= _bn(f"{p}.bn1.BN", c // 2)
      else:
        shapes |= _bn(f"{p}.bn1", c)
      shapes |= {**_bn(f"{p}.bn2", c), **_bn(f"{p}.bn3", 4 * c)}
      if j == 0:
        shapes[f"{p}.downsample.0.weight"] = (4 * c, width_in, 1, 1)
        shapes |= _bn(f"{p}.downsample.1", 4 * c)
      width_in = 4 * c
  return shapes


def _weight(key, shape):
  """The rule that filled the references' models when goldens were made."""
  if key == "gap.p":
    return np.float32([3])
  seed = zlib.crc32(f"golden-open/{key}".encode())
  n = np.random.RandomState(seed).standard_normal(shape)
  if key.endswith("running_mean") or key.endswith("bias"):
    n *= 0.1
  elif key.endswith("running_var"):
    n = 0.5 + abs(n)
  elif len(shape) == 4:
    n *= np.sqrt(2 / (shape[0] * shape[2] * shape[3]))
  elif len(shape) == 2:
    n *= np.sqrt(1 / shape[1])
  else:
    n = (1 + 0.1 * n) * (0.5 if key.endswith("bn3.weight") else 1)
  return n.astype(np.float32)


def _fill(encoder, shapes):
  state = {key: _weight(key, shape) for key, shape in shapes.items()}
  images = jnp.zeros((1, 128, 64, 3))
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), images)
  return pretrained.from_torch(state, encoder, shapes)


def _images(seed, *shape):
  stream = np.random.RandomState(seed)
  images = stream.standard_normal((4, 3, *shape)).astype(np.float32)
  coef = stream.standard_normal((4, 2048)).astype(np.float32)
  return jnp.asarray(images.transpose(0, 2, 3, 1)), coef


def _summary(x):
  """[mean, std, first 8 values of NCHW], as the goldens sum a map up."""
  x = np.asarray(x).transpose(0, 3, 1, 2)
  return np.r_[x.mean(), x.std(ddof=1), x.ravel()[:8]]


def _check_stages(z, mode, captured):
  """Compares the outputs of the stem, the four stages and the pooling."""
  names = "bn1", "layer1_2", "layer2_3", "layer3_5", "layer4_2"
  for i, name in enumerate(names):
    (output,) = captured["backbone"][name]["__call__"]
    want = z[f"stage_{mode}_{f'layer{i}' if i else 'stem_relu'}"]
    tolerance = 2e-5 if mode == "eval" else 5e-4
    assert_allclose(_summary(jax.nn.relu(output)), want, tolerance, tolerance)


@pytest.mark.parametrize("name", ["r50_avg", "ibn50a_gem"])
def test_encoder_equals_the_references(golden, make_encoder, name):
  z = golden(f"encoder_{name}")
  arch, pooling = name.split("_")
  ibn = arch == "ibn50a"
  encoder = make_encoder(arch="resnet50" + "_ibn_a" * ibn, pooling=pooling)
  shapes = {**_resnet50_shapes(ibn), **_bn("feat_bn", 2048)}
  shapes |= {"gap.p": (1,)} if pooling == "gem" else {}
  variables = _fill(encoder, shapes)
  images, coef = _images(51, 64, 32)

  def apply(params, train):
    out, aux = encoder.apply(
      {**variables, "params": params},
      images,
      train,
      mutable=["batch_stats", "intermediates"],
      capture_intermediates=True,
    )
    return (out * coef).sum(), (out, aux)

  _, (out, aux) = jax.jit(apply, static_argnums=1)(variables["params"], False)
  assert_allclose(out, z["out_eval"], 0, 2e-6)
  pooled = aux["intermediates"]["head"]["pool"]["__call__"][0]
  assert_allclose(pooled, z["pooled_eval"], 2e-5, 2e-6)
  _check_stages(z, "eval", aux["intermediates"])
  jax.tree.map(assert_array_equal, aux["batch_stats"], variables["batch_stats"])

  step = jax.jit(jax.value_and_grad(apply, has_aux=True), static_argnums=1)
  (loss, (out, aux)), grads = step(variables["params"], True)
  assert_allclose(out, z["out_train"], 0, 2e-4)
  assert_allclose(loss, z["loss_train_f64"], 1e-3)
  _check_stages(z, "train", aux["intermediates"])
  for part, key in ("backbone", "bn1"), ("head", "feat_bn"):
    stats = aux["batch_stats"][part]["bn1" if part == "backbone" else "bn"]
    assert_allclose(stats["mean"], z[f"{key}_running_mean_after"], 1e-4, 1e-5)
    assert_allclose(stats["var"], z[f"{key}_running_var_after"], 1e-4, 1e-5)
  _check_gradients(z, encoder, grads)


def _check_gradients(z, encoder, grads):
  flat = traverse_util.flatten_dict({"params": grads})
  norms = {
    pretrained.torch_name(encoder, path): np.linalg.norm(gradient)
    for path, gradient in flat.items()
  }
  names = map(encoder.backbone.torch_key, z["param_names"])
  want = dict(zip(names, z["grad_norms"], strict=True))
  # Single ReLUs flip in float32: the goldens themselves are off by 6e-5.
  noise = 2e-5 * float(max(want.values()))
  assert norms == pytest.approx(want, rel=1e-3, abs=noise)
  got = grads["backbone"]["conv1"]["kernel"].transpose(3, 2, 0, 1)
  assert_allclose(got, z["grad_conv1"], 0, 2e-2 * abs(z["grad_conv1"]).max())
  scale = z["grad_feat_bn_weight"]
  got = grads["head"]["bn"]["scale"]
  assert_allclose(got, scale, 0, 1e-3 * abs(scale).max())
  if "grad_gem_p" in z:
    assert_allclose(grads["head"]["pool"]["p"], z["grad_gem_p"], 5e-3)


def test_stripes_equal_the_reference(golden, make_encoder):
  z = golden("encoder_scl")
  encoder = make_encoder(head="stripes", embedding_dim=512, stripe_dim=64)
  shapes = _resnet50_shapes(base=_CNN)
  avg, local = "avg_pooling.embeding", "local_pooling.local_conv_list"
  shapes |= {f"{avg}.weight": (512, 2048), f"{avg}.bias": (512,)}
  shapes |= _bn(f"{avg}_bn", 512)
  for i in range(8):
    shapes[f"{local}.{i}.0.weight"] = (64, 2048)
    shapes |= {f"{local}.{i}.0.bias": (64,), **_bn(f"{local}.{i}.1", 64)}
  variables = _fill(encoder, shapes)
  images, _ = _images(55, 128, 48)
  apply = jax.jit(
    functools.partial(encoder.apply, mutable=["batch_stats"]), static_argnums=2
  )
  for train, suffix, tolerance in (False, "", 2e-6), (True, "_train", 2e-4):
    out, _ = apply(variables, images, train)
    got = out["local"].transpose(1, 0, 2)
    assert_allclose(out["global"], z[f"out_global{suffix}"], 0, tolerance)
    assert_allclose(got, z[f"out_local{suffix}"], 0, tolerance)


@pytest.mark.parametrize("p", [3.0, 2.5, 1.0, 6.5])
def test_gem_equals_the_reference(golden, p):
  z = golden("gem")
  prefix = f"p{p:g}_".replace(".", "_")
  x = jnp.asarray(z["x"].transpose(0, 2, 3, 1))
  out, pullback = jax.vjp(heads.gem, x, jnp.float32([p]))
  grad_x, grad_p = pullback(z[prefix + "coef"])
  assert_allclose(out, z[prefix + "out"], 2e-5, 2e-5)
  assert_allclose(
    grad_x.transpose(0, 3, 1, 2), z[prefix + "grad_x"], 2e-5, 2e-5
  )
  assert_allclose(grad_p, z[prefix + "grad_p"], 2e-5, 2e-5)


def test_gem_of_a_dead_channel_has_a_finite_gradient():
  x = jnp.zeros((1, 2, 2, 3))
  grads = jax.grad(lambda *a: heads.gem(*a).sum(), (0, 1))(x, jnp.array([9.0]))
  assert all(np.isfinite(grad).all() for grad in grads)


def _slow_batch_norm(x, scale, bias, group_size, which):
  """Ghost batch norm as loops; also returns the new running statistics."""
  x = x.astype(np.float64)
  out, means, variances = np.zeros_like(x), [], []
  for start in range(0, len(x), group_size):
    group = x[start : start + group_size].reshape(-1, x.shape[-1])
    mean, var = group.mean(0), group.var(0)
    rows = slice(start, start + group_size)
    out[rows] = (x[rows] - mean) / np.sqrt(var + 1e-5) * scale + bias
    means.append(mean)
    variances.append(group.var(0, ddof=1))
  pick = (lambda v: v[0]) if which == "first" else (lambda v: np.mean(v, 0))
  return out, 0.1 * pick(means), 0.9 + 0.1 * pick(variances)


@pytest.mark.parametrize("shape", [(16, 5, 3, 4), (16, 4)])
@pytest.mark.parametrize("group_size, which", [(4, "first"), (8, "mean")])
@pytest.mark.parametrize("num_devices", [1, 8])
def test_ghost_batch_norm(shape, group_size, which, num_devices):
  x = np.random.default_rng(0).normal(3, 2, shape).astype(np.float32)
  layer = norm.GhostBatchNorm(group_size, which)
  params = {"scale": np.arange(1.0, 5.0), "bias": np.arange(4.0)}
  variables = layer.init(jax.random.key(0), jnp.asarray(x), True)
  variables["params"] = jax.tree.map(jnp.float32, params)
  mesh = jax.sharding.Mesh(jax.devices()[:num_devices], "data")
  sharding = jax.NamedSharding(mesh, jax.P("data"))
  apply = jax.jit(layer.apply, static_argnames=("train", "mutable"))
  out, new = apply(
    variables, jax.device_put(x, sharding), train=True, mutable="batch_stats"
  )
  want = _slow_batch_norm(x, **params, group_size=group_size, which=which)
  assert_allclose(out, want[0], 2e-5, 2e-5)
  assert_allclose(new["batch_stats"]["mean"], want[1], 1e-5)
  assert_allclose(new["batch_stats"]["var"], want[2], 1e-5)


def test_the_group_must_divide_the_batch():
  layer = norm.GhostBatchNorm(group_size=3)
  with pytest.raises(UserError, match="bn_group_size=3"):
    layer.init(jax.random.key(0), jnp.zeros((8, 2)), True)


def _random(leaf):
  values = np.random.default_rng(leaf.size).uniform(-0.5, 1, leaf.shape)
  return jnp.float32(values * (leaf.shape[-2] if leaf.ndim > 1 else 1) ** -0.5)


def test_bfloat16_stays_close_and_returns_float32(two_blocks, make_encoder):
  images = jax.random.normal(jax.random.key(1), (8, 128, 32, 3))
  outputs = []
  for dtype in "float32", "bfloat16":
    encoder = make_encoder(
      arch="resnet18_ibn_a", width=0.125, head="stripes", dtype=dtype
    )
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), images)
    variables = jax.tree.map(_random, shapes)
    apply = functools.partial(
      encoder.apply, images=images, train=True, mutable=["batch_stats"]
    )
    outputs.append(jax.jit(apply)(variables))
  assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {
    jnp.dtype("float32")
  }
  for exact, rounded in zip(*map(jax.tree.leaves, outputs), strict=True):
    assert_allclose(rounded, exact, 0, 0.1 * abs(exact).max())
    assert abs(rounded - exact).max() > 0  # computed in bfloat16


# torchvision's, with its classifiers of 1,000 classes.
_COUNTS = {18: 11689512, 34: 21797672, 50: 25557032}
_COUNTS |= {101: 44549160, 152: 60192808}
# torchreid's, without classifiers.
_OSNET = {"osnet_x1_0": 2169508, "osnet_x0_25": 201864}


@pytest.mark.parametrize("arch", backbones.archs())
def test_backbones_keep_their_contract(make_encoder, arch):
  backbone = make_encoder(arch=arch).backbone
  images = jnp.zeros((2, 64, 32, 3))
  maps, variables = jax.eval_shape(
    lambda key: backbone.init_with_output(key, images, True), jax.random.key(0)
  )
  maps = maps.maps if isinstance(maps, backbones.Tokens) else maps
  assert maps.shape[:3] == (2, 64 // backbone.stride, 32 // backbone.stride)
  assert len(backbone.mean) == len(backbone.std) == 3
  paths = list(traverse_util.flatten_dict(variables["params"]))
  names = [backbone.torch_name(path) for path in paths]
  assert len(set(names)) == len(names)
  assert [backbone.torch_key(name) for name in names] == names
  sizes = [leaf.size for leaf in jax.tree.leaves(variables["params"])]
  if arch in _OSNET:
    assert sum(sizes) == _OSNET[arch]
  if arch.startswith("resnet"):
    count = _COUNTS[int(re.match(r"resnet(\d+)", arch)[1])]
    assert sum(sizes) == count - 1000 * (maps.shape[3] + 1)


def test_float64_is_exact_on_any_number_of_devices(two_blocks, make_encoder):
  def step(params, variables, images):
    out, stats = encoder.apply(
      variables | {"params": params}, images, True, mutable=["batch_stats"]
    )
    loss = sum(jnp.sum(jnp.sin(9 * x)) for x in out.values())
    return loss, (out, stats)

  with jax.enable_x64(True):
    encoder = make_encoder(
      arch="resnet18_ibn_a", width=0.125, head="stripes", num_stripes=2,
      pooling="gem", bn_group_size=4, dtype="float64",
    )  # fmt: skip
    images = jax.random.normal(jax.random.key(0), (16, 32, 16, 3), "float64")
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), images)
    variables = jax.tree.map(lambda x: _random(x).astype("float64"), shapes)
    results = []
    for num_devices in 1, 8:
      mesh = sharding.make_mesh(num_devices)
      rows = jax.device_put(images, jax.NamedSharding(mesh, sharding.ROWS))
      run = jax.jit(jax.grad(step, has_aux=True))
      results.append(jax.device_get(run(variables["params"], variables, rows)))
  for part in zip(*results, strict=True):  # gradients, then the others
    one, eight = map(jax.tree.leaves, part)
    assert {x.dtype for x in one + eight} == {np.dtype("float64")}
    # Where the exact gradient is zero, only rounding is left.
    largest = max(abs(x).max() for x in one)
    for x, y in zip(one, eight, strict=True):
      assert_allclose(y, x, 0, 1e-12 * largest)


def test_the_neck_bias_is_frozen_and_features_are_unit():
  maps = jax.random.normal(jax.random.key(1), (4, 3, 2, 8))
  neck = heads.Neck("gem")
  variables = jax.jit(neck.init, static_argnums=2)(
    jax.random.key(0), maps, True
  )
  stats = {"batch_stats": variables["batch_stats"]}

  def loss(params):
    out = neck.apply({"params": params, **stats}, maps, False)
    return out[:, 0].sum(), out

  grads, out = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
  assert_allclose(jnp.linalg.norm(out, axis=1), 1, 1e-6)
  assert not grads["bn"]["bias"].any()
  assert grads["bn"]["scale"].any()


def test_mistakes_are_explained(make_encoder):
  with pytest.raises(UserError, match="resnet50_ibn_a"):
    make_encoder(arch="resnet51")
  with pytest.raises(UserError, match="JAX_ENABLE_X64=1"):
    make_encoder(dtype="float64")
  encoder = make_encoder(arch="resnet18", width=0.125, head="stripes")
  key, images = jax.random.key(0), jnp.zeros((1, 113, 16, 3))
  jax.eval_shape(encoder.init, key, images)  # just high enough
  with pytest.raises(UserError, match=r"7 rows.*dataset\.height"):
    jax.eval_shape(encoder.init, key, images[:, 1:])
