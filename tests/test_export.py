"""What is exported holds what was trained, and opens where it says."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from numpy.testing import assert_array_equal
from test_train import cluster_config, tiny_config, tiny_split, use

from unreid_jax import (
  UserError,
  encode,
  export,
  load_encoder,
  ranking,
  scoring,
  sharding,
  verification,
)
from unreid_jax import card as card_lib
from unreid_jax.data import Dataset
from unreid_jax.state import make_card


def draw(config):
  """An encoder with drawn weights, which cannot be applied."""
  card, rng = make_card(config), np.random.default_rng(0)
  _, shapes = card_lib.build(card, "")
  numbers = lambda x: rng.random(x.shape, np.float32)
  return encode.Encoder(
    card, jax.tree.map(numbers, shapes), print, sharding.make_mesh(1)
  )


@pytest.fixture(scope="module")
def encoders():
  size = {"dataset.height": 64, "dataset.width": 32}
  neck = cluster_config("cluster_contrast", **{"encoder.pooling": "gem"})
  lite = cluster_config(
    "cluster_contrast", **{"encoder.arch": "efficientnet_lite0"}
  )
  return {
    "neck": draw(neck), "stripes": draw(tiny_config(**size)),
    "lite": draw(lite),
  }  # fmt: skip


@pytest.mark.parametrize("name", ["neck", "stripes", "lite"])
@pytest.mark.parametrize("format", ["torch", "torch_reference"])
def test_an_exported_encoder_opens_alone(encoders, tmp_path, name, format):
  """Every array comes back bit by bit, and so does what builds the encoder."""
  encoder, path = encoders[name], tmp_path / "encoder.safetensors"
  if (name, format) == ("lite", "torch_reference"):
    with pytest.raises(UserError, match=r"_lite0: set --format=torch$"):
      export.export(encoder, str(path), format)
    return
  encoder.export(path, format)
  again = load_encoder(path)
  plain = encoder.card | {k: list(encoder.card[k]) for k in ("mean", "std")}
  assert again.card == plain
  jax.tree.map(assert_array_equal, again.variables, encoder.variables)


def test_names_and_axes(encoders):
  """Of torchvision and of the heads' authors; all others would be a break."""
  flat = traverse_util.flatten_dict(encoders["neck"].variables, sep="/")
  conv = flat["params/backbone/layer2_0/downsample_0/kernel"]
  state = export.torch_state(encoders["neck"])
  assert_array_equal(
    state["layer2.0.downsample.0.weight"][:, :, 0, 0], conv[0, 0].T
  )
  heads = ["feat_bn.bias", "feat_bn.running_mean", "feat_bn.running_var"]
  heads += ["feat_bn.weight", "gap.p"]
  assert sorted(x for x in state if "." in x[:8] and x[0] in "fg") == heads
  renamed = export.reference_state(encoders["neck"])
  assert_array_equal(
    renamed["base.5.0.downsample.0.weight"],
    state["layer2.0.downsample.0.weight"],
  )
  assert {x.split(".")[0] for x in renamed} == {"base", "feat_bn", "gap"}
  flat = traverse_util.flatten_dict(encoders["stripes"].variables, sep="/")
  state = export.reference_state(encoders["stripes"])
  third = "local_pooling.local_conv_list.2"
  kernel = flat["params/head/stripes/kernel"]
  assert_array_equal(state[f"{third}.0.weight"], kernel[2].T)
  mean = flat["batch_stats/head/stripes_bn/mean"]
  assert_array_equal(state[f"{third}.1.running_mean"], mean[32:48])
  assert state["CNN.layer4.1.conv2.weight"].shape == (64, 64, 3, 3)


