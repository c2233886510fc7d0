"""The loop: any number of devices, one compile, and after any interruption."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from PIL import Image

from configs import default
from unreid_jax import UserError, methods, sharding, train
from unreid_jax.config import resolve
from unreid_jax.data import Dataset, Split
from unreid_jax.methods import Batch, cluster_contrast, dhcl_hnm
from unreid_jax.pseudo_labels import clustering
from unreid_jax.relabel import relabel
from unreid_jax.state import Parts, first_state, make_parts
from unreid_jax.writer import Writer

ROOT = pathlib.Path(__file__).parent.parent
TINY = {
  "num_devices": 2,
  "dataset.height": 64,
  "dataset.width": 32,
  "encoder.arch": "resnet18",
  "encoder.width": 0.125,
  "encoder.num_stripes": 4,
  "encoder.stripe_dim": 16,
  "encoder.embedding_dim": 64,
  "batch_size": 32,
  "log_every": "1 step",
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
  images = patches.repeat(8, axis=1).repeat(8, axis=2)
  pids = np.arange(num, dtype=np.int32) // 4
  camids = np.arange(num, dtype=np.int32) % 4
  return Split(images, pids, camids, tuple(map(str, range(num))))


@pytest.fixture
def dataset(monkeypatch):
  """Noise instead of the images of `data.load`."""
  rng = np.random.default_rng(0)
  dataset = Dataset(*(tiny_split(rng, num) for num in (130, 8, 16)))
  monkeypatch.setattr(train, "load_dataset", lambda config, writer: dataset)
  return dataset


class Rig:
  """A compiled step on some devices, and the banks that it starts with."""

  def __init__(self, split, num_devices, **changes):
    self.split = split
    config = tiny_config(num_devices=num_devices, **changes)
    with jax.set_mesh(sharding.make_mesh(num_devices)):
      self.parts = make_parts(resolve(config, steps_per_epoch=4))
      state = first_state(self.parts, len(split.names), weights="")
      copies = NamedSharding(self.parts.mesh, sharding.COPY)
      self.key = jax.device_put(jax.random.key(0), copies)
      features = tiny_features(len(split.names))
      labels = np.arange(len(split.names), dtype=np.int32)
      method = jax.jit(self.parts.method.refresh)(
        state.method, features, labels, split.camids
      )
      self.state = state.replace(method=method)
      self.step = train.compile_step(self.parts, self.state, self.key)

  def run(self, num_steps, seed=0):
    """Metrics and states of some steps, and test-time features after them."""
    split, mesh = self.split, self.parts.mesh
    state = jax.tree.map(lambda x: x.copy(), self.state)
    rng, outs = np.random.default_rng(seed), []
    labels = np.arange(len(split.names), dtype=np.int32)
    for _ in range(num_steps):
      rows = rng.permutation(len(labels))[:32]
      arrays = split.images, labels, labels, split.camids
      batch = Batch(*(sharding.put_rows(mesh, x, rows) for x in arrays))
      state, metrics = self.step(state, batch, self.key)
      outs.append(jax.device_get((metrics, state)))
    images = sharding.put_rows(mesh, split.images, np.arange(32))
    encode = self.parts.encode["eval"]
    outs.append(jax.device_get(encode(state.variables, images, self.key)[1]))
    return state, outs


def tiny_features(num):
  rng = np.random.default_rng(1)
  shapes = {"global": (num, 64), "local": (num, 4, 16)}
  raw = {k: rng.standard_normal(s, np.float32) for k, s in shapes.items()}
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  return {name: unit(x) for name, x in raw.items()}


def test_one_device_equals_eight(dataset):
  """Loss, gradients, banks and features, over several steps.

  Where rounding changes the sign of a ReLU's input, two runs part by more than
  rounding; this happens to a seed now and then, hence the median of five.
  """
  # SGD's momentum is in the state: the gradients of all steps, summed up.
  changes = {"optim.name": "sgd", "optim.lr": 1e-3}
  one, eight = (Rig(dataset.train, n, **changes) for n in (1, 8))

  def deviation(a, b):
    return np.linalg.norm(a - b) / max(np.linalg.norm(a), 0.1)

  worst = []
  for seed in range(5):
    trees = one.run(3, seed)[1], eight.run(3, seed)[1]
    pairs = zip(*map(jax.tree.leaves, trees), strict=True)
    worst.append(max(deviation(a, b) for a, b in pairs))
  assert np.median(worst) <= 1e-5


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
  assert saved_arrays(tmp_path)[-1] == 4  # TrainState.step
  assert all(np.isfinite(x).all() for x in saved_arrays(tmp_path))
  for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
    assert "NaN" not in line and "Infinity" not in line


def test_goes_on_with_another_number_of_devices(dataset, tmp_path):
  for num_devices, epochs in ((1, 1), (4, 2)):
    train.train(
      tiny_config(num_devices=num_devices, epochs=epochs), str(tmp_path / "a")
    )
  train.train(tiny_config(num_devices=1, epochs=2), str(tmp_path / "b"))
  for a, b in zip(*map(saved_arrays, tmp_path.iterdir()), strict=True):
    assert np.abs(a - b).max(initial=0) <= 1e-3 * max(np.abs(b).max(), 1)


def test_a_cluster_method_on_one_device_and_eight(dataset, tmp_path):
  """Two epochs, each with clusters of its own; the step compiles once."""
  lines = []
  for num_devices in (1, 8):
    config = cluster_config("hhcl", num_devices=num_devices, epochs=2)
    workdir = tmp_path / str(num_devices)
    train.train(config, str(workdir))
    text = (workdir / "metrics.jsonl").read_text().splitlines()
    lines.append([json.loads(line) for line in text])
  clusters = [x["clusters"] for x in lines[0] if x["kind"] == "cluster"]
  assert len(set(clusters)) == 2 and min(clusters) > 1
  for one, eight in zip(*lines, strict=True):
    assert one.keys() == eight.keys()
    if one["step"] <= 3:  # roundings grow, until they change a label
      for name in ("clusters", "outliers", "ARI", "loss"):
        if name in one:
          np.testing.assert_allclose(one[name], eight[name], 2e-3, 1e-9)


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
    (cluster_config("hhcl", **{"method.memory": "instances"}), (3, 4)),
    (generator_config(), (1, 4)),
    (generator_config(alternate="epoch", generator_steps="1 epoch"), (4,)),
  ],
)
def test_labels_and_networks_are_resumed(
  dataset, monkeypatch, tmp_path, config, stops
):
  """Stopped at an epoch's end, or within it: the same run, bit by bit."""
  whole, parted = tmp_path / "whole", tmp_path / "parted"
  train.train(config, str(whole))
  for stop in stops:
    with monkeypatch.context() as patch:
      requested = lambda self, step, stop=stop: step == stop
      patch.setattr(train.Preemption, "requested", requested)
      with pytest.raises(train.Interrupted, match=f"after step {stop} of 9"):
        train.train(config, str(parted))
  train.train(config, str(parted))
  texts = [(x / "metrics.jsonl").read_text() for x in (whole, parted)]
  assert texts[0] == texts[1]
  reports = 3 if config.method.name == "hngn" else 0
  assert texts[0].count('"kind": "epoch"') == reports
  for a, b in zip(*map(saved_arrays, (whole, parted)), strict=True):
    np.testing.assert_array_equal(a, b)


