"""Every set in every form in which people have it, tiny and made up."""

import io
import pathlib
import shutil
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image
from tensorflow_datasets.core import shuffle

from unreid_jax import UserError, data
from unreid_jax.data import cache
from unreid_jax.data.datasets import layout

MARKET = {
  "bounding_box_train": [
    "0002_c1s1_000451_03",
    "0010_c3s2_1_01",
    "-1_c2s1_0_00",
  ],
  "query": ["0001_c4s6_1_00"],
  "bounding_box_test": ["0000_c6s1_5_01", "-1_c1s1_1_00", "0001_c2s1_9_00"],
}
MSMT = {
  "train": [
    "0001/0001_001_03_0113noon_1_0",
    "0000/0000_000_01_0303morning_8_0",
  ],
  "val": ["0000/0000_002_15_0303morning_2_1"],
  "query": ["0000/0000_005_02_0302_1_0"],
  "gallery": ["0000/0000_006_14_0302_1_0", "0007/0007_006_01_0302_1_0"],
}
FOLDERS = {
  "market1501": "Market-1501-v15.09.15",
  "dukemtmc": "DukeMTMC-reID",
  "personx": "PersonX",
  "cuhk03_np": "cuhk03-np/detected",
}


def colour(name):
  """A colour for each name, so that an image tells whose it is."""
  return tuple(np.random.default_rng(list(name.encode())).integers(0, 256, 3))


def write_image(path):
  path.parent.mkdir(parents=True, exist_ok=True)
  image = Image.new("RGB", (8, 16), tuple(map(int, colour(path.stem))))
  image.save(path, format="PNG")  # exact, whatever the name says


def make_market(folder):
  for part, names in MARKET.items():
    for name in names:
      write_image(folder / part / f"{name}.jpg")
    (folder / part / "Thumbs.db").write_text("not ours")
    (folder / part / "._0001_c1.jpg").write_text("nor this")


def make_msmt(folder, train, test):
  for part, names in MSMT.items():
    images = folder / (train if part in ("train", "val") else test)
    lines = []
    for name in names:
      write_image(images / f"{name}.jpg")
      lines.append(f"{name}.jpg {int(name[:4])}\n")
    (folder / f"list_{part}.txt").write_text("".join(lines))


def load(name, root, **changes):
  options = {"height": 16, "width": 8, "root": str(root)} | changes
  options.setdefault("cache_dir", str(pathlib.Path(root).parent / "cache"))
  return data.load(name, **options)


def rows(split):
  """(name, pid, camid) of each image, after a look at the image itself."""
  for name, image in zip(split.names, split.images, strict=True):
    assert (image == colour(pathlib.Path(name).stem)).all()
  return list(zip(split.names, split.pids, split.camids, strict=True))


def check_market(dataset):
  assert rows(dataset.train) == [
    ("0002_c1s1_000451_03.jpg", 2, 1),
    ("0010_c3s2_1_01.jpg", 10, 3),
  ]
  assert rows(dataset.query) == [("0001_c4s6_1_00.jpg", 1, 4)]
  assert rows(dataset.gallery) == [
    ("0000_c6s1_5_01.jpg", 0, 6),
    ("0001_c2s1_9_00.jpg", 1, 2),
  ]


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("form", ["itself", "holds it", "zip", "holds its zip"])
def test_market_layout(tmp_path, name, form):
  root = tmp_path / "root"
  make_market(root / FOLDERS[name])
  if "zip" in form:
    shutil.make_archive(str(tmp_path / "set"), "zip", root)
    shutil.rmtree(root)
    root.mkdir()
    archive = shutil.move(tmp_path / "set.zip", root)
    root = pathlib.Path(archive) if form == "zip" else root
  elif form == "itself":
    root = root / FOLDERS[name]
  check_market(load(name, root, cache_dir=str(tmp_path / "cache")))


