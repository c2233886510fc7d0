"""The names of CLIP's image encoder: those of OpenAI, and of transformers."""

import re

import numpy as np

# From the names of timm's vision transformers to OpenAI's, one after the other.
_OPENAI = {
  r"^patch_embed\.proj": "conv1",
  r"^cls_token": "class_embedding",
  r"^pos_embed": "positional_embedding",
  r"^norm_pre": "ln_pre",
  r"^norm\.": "ln_post.",
  r"^blocks": "transformer.resblocks",
  r"\.norm": ".ln_",
  r"attn\.qkv\.kernel": "attn.in_proj_weight",
  r"attn\.qkv\.bias": "attn.in_proj_bias",
  r"attn\.proj": "attn.out_proj",
  r"mlp\.fc1": "mlp.c_fc",
  r"mlp\.fc2": "mlp.c_proj",
}
# From the names of transformers to OpenAI's.
_TRANSFORMERS = {
  r"^vision_model\.embeddings\.patch_embedding": "visual.conv1",
  r"^vision_model\.embeddings\.class_embedding": "visual.class_embedding",
  r"^vision_model\.embeddings\.position_embedding\.weight": (
    "visual.positional_embedding"
  ),
  r"^vision_model\.pre_layrnorm": "visual.ln_pre",
  r"^vision_model\.post_layernorm": "visual.ln_post",
  r"^vision_model\.encoder\.layers": "visual.transformer.resblocks",
  r"\.layer_norm": ".ln_",
  r"self_attn\.([qkv])_proj\.": r"attn.\1_proj_",
  r"self_attn\.out_proj": "attn.out_proj",
  r"mlp\.fc1": "mlp.c_fc",
  r"mlp\.fc2": "mlp.c_proj",
}


def from_timm(name: str) -> str:
  """From "blocks.0.norm1.scale" to "visual.transformer.resblocks.0.ln_1.scale".

  OpenAI's in_proj_weight is the kernel of timm's qkv.
  """
  return f"visual.{_rename(name, _OPENAI)}"


def from_transformers(key: str) -> str:
  """OpenAI's name of a key of transformers; others stay as they are.

  What transformers keeps in several arrays keeps names of its own, see `join`.
  """
  is_of_images = key.startswith("vision_model.")
  return _rename(key, _TRANSFORMERS) if is_of_images else key


def join(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The arrays of transformers, so renamed, as OpenAI's arrays.

  The two necks of PCL-CLIP become one, "feat_bn".
  """
  state = dict(state)
  if "visual_projection.weight" in state:
    state["visual.proj"] = state.pop("visual_projection.weight").T
  for key in list(state):
    if ".attn.q_proj_" in key:
      names = [key.replace(".q_proj_", f".{x}_proj_") for x in "qkv"]
      _concatenate(state, names, key.replace(".q_proj_", ".in_proj_"))
    if key.startswith("bottleneck_proj."):
      first = "feat_bn." + key.removeprefix("bottleneck_proj.")
      _concatenate(state, [first, key], first)
  return state


def _concatenate(state, names, name):
  """Makes one array of those that there are, if they fit together."""
  parts = [state[x] for x in names if x in state]
  shapes = {x.shape[1:] if x.ndim else None for x in parts}
  if len(shapes) == 1 and None not in shapes:
    for old in names:
      state.pop(old, None)
    state[name] = np.concatenate(parts)


def _rename(name, patterns):
  for pattern, replacement in patterns.items():
    name = re.sub(pattern, replacement, name)
  return name