def test_an_epoch_without_clusters(dataset, monkeypatch, tmp_path):
  """The last epoch's labels stay; without any, the run stops."""
  config = cluster_config("cluster_contrast")
  nothing = np.full(130, -1, np.int32)
  labels = [np.arange(130, dtype=np.int32) % 12, nothing, nothing]
  answers = iter([clustering.Labelling(x) for x in [*labels, nothing]])
  monkeypatch.setattr(
    cluster_contrast,
    "cluster",
    lambda hp, features, camids, epoch: next(answers),
  )
  train.train(config, str(tmp_path / "a"))
  log = (tmp_path / "a" / "log.txt").read_text()
  assert log.count("less than two clusters: the last epoch's labels stay") == 2
  assert saved_arrays(tmp_path / "a")[-1] == 9
  with pytest.raises(UserError, match=r"0 cluster\(s\) of 130 images, and two"):
    train.train(config, str(tmp_path / "b"))


def test_what_goes_with_refused_labels_is_refused_too(tmp_path):
  """One cluster: the last epoch's labels stay, and so does the state."""
  one = clustering.Labelling(
    np.zeros(4, np.int32), state={"loose": np.zeros(4, np.int32)}
  )
  method = methods.make("dhcl_hnm")._replace(label=lambda *_: one)
  config = cluster_config("dhcl_hnm")
  parts = Parts(config, None, None, method, None, None, {})
  banks = dhcl_hnm.State(*[jnp.zeros(())] * 4, loose=jnp.ones(4))
  state = train.TrainState(jnp.zeros((), int), {}, {}, {}, banks)
  known = np.array([0, 0, 1, 1], np.int32)
  refresh = lambda banks, features, labels, camids: banks
  images = tiny_split(np.random.default_rng(0), 4)
  rest = images, "memory", jax.random.key(0), Writer(str(tmp_path))
  after, labels = relabel(parts, state, refresh, known, *rest)
  np.testing.assert_array_equal(labels, known)
  np.testing.assert_array_equal(after.method.loose, np.ones(4))


