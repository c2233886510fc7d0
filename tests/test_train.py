"""The loop: any number of devices, one compile, and after any interruption."""

import functools
import itertools
import json
import shutil
import signal
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import gives, make_split
from jax.sharding import NamedSharding
from PIL import Image
from test_run import FORKS, run_command

from configs import default
from unreid_jax import UserError, evaluate, scoring, sharding, step, train
from unreid_jax.config import resolve
from unreid_jax.data import Dataset, Split
from unreid_jax.methods import cluster_contrast
from unreid_jax.models.backbones import resnet
from unreid_jax.pseudo_labels.clustering import Clusters
from unreid_jax.state import first_state, make_parts
from unreid_jax.workdir import Workdir
from unreid_jax.workdir.sessions import read_sessions

pytestmark = pytest.mark.usefixtures("two_blocks")
TINY = {
  "num_devices": 2,
  "dataset.height": 32,
  "dataset.width": 16,
  "encoder.arch": "resnet18",
  "encoder.width": 0.125,
  "encoder.num_stripes": 4,
  "encoder.stripe_dim": 16,
  "encoder.embedding_dim": 64,
  "batch_size": 32,
  "evaluate_batch_size": 32,
  "log_every": "1 step",
  "report": False,
}


def tiny_config(**changes):
  """The selective config at a size for tests."""
  config = default.get_config("selective", "synthetic", warmup="2 steps")
  config.encoder.head = "stripes"
  config.update_from_flattened_dict(TINY | changes)
  return config


def cluster_config(method, **changes):
  """A cluster method's config at a size for tests."""
  config = default.get_config(method, "synthetic")
  cluster = "method.base" if method == "hngn" else "method"
  config.update_from_flattened_dict(
    TINY
    | {
      "sampler.num_instances": 4,
      "steps_per_epoch": 3,
      "epochs": 3,
      f"{cluster}.k1": 6,
      f"{cluster}.k2": 2,
      f"{cluster}.min_samples": 2,
      "optim.name": "sgd",
      "optim.lr": 1e-3,
    }
    | changes
  )
  return config


def tiny_split(rng, num):
  patches = rng.integers(0, 256, (num, 8, 4, 3), np.uint8)
  images = patches.repeat(4, axis=1).repeat(4, axis=2)
  pids = np.arange(num, dtype=np.int32) // 4
  camids = np.arange(num, dtype=np.int32) % 4
  return Split(images, pids, camids, tuple(map(str, range(num))))


@pytest.fixture
def dataset(monkeypatch):
  """Noise instead of the images of `data.load`."""
  rng = np.random.default_rng(0)
  dataset = Dataset(*(tiny_split(rng, num) for num in (130, 8, 16)))
  use(monkeypatch, dataset)
  return dataset


def use(monkeypatch, dataset):
  """Lets `data.load` return the named splits of this dataset."""

  @functools.wraps(train.data.load)
  def load(*, splits=Dataset._fields, **_):
    return Dataset(*(getattr(dataset, s) if s in splits else None
                     for s in Dataset._fields))  # fmt: skip

  monkeypatch.setattr(train.data, "load", load)


class Rig:
  """A compiled step on some devices, and the banks that it starts with."""

  def __init__(self, split, num_devices, **changes):
    self.split, num = split, len(split.names)
    config = tiny_config(num_devices=num_devices, **changes)
    with jax.set_mesh(sharding.make_mesh(num_devices)):
      self.parts = make_parts(resolve(config, steps_per_epoch=4))
      state = first_state(self.parts, num, weights="")
      copies = NamedSharding(self.parts.mesh, sharding.COPY)
      self.key = jax.device_put(jax.random.key(0), copies)
      method, encode = self.parts.method, gives(tiny_features(num))
      found = method.label(state.method, encode, split, 0)
      refresh = jax.jit(method.refresh)
      banks = refresh(state.method, found.values, found.given, self.key)
      self.state = state.replace(method=banks)
      self.step = step.compile_step(self.parts, self.state, self.key)

  def run(self, num_steps):
    """Metrics and states of some steps, and test-time features after them."""
    split, mesh = self.split, self.parts.mesh
    state = jax.tree.map(lambda x: x.copy(), self.state)
    rng, outs = np.random.default_rng(0), []
    labels = np.arange(len(split.names), dtype=np.int32)
    arrays = {"images": split.images, "camids": split.camids}
    arrays |= {"indices": labels, "labels": labels}
    for _ in range(num_steps):
      rows = rng.permutation(len(labels))[:32]
      batch = {k: sharding.put_rows(mesh, x, rows) for k, x in arrays.items()}
      with jax.transfer_guard("disallow"):
        state, metrics = self.step(state, batch, self.key)
      outs.append(jax.device_get((metrics, state)))
    outs.append(self.parts.encoder(state)(split.images[:32]))
    return state, outs


