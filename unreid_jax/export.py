"""A trained encoder for other frameworks: a function and a name a format."""

import importlib.util
import json
import logging
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util

from unreid_jax import UserError, models, values
from unreid_jax.data import augment
from unreid_jax.encode import CARD, Encoder, flat
from unreid_jax.models.backbones.resnet import PLACES, ResNet
from unreid_jax.models.pretrained import torch_name
from unreid_jax.verification import RATES
from unreid_jax.workdir import whole_file

# The longest difference of a feature, whose length is 1.
_TOLERANCE = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}
_LAYERS = {layer: place for place, layer in PLACES.items()}
_log = logging.getLogger(__name__)


def export(
  encoder: Encoder, path: str, format: str, dtype: str = "float32"
) -> None:
  """Writes an encoder into a file, the old one or the whole new one.

  Args:
    encoder: what is written.
    path: the file, which ends as its format wants it.
    format: a key of `FORMATS`.
    dtype: what a program computes in, and has its weights in: "float32", or
      for half the size "float16", or "bfloat16" (not in ONNX).

  Raises:
    UserError: there is no such format, the file ends otherwise or cannot be
      written, or the encoder has no such form.
  """
  if format not in FORMATS:
    raise UserError(f'--format="{format}": set it to {" or ".join(FORMATS)}')
  if not path:
    raise UserError("say where to write to: --output=FILE")
  path, (ending, write) = values.expand(path, "--output"), FORMATS[format]
  if not path.parent.is_dir():
    raise UserError(f"--output={path}: there is no such folder, make it first")
  if path.suffix != ending:
    raise UserError(f"--output={path}: end it in {ending}, as {format} does")
  is_program = format in ("onnx", "stablehlo")
  if dtype not in _TOLERANCE or (dtype != "float32" and not is_program):
    wanted = " or ".join(_TOLERANCE) if is_program else "float32"
    raise UserError(
      f"--dtype={dtype}: set it to {wanted}, which --format={format} has"
    )
  content = write(encoder, dtype) if is_program else write(encoder)
  with whole_file(path, "--output") as file:
    file.write(content)
  if is_program:  # a card for people and programs
    with whole_file(path.with_name(f"{path.name}.json"), "--output") as file:
      file.write(json.dumps(_model_card(encoder, dtype), indent=2).encode())
  arch, size = encoder.card["encoder"]["arch"], len(content) / 2**20
  _log.info("%s: %s as %s, %.1f MB", path, arch, format, size)