def test_a_workdir_belongs_to_one_config(dataset, tmp_path):
  train.train(tiny_config(epochs=1), str(tmp_path))
  with pytest.raises(UserError, match=r"optim.lr=0.00035, but this one has 1"):
    train.train(tiny_config(epochs=1, **{"optim.lr": 1.0}), str(tmp_path))


def test_a_set_without_queries_exports_features(monkeypatch, tmp_path):
  split = tiny_split(np.random.default_rng(0), 40)
  dataset = Dataset(split, None, None)
  monkeypatch.setattr(train, "load_dataset", lambda config, writer: dataset)
  train.train(tiny_config(epochs=1), str(tmp_path))
  exported = np.load(tmp_path / "features.npz")
  assert list(exported["names"]) == list(split.names)
  assert exported["global"].shape == (40, 64)
  assert exported["local"].shape == (40, 4, 16)


def test_an_interrupted_run_ends_like_an_unbroken_one(tmp_path):
  """SIGTERM, SIGKILL within an epoch, SIGKILL within a checkpoint's write."""
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
    overrides = [f"--config.{key}={value}" for key, value in options.items()]
    env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, "run.py", "--config=configs/selective.py"]
    command += [f"--workdir={workdir}", *overrides]
    return subprocess.Popen(command, cwd=ROOT, env=env)

  def stop(condition, number):
    process = start(broken)
    while not condition():
      assert process.poll() is None, "the run ended before it was stopped"
      time.sleep(0.001)
    process.send_signal(number)
    return process.wait()

  def steps():
    path = broken / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0

  def is_saving():
    return steps() > 20 and list(broken.glob("checkpoints/last/*tmp*"))

  assert start(unbroken).wait() == 0
  assert stop(lambda: steps() > 5, signal.SIGTERM) == 75
  assert stop(lambda: steps() > 15, signal.SIGKILL) == -signal.SIGKILL
  assert stop(is_saving, signal.SIGKILL) == -signal.SIGKILL
  assert start(broken).wait() == 0
  metrics = [(x / "metrics.jsonl").read_text() for x in (broken, unbroken)]
  assert metrics[0] == metrics[1]
  for a, b in zip(*map(saved_arrays, (broken, unbroken)), strict=True):
    np.testing.assert_array_equal(a, b)


def saved_arrays(workdir):
  """The arrays of a workdir's last checkpoint."""
  folder = pathlib.Path(workdir) / "checkpoints" / "last"
  with ocp.CheckpointManager(folder) as manager:
    tree = manager.restore(
      manager.latest_step(), args=ocp.args.StandardRestore()
    )
  return [np.asarray(x) for x in jax.tree.leaves(tree)]