def tiny_features(num):
  rng = np.random.default_rng(1)
  shapes = {"global": (num, 64), "local": (num, 4, 16)}
  dtype = jax.dtypes.canonicalize_dtype(float)
  raw = {k: rng.standard_normal(s, dtype) for k, s in shapes.items()}
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  return {name: unit(x) for name, x in raw.items()}


EXACT = {
  "encoder.dtype": "float64", "optim.name": "sgd", "optim.lr": 1e-3,
  "ema": 0.75,
}  # fmt: skip


def test_one_device_equals_eight(dataset, float64):
  """Loss, gradients, banks and features, over several steps.

  In single precision the two part now and then, where rounding changes the sign
  of a ReLU's input. In double precision only a mistake parts them.
  """
  # SGD's momentum is in the state: the gradients of all steps, summed up.
  one, eight = (Rig(dataset.train, n, **EXACT).run(3)[1] for n in (1, 8))
  for a, b in zip(*map(jax.tree.leaves, (one, eight)), strict=True):
    assert np.linalg.norm(a - b) <= 1e-9 * max(np.linalg.norm(a), 0.1)
  states = [state for _, state in one[:-1]]
  assert states[-1].encoder is states[-1].average
  mix = lambda old, new: 0.75 * old + 0.25 * new
  for before, after in itertools.pairwise(states):
    expected = jax.tree.map(mix, before.average, after.variables)
    for a, b in zip(
      *map(jax.tree.leaves, (after.average, expected)), strict=True
    ):
      np.testing.assert_allclose(a, b, rtol=1e-12)


def test_the_bank_is_never_gathered(collective_sizes):
  """Reads the compiled step: no collective is as large as a bank."""
  rng = np.random.default_rng(0)
  dataset = Dataset(*(tiny_split(rng, num) for num in (2000, 8, 16)))
  rig = Rig(dataset.train, 8, **{"method.num_negatives": 20})
  state, _ = rig.run(1)
  banks = (state.method.global_bank, state.method.mixture)
  for bank in (*banks, state.method.local_bank):
    shapes = {x.data.shape for x in bank.addressable_shards}
    assert shapes == {(256, *bank.shape[1:])}
  sizes = collective_sizes(rig.step.as_text())
  assert len(sizes) > 10  # the pattern does find them
  assert max(sizes) < banks[0].size / 2


def test_a_step_that_is_not_finite_stops_the_run(dataset, tmp_path):
  config = tiny_config(epochs=4, checkpoint_every="2 steps")
  config.update_from_flattened_dict(
    {
      "optim.name": "sgd",
      "optim.lr": 1e30,
      "optim.warmup": "5 steps",
      "optim.warmup_factor": 0.0,
      "optim.warmup_curve": "constant",
    }
  )
  with pytest.raises(UserError, match=r"param_norm is inf at step 6: the run"):
    train.train(config, str(tmp_path))
  assert saved_tree(tmp_path)["training"]["step"] == 4
  assert all(np.isfinite(x).all() for x in saved_arrays(tmp_path))
  for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
    assert "NaN" not in line and "Infinity" not in line


def test_any_number_of_devices(dataset, tmp_path, float64):
  """Four; and one, then four from the middle of an epoch: the same run.

  Two epochs, each with clusters of its own.
  """
  four, other = tmp_path / "four", tmp_path / "other"
  for workdir, num_devices, end in ((four, 4, 6), (other, 1, 4), (other, 4, 6)):
    config = cluster_config("hhcl", **EXACT | {"num_devices": num_devices})
    config.epochs = 2
    run_until(config, workdir, end)
  texts = ((x / "metrics.jsonl").read_text() for x in (four, other))
  lines = [[json.loads(x) for x in text.splitlines()] for text in texts]
  clusters = [x["clusters"] for x in lines[0] if x["kind"] == "cluster"]
  assert len(set(clusters)) == 2 and min(clusters) > 1
  for a, b in zip(*lines, strict=True):
    assert a.pop("kind") == b.pop("kind")
    assert a == pytest.approx(b, rel=1e-6, abs=1e-9)
  for a, b in zip(*map(saved_arrays, (four, other)), strict=True):
    np.testing.assert_allclose(a, b, 1e-6, 1e-9)


