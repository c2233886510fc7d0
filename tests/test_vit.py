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
from unreid_jax import UserError, models, sharding
from unreid_jax.config import resolve
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
  """Variables, or gradients in their place, by their names in PyTorch."""
  state = {}
  for path, x in traverse_util.flatten_dict(tree).items():
    if path[1] == "backbone":
      axes = (3, 2, 0, 1) if x.ndim == 4 else (1, 0)
      x = np.asarray(x).transpose(axes) if path[-1] == "kernel" else x
      state[pretrained.torch_name(encoder, path)] = np.asarray(x)
  return state


def _load(encoder, size):
  """Variables with the references' weights, which come by their names."""
  zeros = _zeros(encoder, *size)
  shapes = _torch_state(encoder, zeros)
  state = {key: ref.value(key, x.shape) for key, x in shapes.items()}
  return pretrained.from_torch(state, encoder, zeros, size)


def _token(out):
  return out.token


def _tokens(out):
  """All tokens in a row, the class token first."""
  b, _, _, dim = out.maps.shape
  maps = out.maps.reshape(b, -1, dim)
  return jnp.concatenate([out.token[:, None], maps], 1)


_CASES = {  # the encoder, the images' size, and what is compared
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
    pytest.importorskip(
      package, reason=f"{package} is not here to compare with"
    )
  return ref.RUNS[name]()


def _run(encoder, variables, size, pick):
  """The backbone's output and its gradients, of the references' loss."""
  images = jnp.asarray(ref.images(*size))

  def loss(params):
    out = pick(encoder.backbone.apply({"params": params}, images, False))
    return (out * ref.value("loss", out.shape)).sum(), out

  params = variables["params"]["backbone"]
  grads, out = jax.jit(jax.grad(loss, has_aux=True))(params)
  return out, ref.sums(_torch_state(encoder, {"params": {"backbone": grads}}))


@pytest.mark.parametrize("source", ["golden", "torch"])
@pytest.mark.parametrize("name", ["overlap", "clip"])
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
  theirs = {"timm": "timm", "clip": "transformers"}[name]
  pytest.importorskip(theirs, reason=f"{theirs} is not here to load them")
  encoder, size, pick = _CASES[name]
  variables = jax.tree.map(
    lambda x: jnp.asarray(ref.value(str(x.shape), x.shape)),
    _zeros(encoder, *size),
  )
  images = jnp.asarray(ref.images(*size))
  got = pick(encoder.backbone.apply(
    {"params": variables["params"]["backbone"]}, images, False
  ))  # fmt: skip
  state = _torch_state(encoder, variables)
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
def test_the_stem(source):
  """In training mode, before any block."""
  want = _want("stem", source)
  encoder = _encoder(stem=8, depth=0)
  variables = _load(encoder, _SIZE)
  params = variables["params"]["backbone"]
  plain = {"scale": jnp.ones(ref.DIM), "bias": jnp.zeros(ref.DIM)}
  params |= {"pos_embed": jnp.zeros((1, 9, ref.DIM)), "norm": plain}
  images = jnp.asarray(ref.images(*_SIZE))

  def loss(params):
    stats = variables["batch_stats"]["backbone"]
    out, _ = encoder.backbone.apply(
      {"params": params, "batch_stats": stats},
      images,
      True,
      mutable=["batch_stats"],
    )
    return (out.maps * ref.value("loss", out.maps.shape)).sum(), out.maps

  grads, out = jax.jit(jax.grad(loss, has_aux=True))(params)
  assert_allclose(out, want["out"], 1e-4, 1e-5)
  grads = ref.sums(_torch_state(encoder, {"params": {"backbone": grads}}))
  names = {key.removeprefix("grad/") for key in want} - {"out"}
  assert names == {key for key in grads if key.startswith("patch_embed")}
  for key in names:
    norm = max(want[f"grad/{key}"][0], 1)
    assert_allclose(grads[key], want[f"grad/{key}"], 1e-3, 1e-3 * norm)


@pytest.mark.parametrize("source", ["golden", "torch"])
def test_positions_are_resized_as_in_torch(source):
  """Bilinearly, between grids of any shape; those that fit stay as they are."""
  if source == "torch":
    pytest.importorskip("torch", reason="torch is not here to compare with")
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
  for shape in (12, 32), (1, 32), (10, 0), (2, 10, 32), (32,):
    odd = half | {"visual.positional_embedding": np.zeros(shape, "f")}
    with pytest.raises(UserError, match=r"its visual.positional_embedding"):
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
        for key, x in _torch_state(encoder, variables).items()
      }
      zeros = _zeros(encoder, *size)
      loaded = pretrained.from_torch(state | extra, encoder, zeros)
      pairs = loaded["params"]["backbone"], variables["params"]["backbone"]
      jax.tree.map(assert_array_equal, *pairs)
      var = loaded["batch_stats"]["head"]["bn"]["var"]
      both = [2] * ref.DIM + [3] * (ref.PROJECTION if name == "clip" else 0)
      assert var.tolist() == both


