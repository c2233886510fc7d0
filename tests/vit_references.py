"""What timm's and transformers' own networks make of small, fixed weights.

`python tests/vit_references.py` writes tests/goldens/vit.npz, with which the
tests compare where PyTorch, timm and transformers are not installed. It was
made with their versions 2.13.0, 1.0.31 and 5.24.0.
"""

import pathlib
import re
import zlib

import numpy as np

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "vit.npz"
DIM, HEADS, DEPTH, PATCH, PROJECTION = 32, 2, 2, 8, 24
GRIDS = {(4, 4): (8, 3), (8, 4): (6, 2), (14, 14): (16, 8)}  # from, to


def value(key, shape):
  """The weights, or whatever is called so; norms are not at their start."""
  seed = zlib.crc32(key.encode())
  x = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
  if key.endswith("running_var"):
    return abs(x)
  return 1 + 0.3 * x if re.search(r"(norm|ln_)\w*\.weight", key) else 0.3 * x


def sums(grads):
  """Of each gradient its norm, and its product with a random direction."""
  return {
    name: np.float32([np.linalg.norm(x), (x * value(name, x.shape)).sum()])
    for name, x in grads.items()
  }


def timm_vit(stride):
  """timm's network, with patches that overlap as TransReID makes them."""
  import timm
  import torch

  grid = [(x - PATCH) // stride + 1 for x in (32, 16)]
  net = timm.models.vision_transformer.VisionTransformer(
    img_size=(32, 16), patch_size=PATCH, embed_dim=DIM, depth=DEPTH,
    num_heads=HEADS, num_classes=0,
  ).eval()  # fmt: skip
  net.patch_embed.proj.stride = stride, stride
  positions = torch.zeros(1, 1 + grid[0] * grid[1], DIM)
  net.pos_embed = torch.nn.Parameter(positions)
  return net


def clip_vit():
  """The network of transformers, for square images only."""
  import transformers

  config = transformers.CLIPVisionConfig(
    hidden_size=DIM, intermediate_size=4 * DIM, projection_dim=PROJECTION,
    num_hidden_layers=DEPTH, num_attention_heads=HEADS, image_size=32,
    patch_size=PATCH,
  )  # fmt: skip
  return transformers.CLIPVisionModelWithProjection(config).eval()


_TRANSFORMERS = {
  r"^visual\.": "vision_model.",
  r"conv1\.": "embeddings.patch_embedding.",
  r"class_embedding": "embeddings.class_embedding",
  r"positional_embedding": "embeddings.position_embedding.weight",
  r"ln_pre": "pre_layrnorm",
  r"ln_post": "post_layernorm",
  r"transformer\.resblocks": "encoder.layers",
  r"\.ln_": ".layer_norm",
  r"attn\.out_proj": "self_attn.out_proj",
  r"mlp\.c_fc": "mlp.fc1",
  r"mlp\.c_proj": "mlp.fc2",
  r"^vision_model\.proj$": "visual_projection.weight",
}


def to_transformers(state):
  """From the names of OpenAI's CLIP to those of transformers."""
  renamed = {}
  for key, x in state.items():
    for pattern, name in _TRANSFORMERS.items():
      key = re.sub(pattern, name, key)
    if found := re.fullmatch(r"(.*)attn\.in_proj_(\w+)", key):
      for part, third in zip("qkv", np.split(x, 3), strict=True):
        renamed[f"{found[1]}self_attn.{part}_proj.{found[2]}"] = third
    else:
      renamed[key] = x.T if key == "visual_projection.weight" else x
  return renamed


def from_transformers(state):
  """The way back."""
  names = {}
  for key in clip_shapes():
    for new in to_transformers({key: np.zeros((3, 1))}):
      names.setdefault(key, []).append(new)
  joined = {
    key: np.concatenate([state[name] for name in parts])
    for key, parts in names.items()
  }
  return joined | {"visual.proj": joined["visual.proj"].T}


def clip_shapes():
  """Name and shape of each weight of CLIP's image encoder, as OpenAI has it."""
  shapes = {
    "visual.class_embedding": (DIM,),
    "visual.positional_embedding": (17, DIM),
    "visual.proj": (DIM, PROJECTION),
    "visual.conv1.weight": (DIM, 3, PATCH, PATCH),
  }
  for name in "ln_pre", "ln_post":
    shapes |= {f"visual.{name}.{k}": (DIM,) for k in ("weight", "bias")}
  for i in range(DEPTH):
    for name, out, inside in (
      ("ln_1.", DIM, ()),
      ("ln_2.", DIM, ()),
      ("attn.in_proj_", 3 * DIM, (DIM,)),
      ("attn.out_proj.", DIM, (DIM,)),
      ("mlp.c_fc.", 4 * DIM, (DIM,)),
      ("mlp.c_proj.", DIM, (4 * DIM,)),
    ):
      at = f"visual.transformer.resblocks.{i}.{name}"
      shapes |= {f"{at}weight": (out, *inside), f"{at}bias": (out,)}
  return shapes


def tensors(state):
  """NumPy's arrays as PyTorch's."""
  import torch

  return {key: torch.from_numpy(np.array(x)) for key, x in state.items()}


def images(*shape):
  """Three images, channels last."""
  return value("images", (3, *shape, 3)) / 0.3


def _channels_first(x):
  return tensors({"x": x.transpose(0, 3, 1, 2)})["x"]


def _result(out, net, rename=lambda grads: grads):
  """The features, and what `sums` has of a loss's gradients, by name."""
  (out * tensors({"x": value("loss", out.shape)})["x"]).sum().backward()
  grads = {k: p.grad.numpy() for k, p in net.named_parameters()}
  grads = {f"grad/{k}": x for k, x in sums(rename(grads)).items()}
  return {"out": out.detach().numpy(), **grads}


def run_timm(stride):
  """All tokens of the last norm, [b, n, c], and the gradients' sums."""
  net = timm_vit(stride)
  shapes = {k: tuple(x.shape) for k, x in net.state_dict().items()}
  net.load_state_dict(tensors({k: value(k, x) for k, x in shapes.items()}))
  return _result(net.forward_features(_channels_first(images(32, 16))), net)


def run_clip():
  """Both features of the class token in a row, and the gradients' sums."""
  import torch

  net = clip_vit()
  state = {key: value(key, shape) for key, shape in clip_shapes().items()}
  net.load_state_dict(tensors(to_transformers(state)), strict=True)
  out = net(_channels_first(images(32, 32)))
  pooled = net.vision_model.post_layernorm(out.last_hidden_state[:, 0])
  out = torch.cat([pooled, out.image_embeds], 1)
  return _result(out, net, from_transformers)


def run_stem():
  """TransReID-SSL's stem in training mode, written anew, and a layer norm."""
  import torch
  from torch import nn

  class Half(nn.Module):
    def __init__(self):
      super().__init__()
      self.IN, self.BN = nn.InstanceNorm2d(4, affine=True), nn.BatchNorm2d(4)

    def forward(self, x):
      return torch.cat([self.IN(x[:, :4]), self.BN(x[:, 4:])], 1)

  conv = lambda inputs, size, stride: nn.Conv2d(
    inputs, 8, size, stride, size // 2, bias=False
  )
  layers = [conv(3, 7, 2), Half(), nn.ReLU(), conv(8, 3, 1), Half(), nn.ReLU()]
  layers += [conv(8, 3, 1), nn.BatchNorm2d(8), nn.ReLU()]
  half = PATCH // 2
  parts = {
    "conv": nn.Sequential(*layers),
    "proj": nn.Conv2d(8, DIM, half, half),
  }
  net = nn.ModuleDict({"patch_embed": nn.ModuleDict(parts)})
  names = {k: p.shape for k, p in net.named_parameters()}
  state = {key: value(key, tuple(shape)) for key, shape in names.items()}
  net.load_state_dict(tensors(state), strict=False)
  x = _channels_first(images(32, 16))
  out = parts["proj"](parts["conv"](x)).permute(0, 2, 3, 1)
  return _result(nn.functional.layer_norm(out, (DIM,), eps=1e-6), net)


def run_resize():
  """Position embeddings of one grid for another, as the re-ID code bases."""
  from torch.nn.functional import interpolate

  return {
    str(old): interpolate(
      _channels_first(value("positions", (1, *old, 5))), new, mode="bilinear"
    )
    .permute(0, 2, 3, 1)
    .numpy()
    for old, new in GRIDS.items()
  }


RUNS = {
  "overlap": lambda: run_timm(PATCH // 2),
  "clip": run_clip,
  "stem": run_stem,
  "resize": run_resize,
}

if __name__ == "__main__":
  results = {name: run() for name, run in RUNS.items()}
  flat = {f"{k}/{x}": v for k, r in results.items() for x, v in r.items()}
  np.savez_compressed(GOLDENS, **flat)