def run_until(config, workdir, end, in_labelling=False):
  """Trains, and stops after this step as if by a signal.

  With `in_labelling` the signal comes while the next epoch's images are
  encoded, between the first batch and the second.
  """
  steps, batches = [], []
  compile_step = train.compile_step

  def compiled(*arguments):
    compute = compile_step(*arguments)

    def step(state, *rest):
      steps.append(int(state.step) + 1)
      return compute(state, *rest)

    return step

  def check(self):
    batches.append(steps[-1:])
    if in_labelling and batches[-2:] == [[end], [end]]:
      raise train.Interrupted

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train, "compile_step", compiled)
    requested = lambda self, _: steps[-1] == end and not in_labelling
    patch.setattr(train.Preemption, "requested", requested)
    patch.setattr(train.Preemption, "check", check)
    try:
      train.train(config, str(workdir))
    except train.Interrupted as stopped:
      assert str(stopped).startswith(f"stopped after step {end} of ")


def generator_config(**changes):
  """A warm-up of two steps, and then a ramp of four."""
  config = cluster_config("hngn")
  with config.method.ignore_type():
    config.method.update({"warmup": "2 steps", "ramp": "4 steps"} | changes)
  config.method.generator_width = 16
  return config


@pytest.mark.parametrize(
  "config, stops",
  [
    (
      cluster_config("hhcl", **{"method.memory": "instances", "ema": 0.5}),
      (3, 6),
    ),
    (generator_config(), (1, 4)),
    (generator_config(alternate="epoch", generator_steps="1 epoch"), (4,)),
  ],
)
def test_labels_and_networks_are_resumed(dataset, tmp_path, config, stops):
  """Stopped at an epoch's end, or within it: the same run, bit by bit."""
  whole, parted = tmp_path / "whole", tmp_path / "parted"
  train.train(config, str(whole))
  for stop in stops:
    run_until(config, parted, stop, in_labelling=stop == 6)
  train.train(config, str(parted))
  texts = [(x / "metrics.jsonl").read_text() for x in (whole, parted)]
  assert texts[0] == texts[1]
  reports = 3 if config.method.name == "hngn" else 0
  assert texts[0].count('"kind": "epoch"') == reports
  for a, b in zip(*map(saved_arrays, (whole, parted)), strict=True):
    np.testing.assert_array_equal(a, b)
  for path, ends in ((whole, [9]), (parted, [*stops, 9])):
    sessions = read_sessions(Workdir(path))
    assert [(x["step"], x["end"]) for x in sessions] == [(n, 9) for n in ends]
    assert all(x["seconds"] > 0 and x["hardware"] for x in sessions)


def test_an_epoch_without_clusters(dataset, monkeypatch, tmp_path):
  """The last epoch's labels and banks stay; without any, the run stops."""
  config = cluster_config("cluster_contrast")
  nothing = np.full(130, -1, np.int32)
  labels = [np.arange(130, dtype=np.int32) % 12, nothing, nothing, nothing]
  answers = iter([Clusters((x,), 0.6, {}, ()) for x in labels])
  monkeypatch.setattr(cluster_contrast, "cluster", lambda *_: next(answers))
  train.train(config, str(tmp_path / "a"))
  log = (tmp_path / "a" / "log.txt").read_text()
  assert log.count("less than two clusters: the last epoch's labels stay") == 2
  saved = saved_tree(tmp_path / "a")["training"]
  assert saved["step"] == 9 and saved["method"]["num_clusters"] == 12
  np.testing.assert_array_equal(saved["labels"], labels[0])
  with pytest.raises(UserError, match=r"0 cluster\(s\) of 130 images, and two"):
    train.train(config, str(tmp_path / "b"))


def test_more_clusters_than_the_bank_has_room_for():
  """The largest are kept, and the log says so."""
  pairs = np.r_[np.repeat(np.arange(40), 2), np.arange(40, 80)]
  features = np.eye(80, dtype=np.float32)[pairs]
  hp = cluster_contrast.Hyperparameters(k1=2, k2=1, min_samples=1, eps=0.3)
  split = make_split(np.zeros(120, np.int32))
  found = cluster_contrast.label(hp, None, gives(features), split, 0)
  assert found.values.max() + 1 == 60 and (found.values >= 0).sum() == 100
  assert found.notes == ("the 60 largest of 80 clusters are kept",)