@pytest.mark.parametrize("packed", [False, True])
def test_msmt17(tmp_path, caplog, packed):
  root = tmp_path / "root"
  make_msmt(root / "MSMT17_V1", "train", "test")
  if packed:
    shutil.make_archive(str(tmp_path / "msmt"), "zip", root)
    root = tmp_path / "msmt.zip"
  dataset = load("msmt17", root)
  assert rows(dataset.train) == [
    ("0000/0000_000_01_0303morning_8_0.jpg", 0, 1),
    ("0000/0000_002_15_0303morning_2_1.jpg", 0, 15),
    ("0001/0001_001_03_0113noon_1_0.jpg", 1, 3),
  ]
  assert rows(dataset.query) == [("0000/0000_005_02_0302_1_0.jpg", 0, 2)]
  assert [pid for _, pid, _ in rows(dataset.gallery)] == [0, 7]
  assert "blurred" not in caplog.text


def test_msmt17_versions(tmp_path, caplog):
  make_msmt(tmp_path / "root" / "MSMT17_V2", "mask_train_v2", "mask_test_v2")
  assert len(load("msmt17", tmp_path / "root").train.names) == 3
  assert "V2" in caplog.text and "blurred" in caplog.text
  with pytest.raises(UserError, match="MSMT17_V1"):
    load("msmt17", tmp_path / "root", version="V1")
  make_msmt(tmp_path / "root" / "MSMT17_V1", "train", "test")
  caplog.clear()
  load("msmt17", tmp_path / "root")
  assert "blurred" not in caplog.text
  load("msmt17", tmp_path / "root" / "MSMT17_V2", version="V2")
  assert "blurred" in caplog.text


def test_msmt17_in_market_layout(tmp_path):
  make_market(tmp_path / "root" / "MSMT17_V1")
  check_market(load("msmt17", tmp_path / "root"))


def test_cuhk03_versions(tmp_path):
  make_market(tmp_path / "root" / "cuhk03-np" / "labeled")
  check_market(load("cuhk03_np", tmp_path / "root", version="labeled"))
  with pytest.raises(UserError, match="detected"):
    load("cuhk03_np", tmp_path / "root")
  with pytest.raises(UserError, match="detected or labeled"):
    load("cuhk03_np", tmp_path / "root", version="drawn")


def test_sizes_are_compared_with_the_published_ones(tmp_path, caplog):
  make_market(tmp_path / "root")
  load("market1501", tmp_path / "root")
  for words in ("2 train images", "12936", "1 query", "3368", "15913"):
    assert words in caplog.text


def test_nothing_is_said_of_a_complete_set(tmp_path, caplog, monkeypatch):
  make_market(tmp_path / "root")
  monkeypatch.setattr(
    "unreid_jax.data.datasets.market1501.Market1501.SIZES", {"": (2, 1, 2)}
  )
  load("market1501", tmp_path / "root")
  assert caplog.text == ""


def test_duke_is_said_to_be_withdrawn(tmp_path, caplog):
  make_market(tmp_path / "root")
  load("dukemtmc", tmp_path / "root")
  assert "withdrew" in caplog.text


def test_only_the_splits_asked_for(tmp_path):
  make_market(tmp_path / "root")
  train = tmp_path / "root" / "bounding_box_train" / "0002_c1s1_000451_03.jpg"
  train.write_bytes(b"not looked at")
  dataset = load("market1501", tmp_path / "root", splits=("query",))
  assert rows(dataset.query) == [("0001_c4s6_1_00.jpg", 1, 4)]
  assert dataset.train is None and dataset.gallery is None


def test_prepared_anew_when_the_source_changes(tmp_path, monkeypatch):
  make_market(tmp_path / "root")
  load("market1501", tmp_path / "root")
  with monkeypatch.context() as patch:  # now from the cache
    patch.setattr(cache, "_make", None)
    check_market(load("market1501", tmp_path / "root"))
  changed = tmp_path / "root" / "query" / "0001_c4s6_1_00.jpg"
  Image.new("RGB", (9, 9), "red").save(changed, format="PNG")
  write_image(tmp_path / "root" / "query" / "0001_c5s6_1_00.jpg")
  query = load("market1501", tmp_path / "root").query
  assert (query.images[0] == (255, 0, 0)).all()
  assert query.camids.tolist() == [4, 5]


