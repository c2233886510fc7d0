"""Features of a folder: each image is encoded once, whatever happens."""

import dataclasses
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from unreid_jax import (
  UserError,
  commands,
  feature_files,
  gallery,
  index,
  ranking,
  search,
  sharding,
)
from unreid_jax.encode import Encoder, flat
from unreid_jax.verification import RATES


class Counted(Encoder):
  """An encoder that notes how many images it has seen, and may fail."""

  def __call__(self, images, *args):
    self.card["seen"] += 1 if isinstance(images, pathlib.Path) else len(images)
    if self.card["seen"] > self.card["patience"]:
      raise InterruptedError
    return super().__call__(images, *args)


@jax.jit
def project(weights, images):
  """Features of two kinds without a network."""
  x = images.reshape(len(images), -1).astype(jnp.float32) @ weights
  x = x / jnp.linalg.norm(x, axis=1, keepdims=True)
  stripes = x[:, :6].reshape(-1, 2, 3)
  norms = jnp.linalg.norm(stripes, axis=2, keepdims=True)
  return {"global": x, "local": stripes / norms}


def make_encoder(seed=0):
  rng = np.random.default_rng(seed)
  weights = rng.standard_normal((8 * 4 * 3, 8), np.float32)
  card = {"encoder": {}, "height": 8, "width": 4, "mean": [], "std": []}
  card |= {"seen": 0, "patience": 10**6}
  return Counted(card, weights, project, sharding.make_mesh(1))


@pytest.fixture
def folder(tmp_path):
  """Eleven images in two sub-folders."""
  for i in range(11):
    write(tmp_path / "crops" / f"{i % 2}" / f"{i:02}_c{i % 3}.png", i)
  return tmp_path / "crops"


def write(path, seed):
  path.parent.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(seed)
  Image.fromarray(rng.integers(0, 256, (8, 4, 3), np.uint8)).save(path)


@pytest.fixture
def update(folder, monkeypatch):
  """Updates the folder's features; four images at a time."""
  monkeypatch.setattr(gallery, "_AT_ONCE", 4)
  return lambda encoder: gallery.update(folder, encoder, folder.parent / "c")


def assert_is_right(found, folder):
  """Its features are those of the files."""
  paths = [folder / name for name in found.names]
  assert found.names == sorted(found.names)
  want = flat(make_encoder()(paths))
  np.testing.assert_allclose(found[:], want, rtol=1e-5, atol=1e-6)


def test_only_what_is_new_is_encoded(folder, update):
  first = folder / "0" / "00_c0.png"
  for change, seen in (
    (lambda: None, 11),
    (lambda: None, 0),
    (lambda: write(folder / "1" / "99.png", 99), 1),
    (lambda: (write(first, 77), os.utime(first, (5, 5))), 1),
    (lambda: os.unlink(folder / "0" / "02_c2.png"), 0),
  ):
    change()
    encoder = make_encoder()
    found = update(encoder)
    assert encoder.card["seen"] == seen
    assert_is_right(found, folder)
  assert len(found) == 11


def test_an_update_goes_on_after_an_interruption(folder, update):
  encoder = make_encoder()
  encoder.card["patience"] = 9
  with pytest.raises(InterruptedError):
    update(encoder)
  for path in (folder.parent / "c").rglob("*.*"):  # half a row, half a line
    with open(path, "ab") as file:
      file.write(b'["0/x')
  encoder = make_encoder()
  found = update(encoder)
  assert encoder.card["seen"] == 3 and len(found) == 11
  assert_is_right(found, folder)
  other = make_encoder(1)
  update(other)
  assert other.card["seen"] == 11  # another encoder knows nothing


@pytest.mark.parametrize(
  "line",
  ["5", "null", "[]", '[["a"], 1, 2, true]', '["a", 1, 2, "b"]', "[" * 10**5],
)
def test_a_damaged_line(folder, update, line):
  """It and what follows is encoded again."""
  update(make_encoder())
  (path,) = (folder.parent / "c").rglob("images.jsonl")
  lines = path.read_text().splitlines()
  path.write_text("\n".join([*lines[:8], line, *lines[9:], ""]))
  encoder = make_encoder()
  assert_is_right(update(encoder), folder)
  assert encoder.card["seen"] == 3
  assert path.read_text().splitlines() == lines