def test_clip_of_transformers():
  """The names of its file, with the text's half and a buffer beside them."""
  encoder, size, _ = _CASES["clip"]
  state = {key: ref.value(key, x) for key, x in ref.clip_shapes().items()}
  zeros = _zeros(encoder, *size)
  want = pretrained.from_torch(state, encoder, zeros)
  hub = ref.to_transformers(state)
  text = "text_model.encoder.layers.0.self_attn.q_proj.weight"
  hub |= {text: np.ones((4, 4), "f"), "logit_scale": np.float32(1)}
  hub["vision_model.embeddings.position_ids"] = np.arange(17)[None]
  got = pretrained.from_torch(hub, encoder, zeros)
  jax.tree.map(assert_array_equal, got, want)
  at = "vision_model.encoder.layers.1.self_attn"
  positions = "vision_model.embeddings.position_embedding.weight"
  for changes, name in (
    ({f"{at}.k_proj.bias": np.ones(3, "f")}, "in_proj_bias"),
    ({f"{at}.v_proj.weight": np.ones((32, 31), "f")}, "in_proj_weight"),
    ({f"{at}.q_proj.bias": np.float32(1)}, "in_proj_bias"),
    ({"visual_projection.weight": np.float32(1)}, r"visual\.proj"),
    ({positions: np.ones((2, 10, 32), "f")}, "positional_embedding"),
  ):
    with pytest.raises(UserError, match=name):
      pretrained.from_torch(hub | changes, encoder, zeros, size)
  del hub[f"{at}.k_proj.bias"]
  with pytest.raises(UserError, match=r"blocks\.1\.attn\.in_proj_bias"):
    pretrained.from_torch(hub, encoder, zeros)


def test_weights_of_other_transformers_are_refused():
  encoder, size, _ = _CASES["timm"]
  zeros = _zeros(encoder, *size)
  state = _torch_state(encoder, zeros)
  block = np.zeros(ref.DIM, "f")
  for key in "blocks.2.norm1.bias", "patch_embed.conv.0.weight":
    with pytest.raises(UserError, match=f"{key}, which the encoder does not"):
      pretrained.from_torch(state | {key: block}, encoder, zeros)
  for key in "base.sie_embed", "cv_embed", "b1.0.norm1.bias", "b2.1.weight":
    with pytest.raises(UserError, match="of TransReID's SIE or JPM"):
      pretrained.from_torch(state | {key: block}, encoder, zeros)
  with pytest.raises(UserError, match="it has a dist_token, which no encoder"):
    pretrained.from_torch(state | {"base.dist_token": block}, encoder, zeros)
  clip = {key: ref.value(key, x) for key, x in ref.clip_shapes().items()}
  with pytest.raises(UserError, match=r"it has no weight .*, its first is vis"):
    pretrained.from_torch(clip, encoder, zeros)


def test_cards_of_earlier_versions_have_no_such_options():
  options = default.get_config("spcl", "synthetic").encoder.to_dict()
  added = "drop_path", "remat", "bn_momentum", "last_stride"
  for name in "pretrained", *added:
    del options[name]
  models.make(**options)


def test_mistakes_are_explained(make_encoder):
  for key, value, line in (
    ("drop_path", 0.1, r"resnet18 has no drop_path: set .*drop_path to 0\.0"),
    ("remat", True, r"resnet18 has no remat: set encoder\.remat to False"),
    (
      "last_stride",
      2,
      r"osnet_x1_0 has no last_stride: set .*last_stride to 1",
    ),
  ):
    with pytest.raises(UserError, match=line):
      make_encoder(arch=line.split()[0], **{key: value})
  with pytest.raises(UserError, match=r"64x15 pixels .* patch of 16: raise"):
    encoder = make_encoder(arch="vit_small")
    jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 64, 15, 3)))


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


def test_bfloat16_stays_close_and_returns_float32():
  want = np.load(ref.GOLDENS)["clip/out"]
  encoder, size = _CLIP(dtype="bfloat16"), (32, 32)
  images = jnp.asarray(ref.images(*size))
  with jax.numpy_dtype_promotion("standard"):  # for Flax's layer norm
    variables = _load(encoder, size)
    apply = jax.jit(lambda v: encoder.backbone.apply(v, images, False).token)
    token = apply({"params": variables["params"]["backbone"]})
    out = jax.eval_shape(encoder.apply, variables, images)
  assert (token.dtype, out.dtype) == (jnp.bfloat16, jnp.float32)
  token = token.astype("float32")
  assert_allclose(token, want, 0, 0.1 * abs(want).max())
  assert abs(token - want).max() > 1e-4  # computed in bfloat16