def test_prepared_by_tfds(tmp_path, monkeypatch):
  """By index, in the order of the names, with the encoded image inside."""
  from unreid_jax.data.datasets.market1501 import Market1501

  monkeypatch.setattr(layout, "_PER_SHARD", 1)  # a large set has several
  monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1)
  make_market(tmp_path / "root")
  shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path / "root")
  for root in (tmp_path / "root", tmp_path / "set.zip"):
    builder = Market1501(root=str(root), data_dir=tmp_path / "tfds")
    builder.download_and_prepare()
    train = builder.as_data_source("train")
    names = [b"0002_c1s1_000451_03.jpg", b"0010_c3s2_1_01.jpg"]
    assert [example["name"] for example in train] == names
    assert [example["pid"] for example in train] == [2, 10]
    assert (train[1]["image"] == colour("0010_c3s2_1_01")).all()
  assert "tensorflow" not in sys.modules


def fails(name, root, *words, **changes):
  with pytest.raises(UserError) as caught:
    load(name, root, **changes)
  line = str(caught.value)
  assert "\n" not in line
  for word in words:
    assert str(word) in line


@pytest.mark.parametrize("name", [*FOLDERS, "msmt17"])
def test_missing_or_empty_root(tmp_path, name):
  fails(name, tmp_path / "nowhere", tmp_path / "nowhere", "does not exist")
  fails(name, "", "dataset.root")
  (tmp_path / "empty").mkdir()
  fails(name, tmp_path / "empty", tmp_path / "empty", "set dataset.root")


def test_wrong_zip(tmp_path):
  with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
    archive.writestr("photos/cat.jpg", b"")
  fails("market1501", tmp_path / "other.zip", "other.zip", "Market-1501-v15")
  whole = (tmp_path / "other.zip").read_bytes()
  (tmp_path / "half.zip").write_bytes(whole[: len(whole) // 2])
  fails("market1501", tmp_path / "half.zip", "half.zip", "not a zip")


def test_split_is_missing_or_empty(tmp_path):
  make_market(tmp_path / "root")
  shutil.rmtree(tmp_path / "root" / "query")
  fails("market1501", tmp_path / "root", tmp_path / "root" / "query", "unpack")
  (tmp_path / "root" / "query").mkdir()
  fails(
    "market1501", tmp_path / "root", tmp_path / "root" / "query", "no image"
  )


@pytest.mark.parametrize("bad", ["holiday.jpg", "c1_0002.jpg", "0002_cx_1.png"])
def test_name_that_does_not_parse(tmp_path, bad):
  make_market(tmp_path / "root")
  path = tmp_path / "root" / "bounding_box_test" / bad
  write_image(path)
  fails("market1501", tmp_path / "root", path, "rename")


def test_msmt17_lists(tmp_path):
  root = tmp_path / "root"
  make_msmt(root, "train", "test")
  (root / "list_val.txt").write_text("0000/0000_000.jpg 0\n")
  fails("msmt17", root, "list_val.txt", "0000/0000_000.jpg 0")
  (root / "list_val.txt").write_text("0000/0000_000_01_gone.jpg 0\n")
  fails("msmt17", root, "0000_000_01_gone.jpg", "missing")
  (root / "list_val.txt").unlink()
  fails("msmt17", root, "list_val.txt", "missing")


@pytest.mark.parametrize("packed", [False, True])
def test_corrupt_image(tmp_path, packed):
  root = tmp_path / "root"
  make_market(root)
  buffer = io.BytesIO()
  noise = np.random.default_rng(0).integers(0, 256, (64, 32, 3))
  Image.fromarray(noise.astype(np.uint8)).save(buffer, "JPEG")
  truncated = root / "query" / "0009_c1s1_1_00.jpg"
  truncated.write_bytes(buffer.getvalue()[:900])
  if packed:
    shutil.make_archive(str(tmp_path / "set"), "zip", root)
    root = tmp_path / "set.zip"
  fails("market1501", root, truncated.name, root, "on_corrupt")
  check_market(load("market1501", root, on_corrupt="skip"))