def test_a_file_that_is_no_image(folder, update):
  """It is left out, and not read again until it has changed."""
  bad = folder / "0" / "04_c1.png"
  bad.write_text("no image")
  found = update(make_encoder())
  assert found.corrupt == ["0/04_c1.png"] and len(found) == 10
  assert_is_right(found, folder)
  encoder = make_encoder()
  assert update(encoder).corrupt == ["0/04_c1.png"]
  assert encoder.card["seen"] == 0
  write(bad, 5)
  found = update(encoder)
  assert encoder.card["seen"] == 1 and not found.corrupt
  assert_is_right(found, folder)


@pytest.mark.parametrize("block", [7, 100])
def test_rank_equals_a_sort(monkeypatch, block):
  monkeypatch.setattr(search, "_BLOCK", block)
  rng = np.random.default_rng(0)
  query, images = (rng.integers(-3, 4, (n, 3)) + 0.5 for n in (5, 60))
  images[40:] = images[:20]  # of equal ones the first comes first
  hits = search.rank(query, images, 9)
  similarity = query @ images.T
  want = np.argsort(-similarity, axis=1, kind="stable")[:, :9]
  np.testing.assert_array_equal(hits.rows, want)
  np.testing.assert_array_equal(
    hits.similarity, np.take_along_axis(similarity, want, axis=1)
  )
  assert search.rank(query, images[:4]).rows.shape == (5, 4)
  kinds = {"global": images, "local": images[:, None]}
  both = {name: x[:5] for name, x in kinds.items()}
  np.testing.assert_array_equal(
    search.rank(both, kinds).rows, search.rank(flat(both), flat(kinds)).rows
  )
  with pytest.raises(UserError, match=r"gallery has the shape \(60, 2\), but"):
    search.rank(query, images[:, :2])
  with pytest.raises(
    UserError, match="top is 0: set it to a whole number of 1"
  ):
    search.rank(query, images, 0)