def test_mistakes(encoders, tmp_path):
  encoder, path = encoders["neck"], tmp_path / "encoder.safetensors"
  with pytest.raises(UserError, match='format="onn": set it to onnx or'):
    export.export(encoder, str(path), "onn")
  with pytest.raises(UserError, match="where to write to: --output=FILE"):
    export.export(encoder, "", "torch")
  with pytest.raises(
    UserError, match=r"no/x\S+: there is no such folder, make"
  ):
    export.export(encoder, str(tmp_path / "no" / "x.safetensors"), "torch")
  for format, ending in (
    ("torch", "safetensors"),
    ("torch_reference", "safetensors"),
    ("onnx", "onnx"),
    ("stablehlo", "stablehlo"),
  ):
    with pytest.raises(UserError, match=rf"x\.pth: end it in \.{ending}, as"):
      export.export(encoder, str(tmp_path / "x.pth"), format)
  assert not list(tmp_path.iterdir())
  state = export.torch_state(encoder)
  for card, line in (
    (None, "does not say what encoder it is of: pass --config"),
    ({encode.CARD: "{"}, "its card is damaged"),
    ({encode.CARD: '{"encoder": 1}'}, "is damaged"),
    ({encode.CARD: "[]"}, "no JSON object"),
  ):
    path.write_bytes(safetensors.numpy.save(state, card))
    with pytest.raises(UserError, match=line):
      load_encoder(path)
  path.write_bytes(safetensors.numpy.save(state))
  for card, line in (
    (
      {"height": 32},
      r"card that was passed is damaged \(it has no 'encoder'\)",
    ),
    (encoder.card | {"width": 0}, "card that was passed.*make_card"),
  ):
    with pytest.raises(UserError, match=line):
      load_encoder(path, card)
  export.export(encoder, str(path), "torch")
  path.write_bytes(path.read_bytes()[:-4])
  with pytest.raises(UserError, match=r"\.safetensors: .*it is damaged"):
    load_encoder(path)


@pytest.mark.usefixtures("two_blocks")
def test_scores_of_weights(tmp_path, monkeypatch, capsys):
  """What evaluate_rank makes of the features, and what became of each tensor.

  The encoder is the config's, or the exported one's whatever the config says.
  """
  rng = np.random.default_rng(0)
  train_set, query, gallery = (tiny_split(rng, 16) for _ in range(3))
  use(monkeypatch, Dataset(train_set, query, gallery))
  config = cluster_config("cluster_contrast", num_devices=1)
  state = export.reference_state(draw(config))
  state |= {"classifier.weight": np.zeros((9, 16), np.float32)}
  weights = tmp_path / "model_best.pth.tar"
  weights.write_bytes(safetensors.numpy.save(state))
  scoring.score(config, str(tmp_path / "run"), str(weights))
  with jax.set_mesh(sharding.make_mesh(1)):
    encoder = load_encoder(weights, make_card(config))
  q, g = encoder(query.images), encoder(gallery.images)
  ids = query.pids, gallery.pids, query.camids, gallery.camids
  want = ranking.evaluate_rank(2 - 2 * q @ g.T, *ids)
  row = rf"model_best\.pth\.tar +{100 * want.mAP:.1f} +{100 * want.cmc[0]:.1f} "
  assert re.search(row, capsys.readouterr().out)
  log = (tmp_path / "run" / "log.txt").read_text()
  assert f"{weights}: loaded {len(state) - 1} tensors; ignored what" in log

  path = tmp_path / "encoder.safetensors"
  export.export(encoder, str(path), "torch")
  config.encoder.pooling = "gem"
  scoring.score(config, str(tmp_path / "run"), str(path))
  assert f" {100 * want.mAP:.1f} " in capsys.readouterr().out


@pytest.fixture(scope="module")
def runnable():
  """Encoders that can be applied: one feature an image, and two."""
  size = {"dataset.height": 32, "dataset.width": 16, "num_devices": 1}
  made = {}
  for head in "neck", "stripes":
    config = tiny_config(**size)
    config.encoder.update({"head": head, "width": 0.125})
    config.encoder.update({"num_stripes": 2, "stripe_dim": 8})
    config.encoder.embedding_dim = 16
    card, mesh = make_card(config), sharding.make_mesh(1)
    module, _ = card_lib.build(card, "")
    variables = card_lib.draw(module, card, jax.random.key(0))
    apply = card_lib.make_apply(module, card, mesh)
    made[head] = encode.Encoder(card, variables, apply, mesh)
  return made


