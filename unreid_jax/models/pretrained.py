"""Weights trained in PyTorch, loaded into an encoder's variables."""

import pathlib

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from unreid_jax import UserError
from unreid_jax.models import Encoder

_LEAVES = {"kernel": "weight", "scale": "weight"}
_LEAVES |= {"mean": "running_mean", "var": "running_var"}
_HEAD = {
  "pool": "gap",
  "bn": "feat_bn",
  "embedding": "avg_pooling.embeding",
  "embedding_bn": "avg_pooling.embeding_bn",
  "stripes": "local_pooling.local_conv_list.{}.0",
  "stripes_bn": "local_pooling.local_conv_list.{}.1",
}


def load(path: str | pathlib.Path, encoder: Encoder, variables: dict) -> dict:
  """The variables with the weights of a file in place; see `from_torch`.

  The file is a .safetensors, or a state dict or {"state_dict": ...} that
  torch.save wrote; reading that needs PyTorch.

  Raises:
    UserError: there is no such file, it cannot be read, or its weights are for
      another encoder.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise UserError(f"{path}: no such file: download the weights there first")
  read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
  try:
    return from_torch(read(path), encoder, variables)
  except UserError as error:
    raise UserError(f"{path}: {error}") from None


def from_torch(
  state: dict[str, np.ndarray], encoder: Encoder, variables: dict
) -> dict:
  """The variables with the weights of a PyTorch state dict in their place.

  The backbone knows its names, see `backbones.Backbone`. Heads have those of
  Cluster Contrast, SpCL and HHCL ("feat_bn.*", "gap.p") and of Unsup_ReID
  ("avg_pooling.*", "local_pooling.*"). A head keeps the variables that the
  state dict does not have; classifiers are ignored. The arrays have PyTorch's
  order of axes.

  Raises:
    UserError: a weight of the backbone is missing, or a shape differs.
  """
  torch_key = encoder.backbone.torch_key
  state = {torch_key(key): value for key, value in state.items()}
  flat = traverse_util.flatten_dict(variables)
  new = {path: _replace(encoder, path, flat[path], state) for path in flat}
  return traverse_util.unflatten_dict(new)


def torch_name(encoder: Encoder, path: tuple[str, ...]) -> str:
  """The PyTorch name of the variable with a path like ("params", "head", ...).

  All stripes are one variable, and their name has "{}" in place of a number.
  """
  _, part, *names = path
  if part == "backbone":
    name, leaf = encoder.backbone.torch_name(tuple(names)).rsplit(".", 1)
  else:
    name, leaf = _HEAD[names[0]], names[-1]
  return f"{name}.{_LEAVES.get(leaf, leaf)}"


def _replace(encoder, path, old, state):
  name = torch_name(encoder, path)
  names = dict.fromkeys(name.format(i) for i in range(len(state)))
  arrays = [np.asarray(state[key]) for key in names if key in state]
  if not arrays:
    if path[1] == "head":
      return old
    raise UserError(f"it has no weight {name}: set encoder.arch to the file's")
  # PyTorch has [out, in, h, w] and [out, in].
  arrays = [x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T for x in arrays]
  # The weights of stripes have an axis for them; their norms are one norm.
  new = (np.stack if path[2] == "stripes" else np.concatenate)(arrays)
  if new.shape != old.shape:
    raise UserError(
      f"its {name} makes an array of {new.shape}, the encoder's is "
      f"{old.shape}: set encoder.arch, width and dimensions to the file's"
    )
  return jnp.asarray(new, old.dtype)


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    return safetensors.numpy.load_file(path)
  except safetensors.SafetensorError as bad:
    raise UserError(f"not a safetensors file ({bad}): copy it again") from None


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    import torch
  except ImportError:
    raise UserError(
      "reading it needs PyTorch: pip install torch, or convert it to "
      ".safetensors where PyTorch is installed"
    ) from None
  # The references save their best mAP, a NumPy scalar, with the weights.
  scalar = np.float64(0).__reduce__()[0]
  old_name = (scalar, "numpy.core.multiarray.scalar")
  safe = [scalar, old_name, np.dtype, np.dtypes.Float64DType]
  try:
    with torch.serialization.safe_globals(safe):
      state = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:
    reason = str(error).partition("\n")[0]
    raise UserError(f"not weights that PyTorch can read: {reason}") from error
  state = state.get("state_dict", state)
  return {key: value.float().numpy() for key, value in state.items()}