def test_a_workdir_belongs_to_one_config(tmp_path):
  config = tiny_config()
  Workdir(tmp_path).write_config(config)
  (tmp_path / "checkpoints" / "last" / "4" / "card").mkdir(parents=True)
  config.optim.lr = 1.0
  with pytest.raises(UserError, match=r"optim.lr=0.00035, but this one has 1"):
    train.train(config, str(tmp_path))


def test_a_set_without_queries_exports_features(monkeypatch, tmp_path):
  split = tiny_split(np.random.default_rng(0), 40)
  dataset = Dataset(split, None, None)
  use(monkeypatch, dataset)
  train.train(tiny_config(epochs=1), str(tmp_path))
  exported = dict(np.load(tmp_path / "features.npz"))
  assert list(exported["names"]) == list(split.names)
  assert exported["global"].shape == (40, 64)
  assert exported["local"].shape == (40, 4, 16)
  (tmp_path / "features.npz").unlink()
  scoring.score(tiny_config(epochs=1), str(tmp_path))
  again = np.load(tmp_path / "features.npz")
  for name, array in exported.items():
    np.testing.assert_array_equal(again[name], array)


def test_scores_of_a_checkpoint(dataset, monkeypatch, tmp_path):
  """Those of the run itself, without its train images, at any number of steps.

  The images' size is the encoder's, whatever the config says.
  """
  config = tiny_config(epochs=2, **{"evaluate_every": "1 epoch"})
  train.train(config, str(tmp_path))
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  expected = [x for x in map(json.loads, lines) if x["kind"] == "evaluate"]
  tables = []
  monkeypatch.setattr(train.Writer, "table", lambda self, x: tables.append(x))
  use(monkeypatch, dataset._replace(train=None))
  config.dataset.height, config.optim.lr = 64, 1.0
  scoring.score(config, str(tmp_path))
  (rows,) = tables
  assert rows[0]["step"] == 8
  for row in rows:
    (known,) = (x for x in expected if x["step"] == row["step"])
    assert row == {name: known[name] for name in row}


def test_other_train_images(dataset, monkeypatch, tmp_path):
  """Removed, renamed, replaced: the run is refused, and nothing is lost."""
  config = tiny_config(epochs=1)
  train.train(config, str(tmp_path))
  saved = contents(tmp_path)
  config.epochs = 2
  split = dataset.train
  for other, what in (
    (tiny_split(np.random.default_rng(0), 100), "130 then, 100 now"),
    (split._replace(names=("x", *split.names[1:])), "their names, cameras or"),
    (split._replace(camids=split.camids + 1), "their names, cameras or pix"),
    (split._replace(images=255 - split.images), "their names, cameras or pix"),
  ):
    use(monkeypatch, dataset._replace(train=other))
    with pytest.raises(UserError, match=rf"last/4 was trained on .*{what}"):
      train.train(config, str(tmp_path))
    assert contents(tmp_path) == saved