def test_rerank_equals_that_of_one_query():
  rng = np.random.default_rng(0)
  query, images = (rng.standard_normal((n, 4), np.float32) for n in (3, 80))
  unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query, images)]
  hits = search.rerank(*unit, 12)
  for one, rows in zip(unit[0], hits.rows, strict=True):
    distances = ranking.rerank(one[None], unit[1])[0]
    assert len(set(rows)) == 12
    np.testing.assert_allclose(
      distances[rows], np.sort(distances)[:12], rtol=1e-5
    )
  similarity = np.take_along_axis(unit[0] @ unit[1].T, hits.rows, axis=1)
  np.testing.assert_allclose(hits.similarity, similarity, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("near", [search.rank, search.rerank])
def test_no_query_has_no_hits(near):
  hits = near(np.zeros((0, 4), np.float32), np.eye(4, dtype=np.float32), 3)
  assert hits.rows.shape == hits.similarity.shape == (0, 3)


def test_modes(folder, monkeypatch, capsys):
  """What each writes and prints is the encoder's own."""
  encoder = make_encoder()
  steps = np.linspace(0, 4, len(RATES)).tolist()
  card = {"threshold": 1.0, "source": "these", "same": steps}
  encoder.card["same_person"] = card | {"different": steps}
  monkeypatch.setattr(commands, "load_encoder", lambda *_: encoder)
  monkeypatch.setattr(feature_files, "_BLOCK", 4)
  out, cache = folder.parent, str(folder.parent / "cache")
  names = [str(out / f"f.{kind}") for kind in ("parquet", "npz", "npy")]
  commands.encode(".", str(folder), names, cache)
  paths = sorted(folder.rglob("*.png"))
  features = flat(encoder(paths))
  named = [path.relative_to(folder).as_posix() for path in paths]
  table = pyarrow.parquet.read_table(names[0]).to_pydict()
  arrays = np.load(names[1])
  lines = (out / "f.csv").read_text().splitlines()
  assert lines[1:] == [f"{x},{x[-5]}" for x in named]  # its camera is in it
  assert table["name"] == list(arrays["names"]) == named
  assert table["camera"] == list(arrays["cameras"]) == [x[-5] for x in named]
  for got in (table["features"], arrays["features"], np.load(names[2])):
    np.testing.assert_allclose(np.array(got), features, rtol=1e-5, atol=1e-6)

  page = [str(out / f"hits.{kind}") for kind in ("json", "html")]
  query = paths[3]
  capsys.readouterr()
  commands.search(".", str(query), str(folder), 4, False, page, cache)
  (result,) = json.loads((out / "hits.json").read_text())
  order = np.argsort(-features @ features[3], kind="stable")[:4]
  assert [x["image"] for x in result["hits"]] == [str(paths[i]) for i in order]
  printed = capsys.readouterr().out.splitlines()
  assert printed[0] == str(query) and printed[1].endswith(f"same   {query}")
  assert (out / "hits.html").read_text().count("<img ") == 5
  monkeypatch.setattr(commands, "_ON_A_PAGE", 3)
  commands.search(".", str(folder), str(folder), 1, True, page, cache)
  assert (out / "hits.html").read_text().count("<img ") == 6
  assert "shows the first 3 of 11 queries" in capsys.readouterr().err
  results = json.loads((out / "hits.json").read_text())
  assert [x["query"] for x in results] == [str(path) for path in paths]

  commands.verify(".", str(query), str(query), None)
  assert capsys.readouterr().out.splitlines()[-4] == "the same person"
  far = paths[int(np.argmin(features @ features[3]))]
  commands.verify(".", str(query), str(far), None)
  assert "another person" in capsys.readouterr().out
  for pair in ((folder, query), (query, folder)):
    with pytest.raises(UserError, match=f"={folder} is a folder: name one"):
      commands.verify(".", *map(str, pair))
  with pytest.raises(UserError, match=r"--output=.*no such folder, make"):
    commands.encode(".", str(folder), [str(out / "none" / "x.npz")], cache)


@pytest.mark.parametrize("query", ["none.png", "text.png", "empty"])
def test_a_query_is_read_before_the_gallery(folder, monkeypatch, query):
  encoder = make_encoder()
  monkeypatch.setattr(commands, "load_encoder", lambda *_: encoder)
  (folder.parent / "empty").mkdir()
  (folder.parent / "text.png").write_text("no image")
  query, cache = folder.parent / query, folder.parent / "cache"
  with pytest.raises(UserError, match=str(query)):
    commands.search(".", str(query), str(folder), cache_dir=str(cache))
  assert not cache.exists()


def test_the_index_follows_the_folder(folder, update, monkeypatch):
  """With eleven images it misses none, whatever happened to the store."""
  pytest.importorskip("usearch", reason="usearch is not installed")
  encoder = make_encoder()
  first, *others = sorted(folder.rglob("*.png"))
  query = flat(encoder([first, others[4]]))

  def check():
    found = update(make_encoder())
    want = search.rank(query, found, 5)
    for _ in range(2):  # made, and restored
      got = index.rank_approximately(query, found, 5)
      np.testing.assert_array_equal(got.rows, want.rows)
      np.testing.assert_allclose(got.similarity, want.similarity, 1e-6)
    return found

  found = check()
  os.unlink(first)  # its row stays in the store
  write(folder / "1" / "99.png", 99)
  check()
  path = folder.parent / "c"
  (path,) = path.rglob("index.usearch")
  path.write_bytes(b"x" * 100)
  check()
  other = index._updated(
    dataclasses.replace(found, stored=_reversed(found.stored, path))
  )
  np.testing.assert_allclose(other.get(0), found.stored[-1], atol=1e-3)


def _reversed(stored, beside):
  """The features in another order, in a store of their own."""
  path = beside.with_name("other.bin")
  stored[::-1].tofile(path)
  return np.memmap(path, np.float32, "r", shape=stored.shape)


def test_an_index_without_its_package(folder, update, monkeypatch):
  monkeypatch.setattr(index.importlib.util, "find_spec", lambda _: None)
  with pytest.raises(UserError, match="pip install usearch"):
    index.rank_approximately(
      np.ones((1, 4), np.float32), update(make_encoder())
    )
