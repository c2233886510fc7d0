"""Weights trained in PyTorch, loaded into an encoder's variables."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from unreid_jax import UserError

# Position in nn.Sequential of the re-ID code bases: torchvision's name.
_BASE = {"0": "conv1", "1": "bn1"} | {str(i + 3): f"layer{i}" for i in range(5)}
_LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "mean": "running_mean",
  "var": "running_var",
}
_HEAD = {
  "pool": "gap",
  "bn": "feat_bn",
  "embedding": "avg_pooling.embeding",
  "embedding_bn": "avg_pooling.embeding_bn",
  "stripes": "local_pooling.local_conv_list.{}.0",
  "stripes_bn": "local_pooling.local_conv_list.{}.1",
}


def load(path: str | pathlib.Path, variables: dict) -> dict:
  """Loads weights from a file; see `from_torch`.

  Args:
    path: .safetensors, or whatever torch.save wrote (then PyTorch must be
      installed), bare or as {"state_dict": ...}.
    variables: params and batch_stats of an encoder; not changed.

  Raises:
    UserError: no such file, not readable, or made for another encoder.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise UserError(f"{path}: no such file: download the weights there first")
  read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
  try:
    return from_torch(read(path), variables)
  except UserError as error:
    raise UserError(f"{path}: {error}") from None


def from_torch(state: dict[str, np.ndarray], variables: dict) -> dict:
  """Replaces the variables that a PyTorch state dict holds.

  Understands the names of torchvision and IBN-Net ("layer1.0.conv1.weight"),
  of Cluster Contrast, SpCL and HHCL ("base.4.0.conv1.weight", "feat_bn.*",
  "gap.p") and of Unsup_ReID ("CNN.layer1.0.conv1.weight", "avg_pooling.*",
  "local_pooling.*"), with or without "module." in front. A head that is not
  in the file keeps its values; classifiers are ignored.

  Args:
    state: name to array, laid out as in PyTorch.
    variables: params and batch_stats of an encoder; not changed.

  Returns:
    new variables.

  Raises:
    UserError: a weight of the backbone is missing, or a shape differs.
  """
  state = {_torchvision_name(key): value for key, value in state.items()}
  flat = traverse_util.flatten_dict(variables)
  new = {path: _replace(path, old, state) for path, old in flat.items()}
  return traverse_util.unflatten_dict(new)


def _torchvision_name(key: str) -> str:
  key = re.sub(r"^(module\.)?(CNN\.)?", "", key)
  return re.sub(r"^base\.([014567])", lambda match: _BASE[match[1]], key)


def _torch_name(path: tuple[str, ...]) -> str:
  """("params", "backbone", "layer1_0", "conv1", "kernel") and its like."""
  _, part, *names, leaf = path
  name = ".".join(names)
  name = re.sub(r"_(\d)", r".\1", name) if part == "backbone" else _HEAD[name]
  return f"{name}.{_LEAVES.get(leaf, leaf)}"


def _replace(path: tuple[str, ...], old, state: dict[str, np.ndarray]):
  name = _torch_name(path)
  keys = [name]
  if "{}" in name:  # all stripes are one array of ours
    keys = [key for i in range(len(state)) if (key := name.format(i)) in state]
  if not keys or keys[0] not in state:
    if path[1] == "head":
      return old
    raise UserError(
      f"it has no weight {name}: choose the encoder.arch it is for"
    )
  arrays = [_to_channels_last(np.asarray(state[key])) for key in keys]
  if "{}" not in name:
    new = arrays[0]
  else:
    new = (np.concatenate if path[2] == "stripes_bn" else np.stack)(arrays)
  if new.shape != old.shape:
    raise UserError(
      f"its {name} makes an array of {new.shape}, the encoder's is "
      f"{old.shape}: set encoder.arch, width and dimensions to the file's"
    )
  return jnp.asarray(new, old.dtype)


def _to_channels_last(array: np.ndarray) -> np.ndarray:
  """[out, in, h, w] to [h, w, in, out], [out, in] to [in, out]."""
  return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    return safetensors.numpy.load_file(path)
  except safetensors.SafetensorError as error:
    raise UserError(
      f"not a safetensors file ({error}): copy it again"
    ) from error


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
