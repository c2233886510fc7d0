"""A trained encoder opens anywhere, and takes images as they come."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from test_train import tiny_config

from unreid_jax import UserError, encode, load_encoder, sharding
from unreid_jax.config import resolve
from unreid_jax.data.images import Sized, decode, resize
from unreid_jax.state import first_state, make_parts
from unreid_jax.workdir import Workdir
from unreid_jax.workdir.checkpoints import Checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A workdir with two checkpoints, and the state of the last one."""
  path = tmp_path_factory.mktemp("run")
  size = {"dataset.height": 64, "dataset.width": 32}
  config = tiny_config(num_devices=1, **size)
  with jax.set_mesh(sharding.make_mesh(1)):
    parts = make_parts(resolve(config, steps_per_epoch=4))
    state = first_state(parts, 40, weights="")
  with Checkpoints(Workdir(path)) as checkpoints:
    for which, step in (("best", 2), ("last", 4)):
      state = state.replace(
        params=jax.tree.map(lambda x: 1.01 * x, state.params)
      )
      checkpoints.save(which, step, parts.card, state)
  return path, parts, state


@pytest.fixture
def images():
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (11, 64, 32, 3), np.uint8)


@pytest.mark.parametrize("num_devices", [0, 1, 4])
def test_features_are_those_of_the_run(trained, images, num_devices):
  """In any number of batches, on any number of devices, without its data."""
  path, parts, state = trained
  expected = jax.device_get(parts.apply(state.variables, images))
  encoder = load_encoder(path)
  if num_devices:
    with jax.set_mesh(sharding.make_mesh(num_devices)):
      encoder = load_encoder(path)
  for batch_size in (3, 128):
    features = encoder(images, batch_size)
    for name, array in expected.items():
      assert isinstance(features[name], np.ndarray)
      np.testing.assert_allclose(features[name], array, 1e-4, 1e-5)


def test_paths_to_a_checkpoint(trained, images):
  path, _, _ = trained
  last, best = (
    load_encoder(path / "checkpoints" / x)(images) for x in ("last", "best")
  )
  assert np.abs(last["global"] - best["global"]).max() > 1e-4
  for same, features in (("last/4", last), ("best/2", best), ("..", last)):
    again = load_encoder(str(path / "checkpoints" / same))(images)
    np.testing.assert_array_equal(again["global"], features["global"])


def test_images_of_any_size_and_paths(trained, images, tmp_path):
  encoder, rng = load_encoder(trained[0]), np.random.default_rng(1)
  large = [rng.integers(0, 256, (90 + i, 50, 3), np.uint8) for i in range(3)]
  paths = [tmp_path / f"{i}.png" for i in range(3)]
  for path, image in zip(paths, large, strict=True):
    Image.fromarray(image).save(path)
  sized = np.stack([resize(Image.fromarray(x), 64, 32) for x in large])
  expected = encoder(sized)["local"]
  mixed = [large[0], str(paths[1]), paths[2]]
  for given in (large, paths, mixed):
    np.testing.assert_array_equal(encoder(given)["local"], expected)
  np.testing.assert_array_equal(encoder(paths[0])["local"], expected[:1])
  np.testing.assert_array_equal(encoder(large[0])["local"], expected[:1])
  same_size = np.stack([x[:90] for x in large])
  np.testing.assert_array_equal(
    encoder(same_size)["local"], encoder(list(same_size))["local"]
  )


def test_mistakes(trained, tmp_path):
  encoder = load_encoder(trained[0])
  (tmp_path / "text.jpg").write_text("no image")
  grey = np.zeros((8, 8), np.uint8)
  for given, line in (
    ([tmp_path / "none.jpg"], "none.jpg is missing: check the path"),
    ([tmp_path / "text.jpg"], "text.jpg is not an image"),
    ([grey], r"image 0 is uint8\[8, 8\]: pass uint8\[h, w, 3\], or a path"),
    (np.zeros((2, 64, 32, 3)), r"image 0 is float64\[64, 32, 3\]"),
    ([np.zeros((0, 5, 3), np.uint8)], r"image 0 is uint8\[0, 5, 3\]"),
    ([], "no image to encode"),
    (["~nosuchuser/a.jpg"], "~nosuchuser/a.jpg: the home directory is not kn"),
  ):
    with pytest.raises(UserError, match=line):
      encoder(given)
  for path in (tmp_path, tmp_path / "checkpoints" / "best", "nowhere"):
    with pytest.raises(UserError, match="holds no checkpoint: give a workdir"):
      load_encoder(path)


@pytest.mark.parametrize("images", [None, 5, {"a.png"}, np.float32(1)])
def test_what_is_no_list_of_images(images):
  with pytest.raises(
    UserError, match=r"the images are of the type .*: pass a l"
  ):
    Sized(images, 8, 8)


