"""Weights of PyTorch models, in every spelling that the field uses."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from numpy.testing import assert_array_equal

from unreid_jax import UserError
from unreid_jax.models import pretrained

_KINDS = {"kernel": "weight", "scale": "weight"}
_KINDS |= {"mean": "running_mean", "var": "running_var"}
_IMAGES = jnp.zeros((1, 128, 16, 3))


@pytest.fixture(scope="module")
def encoders(make_encoder):
  """For each head a small encoder and its variables, filled with ones."""

  def make(head):
    encoder = make_encoder(
      arch="resnet18", width=0.125, head=head, pooling="gem", stripe_dim=4
    )
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), _IMAGES)
    return encoder, jax.tree.map(lambda v: jnp.ones(v.shape), shapes)

  return {head: make(head) for head in ("neck", "stripes")}


def _torchvision_state(variables):
  """Random weights for the backbone, named and laid out by torchvision."""
  random, state = np.random.default_rng(0), {}
  for path, leaf in traverse_util.flatten_dict(variables, sep="/").items():
    _, part, *names, kind = path.split("/")
    if part == "backbone":
      name = ".".join(names).replace("_", ".")
      kind = _KINDS.get(kind, kind)
      array = np.transpose(leaf, (3, 2, 0, 1)) if leaf.ndim == 4 else leaf
      state[f"{name}.{kind}"] = random.random(array.shape, np.float32)
  return state | {"fc.weight": np.zeros((1000, 64), np.float32)}


def _as_sequential(state):
  """torchvision's names as those of Cluster Contrast, through DataParallel."""
  order = ["conv1", "bn1", "relu", "maxpool"]
  order += ["layer1", "layer2", "layer3", "layer4"]
  renamed = {}
  for key, value in state.items():
    first, _, rest = key.partition(".")
    if first in order:
      renamed[f"module.base.{order.index(first)}.{rest}"] = value
  return renamed


def test_spellings_agree(encoders):
  encoder, variables = encoders["neck"]
  state = _torchvision_state(variables)
  spellings = (
    state,
    {f"module.{key}": value for key, value in state.items()},
    {f"CNN.{key}": value for key, value in state.items()},
    _as_sequential(state),
  )
  loaded = [pretrained.from_torch(s, encoder, variables) for s in spellings]
  kernel = loaded[0]["params"]["backbone"]["layer2_0"]["downsample_0"]["kernel"]
  want = state["layer2.0.downsample.0.weight"]
  assert_array_equal(kernel[0, 0].T, want[:, :, 0, 0])
  var = loaded[0]["batch_stats"]["backbone"]["bn1"]["var"]
  assert_array_equal(var, state["bn1.running_var"])
  for other in loaded[1:]:
    jax.tree.map(assert_array_equal, other, loaded[0])
  heads = variables["params"]["head"], loaded[0]["params"]["head"]
  jax.tree.map(assert_array_equal, *heads)


def test_heads(encoders):
  state = _torchvision_state(encoders["neck"][1])
  state |= {"gap.p": np.float32([4]), "feat_bn.bias": np.full(64, 7, "f")}
  head = pretrained.from_torch(state, *encoders["neck"])["params"]["head"]
  assert head["pool"]["p"] == 4
  assert set(head["bn"]["bias"].tolist()) == {7}

  for i in range(8):
    stripe = f"local_pooling.local_conv_list.{i}"
    weight = np.full((4, 64), i, np.float32)
    weight[1] += 0.5
    state |= {f"{stripe}.0.weight": weight, f"{stripe}.1.bias": weight[:, 0]}
  head = pretrained.from_torch(state, *encoders["stripes"])["params"]["head"]
  assert_array_equal(head["stripes"]["kernel"][3, 9], [3, 3.5, 3, 3])
  assert_array_equal(head["stripes_bn"]["bias"][12:16], [3, 3.5, 3, 3])


def test_mistakes_name_the_weight(encoders):
  state = _torchvision_state(encoders["neck"][1])
  wrong = state | {"layer1.0.conv1.weight": np.zeros((8, 4, 3, 3), np.float32)}
  with pytest.raises(UserError, match=r"layer1\.0\.conv1.*4, 8.*8, 8"):
    pretrained.from_torch(wrong, *encoders["neck"])
  del state["layer4.1.bn2.running_var"]
  with pytest.raises(UserError, match=r"layer4\.1\.bn2\.running_var"):
    pretrained.from_torch(state, *encoders["neck"])


def test_files(encoders, tmp_path):
  encoder, path = encoders["neck"], tmp_path / "weights.safetensors"
  with pytest.raises(UserError, match="no such file"):
    pretrained.load(path, *encoder)
  path.write_bytes(b"nonsense")
  with pytest.raises(UserError, match="not a safetensors file"):
    pretrained.load(path, *encoder)
  state = _torchvision_state(encoder[1])
  safetensors.numpy.save_file(state, path)
  want = pretrained.from_torch(state, *encoder)
  jax.tree.map(assert_array_equal, pretrained.load(path, *encoder), want)


def test_torch_files(encoders, tmp_path):
  torch = pytest.importorskip("torch")
  encoder, path = encoders["neck"], tmp_path / "checkpoint.pth.tar"
  state = _torchvision_state(encoder[1])
  tensors = {f"module.{k}": torch.from_numpy(v) for k, v in state.items()}
  torch.save({"state_dict": tensors, "best_mAP": np.float64(0.5)}, path)
  want = pretrained.from_torch(state, *encoder)
  jax.tree.map(assert_array_equal, pretrained.load(path, *encoder), want)
  path.write_bytes(b"nonsense")
  with pytest.raises(UserError, match="not weights that PyTorch can read"):
    pretrained.load(path, *encoder)


def test_torch_files_without_torch(encoders, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  path = tmp_path / "weights.pth"
  path.write_bytes(b"")
  with pytest.raises(UserError, match="pip install torch"):
    pretrained.load(path, *encoders["neck"])
