"""A folder of one's own: who is on an image, and under which camera."""

import numpy as np
import pytest
from PIL import Image

from unreid_jax import UserError, data
from unreid_jax.data.folder import cameras_in, person_in


def make(root, *names):
  """Images of those names below a folder, each of its own grey."""
  for i, name in enumerate(names):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 4, 3), i, np.uint8)).save(path)
  return root


def load(root, **options):
  options |= {"height": 8, "width": 4, "cache_dir": str(root.parent / "cache")}
  return data.load("folder", root=str(root), **options)


def test_people_without_cameras(tmp_path, caplog):
  """Sub-folders and file names may say who it is; all images count."""
  caplog.set_level("INFO")
  root = make(
    tmp_path / "own",
    "query/ann/x.png",
    "query/bob_2.png",
    "gallery/bob/a/1.png",
    "gallery/ann_1.png",
    "gallery/ann_c_1.png",
    "gallery/-1_c5.png",
    "gallery/zoe.png",
  )
  dataset = load(root)
  assert dataset.train is None
  assert dataset.query.names == ("ann/x.png", "bob_2.png")
  assert list(dataset.query.pids) == [1, 2]
  assert dataset.gallery.names == (
    "ann_1.png", "ann_c_1.png", "bob/a/1.png", "zoe.png"
  )  # fmt: skip
  assert list(dataset.gallery.pids) == [1, 1, 2, 3]
  assert not set(dataset.query.camids) & set(dataset.gallery.camids)
  np.testing.assert_array_equal(
    dataset.gallery.images[:, 0, 0, 0], [3, 4, 2, 6]
  )
  assert "no cameras: every gallery image of the person" in caplog.text


def test_cameras_count_if_every_name_has_one(tmp_path, caplog):
  caplog.set_level("INFO")
  root = make(
    tmp_path / "own",
    "query/ann/k_c2.png",
    "gallery/ann/k_c2_1.png",
    "gallery/ann_c13s1.png",
    "gallery/-1_5.png",
    "train/left/1.png",
    "train/right/1.png",
  )
  dataset = load(root)
  assert list(dataset.query.camids) == [2]
  assert list(dataset.gallery.camids) == [2, 13]
  assert list(dataset.train.camids) == [1, 2]
  assert list(dataset.train.pids) == [-1, -1]
  assert "cameras: images of the person under the query" in caplog.text


def test_cameras_of_a_train_set(tmp_path):
  """Names count if all have one, as in `cameras_in`; else sub-folders do."""
  root = make(tmp_path / "own", "a/x_c7.png", "a/y_c12.png", "b/x_c7.png")
  assert list(load(root).train.camids) == [7, 12, 7]
  make(root, "b/z.png")
  train = load(root).train
  assert list(train.camids) == [1, 1, 2, 2]
  assert cameras_in(train.names) == ["a", "a", "b", "b"]


def test_mistakes(tmp_path):
  root = make(tmp_path / "own", "query/ann.png", "gallery/bob.png")
  with pytest.raises(UserError, match=r"query and .*gallery have no person in"):
    load(root)
  make(root, "query/-1.png", "gallery/-1.png")  # junk is nobody
  with pytest.raises(UserError, match=r"query and .*gallery have no person in"):
    load(root)


@pytest.mark.parametrize(
  "parts, words",
  [
    (("train", "query", "galery"), "holds train and query, but no gallery:"),
    (("query",), "holds query, but no gallery:"),
    (("gallery",), "holds gallery, but no query:"),
    (("train", "test"), "holds train, but no query and no gallery:"),
  ],
)
def test_a_misspelt_part(tmp_path, parts, words):
  """Test images are not trained on because a folder is not found."""
  root = make(tmp_path / "own", *(f"{part}/ann_1.png" for part in parts))
  with pytest.raises(UserError, match=f"own {words}"):
    load(root)
  assert load(root / parts[0]).train.names == ("ann_1.png",)


@pytest.mark.parametrize("lacks", ["query/ann/2.png", "gallery/ann_7.png"])
def test_one_name_without_a_camera(tmp_path, lacks):
  """It would change what counts as a match, for all."""
  has = "query/ann/1_c1.png", "gallery/ann_c2.png"
  root = make(tmp_path / "own", *has, lacks)
  with pytest.raises(UserError, match=f"{root / lacks} names no camera"):
    load(root)


@pytest.mark.parametrize(
  "name, person, camera",
  [
    ("0002_c3s1_000451.jpg", "0002", "3"),
    ("ann/door/x.jpg", "ann", "ann"),
    ("ann/x_c12.jpg", "ann", "12"),
    ("-1_c1.jpg", "-1", "1"),
    ("x.y.jpg", "x", ""),
    ("mc_cain.jpg", "mc", ""),
  ],
)
def test_names(name, person, camera):
  assert person_in(name) == person
  assert cameras_in([name]) == [camera]