def test_images_of_other_libraries(trained, images):
  encoder = load_encoder(trained[0])
  pillow = [Image.fromarray(x) for x in images[:3]]
  for given in (pillow, jax.numpy.asarray(images[:3])):
    for a, b in zip(*map(jax.tree.leaves, map(encoder, (given, images[:3]))),
                    strict=True):  # fmt: skip
      np.testing.assert_array_equal(a, b)
  one = encoder(pillow[0])["global"]
  np.testing.assert_array_equal(one, encoder(images[0])["global"])


def test_a_workdir_of_links(trained, images, tmp_path):
  """Its checkpoints are on another disk."""
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "checkpoints").symlink_to(trained[0] / "checkpoints")
  for path in ("run", "run/checkpoints/best", "run/checkpoints/last/4"):
    assert load_encoder(tmp_path / path)(images)["global"].shape == (11, 64)


def test_an_image_is_read_once(trained, images, tmp_path, monkeypatch):
  """However much a batch is filled up."""
  path, read = tmp_path / "a.png", []
  Image.fromarray(images[0]).save(path)
  decode_it = lambda path, *size: read.append(1) or decode(path, *size)
  monkeypatch.setattr("unreid_jax.data.images.decode", decode_it)
  with jax.set_mesh(sharding.make_mesh(1)):
    load_encoder(trained[0])(path)
  assert len(read) == 1


def test_workdirs_with_odd_names(trained, images, tmp_path):
  """A number, or a folder within one that is called checkpoints."""
  for name in ("2024", "checkpoints/market"):
    shutil.copytree(trained[0], tmp_path / name)
    assert load_encoder(tmp_path / name)(images)["global"].shape == (11, 64)


@pytest.mark.parametrize("lost", ["card/metadata", "encoder", "encoder/d"])
def test_a_damaged_checkpoint(trained, tmp_path, lost):
  shutil.copytree(trained[0], tmp_path / "run")
  path = tmp_path / "run" / "checkpoints" / "last" / "4" / lost
  shutil.rmtree(path) if path.is_dir() else path.write_text("{")
  with pytest.raises(UserError, match=r"last/4.* (cannot be|is)"):
    load_encoder(tmp_path / "run")


def test_a_new_process_needs_the_folder_alone(trained, tmp_path):
  """No data, no config file, another working directory."""
  program = (
    "import sys, numpy as np; from unreid_jax import load_encoder;"
    "images = np.zeros((2, 5, 4, 3), np.uint8);"
    "print(load_encoder(sys.argv[1])(images)['global'].shape);"
    "print([m for m in ('unreid_jax.train', 'unreid_jax.state', 'optax',"
    " 'unreid_jax.methods.selective') if m in sys.modules])"
  )
  root = os.path.dirname(os.path.dirname(__file__))
  env = os.environ | {"PYTHONPATH": root}
  done = subprocess.run(
    [sys.executable, "-c", program, str(trained[0])],
    cwd=tmp_path,
    env=env,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.stdout.splitlines() == ["(2, 64)", "[]"], done.stderr


def test_flat_features_weigh_each_kind_alike(trained, images):
  """Their inner product is the mean of the kinds' cosine similarities."""
  features = load_encoder(trained[0])(images)
  rows = encode.flat(features)
  whole, stripes = features["global"], features["local"]
  local = np.einsum("asd,bsd->ab", stripes, stripes) / stripes.shape[1]
  want = (whole @ whole.T + local) / 2
  np.testing.assert_allclose(rows @ rows.T, want, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(encode.flat(whole), whole)


def test_the_card_is_plain_text(trained):
  folder = Workdir(trained[0]).newest("last")
  card = json.loads((folder / "card" / "metadata").read_text())
  assert card["height"] == 64 and card["encoder"]["arch"] == "resnet18"
  assert {x.name for x in folder.iterdir() if x.is_dir()} == {
    "card",
    "encoder",
    "training",
  }


def test_encode_returns_features_in_the_order_of_the_images():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (13, 4, 2, 3), np.uint8)
  order, seen = rng.permutation(13), []

  def step(count, images, start):
    seen.append(np.asarray(images))
    pixels = images.reshape(len(images), -1).astype(np.float32)
    return count + 1, {"global": pixels}

  with jax.set_mesh(sharding.make_mesh(4)):
    count, features = encode.encode(step, 0, images, 4, "", order)
  assert count == 4
  np.testing.assert_array_equal(features["global"], images.reshape(13, -1))
  np.testing.assert_array_equal(np.concatenate(seen)[:13], images[order])
