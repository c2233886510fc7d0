"""A trained encoder for other frameworks: a function and a name a format."""

import json
import logging
import re
from collections.abc import Callable

import numpy as np
import safetensors.numpy
from flax import traverse_util

from unreid_jax import UserError, models, values
from unreid_jax.encode import CARD, Encoder
from unreid_jax.models.backbones.resnet import PLACES, ResNet
from unreid_jax.models.pretrained import torch_name
from unreid_jax.workdir import whole_file

_LAYERS = {layer: place for place, layer in PLACES.items()}
_log = logging.getLogger(__name__)


def export(encoder: Encoder, path: str, format: str) -> None:
  """Writes an encoder into a file, the old one or the whole new one.

  Args:
    encoder: what is written.
    path: the file.
    format: a key of `FORMATS`.

  Raises:
    UserError: there is no such format, the encoder has no such form, or the
      file cannot be written.
  """
  if format not in FORMATS:
    raise UserError(f'--format="{format}": set it to {" or ".join(FORMATS)}')
  if not path:
    raise UserError("say where to write to: --output=FILE")
  content = FORMATS[format](encoder)
  with whole_file(values.expand(path, "--output"), "--output") as file:
    file.write(content)
  arch, size = encoder.card["encoder"]["arch"], len(content) / 2**20
  _log.info("%s: %s as %s, %.1f MB", path, arch, format, size)


def torch_state(encoder: Encoder) -> dict[str, np.ndarray]:
  """The weights as a PyTorch state dict, the inverse of `pretrained`.

  A ResNet's backbone has torchvision's names, an EfficientNet's timm's. The
  head "neck" is "feat_bn.*" and "gap.p", as in Cluster Contrast, SpCL and HHCL;
  "stripes" are "avg_pooling.*" and "local_pooling.*", as in Unsup_ReID.
  """
  module = models.make(**encoder.card["encoder"])
  state = {}
  for path, leaf in traverse_util.flatten_dict(encoder.variables).items():
    name, array = torch_name(module, path), np.asarray(leaf)
    if "{}" in name:  # all stripes in one variable
      parts = array.reshape(module.head.num_stripes, *_each(path, array))
      named = {name.format(i): part for i, part in enumerate(parts)}
    else:
      named = {name: array}
    for key, x in named.items():
      if path[-1] == "kernel":  # PyTorch has [out, in, h, w] and [out, in].
        x = x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T
      state[key] = np.ascontiguousarray(x)
  return state


def reference_state(encoder: Encoder) -> dict[str, np.ndarray]:
  """`torch_state` in the names of the head's authors' own network.

  That is "base.4.0.conv1.weight" and so on for the head "neck" (Cluster
  Contrast, SpCL, HHCL), and "CNN.layer1.0.conv1.weight" for "stripes"
  (Unsup_ReID), whose ResNets load it with `strict=True`.

  Raises:
    UserError: the backbone is not one of theirs.
  """
  module = models.make(**encoder.card["encoder"])
  if not isinstance(module.backbone, ResNet):
    arch = encoder.card["encoder"]["arch"]
    raise UserError(
      f"no reference has an {arch}: set --format=torch for timm's names"
    )
  layer = re.compile(r"(conv1|bn1|layer\d)\.")
  to_base = lambda found: f"base.{_LAYERS[found[1]]}."
  to = to_base if encoder.card["encoder"]["head"] == "neck" else r"CNN.\g<0>"
  return {
    layer.sub(to, key, count=1) if layer.match(key) else key: value
    for key, value in torch_state(encoder).items()
  }


def _each(path, array):
  """The shape of one stripe's part of a variable."""
  return array.shape[1:] if path[2] == "stripes" else (-1,)


def _safetensors(state_of: Callable) -> Callable[[Encoder], bytes]:
  """Writes a state dict, with the card, which `load_encoder` reads again."""

  def write(encoder):
    metadata = {"format": "pt", CARD: json.dumps(encoder.card)}
    return safetensors.numpy.save(state_of(encoder), metadata)

  return write


# A function turns an encoder into the content of a file.
FORMATS: dict[str, Callable[[Encoder], bytes]] = {
  "torch": _safetensors(torch_state),
  "torch_reference": _safetensors(reference_state),
}