def test_float64_is_exact_on_any_number_of_devices(float64):
  """With drop path, and whether or not blocks are computed again."""

  def step(params, encoder, variables, images):
    out, stats = encoder.apply(
      variables | {"params": params},
      images,
      True,
      mutable=["batch_stats"],
      rngs={"drop_path": jax.random.key(3)},
    )
    return jnp.sin(9 * out).sum(), (out, stats)

  images = jnp.asarray(ref.value("images", (16, *_SIZE, 3)), "float64")
  results = []
  for num_devices in 1, 8:
    remat = num_devices == 8
    encoder = _CLIP(drop_path=0.3, remat=remat, dtype="float64")
    variables = jax.tree.map(
      lambda x: jnp.asarray(ref.value(str(x.shape), x.shape), "float64"),
      _zeros(encoder),
    )
    mesh = sharding.make_mesh(num_devices)
    rows = jax.device_put(images, NamedSharding(mesh, sharding.ROWS))
    run = jax.jit(jax.grad(step, has_aux=True), static_argnums=1)
    traced = run.trace(variables["params"], encoder, variables, rows)
    assert ("remat" in str(traced.jaxpr)) == remat
    compiled = traced.lower().compile()
    out = compiled(variables["params"], variables, rows)
    results.append(jax.device_get(out))
  for part in zip(*results, strict=True):
    one, eight = map(jax.tree.leaves, part)
    assert {x.dtype for x in one} == {np.dtype("float64")}
    largest = max(abs(x).max() for x in one)
    for x, y in zip(one, eight, strict=True):
      assert_allclose(y, x, 0, 1e-12 * largest)


def _recipe(monkeypatch):
  """The config of a small network with all that the recipes may have."""
  tiny = functools.partial(vit.ViT, 32, 2, 2, patch=8, stride=8)
  monkeypatch.setitem(vit.ARCHS, "tiny", tiny)
  config = default.get_config("cluster_contrast", "synthetic")
  config.update_from_flattened_dict(
    {
      "num_devices": 1,
      "batch_size": 16,
      "dataset.height": 32,
      "dataset.width": 16,
      "augment.flip": False,
      "augment.pad": 0,
      "augment.erase_probability": 0.0,
      "encoder.arch": "tiny",
      "encoder.pooling": "token",
      "encoder.drop_path": 0.3,
      "optim.name": "sgd",
      "optim.lr": 0.02,
      "optim.frozen": ("patch_embed_proj",),
      "optim.layer_decay": 0.9,
      "optim.cosine": "10 epochs",
    }
  )
  return config


def test_training(monkeypatch):
  """It learns, what is frozen stays, and steps drop paths of their own."""
  labels = np.arange(48, dtype=np.int32) // 6
  rng = np.random.default_rng(0)
  colours = rng.integers(0, 200, (8, 4, 1, 3))[labels].repeat(8, 1)
  images = colours + rng.integers(0, 50, (48, *_SIZE, 3))
  arrays = {"images": images.astype(np.uint8), "labels": labels}
  arrays |= {"camids": labels * 0, "indices": np.arange(48, dtype=np.int32)}
  mesh = sharding.make_mesh(1)
  copies = NamedSharding(mesh, sharding.COPY)
  key = jax.device_put(jax.random.key(0), copies)
  with jax.set_mesh(mesh):
    parts = make_parts(resolve(_recipe(monkeypatch), 10))
    first = first_state(parts, 48, weights="")
    features = parts.encoder(first)(arrays["images"])
    refresh = jax.jit(parts.method.refresh, static_argnums=3)
    method = refresh(first.method, labels, features, None)
    method = jax.device_put(method, shardings(mesh, first.method))
    compiled = compile_step(parts, first, key)

  def step(state, i):
    rows = np.random.default_rng(i).permutation(48)[:16]
    batch = {k: sharding.put_rows(mesh, x, rows) for k, x in arrays.items()}
    state = jax.tree.map(jnp.copy, state)  # the step gives it away
    state, metrics = compiled(state, batch, key)
    return state, float(metrics["loss"])

  # The pass in training mode drops paths, too.
  jax.eval_shape(parts.adapt, first.variables, arrays["images"], key)

  state, losses = first.replace(method=method), []
  for i in range(25):
    before = state
    state, loss = step(state, i)
    losses.append(loss)
  assert np.mean(losses[20:]) < 0.8 * np.mean(losses[:5])
  pairs = first.params["backbone"], state.params["backbone"]
  is_same = jax.tree.map(lambda a, b: bool((a == b).all()), *pairs)
  assert all(jax.tree.leaves(is_same.pop("patch_embed_proj")))
  assert not any(jax.tree.leaves(is_same))
  again, loss = step(before, 24)
  jax.tree.map(assert_array_equal, again, state)
  # Nothing but the drop path knows which step it is.
  later = before.replace(step=before.step + 1)
  assert abs(step(later, 24)[1] - loss) > 1e-3
