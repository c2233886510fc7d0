"""The page of a run: what it says is true, and it needs nothing else."""

import html.parser
import re

import numpy as np
import pytest
from test_train import cluster_config, tiny_split, use

from unreid_jax import UserError, encode, evaluate, load_encoder, train
from unreid_jax.about import made_by
from unreid_jax.config import from_json, resolve
from unreid_jax.data import Dataset
from unreid_jax.models.backbones import resnet
from unreid_jax.report import charts, clusters, curves, from_workdir, ranks
from unreid_jax.workdir import Workdir


class Page(html.parser.HTMLParser):
  """Checks that every tag is closed, and collects what a test asks for."""

  VOID = ("meta", "link", "img", "br", "path", "use")

  def __init__(self, text):
    super().__init__()
    self.open, self.ids, self.urls, self.lists = [], [], [], {}
    self.figures, self.title = [], None
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    assert tag not in ("script", "iframe", "object", "form")
    assert not any(name.startswith("on") for name in attrs)
    if tag not in self.VOID:
      self.open.append(tag)
    self.ids += [attrs["id"]] if "id" in attrs else []
    self.urls += [v for k, v in attrs.items() if k in ("src", "href")]
    if tag == "img":
      assert attrs["alt"]
      self.lists[self.title].append(attrs["alt"])
    if attrs.get("role") == "img":
      assert attrs["aria-label"]
      self.figures.append(attrs["aria-label"])

  def handle_startendtag(self, tag, attrs):
    self.urls += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
    self.ids += [v for k, v in attrs if k == "id"]

  def handle_endtag(self, tag):
    if tag not in self.VOID:
      assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] == "h4":
      self.title = data
      self.lists[data] = []


def load(monkeypatch, dataset):
  """Lets `data.load` give this data set, and ResNets have two blocks."""
  use(monkeypatch, dataset)
  monkeypatch.setitem(resnet._DEPTHS, 18, ((1, 1), False))


