"""The loop: any number of devices, one compile, and after any interruption."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding

from configs import default
from unreid_jax import UserError, sharding, train
from unreid_jax.data import Dataset, Split
from unreid_jax.methods import Batch
from unreid_jax.state import build

ROOT = pathlib.Path(__file__).parent.parent
TINY = {
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


def tiny_split(rng, num):
  images = rng.integers(0, 256, (num, 64, 32, 3), np.uint8)
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


def run_steps(dataset, num_devices, num_steps, **changes):
  """Fills the banks and trains; the step, its results, test features."""
  config = tiny_config(num_devices=num_devices, **changes)
  split = dataset.train
  with jax.set_mesh(sharding.make_mesh(num_devices)):
    parts, state = build(config, len(split.names), steps_per_epoch=4)
    key = jax.device_put(
      jax.random.key(0), NamedSharding(parts.mesh, sharding.COPY)
    )
    features = tiny_features(len(split.names))
    labels = np.arange(len(split.names), dtype=np.int32)
    method = parts.method.refresh(state.method, features, labels, split.camids)
    state = state.replace(method=method)
    step = train.compile_step(parts, state, key)
    outs = []
    for i in range(num_steps):
      rows = np.random.default_rng(i).permutation(len(labels))[:32]
      arrays = split.images, labels, labels, split.camids
      batch = Batch(*(sharding.put_rows(parts.mesh, x, rows) for x in arrays))
      state, metrics = step(state, batch, key)
      outs.append(jax.device_get((metrics, state)))
    eval_step = parts.encode["eval"]
    images = sharding.put_rows(parts.mesh, split.images, np.arange(32))
    _, encoded = eval_step(state.variables, images, key)
  return step, state, outs, jax.device_get(encoded)


def tiny_features(num):
  rng = np.random.default_rng(1)
  shapes = {"global": (num, 64), "local": (num, 4, 16)}
  raw = {k: rng.standard_normal(s, np.float32) for k, s in shapes.items()}
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  return {name: unit(x) for name, x in raw.items()}


def test_one_device_equals_eight(dataset):
  # SGD's momentum is in the state: the gradients of all steps, summed up.
  changes = {"optim.name": "sgd", "optim.lr": 1e-3}
  _, _, outs, features = run_steps(dataset, 1, 3, **changes)
  _, _, outs8, features8 = run_steps(dataset, 8, 3, **changes)
  trees = (outs, features), (outs8, features8)
  for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
    assert np.abs(a - b).max() <= 1e-5 * max(np.abs(a).max(), 0.1)


def test_the_bank_is_never_gathered():
  """Reads the compiled step: no collective is as large as a bank."""
  rng = np.random.default_rng(0)
  dataset = Dataset(*(tiny_split(rng, num) for num in (2000, 8, 16)))
  changes = {"method.num_negatives": 20}
  step, state, _, _ = run_steps(dataset, 8, 1, **changes)
  banks = (state.method.global_bank, state.method.mixture)
  for bank in (*banks, state.method.local_bank):
    shapes = {x.data.shape for x in bank.addressable_shards}
    assert shapes == {(256, *bank.shape[1:])}
  names = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
  lines = re.findall(rf"= (.*?) (?:{names})(?:-start)?\(", step.as_text())
  arrays = re.findall(r"[a-z]+\d+\[([\d,]*)\]", " ".join(lines))
  sizes = [np.prod([int(n) for n in x.split(",") if n]) for x in arrays]
  assert len(lines) > 10  # the pattern does find them
  assert max(sizes) < banks[0].size / 2


def test_a_step_that_is_not_finite_stops_the_run(dataset, tmp_path):
  config = tiny_config(epochs=4, checkpoint_every="2 steps")
  config.update_from_flattened_dict(
    {
      "optim.name": "sgd",
      "optim.lr": 1e30,
      "optim.warmup": "5 steps",
      "optim.warmup_factor": 0.0,
    }
  )
  with pytest.raises(UserError, match=r"step [567]: the run stops"):
    train.train(config, str(tmp_path))
  assert all(np.isfinite(x).all() for x in saved_arrays(tmp_path))


def test_goes_on_with_another_number_of_devices(dataset, tmp_path):
  for num_devices, epochs in ((1, 1), (8, 2)):
    train.train(
      tiny_config(num_devices=num_devices, epochs=epochs), str(tmp_path / "a")
    )
  train.train(tiny_config(num_devices=1, epochs=2), str(tmp_path / "b"))
  for a, b in zip(*map(saved_arrays, tmp_path.iterdir()), strict=True):
    assert np.abs(a - b).max(initial=0) <= 1e-3 * max(np.abs(b).max(), 1)


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

  def start(workdir):
    options = {"epochs": 2, "checkpoint_every": "4 steps"} | TINY
    overrides = (f"--config.{key}={value}" for key, value in options.items())
    env = os.environ | {"XLA_FLAGS": ""}
    command = [sys.executable, "run.py", f"--workdir={workdir}", *overrides]
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