def torch_state(encoder: Encoder) -> dict[str, np.ndarray]:
  """The weights as a PyTorch state dict, the inverse of `pretrained`.

  The backbone has the names that its `torch_name` gives, such as torchvision's
  for a ResNet. The head "neck" is "feat_bn.*" and "gap.p", as in Cluster
  Contrast, SpCL and HHCL; "stripes" are "avg_pooling.*" and "local_pooling.*",
  as in Unsup_ReID.
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
    raise UserError(f"no reference has {arch}: set --format=torch")
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


def stablehlo(encoder: Encoder, dtype: str = "float32") -> bytes:
  """A program for `jax.export.deserialize`, on CPUs, GPUs and TPUs.

  From images u8[b, h, w, 3] of any number to features, weights included.

  Raises:
    UserError: its features are not the encoder's.
  """
  forward, images = _forward(encoder, dtype)
  program = jax.export.export(
    jax.jit(forward), platforms=("cpu", "cuda", "rocm", "tpu")
  )(images)
  content = program.serialize()
  _check(encoder, jax.export.deserialize(content).call, "stablehlo", dtype)
  return bytes(content)


def onnx(encoder: Encoder, dtype: str = "float32") -> bytes:
  """A model for ONNX runtimes; "images" u8[b, h, w, 3] of any number come in.

  What comes out is "features", f32[b, d].

  Raises:
    UserError: jax2onnx is not installed, the features in onnxruntime are not
      the encoder's, or the dtype is "bfloat16", which it cannot run.
  """
  if dtype == "bfloat16":
    raise UserError(
      "--dtype=bfloat16: set it to float16, or --format=stablehlo"
    )
  if not importlib.util.find_spec("jax2onnx"):
    raise UserError(
      "jax2onnx is not installed: pip install jax2onnx onnxruntime"
    )
  import jax2onnx
  import onnxruntime
  from onnxruntime.transformers import float16

  forward, images = _forward(encoder, "float32")
  logging.getLogger("onnx_ir").setLevel(logging.ERROR)
  names = {"input_names": ["images"], "output_names": ["features"]}
  model = jax2onnx.to_onnx(forward, [images], opset=18, **names)
  if dtype == "float16":  # head and all; images and features stay as they are
    model = float16.convert_float_to_float16(model, keep_io_types=True)
  prop = model.metadata_props.add()
  prop.key, prop.value = CARD, json.dumps(encoder.card)
  content = model.SerializeToString()
  options = onnxruntime.SessionOptions()
  options.log_severity_level = 3  # it warns of each node that is not folded
  session = onnxruntime.InferenceSession(
    content, options, providers=["CPUExecutionProvider"]
  )

  def run(images):
    return session.run(None, {"images": images})[0]

  _check(encoder, run, "onnx", dtype)
  return content


def _forward(encoder, dtype) -> tuple[Callable, jax.ShapeDtypeStruct]:
  """From images to one vector each, and the shape of any number of images."""
  module = models.make(**encoder.card["encoder"])
  colour = tuple(encoder.card["mean"]), tuple(encoder.card["std"])
  variables = jax.tree.map(jnp.asarray, jax.device_get(encoder.variables))
  if not dtype == encoder.card["encoder"]["dtype"] == "float32":
    module = module.clone(backbone=module.backbone.clone(dtype=dtype))
    is_kernel = lambda path, x: x.ndim > 1 and path[1].key == "backbone"
    variables = jax.tree.map_with_path(
      lambda path, x: x.astype(dtype) if is_kernel(path, x) else x, variables
    )

  def forward(images):
    images = augment.normalise(images, *colour)
    return flat(module.apply(variables, images, train=False))

  (num,) = jax.export.symbolic_shape("b")
  return forward, _zeros(encoder, num)


def _zeros(encoder, num):
  shape = num, encoder.card["height"], encoder.card["width"], 3
  return jax.ShapeDtypeStruct(shape, jnp.uint8)


def _check(encoder, run, format, dtype) -> None:
  """Refuses an exported encoder whose features are others.

  The images are noise, and a black and a white one.
  """
  own = encoder.card["encoder"]["dtype"]
  most = max(_TOLERANCE[dtype], _TOLERANCE.get(own, 0.0))
  for num in 1, 3:
    images = np.random.default_rng(num).integers(
      0, 256, _zeros(encoder, num).shape, np.uint8
    )
    images[1:2], images[2:3] = 0, 255
    gap = flat(encoder(images)) - np.asarray(run(images))
    error = float(np.linalg.norm(gap, axis=1).max())
    if not error <= most:
      raise UserError(
        f"--format={format}: its features differ from the encoder's by "
        f"{error:.2g}, so nothing is written: choose another format"
      )


def _model_card(encoder, dtype) -> dict[str, Any]:
  """What one must know to use the file."""
  height, width = encoder.card["height"], encoder.card["width"]
  return {
    "input": f"images, uint8 [any number, {height}, {width}, 3], RGB; colours "
    "are normalised inside",
    "output": "features [any number, d] of length 1; the cosine of two is "
    "their similarity, and 2 - 2 cosine their squared distance",
    "dtype": dtype,
    "same_person": _thresholds(encoder.card.get("same_person")),
    "weights": "those of the training, whose licence is that of its images and "
    "of the weights it began with",
    **{k: x for k, x in encoder.card.items() if k != "same_person"},
  }


def _thresholds(card) -> dict[str, Any] | str:
  """From which similarity on two images are taken for one person."""
  if not card:
    return "not known: the encoder was saved without an evaluation"
  cosine = lambda squared: round(1 - float(squared) / 2, 4)
  at = lambda far: cosine(np.interp(far, RATES, card["different"]))
  return {
    "measured_on": card["source"],
    "cosine_at_equal_error_rate": cosine(card["threshold"]),
    "cosine_at_false_accept_rate": {
      f"{x:g}": at(x) for x in (0.01, 1e-3, 1e-4)
    },
  }


# How the file ends, and what turns an encoder into its content.
FORMATS: dict[str, tuple[str, Callable[..., bytes]]] = {
  "onnx": (".onnx", onnx),
  "stablehlo": (".stablehlo", stablehlo),
  "torch": (".safetensors", _safetensors(torch_state)),
  "torch_reference": (".safetensors", _safetensors(reference_state)),
}
