"""Vision transformers: ViT, DeiT, and CLIP's image encoder."""

import functools
import math
import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from unreid_jax import UserError
from unreid_jax.models import clip_names
from unreid_jax.models.backbones import Tokens, dotted, drop_images
from unreid_jax.models.backbones.resnet import MEAN, STD
from unreid_jax.models.conv import KAIMING, Conv
from unreid_jax.models.norm import GhostBatchNorm, InstanceBatchNorm, widen

_HALF = (0.5,) * 3
_CLIP_MEAN = 0.48145466, 0.4578275, 0.40821073
_CLIP_STD = 0.26862954, 0.26130258, 0.27577711
_INIT = nn.initializers.truncated_normal(0.02)


class ViT(nn.Module):
  """Images to a feature map and a class token, `stride` times smaller.

  Dosovitskiy et al., ICLR 2021, as in timm and DINO. Position embeddings have
  the size of the images that the variables are made for.

  CLIP's (Radford et al., ICML 2021) differs in its activation and one more
  norm, and ends in a projection. As PCL-CLIP (Li and Gong, 2023) uses both, the
  feature before the projection and the one after it are one vector here, of 768
  + 512 channels: batch norm treats each channel alone, so that one neck does
  what their two necks do.

  With a `stem`, three convolutions come before the patches: the "ICS" of
  TransReID-SSL (Luo et al., 2021).
  """

  dim: int = 384
  heads: int = 6
  depth: int = 12
  mean: tuple[float, float, float] = _HALF
  std: tuple[float, float, float] = _HALF
  stride: int = 16  # below `patch`, patches overlap, as in TransReID
  patch: int = 16
  projection: int = 0  # channels after CLIP's projection; 0: not CLIP's
  stem: int = 0  # channels of convolutions before; 0: there are none
  drop_path: float = 0.0  # the probability that an image skips the last block
  remat: bool = False  # compute blocks again for the gradient: less memory
  width: float = 1.0  # times the channels of each of the heads
  norm: Callable[..., nn.Module] = GhostBatchNorm  # in the stem
  dtype: str = "float32"  # of the computation; parameters keep theirs

  @nn.compact
  def __call__(self, x: Float[Array, "b H W 3"], train: bool) -> Tokens:
    norm = functools.partial(
      nn.LayerNorm,
      epsilon=1e-5 if self.projection else 1e-6,
      dtype=jnp.dtype(self.dtype),
      use_fast_variance=False,
    )
    x = self._embed(x.astype(jnp.dtype(self.dtype)), train)
    b, h, w, dim = x.shape
    lead = () if self.projection else (1,)  # an axis that CLIP's do not have
    token = self.param("cls_token", _INIT, (*lead, *lead, dim))
    positions = self.param("pos_embed", _INIT, (*lead, 1 + h * w, dim))
    token = jnp.broadcast_to(token.astype(x.dtype), (b, 1, dim))
    x = jnp.concatenate([token, x.reshape(b, h * w, dim)], 1)
    x += positions.astype(x.dtype).reshape(1, 1 + h * w, dim)
    if self.projection:
      x = norm(name="norm_pre")(x)
    first = self.get_variable("batch", "first", 0)
    block = nn.remat(Block, static_argnums=2) if self.remat else Block
    # As in timm, the probability grows from 0 in the first block.
    for i, drop in enumerate(np.linspace(0, self.drop_path, self.depth)):
      gelu = quick_gelu if self.projection else exact_gelu
      x = block(self.heads, float(drop), gelu, norm, name=f"blocks_{i}")(
        x, train, first
      )
    x = norm(name="norm")(x)
    if self.projection:
      init = nn.initializers.normal(dim**-0.5)
      proj = self.param("proj", init, (dim, self.projection))
      x = jnp.concatenate([x, x @ proj.astype(x.dtype)], -1)
    return Tokens(x[:, 1:].reshape(b, h, w, -1), x[:, 0])

  @nn.nowrap
  def _embed(self, x, train):
    """A vector for each patch."""
    if min(x.shape[1:3]) < self.patch:
      raise UserError(
        f"images of {x.shape[1]}x{x.shape[2]} pixels are smaller than a patch "
        f"of {self.patch}: raise dataset.height and dataset.width"
      )
    shrink = 2 if self.stem else 1
    for i, size in ((0, 7), (3, 3), (6, 3)) if self.stem else ():
      name = f"patch_embed_conv_{i}"
      x = Conv(self.stem, size, 1 if i else 2, name=name)(x)
      half = functools.partial(InstanceBatchNorm, self.norm)
      norm = self.norm if i == 6 else half
      x = nn.relu(norm(name=f"patch_embed_conv_{i + 1}")(x, train))
    channels = 8 * max(1, round(self.width * self.dim / self.heads / 8))
    return nn.Conv(
      self.heads * channels,
      (self.patch // shrink,) * 2,
      self.stride // shrink,
      "VALID",
      use_bias=not self.projection,
      dtype=x.dtype,
      kernel_init=KAIMING,
      name="patch_embed_proj",
    )(x)

  @nn.nowrap
  def torch_key(self, key: str) -> str:
    """To timm's "blocks.0.attn.qkv.weight", or the name in OpenAI's CLIP.

    TransReID saves "base.blocks.0...", DINO "backbone.blocks.0...", and
    PCL-CLIP and CLIP-ReID "image_encoder..." for "visual...". Their neck is
    "bottleneck". Of transformers, see `clip_names`.

    Raises:
      UserError: the network has more tokens, or is one of TransReID or
        CLIP-ReID that adds an embedding of the camera, or takes its feature
        from branches of its own.
    """
    key = re.sub(r"^(base|backbone)\.", "", key)
    if key in ("dist_token", "reg_token"):
      raise UserError(f"it has a {key}, which no encoder here has")
    if re.match(r"(sie_embed$|cv_embed$|b[12]\.)", key):
      raise UserError(
        f"its {key} is of TransReID's SIE or JPM, which no encoder here has"
      )
    key = re.sub(r"^image_encoder\.", "visual.", key)
    key = re.sub(r"^bottleneck\.", "feat_bn.", key)
    return clip_names.from_transformers(key) if self.projection else key

  @nn.nowrap
  def torch_name(self, path: tuple[str, ...]) -> str:
    """From ("blocks_0", "attn_qkv", "kernel") to timm's or CLIP's name."""
    name = re.sub(r"\b(patch_embed|attn|mlp)_", r"\1.", dotted(path))
    return clip_names.from_timm(name) if self.projection else name

  @nn.nowrap
  def torch_state(
    self, state: dict[str, np.ndarray], size: tuple[int, int] | None
  ) -> dict[str, np.ndarray]:
    """The state with positions for images of this height and width.

    They are resized bilinearly and without antialiasing, as in TransReID,
    TransReID-SSL, CLIP-ReID and PCL-CLIP, whose results are the published ones;
    timm's are bicubic with antialiasing, DINO's bicubic without.
    """
    state, name = clip_names.join(state), self.torch_name(("pos_embed",))
    if size and name in state:
      grid = [(x - self.patch) // self.stride + 1 for x in size]
      state[name] = _resize(state[name], grid)
    return state


class Block(nn.Module):
  """Attention and two dense layers, each after a norm and beside a shortcut."""

  heads: int
  drop_path: float
  gelu: Callable
  norm: Callable[..., nn.Module]

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n c"], train: bool, first: Int[ArrayLike, ""] = 0
  ) -> Array:
    b, n, dim = x.shape
    dense = functools.partial(nn.Dense, dtype=x.dtype, kernel_init=_INIT)
    qkv = dense(3 * dim, name="attn_qkv")(self.norm(name="norm1")(x))
    qkv = qkv.reshape(b, n, 3, self.heads, dim // self.heads)
    q, k, v = (qkv[:, :, i] for i in range(3))
    # Not jax.nn.dot_product_attention: its softmax is in float32 always.
    logits = widen(jnp.einsum("bqhc,bkhc->bhqk", q * q.shape[-1] ** -0.5, k))
    weights = jax.nn.softmax(logits).astype(x.dtype)
    y = jnp.einsum("bhqk,bkhc->bqhc", weights, v)
    y = dense(dim, name="attn_proj")(y.reshape(b, n, dim))
    x += drop_images(self, y, train, first)
    y = dense(4 * dim, name="mlp_fc1")(self.norm(name="norm2")(x))
    y = dense(dim, name="mlp_fc2")(self.gelu(y))
    return x + drop_images(self, y, train, first)


exact_gelu = functools.partial(nn.gelu, approximate=False)


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """x * sigmoid(1.702 x): CLIP's."""
  return x * jax.nn.sigmoid(1.702 * x)


def _resize(positions, grid):
  """Position embeddings, the class token's first, for another grid.

  Those for the square images of ImageNet and CLIP, and for images twice as high
  as wide, tell their grid by their number. Others stay as they are.
  """
  *lead, count, dim = positions.shape if positions.ndim > 1 else (0, 0)
  side = lambda ratio: math.isqrt(max(count - 1, 0) // ratio)
  known = {ratio * side(ratio) ** 2: ratio for ratio in (1, 2)}
  is_known = count > 1 and count - 1 in known
  is_known = is_known and 0 < positions.size == count * dim
  if not is_known or count == 1 + math.prod(grid):
    return positions
  old = positions.reshape(count, dim)
  old = old.astype(np.promote_types(old.dtype, np.float32))
  maps = old[1:].reshape(-1, side(known[count - 1]), dim)
  maps = jax.image.resize(maps, (*grid, dim), "linear", antialias=False)
  new = np.concatenate([old[:1], np.asarray(maps).reshape(-1, dim)])
  return new.reshape(*lead, -1, dim)


_SIZES = {"small": (384, 6), "base": (768, 12)}
_DEIT = {"mean": MEAN, "std": STD}  # DINO's as well
_CLIP = {"mean": _CLIP_MEAN, "std": _CLIP_STD, "projection": 512}
ARCHS = {
  f"{kind}_{size}": functools.partial(ViT, *shape, **options)
  for size, shape in _SIZES.items()
  for kind, options in (("vit", {}), ("deit", _DEIT), ("clip_vit", _CLIP))
  if (kind, size) != ("clip_vit", "small")
}
ARCHS |= {
  f"{name}_stride12": functools.partial(make, stride=12)
  for name, make in ARCHS.items()
} | {
  f"vit_{size}_ics": functools.partial(ViT, *shape, stem=64)
  for size, shape in _SIZES.items()
}