def make_config():
  """Three steps on one device, with clusters of whatever there is."""
  changes = {"epochs": 1, "report": True, "num_devices": 1, "method.eps": 0.9}
  return cluster_config("cluster_contrast", **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run of three steps: its workdir, its report and its data set."""
  rng = np.random.default_rng(0)
  train_set, query, gallery = (tiny_split(rng, num) for num in (40, 8, 24))
  query = query._replace(names=tuple(f"<i>{i}&\"'.jpg" for i in range(8)))
  gallery.pids[20:] = 0
  dataset = Dataset(train_set, query, gallery)
  path = tmp_path_factory.mktemp("run")
  config = make_config()
  with pytest.MonkeyPatch.context() as patch:
    load(patch, dataset)
    train.train(config, str(path))
    yield path, (path / "report.html").read_text(), dataset


def test_the_page_needs_no_network(run):
  """Nothing is fetched, no script runs, and each name is there once."""
  _, text, _ = run
  page = Page(text)
  assert all(url.startswith(("data:", "#")) for url in page.urls)
  targets = [url[1:] for url in page.urls if url.startswith("#")]
  targets += re.findall(r"url\(#([^)]*)\)", text)
  assert set(targets) <= set(page.ids)
  assert len(page.ids) == len(set(page.ids))
  assert not re.search(r"@import|url\((?!#)", text)
  assert len(text) < 2**20
  assert made_by(1)["jax"] in text and "Learning rate" in text


def test_ranked_lists_are_those_of_the_features(run):
  path, text, dataset = run
  page, encoder = Page(text), load_encoder(path)
  query, gallery = dataset.query, dataset.gallery
  features = [encoder(split.images) for split in (query, gallery)]
  distances = np.square(features[0][:, None] - features[1]).sum(axis=2)
  shown = {
    title.partition(": average")[0]: alts
    for title, alts in page.lists.items()
    if "average" in title
  }
  assert shown
  for name, alts in shown.items():
    i = query.names.index(name)
    assert alts[0].startswith("query: ")
    for alt, g in zip(alts[1:], np.argsort(distances[i]), strict=False):
      same = query.pids[i] == gallery.pids[g]
      kind = "✓" if same else "✗"
      if same and query.camids[i] == gallery.camids[g]:
        kind = "·"
      who = f"person {gallery.pids[g]}" if gallery.pids[g] else "stranger"
      assert alt.startswith(kind)
      assert alt.endswith(f"{who}, camera {gallery.camids[g]}")


def test_mode_report_writes_the_same_page(run, monkeypatch):
  """From the workdir alone, but for the seconds, which are in the log."""
  path, text, dataset = run
  load(monkeypatch, dataset)
  (path / "report.html").unlink()
  # Of another config the place of the data set counts, and nothing else.
  moved = Workdir(path).stored_config()
  moved["optim"]["lr"], moved["encoder"]["arch"] = 77.0, "resnet50"
  for config in None, from_json(moved):
    from_workdir.write(config, str(path))
    plain = lambda text: re.sub(r"<tr>.*?</tr>", "", text, flags=re.S)
    again = (path / "report.html").read_text()
    assert plain(again) == plain(text)
    assert "77.0" not in again and "resnet50" not in again
  fewer = dataset._replace(train=tiny_split(np.random.default_rng(1), 36))
  load(monkeypatch, fewer)
  with pytest.raises(UserError, match="trained on 40 images, and the data set"):
    from_workdir.write(None, str(path))


def test_the_threshold_is_kept_with_the_encoder(run, monkeypatch):
  path, _, dataset = run
  encoder, gallery = load_encoder(path), dataset.gallery
  card = encoder.card["same_person"]
  assert card["source"] == "test identities"
  one, other = gallery.images[:3], gallery.images[3:6]
  answer = encoder.same(one, other)
  a, b = (encode.flat(encoder(x)) for x in (one, other))
  np.testing.assert_allclose(
    answer.distance, np.square(a - b).sum(axis=1), rtol=1e-5
  )
  np.testing.assert_array_equal(
    answer.same, answer.distance <= card["threshold"]
  )
  alike = encoder.same(one[0], one[0])
  assert alike.same.all() and alike.distance[0] == alike.far[0] == 0
  with pytest.raises(UserError, match=r"far is 2\.0: set it to a number in"):
    encoder.same(one, other, far=2.0)
  with pytest.raises(UserError, match="2 images cannot be compared with 3"):
    encoder.same(one[:2], one)
  monkeypatch.delitem(encoder.card, "same_person")
  with pytest.raises(UserError, match="saved without a threshold: --mode=rep"):
    encoder.same(one, other)


def test_a_set_without_queries(run, tmp_path, monkeypatch):
  """It has a report, too, and a threshold that its labels set."""
  train_set = run[2].train._replace(pids=np.full(40, -1, np.int32))
  load(monkeypatch, Dataset(train_set, None, None))
  train.train(make_config(), str(tmp_path))
  page = Page((tmp_path / "report.html").read_text())
  assert not any("average precision" in title for title in page.lists)
  assert any(title.startswith("cluster ") for title in page.lists)
  card = load_encoder(tmp_path).card["same_person"]
  assert card["source"] == "pseudo labels"


def test_who_is_taken_for_whom():
  """Junk does not count, nor do queries without a match."""
  query, gallery = (tiny_split(np.random.default_rng(0), n) for n in (6, 8))
  query.pids[:] = [1, 1, 2, 3, 3, 9]
  query.camids[:] = 1
  gallery.pids[:] = [1, 2, 2, 3, 3, 0, 1, 4]
  gallery.camids[:] = [1, 2, 3, 2, 2, 2, 2, 2]
  nearest = [0, 3, 0, 5, 7, 1]  # the first of person 1 is junk, then comes 2
  far = np.arange(8.0) + 9 + np.zeros((6, 1))
  far[np.arange(6), nearest] = 0
  far[0, 2] = 1
  found = evaluate.Evaluation({}, {}, far.astype(np.float32), np.zeros((8, 1)))
  known = ranks.rank(found, query, gallery, lambda q, *_: q)
  assert known.mistakes == {0: 2, 1: 3, 2: 0, 3: 5, 4: 7}
  text, rows = ranks.confusions(known, query, gallery)
  assert text == (
    "5 of 5 queries find another person first, 1 of them a stranger. Half of "
    "the mistakes between known people are made by 1 of the 6 possible pairs "
    "of them."
  )
  assert [row.title for row in rows] == [
    "person 1 and person 2: mistaken 2 times",
    "person 1 and person 3: mistaken 1 times",
    "person 3 and person 4: mistaken 1 times",
  ]
  assert [crop.text for crop in rows[0].crops] == [
    f"person {p}, camera {c}" for p, c in ((1, 1), (1, 2), (2, 2), (2, 3))
  ]


def test_clusters_of_each_kind():
  split = tiny_split(np.random.default_rng(0), 24)  # four images a person
  labels = np.array(
    [0] * 4 + [1] * 4 + [2] * 4 + [2] * 4 + [3, 3, 4, 4] + [3, -1, 5, -1]
  )
  split.pids[:] += 1
  found = clusters.mosaic(split, labels)
  titles = {name: [row.title for row in rows] for name, rows in found.items()}
  assert titles == {
    "Pure": [f"cluster {c}, {n} images" for c, n in ((0, 4), (1, 4), (4, 2))],
    "Mixed": [
      f"cluster {c}, {n} images of 2 people" for c, n in ((2, 8), (3, 3))
    ],
    "Split": ["person 5 in 2 clusters"],
    "Outliers": ["3 images in no cluster"],
  }  # fmt: skip
  split.pids[:] = -1
  assert list(clusters.mosaic(split, labels)) == [
    "Largest",
    "Smallest",
    "Outliers",
  ]
  assert clusters.mosaic(split, np.arange(24)) == {}


@pytest.mark.parametrize("size", [3, 5000])
def test_the_map_has_whole_groups(size):
  groups = np.repeat(np.arange(-1, 400), size)
  rows = clusters.sample(groups)
  assert len(rows) == len(set(rows)) <= clusters._MAPPED
  names, counts = np.unique(groups[rows], return_counts=True)
  if size == 3:
    assert set(counts) == {3} and len(names) > 150


def test_seconds_of_phases_are_read_from_the_log():
  log = """2026-01-02 03:04:05  encode train       1,080 images in 6.5 s (9/s)
2026-01-02 03:04:06  epoch 1/60         1,056 images in 2 min 05 s (8/s)
2026-01-02 03:04:07  epoch 2/60         1,056 images in 1 h 10 min (0.2/s)
2026-01-02 03:04:08  step 4              mAP 1.0  in 3 s (no phase)
"""
  assert curves.seconds(log) == [
    ("train", 2, 125 + 4200),
    ("encode train", 1, 6.5),
  ]


def test_the_learning_rate_is_that_of_the_training():
  config = resolve(make_config(), steps_per_epoch=3)
  lines = [{"step": step} for step in (1, 51, 101)]
  config.optim.update({"lr": 1.0, "milestones": (50,), "gamma": 0.1})
  for cosine, rates in ((0, ["1", "0.1", "0.1"]), (100, ["1", "0.5", "0"])):
    config.optim.cosine = cosine
    chart = curves.learning_rate(lines, config)
    assert [rate for _, rate in chart.rows] == rates


def test_a_chart_says_what_it_draws():
  steps = list(range(100))
  chart = charts.lines("Loss", {"a": (steps, steps), "b": ([0, 99], [5, 7])})
  assert chart.text == "Loss: a from 0 to 99; b from 5 to 7"
  assert chart.rows[0] == ("0", "0", "5") and chart.rows[-1] == (
    "99",
    "99",
    "7",
  )
  assert 10 < len(chart.rows) <= 27
  assert "currentColor" in chart.svg and "#010203" not in chart.svg
  assert Workdir("x").report.name == "report.html"