def test_a_run_without_a_step_begins_anew(dataset, monkeypatch, tmp_path):
  """A typo that is noticed soon costs no workdir."""
  config, typo = tiny_config(epochs=1), tiny_config(epochs=1)
  typo.optim.lr = 35.0
  broken, whole = str(tmp_path / "broken"), str(tmp_path / "whole")
  with monkeypatch.context() as patch:
    patch.setattr(train, "compile_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      train.train(typo, broken)
  assert Workdir(broken).newest("last").name == "0"
  for path in (broken, whole):
    train.train(config, path)
  for name in ("metrics.jsonl", "config.json"):
    texts = ((tmp_path / x / name).read_text() for x in ("broken", "whole"))
    assert len(set(texts)) == 1


def test_a_signal_while_it_is_scored(dataset, monkeypatch, tmp_path):
  """The run stops before the next epoch is clustered."""

  def report(self, *_):
    monkeypatch.setattr(train.Preemption, "noticed", True)
    return evaluate.Evaluation({"mAP": 0.1}, {})

  monkeypatch.setattr(train, "report_scores", report)
  config = tiny_config(epochs=3, **{"evaluate_every": "1 epoch"})
  with pytest.raises(train.Interrupted, match=r"^stopped after step 4 of 12"):
    train.train(config, str(tmp_path))


def contents(workdir):
  """Every file of a workdir but the log and the lock."""
  files = [x for x in workdir.rglob("*") if x.is_file()]
  return {
    x: x.read_bytes() for x in files if x.name not in ("log.txt", ".lock")
  }


@pytest.mark.parametrize("gone", ["last", "last/*"])
def test_a_run_that_lost_its_last_checkpoint(dataset, tmp_path, gone):
  """It is refused with any config, and its best encoder and metrics stay."""
  config = tiny_config(epochs=1)
  train.train(config, str(tmp_path))
  for path in (tmp_path / "checkpoints").glob(gone):
    shutil.rmtree(path)
  left = contents(tmp_path)
  for lr in (config.optim.lr, 1.0):
    config.optim.lr = lr
    with pytest.raises(
      UserError, match="checkpoints/last is gone, and without"
    ):
      train.train(config, str(tmp_path))
  assert contents(tmp_path) == left
  scoring.score(config, str(tmp_path))  # the best one is still of use


@pytest.mark.parametrize(
  "name, text, line",
  [
    (
      "metrics.jsonl",
      b"{}\n",
      "^line 1 of .*metrics.jsonl has no step or kind",
    ),
    ("metrics.jsonl", b"\xff\0\n", "^line 1 of .*metrics.jsonl is damaged"),
    ("metrics.jsonl", b'{"step": "1", "kind": ""}\n', "^line 1 of .* no step"),
    (
      "metrics.jsonl",
      b'{"step": 1, "kind": "evaluate", "mAP": "x"}\n',
      "^line 1 of .*metrics.jsonl has no numbers",
    ),
    (
      "config.json",
      b'{"method": {"name": "x"}}',
      "config.json of --workdir is",
    ),
    ("config.json", b"[1]", "config.json is damaged .it is no JSON object"),
    ("config.json", b"\xff", "config.json is damaged"),
    ("config.json", b"", "config.json is damaged"),
    ("checkpoints/last/99/x", b"", "last/99 is no checkpoint: move it away"),
    ("checkpoints/last/4/card/metadata", b"{", "card/metadata is damaged"),
    (
      "checkpoints/last/4/encoder/manifest.ocdbt",
      b"x",
      "last/4 cannot be rest",
    ),
    (
      "checkpoints/last/4/training/_METADATA",
      b"x",
      "last/4 cannot be restored",
    ),
  ],
)
def test_a_damaged_workdir(finished, tmp_path, name, text, line):
  """One line names the file, and nothing else is touched."""
  workdir, config, run = finished
  copy = tmp_path / "run"
  shutil.copytree(workdir, copy)
  (copy / name).parent.mkdir(exist_ok=True)
  (copy / name).write_bytes(text)
  before = contents(copy)
  with pytest.raises(UserError, match=line) as refused:
    run(config, str(copy))
  assert "\n" not in str(refused.value)
  assert contents(copy) == before


def test_the_checkpoint_before_a_damaged_one(finished, tmp_path):
  """The run says that it is there, and ends the same from it."""
  workdir, _, run = finished
  shutil.copytree(workdir, copy := tmp_path / "run")
  longer, last = tiny_config(epochs=2), copy / "checkpoints" / "last"
  shutil.copytree(last / "4", kept := tmp_path / "4")
  run(longer, str(copy))
  assert [x.name for x in last.iterdir()] == ["8"]  # it has ended
  metrics, arrays = (copy / "metrics.jsonl").read_text(), saved_arrays(copy)
  shutil.copytree(kept, last / "4")
  (last / "8" / "training" / "_METADATA").write_bytes(b"x")
  line = r"last/8 cannot .* it away, and the same command goes on after step 4$"
  with pytest.raises(UserError, match=line):
    run(longer, str(copy))
  shutil.rmtree(last / "8")
  run(longer, str(copy))
  assert (copy / "metrics.jsonl").read_text() == metrics
  for a, b in zip(saved_arrays(copy), arrays, strict=True):
    np.testing.assert_array_equal(a, b)


def test_the_best_is_the_one_that_is_saved():
  """Scores whose encoder a killed run has lost do not stand in its way."""
  scores = lambda step, mAP: {"step": step, "mAP": mAP}
  history = [scores(0, 0.9), scores(4, 0.5), scores(8, 0.7)]
  assert scoring.is_best({"mAP": 0.8}, history, saved=8)
  assert not scoring.is_best({"mAP": 0.7}, history, saved=8)
  assert scoring.is_best({"mAP": 0.6}, history, saved=4)
  assert scoring.is_best({"mAP": 0.1}, history, saved=None)
  assert not scoring.is_best({}, history, saved=None)


def test_a_best_encoder_of_another_config(finished, tmp_path):
  """It stays, also where no later checkpoint has been saved than the first."""
  workdir, _, run = finished
  last = shutil.copytree(workdir, tmp_path / "run") / "checkpoints" / "last"
  (last / "4").rename(last / "0")
  other, before = tiny_config(epochs=1), contents(tmp_path / "run")
  other.optim.lr = 35.0
  with pytest.raises(UserError, match=r"holds a run with optim\.lr"):
    run(other, str(tmp_path / "run"))
  assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_workdir_that_lost_a_file(finished, tmp_path, name):
  workdir, config, run = finished
  shutil.copytree(workdir, tmp_path / "run")
  (tmp_path / "run" / name).unlink()
  before = contents(tmp_path / "run")
  with pytest.raises(UserError, match=f"{name} is gone.*: bring it back, or"):
    run(config, str(tmp_path / "run"))
  assert contents(tmp_path / "run") == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A workdir, its config, and a function that trains on the same images."""
  workdir = tmp_path_factory.mktemp("finished")
  rng = np.random.default_rng(0)
  dataset = Dataset(*(tiny_split(rng, num) for num in (130, 8, 16)))

  def run(config, path):
    with pytest.MonkeyPatch.context() as patch:
      patch.setitem(resnet._DEPTHS, 18, ((1, 1), False))
      use(patch, dataset)
      train.train(config, path)

  run(config := tiny_config(epochs=1), str(workdir))
  return workdir, config, run


def test_no_checkpoint_and_an_old_one(dataset, tmp_path):
  with pytest.raises(UserError, match="holds no checkpoint: give a workdir in"):
    scoring.score(tiny_config(), str(tmp_path))
  old = tmp_path / "checkpoints" / "last" / "4" / "default"
  old.mkdir(parents=True)
  Workdir(tmp_path).write_config(tiny_config())
  before = contents(tmp_path)
  for use_it in (train.train, scoring.score):
    with pytest.raises(UserError, match=r"earlier version.*another --workdir"):
      use_it(tiny_config(), str(tmp_path))
  assert contents(tmp_path) == before


def test_an_interrupted_run_ends_like_an_unbroken_one(tmp_path):
  """SIGKILL within an epoch, and within a checkpoint's write."""
  broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
  crops = tiny_split(np.random.default_rng(0), 64)
  for name, image in zip(crops.names, crops.images, strict=True):
    path = tmp_path / "crops" / f"camera{int(name) % 4}" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)

  def start(workdir):
    options = TINY | {
      "num_devices": 1,
      "dataset.name": "folder",
      "dataset.root": tmp_path / "crops",
      "dataset.cache_dir": tmp_path / "cache",
      "epochs": 2,
      "steps_per_epoch": 14,
      "checkpoint_every": "4 steps",
    }
    arguments = ["--config=configs/selective.py", f"--workdir={workdir}"]
    arguments += [f"--config.{key}={value}" for key, value in options.items()]
    process = FORKS.Process(
      target=run_command, args=(arguments, tmp_path / "log")
    )
    process.start()
    return process

  def ends(process):
    process.join(100)
    return process.exitcode

  def kill(condition):
    process = start(broken)
    while not condition():
      assert process.is_alive(), "the run ended before it was stopped"
      time.sleep(0.001)
    process.kill()
    return ends(process)

  def steps():
    path = broken / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0

  def is_saving():
    return steps() > 20 and list(broken.glob("checkpoints/last/*tmp*"))

  assert ends(start(unbroken)) == 0
  assert kill(lambda: steps() > 8) == -signal.SIGKILL
  assert kill(is_saving) == -signal.SIGKILL
  assert len(list(broken.glob("checkpoints/last/*[0-9]"))) == 2
  assert ends(start(broken)) == 0
  metrics = [(x / "metrics.jsonl").read_text() for x in (broken, unbroken)]
  assert metrics[0] == metrics[1]
  assert "starts from random weights" in (unbroken / "log.txt").read_text()
  for a, b in zip(*map(saved_arrays, (broken, unbroken)), strict=True):
    np.testing.assert_array_equal(a, b)


def saved_tree(workdir):
  """Both parts of a workdir's last checkpoint."""
  folder = Workdir(workdir).newest("last")
  with ocp.StandardCheckpointer() as checkpointer:
    parts = ("encoder", "training")
    return {part: checkpointer.restore(folder / part) for part in parts}


def saved_arrays(workdir):
  """The arrays of a workdir's last checkpoint."""
  return [np.asarray(x) for x in jax.tree.leaves(saved_tree(workdir))]