@pytest.mark.parametrize("head", ["neck", "stripes"])
@pytest.mark.parametrize("format", ["stablehlo", "onnx"])
def test_an_exported_program_gives_the_features(
  runnable, tmp_path, head, format
):
  """For any number of images; another order of the colours is noticed."""
  encoder, path = runnable[head], tmp_path / f"encoder.{format}"
  if format == "onnx":
    pytest.importorskip("jax2onnx", reason="jax2onnx is not installed")
  export.export(encoder, str(path), format)
  images = np.random.default_rng(9).integers(0, 256, (5, 32, 16, 3), np.uint8)
  if format == "stablehlo":
    found = jax.export.deserialize(bytearray(path.read_bytes())).call(images)
  else:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {"images": images})
  features = encode.flat(encoder(images))
  np.testing.assert_allclose(found, features, atol=1e-5)
  gap = np.square(features[0] - features[1]).sum()
  np.testing.assert_allclose(2 - 2 * found[0] @ found[1], gap, atol=1e-5)
  card = json.loads((tmp_path / f"encoder.{format}.json").read_text())
  assert card["height"] == 32 and "[any number, 32, 16, 3]" in card["input"]
  assert "not known" in card["same_person"]
  swapped = dataclasses.replace(
    encoder, apply=lambda v, x: encoder.apply(v, x[..., ::-1])
  )
  with pytest.raises(UserError, match=r"features differ .* nothing is written"):
    export.export(swapped, str(tmp_path / f"other.{format}"), format)
  assert not (tmp_path / f"other.{format}").exists()


@pytest.mark.parametrize(
  "format, dtype",
  [("stablehlo", "float16"), ("stablehlo", "bfloat16"), ("onnx", "float16")],
)
def test_half_the_size(runnable, tmp_path, format, dtype):
  """The features are close, and what is not is not written."""
  if format == "onnx":
    pytest.importorskip("jax2onnx", reason="jax2onnx is not installed")
  encoder, path = runnable["neck"], tmp_path / f"half.{format}"
  whole = tmp_path / f"whole.{format}"
  export.export(encoder, str(whole), format)
  export.export(encoder, str(path), format, dtype)
  assert path.stat().st_size < 0.8 * whole.stat().st_size
  card = json.loads((tmp_path / f"half.{format}.json").read_text())
  assert card["dtype"] == dtype
  swapped = dataclasses.replace(
    encoder, apply=lambda v, x: encoder.apply(v, x[..., ::-1])
  )
  with pytest.raises(UserError, match=r"features differ .* nothing is written"):
    export.export(swapped, str(path), format, dtype)


@pytest.mark.parametrize(
  "format, dtype, line",
  [
    ("torch", "float16", "--dtype=float16: set it to float32, which --format="),
    ("stablehlo", "int8", "set it to float32 or float16 or bfloat16, which"),
    ("onnx", "bfloat16", "set it to float16, or --format=stablehlo"),
  ],
)
def test_dtypes_that_a_format_has_not(encoders, tmp_path, format, dtype, line):
  path = tmp_path / f"x{export.FORMATS[format][0]}"
  with pytest.raises(UserError, match=line):
    export.export(encoders["neck"], str(path), format, dtype)
  assert not path.exists()


def test_thresholds_of_a_model_card():
  """A squared distance d is a cosine of 1 - d / 2."""
  card = {"source": "ten pairs", "threshold": 0.5}
  card["different"] = [2 * rate for rate in verification.RATES]
  assert export._thresholds(card) == {
    "measured_on": "ten pairs",
    "cosine_at_equal_error_rate": 0.75,
    "cosine_at_false_accept_rate": {
      "0.01": 0.99,
      "0.001": 0.999,
      "0.0001": 0.9999,
    },
  }


def test_onnx_without_its_package(runnable, tmp_path, monkeypatch):
  monkeypatch.setattr(export.importlib.util, "find_spec", lambda _: None)
  with pytest.raises(UserError, match="pip install jax2onnx"):
    export.export(runnable["neck"], str(tmp_path / "x.onnx"), "onnx")
