"""Vision transformers against timm's and transformers' own networks.

What those gave is in a golden; where they are installed, they are asked again.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vit_references as ref
from flax import traverse_util
from jax.sharding import NamedSharding
from numpy.testing import assert_allclose, assert_array_equal

from configs import default
from unreid_jax import UserError, sharding
from unreid_jax.config import check, resolve
from unreid_jax.models import Encoder, backbones, heads, pretrained
from unreid_jax.models.backbones import vit
from unreid_jax.state import first_state, make_parts, shardings
from unreid_jax.step import compile_step

_SIZE = (32, 16)


def _encoder(pooling="token", **changes):
  options = {"dim": ref.DIM, "heads": ref.HEADS, "depth": ref.DEPTH}
  options |= {"patch": ref.PATCH, "stride": ref.PATCH}
  return Encoder(vit.ViT(**options | changes), heads.Neck(pooling))


_CLIP = functools.partial(_encoder, projection=ref.PROJECTION)


def _zeros(encoder, height=32, width=16):
  images = jnp.zeros((1, height, width, 3))
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), images)
  return jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)


def _torch_state(encoder, tree):
  """The parameters, or their gradients, by their names in PyTorch."""
  state = {}
  for path, x in traverse_util.flatten_dict({"params": tree}).items():
    if path[1] == "backbone":
      axes = (3, 2, 0, 1) if x.ndim == 4 else (1, 0)
      x = np.asarray(x).transpose(axes) if path[-1] == "kernel" else x
      state[pretrained.torch_name(encoder, path)] = np.asarray(x)
  return state


def _load(encoder, size):
  """Variables with the references' weights, which come by their names."""
  zeros = _zeros(encoder, *size)
  shapes = _torch_state(encoder, zeros["params"])
  state = {key: ref.value(key, x.shape) for key, x in shapes.items()}
  return pretrained.from_torch(state, encoder, zeros, size)


def _token(out):
  return out.token


def _tokens(out):
  """All tokens in a row, the class token first."""
  b, _, _, dim = out.maps.shape
  maps = out.maps.reshape(b, -1, dim)
  return jnp.concatenate([out.token[:, None], maps], 1)


