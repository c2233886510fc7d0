"""The procedural set: reproducible, disjoint, and hard where it should be."""

import functools
import itertools
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from unreid_jax import data
from unreid_jax.data import synthetic
from unreid_jax.data.synthetic.camera import make_cameras

SMALL = {"num_train_ids": 6, "num_test_ids": 4, "num_distractors": 5}


@pytest.fixture(scope="module")
def dataset():
  return synthetic.make(0, **SMALL)


def test_same_seed_same_bytes(dataset):
  again, other = synthetic.make(0, **SMALL), synthetic.make(1, **SMALL)
  for split, same, different in zip(dataset, again, other, strict=True):
    assert np.array_equal(split.images, same.images)
    assert split.names == same.names == different.names
    assert (split.images != different.images).mean() > 0.5


def test_global_random_state_is_neither_used_nor_changed(dataset):
  np.random.seed(5)  # noqa: NPY002
  before = np.random.get_state()[1].copy()  # noqa: NPY002
  assert np.array_equal(synthetic.make(0, **SMALL)[1].images, dataset[1].images)
  assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_splits(dataset):
  train, query, gallery = dataset
  assert len(train.pids) == 6 * 4 * 3
  assert len(query.pids) == 4 * 4
  assert len(gallery.pids) == 4 * 4 * 3 + 5
  assert not set(train.pids) & set(gallery.pids)
  assert set(gallery.pids) == {0, *query.pids}
  pairs = set(zip(query.pids.tolist(), query.camids.tolist(), strict=True))
  assert len(pairs) == 16
  for split in dataset:
    assert split.images.shape[1:] == (128, 64, 3)
    assert list(split.names) == sorted(split.names)
    parsed = [(int(name[:4]), int(name[6])) for name in split.names]
    assert parsed == list(zip(split.pids, split.camids, strict=True))
    assert set(split.camids) == {1, 2, 3, 4}


def test_every_image_is_another(dataset):
  images = np.concatenate([split.images for split in dataset])
  assert len({image.tobytes() for image in images}) == len(images)


def test_raw_pixels_find_the_camera_and_not_the_person(dataset):
  """The nearest other image is of the same camera far more often."""
  flat = dataset.train.images[:, ::8, ::8].reshape(72, -1).astype(float)
  distances = ((flat[:, None] - flat) ** 2).sum(-1)
  np.fill_diagonal(distances, np.inf)
  camids, pids = dataset.train.camids, dataset.train.pids
  assert (camids[distances.argmin(1)] == camids).mean() > 0.7
  distances[camids[:, None] == camids] = np.inf
  assert (pids[distances.argmin(1)] == pids).mean() < 0.6


def test_cameras_differ():
  cameras = make_cameras(0, 4)
  for field in ("gamma", "blur", "scale", "pitch", "heading", "light"):
    assert len({getattr(camera, field) for camera in cameras}) == 4
  gains = np.array([camera.gains for camera in cameras])
  casts = gains / gains.mean(1, keepdims=True)
  for i, j in itertools.combinations(range(4), 2):
    assert abs(casts[i] - casts[j]).max() > 0.03
    assert abs(cameras[i].scene - cameras[j].scene).mean() > 0.05
  assert np.ptp(gains.mean(1)) > 0.2


def test_load_has_the_size_and_the_splits_asked_for(monkeypatch):
  small = functools.partial(synthetic.make, **SMALL)
  monkeypatch.setattr(synthetic, "make", small)
  size = {"height": 32, "width": 16}
  read = data.load("synthetic", **size, seed=3, splits=("query",))
  assert read.train is None and read.gallery is None
  query = small(3).query
  assert read.query.names == query.names
  for image, large in zip(read.query.images, query.images, strict=True):
    resized = Image.fromarray(large).resize((16, 32), Image.BICUBIC)
    assert np.array_equal(image, resized)


def test_written_in_market_layout(dataset, tmp_path):
  synthetic.write(dataset, str(tmp_path / "out"))
  read = data.load(
    "market1501", height=128, width=64,
    root=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"),
  )  # fmt: skip
  for split, expected in zip(read, dataset, strict=True):
    assert split.names == expected.names
    assert np.array_equal(split.pids, expected.pids)
    assert np.array_equal(split.camids, expected.camids)
    difference = split.images.astype(float) - expected.images
    assert abs(difference).mean() < 4


def test_command_says_how_it_is_used():
  command = [sys.executable, "-W", "error", "-m", "unreid_jax.data.synthetic"]
  result = subprocess.run(command, capture_output=True, text=True, check=False)
  assert result.returncode == 1
  assert result.stderr.startswith("usage") and "OUT_DIR" in result.stderr