_CASES = {  # the encoder, the images' size, and what the reference returns
  "timm": (_encoder(), _SIZE, _tokens),
  "overlap": (_encoder(stride=ref.PATCH // 2), _SIZE, _tokens),
  "clip": (_CLIP(), (32, 32), _token),
}


def _want(name, source):
  """The reference's arrays, from the golden or from the reference itself."""
  if source == "golden":
    flat = np.load(ref.GOLDENS)
    prefix = f"{name}/"
    return {
      key.removeprefix(prefix): flat[key]
      for key in flat.files
      if key.startswith(prefix)
    }
  for package in "torch", {"clip": "transformers"}.get(name, "timm"):
    pytest.importorskip(package, reason=f"compares with {package}: pip install")
  return ref.RUNS[name]()


def _run(encoder, variables, size, pick):
  """The backbone's output and its gradients, of the references' loss."""
  images = jnp.asarray(ref.images(*size))

  def loss(params):
    out = pick(encoder.backbone.apply({"params": params}, images, False))
    return (out * ref.value("loss", out.shape)).sum(), out

  params = variables["params"]["backbone"]
  grads, out = jax.jit(jax.grad(loss, has_aux=True))(params)
  return out, ref.sums(_torch_state(encoder, {"backbone": grads}))


@pytest.mark.parametrize("source", ["golden", "torch"])
@pytest.mark.parametrize("name", _CASES)
def test_features_and_gradients(name, source):
  want = _want(name, source)
  encoder, size, pick = _CASES[name]
  out, grads = _run(encoder, _load(encoder, size), size, pick)
  assert_allclose(out, want["out"], 1e-5, 1e-5)
  assert {f"grad/{key}" for key in grads} == want.keys() - {"out"}
  for key, sums in grads.items():
    size_of_all = want[f"grad/{key}"][0] * grads[key].size
    assert_allclose(sums, want[f"grad/{key}"], 1e-4, 1e-5 * size_of_all)


@pytest.mark.parametrize("name", ["timm", "clip"])
def test_weights_go_out(name):
  """Their own networks take our parameters, strictly, with our features."""
  torch = pytest.importorskip("torch", reason="writes for PyTorch's networks")
  encoder, size, pick = _CASES[name]
  variables = jax.tree.map(
    lambda x: jnp.asarray(ref.value(str(x.shape), x.shape)),
    _zeros(encoder, *size),
  )
  images = jnp.asarray(ref.images(*size))
  got = pick(encoder.backbone.apply(
    {"params": variables["params"]["backbone"]}, images, False
  ))  # fmt: skip
  state = _torch_state(encoder, variables["params"])
  x = torch.from_numpy(np.asarray(images).transpose(0, 3, 1, 2).copy())
  with torch.no_grad():
    if name == "clip":
      net = ref.clip_vit()
      state = ref.to_transformers(state)
      net.load_state_dict(ref.tensors(state), strict=True)
      want, got = net(x).image_embeds, got[:, ref.DIM :]
    else:
      net = ref.timm_vit(ref.PATCH)
      net.load_state_dict(ref.tensors(state), strict=True)
      want = net.forward_features(x)
  assert_allclose(got, want.numpy(), 1e-5, 1e-5)


@pytest.mark.parametrize("source", ["golden", "torch"])
def test_positions_are_resized_as_in_torch(source):
  """Bilinearly, between grids of any shape; those that fit stay as they are."""
  if source == "torch":
    pytest.importorskip("torch", reason="compares with torch: pip install")
  want = _want("resize", source) if source == "golden" else ref.run_resize()
  for old, new in ref.GRIDS.items():
    grid = ref.value("positions", (1, *old, 5)).reshape(1, -1, 5)
    positions = np.concatenate([np.full((1, 1, 5), 7, "f"), grid], 1)
    for shape in positions.shape, positions.shape[1:]:  # timm's and CLIP's
      got = vit._resize(positions.reshape(shape), new)
      assert got.shape == (*shape[:-2], 1 + new[0] * new[1], 5)
      assert set(got.reshape(-1, 5)[0]) == {7}
      rows = got.reshape(-1, 5)[1:].reshape(1, *new, 5)
      assert_allclose(rows, want[str(old)], 1e-5, 1e-6)
      assert vit._resize(positions, old) is positions


def test_weights_for_other_images():
  """Half precision as CLIP's, of square images; sizes that tell no grid."""
  encoder = _CLIP()
  state = {k: ref.value(k, shape) for k, shape in ref.clip_shapes().items()}
  half = {key: x.astype(np.float16) for key, x in state.items()}
  zeros = _zeros(encoder)
  got = pretrained.from_torch(half, encoder, zeros, _SIZE)["params"]["backbone"]
  want = vit._resize(half["visual.positional_embedding"], (4, 2))
  assert_array_equal(got["pos_embed"], want)
  assert got["pos_embed"].shape == (9, ref.DIM)
  with pytest.raises(UserError, match=r"positional_embedding.*\(17, 32\)"):
    pretrained.from_torch(half, encoder, zeros)
  odd = half | {"visual.positional_embedding": np.zeros((12, ref.DIM), "f")}
  with pytest.raises(UserError, match=r"positional_embedding.*\(12, 32\)"):
    pretrained.from_torch(odd, encoder, zeros, _SIZE)


def test_spellings_agree():
  """The names of timm, DINO, TransReID-SSL; of OpenAI, CLIP-ReID, PCL-CLIP."""
  stats = dict.fromkeys(["weight", "bias", "running_mean"], 1)
  stats |= {"running_var": 2, "num_batches_tracked": 0}
  for name, spellings, extra in (
    (
      "timm",
      (("", ""), ("", "module.backbone."), ("", "base."), ("", "module.")),
      {"head.weight": 2, "fc.weight": 2},
    ),
    (
      "clip",
      (("", ""), ("visual.", "module.image_encoder.")),
      {"transformer.resblocks.0.ln_1.weight": 1, "logit_scale": 0},
    ),
  ):
    encoder, size, _ = _CASES[name]
    variables = _load(encoder, size)
    extra = {key: np.ones((4,) * ndim, "f") for key, ndim in extra.items()}
    sizes = {"bottleneck": ref.DIM, "bottleneck_proj": ref.PROJECTION}
    for i, neck in enumerate(list(sizes)[: 2 if name == "clip" else 1]):
      for kind, number in stats.items():
        extra[f"{neck}.{kind}"] = np.full(sizes[neck], number + i, "f")
    for old, new in spellings:
      state = {
        new + key.removeprefix(old): x
        for key, x in _torch_state(encoder, variables["params"]).items()
      }
      zeros = _zeros(encoder, *size)
      loaded = pretrained.from_torch(state | extra, encoder, zeros)
      pairs = loaded["params"]["backbone"], variables["params"]["backbone"]
      jax.tree.map(assert_array_equal, *pairs)
      var = loaded["batch_stats"]["head"]["bn"]["var"]
      both = [2] * ref.DIM + [3] * (ref.PROJECTION if name == "clip" else 0)
      assert var.tolist() == both


def test_weights_of_other_transformers_are_refused():
  encoder, size, _ = _CASES["timm"]
  zeros = _zeros(encoder, *size)
  state = _torch_state(encoder, zeros["params"])
  block = np.zeros(ref.DIM, "f")
  for key in "blocks.2.norm1.bias", "patch_embed.conv.0.weight":
    with pytest.raises(UserError, match=f"{key}, which the encoder has not"):
      pretrained.from_torch(state | {key: block}, encoder, zeros)
  clip = {key: ref.value(key, x) for key, x in ref.clip_shapes().items()}
  with pytest.raises(UserError, match=r"it has no weight .*, its first is vis"):
    pretrained.from_torch(clip, encoder, zeros)


# Of timm's networks and of CLIP's, for 224x224 pixels, without classifiers.
_COUNTS = {"vit_small": 21665664, "deit_base": 85798656}
_COUNTS["clip_vit_base"] = 86192640


@pytest.mark.parametrize("arch", _COUNTS)
def test_the_published_sizes(arch, make_encoder):
  encoder = make_encoder(arch=arch, pooling="token")
  out, variables = jax.eval_shape(
    encoder.init_with_output, jax.random.key(0), jnp.zeros((1, 224, 224, 3))
  )
  sizes = [x.size for x in jax.tree.leaves(variables["params"]["backbone"])]
  assert sum(sizes) == _COUNTS[arch]
  dims = {"vit_small": 384, "deit_base": 768, "clip_vit_base": 768 + 512}
  assert out.shape == (1, dims[arch])


def test_pooling():
  maps = jnp.arange(24.0).reshape(1, 2, 3, 4)
  tokens = backbones.Tokens(maps, jnp.ones((1, 4)))
  pool = lambda kind, x: heads.Pool(kind).apply({}, x)
  assert_array_equal(pool("token", tokens), [[1, 1, 1, 1]])
  assert_array_equal(pool("avg", tokens), pool("avg", maps))
  with pytest.raises(UserError, match='pooling is "token", which vision'):
    pool("token", maps)
  stripes = heads.Stripes("token", num_stripes=2)
  make = functools.partial(stripes.init_with_output, train=True)
  out, _ = jax.eval_shape(make, jax.random.key(0), tokens)
  assert out["local"].shape == (1, 2, 256)


def test_each_image_skips_branches_of_its_own():
  """In training, where the others make up for it; at test time none does."""
  block = vit.Block(2, 0.25, vit.exact_gelu, nn.LayerNorm)
  x = jnp.asarray(ref.value("x", (64, 3, 8)))
  params = jax.jit(block.init, static_argnums=2)(jax.random.key(0), x, False)
  # Large enough to be seen, and the same for all numbers of branches.
  params = jax.tree.map(lambda x: x + 0.5, params["params"])
  apply = jax.jit(block.apply, static_argnums=2)
  silent = lambda name: jax.tree.map(jnp.zeros_like, params[name])

  def branch(x, other):
    """What one branch adds, while the other one adds nothing."""
    return apply({"params": params | {other: silent(other)}}, x, False) - x

  attended = x + branch(x, "mlp_fc2")
  got = apply({"params": params}, x, False)
  want = attended + branch(attended, "attn_proj")
  assert_allclose(got, want, 1e-4, 1e-4)

  key = {"drop_path": jax.random.key(1)}
  got = apply({"params": params}, x, True, rngs=key)
  numbers = []
  for start in x + branch(x, "mlp_fc2") / 0.75, x:
    for end in start + branch(start, "attn_proj") / 0.75, start:
      numbers.append(int((abs(got - end).max((1, 2)) < 1e-4).sum()))
  assert sum(numbers) == 64  # each image is one of the four
  assert_allclose(numbers, [36, 12, 12, 4], atol=8)


def _step(config, num_devices, images, labels):
  """A compiled step of Cluster Contrast, its first state and its batches."""
  mesh = sharding.make_mesh(num_devices)
  with jax.set_mesh(mesh):
    parts = make_parts(resolve(config, 4))
    state = first_state(parts, len(images), weights="")
    features = parts.encoder(state)(images)
    refresh = jax.jit(parts.method.refresh)
    method = refresh(state.method, labels, features, jax.random.key(0))
    state = jax.device_put(state.replace(method=method), shardings(mesh, state))
    key = jax.device_put(jax.random.key(0), NamedSharding(mesh, sharding.COPY))
    compiled = compile_step(parts, state, key)
  arrays = {"images": images, "labels": labels, "camids": labels * 0}
  arrays["indices"] = np.arange(len(labels), dtype=np.int32)

  def run(num_steps):
    nonlocal state
    for i in range(num_steps):
      rows = np.random.default_rng(i).permutation(len(labels))[:16]
      batch = {k: sharding.put_rows(mesh, x, rows) for k, x in arrays.items()}
      state, metrics = compiled(state, batch, key)
      yield jax.device_get((metrics["loss"], state.params))

  return run


@pytest.fixture
def tiny_config(monkeypatch):
  tiny = functools.partial(vit.ViT, 32, 2, 2, patch=8, stride=8)
  monkeypatch.setitem(vit.ARCHS, "tiny", tiny)
  config = default.get_config("cluster_contrast", "synthetic")
  config.update_from_flattened_dict(
    {
      "batch_size": 16,
      "dataset.height": 32,
      "dataset.width": 16,
      "augment.pad": 2,
      "encoder.arch": "tiny",
      "encoder.pooling": "token",
      "encoder.drop_path": 0.3,
      "encoder.dtype": "float64",
      "optim.name": "sgd",
      "optim.lr": 0.02,
      "optim.frozen": ("patch_embed_proj",),
      "optim.layer_decay": 0.9,
    }
  )
  return config


def test_a_run_learns_alike_on_any_number_of_devices(tiny_config, float64):
  """With everything on that the recipes have: drop path, a frozen layer..."""
  labels = np.arange(48, dtype=np.int32) // 6
  rng = np.random.default_rng(0)
  colours = rng.integers(0, 200, (8, 4, 1, 3))[labels].repeat(8, 1)
  images = colours + rng.integers(0, 50, (48, 32, 16, 3))
  arguments = images.astype(np.uint8), labels
  check(tiny_config, 2)
  one = list(_step(tiny_config, 1, *arguments)(25))
  two = list(_step(tiny_config, 2, *arguments)(3))
  for a, b in zip(*map(jax.tree.leaves, (one[:3], two)), strict=True):
    assert np.linalg.norm(a - b) <= 1e-9 * max(np.linalg.norm(a), 0.1)
  first, last = (np.mean([loss for loss, _ in one[s:][:5]]) for s in (0, 20))
  assert last < 0.8 * first
  params = [params["backbone"] for _, params in one]
  frozen = "patch_embed_proj"
  jax.tree.map(assert_array_equal, params[0][frozen], params[-1][frozen])
  assert (params[0]["pos_embed"] != params[-1]["pos_embed"]).all()
