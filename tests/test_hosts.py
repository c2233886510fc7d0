"""Several processes: where they are, who starts them, how they end together."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from test_interruptions import wait_for
from test_run import FORKS, run_command

from unreid_jax import UserError
from unreid_jax.hosts import peers, place
from unreid_jax.hosts.launch import PLACE

ROOT = pathlib.Path(__file__).parent.parent
ALONE = dict.fromkeys(("coordinator", "num_processes", "process_id"))
OURS = {
  "JAX_COORDINATOR_ADDRESS": "a:1",
  "JAX_NUM_PROCESSES": "4",
  "JAX_PROCESS_ID": "3",
}
STEP = {  # of srun
  "SLURM_JOB_ID": "4097",
  "SLURM_STEP_NODELIST": "gpu[007-009,12]",
  "SLURM_STEP_NUM_TASKS": "7",
  "SLURM_PROCID": "6",
  "SLURM_LOCALID": "0",
  "SLURM_NODEID": "3",
  "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
}


@pytest.mark.parametrize(
  "way, flags, env, expected",
  [
    ("auto", {}, {}, None),
    ("auto", {}, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, None),  # no srun
    ("off", {}, OURS | STEP, None),
    ("auto", {}, OURS, ("a:1", 4, 3, None)),
    ("manual", {"process_id": 0}, OURS, ("a:1", 4, 0, None)),
    ("auto", {"num_processes": 1, "process_id": 0}, OURS, None),
    ("auto", {}, STEP, ("gpu007:61441", 7, 6, None)),
    # One task has the node, and all of its GPUs.
    ("slurm", {}, STEP | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (7, 6, None)),
    # Two tasks share them, unless Slurm has given each its own.
    (
      "auto", {},
      STEP | {
        "CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
      },
      (7, 3, [2, 3]),
    ),
    (
      "auto", {},
      STEP | {"CUDA_VISIBLE_DEVICES": "5", "SLURM_NODEID": "1"},
      (7, 6, None),
    ),
    ("auto", {}, STEP | {"SLURM_STEP_NODELIST": "n-1,n-2"}, ("n-1:61441",)),
    ("auto", {}, {"TPU_WORKER_HOSTNAMES": "t0"}, None),
    ("auto", {}, {"TPU_WORKER_HOSTNAMES": "t0,t1"}, ("gke_tpu",)),
    ("gke", {}, {}, ("k8s",)),
    ("tpu", {}, {}, ("gce_tpu",)),
  ],
)  # fmt: skip
def test_where_a_process_is(way, flags, env, expected):
  found = place.find(way, ALONE | flags, env)
  if expected is None:
    assert found is None
    return
  *_, ids = (expected[-1],) if len(expected) > 1 else (None,)
  assert found.get("local_device_ids") == ids
  for value in expected[:-1] if len(expected) > 1 else expected:
    assert value in found.values()


@pytest.mark.parametrize(
  "way, flags, env, line",
  [
    ("manual", {}, {}, "--coordinator (or JAX_COORDINATOR_ADDRESS) is missing"),
    ("auto", {}, OURS | {"JAX_PROCESS_ID": ""}, "--process_id (or JAX_PROCES"),
    ("auto", {}, OURS | {"JAX_PROCESS_ID": "x"}, "is x: set it to a whole num"),
    ("auto", {"process_id": 4}, OURS, "--process_id=4, but --num_processes=4"),
    ("auto", {"coordinator": "a"}, OURS, "--coordinator=a: write HOST:PORT"),
    ("slurm", {}, {"SLURM_JOB_ID": "1"}, "SLURM_STEP_NODELIST is not set: "),
  ],
)
def test_a_place_that_is_not_known(way, flags, env, line):
  with pytest.raises(UserError) as error:
    place.find(way, ALONE | flags, env)
  assert line in str(error.value)


def test_processes_of_one_machine_share_its_gpus():
  env = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5"}
  places = place.local(3, 9, env)
  assert [x["local_device_ids"] for x in places] == [[0, 1], [2, 3], [4, 5]]
  assert [x["process_id"] for x in places] == [0, 1, 2]
  assert "local_device_ids" not in place.local(3, 9, {})[0]


@pytest.fixture
def command(tmp_path):
  """Runs, under `launch`, a program in which `own` is the process's number."""

  def start(program, *flags):
    path = tmp_path / "program.py"
    path.write_text(
      "import json, os, pathlib, signal, sys, time\n"
      f"from unreid_jax.hosts.launch import PLACE, launch\n"
      # A shell's background jobs ignore it, and so would their children.
      "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
      "status = launch(sys.argv)\n"
      "if status is not None:\n"
      "  sys.exit(status)\n"
      "own = json.loads(os.environ[PLACE])['process_id']\n"
      f"here = pathlib.Path({str(tmp_path)!r})\n" + textwrap.dedent(program)
    )
    return subprocess.Popen(
      [sys.executable, path, "--launch=2", *flags],
      cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip

  return start


def test_what_the_processes_print_and_return(command):
  out, err = (run := command("print('I am', own)")).communicate(timeout=60)
  assert run.returncode == 0
  assert sorted(out.splitlines()) == ["[0] I am 0", "[1] I am 1"]
  assert not err
  fail = "print('error: ' + 'process 0: ' * own + 'no', file=sys.stderr)"
  run = command(f"{fail}; sys.exit(2)")
  _, err = run.communicate(timeout=60)
  assert run.returncode == 2
  assert err.endswith("no\n") and len(err.splitlines()) == 1


LABELS = """
import jax, numpy as np
from unreid_jax import memory, sharding
from unreid_jax.hosts import peers
from unreid_jax.methods.cluster_contrast import Hyperparameters
from unreid_jax.pseudo_labels import clustering, jaccard_distance, shares

if PLACE in os.environ:
  peers.join()
  shares._MOST, memory._PIECE = 2**12, 96  # several pieces
rng = np.random.default_rng(0)
people = rng.standard_normal((40, 16))[rng.integers(0, 40, 401)]
features = people + 0.7 * rng.standard_normal(people.shape)
features /= np.linalg.norm(features, axis=1, keepdims=True)
features = features.astype(np.float32)
hp = Hyperparameters(k1=12, eps=0.7, min_samples=3)
cluster = lambda: clustering.cluster(hp, features, np.zeros(401, int)).labels[0]
labels = cluster()
dbscan, turn = clustering.dbscan, own if own != "one" else 0
clustering.dbscan = lambda *given: np.roll(dbscan(*given), turn)
decided = cluster()
clustering.dbscan = dbscan
mesh = sharding.make_mesh(4)
with jax.set_mesh(mesh):
  split = sharding.SplitRows.put(mesh, features)
  make = jax.jit(lambda x, labels: memory.centroids(x.array, labels, 200))
  bank = memory.to_host(make(split, labels), 200)
jaccard = jaccard_distance(features, 12, 3)
np.savez(
  f"{here}/{own}.npz", labels=labels, decided=decided, bank=bank,
  data=jaccard.data, indices=jaccard.indices, indptr=jaccard.indptr,
)
"""


def test_four_processes_share_the_labels_of_an_epoch(command, tmp_path):
  """The distances, the labels and a bank of one process, bit by bit.

  Where the processes would label differently, the first one decides.
  """
  out, err = (run := command(LABELS, "--launch=4")).communicate(timeout=100)
  assert run.returncode == 0, out + err
  exec(LABELS, {"PLACE": "no place", "os": os, "here": tmp_path, "own": "one"})
  one = np.load(tmp_path / "one.npz")
  assert one["labels"].max() > 10
  for own in range(4):
    found = np.load(tmp_path / f"{own}.npz")
    for name, array in one.items():
      np.testing.assert_array_equal(found[name], array)


CRASH = (
  "E1129 09:14:32.1 10 coordination_service_agent.cc:289] Polled an error\n"
  "F1129 09:14:32.2 10 client.h:80] Terminating process because the JAX "
  "distributed service detected fatal errors.\n*** Check failure\n    @ 0x7\n"
)


def test_a_process_that_is_killed(command):
  """The others are JAX's to end; what it writes then helps nobody."""
  lose = f"""
    if own == 1:
      os.kill(os.getpid(), signal.SIGKILL)
    sys.stderr.write({CRASH!r})
    sys.stderr.flush()
    os.abort()
  """
  _, err = (run := command(lose)).communicate(timeout=60)
  assert run.returncode == 76
  assert err.splitlines() == [
    "process 1 was ended by SIGKILL",
    "the run has ended; the same command goes on",
  ]


def test_a_crash_of_another_kind_is_shown(command):
  program = (
    "os.write(2, b'F1129 09:14:32.2 10 client.h:80] Else\\n'); os.abort()"
  )
  _, err = command(program).communicate(timeout=60)
  assert err.count("client.h:80] Else") == 2


def test_a_lost_process_is_started_again(command):
  flaky = """
    print("starts", flush=True)
    if not (here / f"was{own}").exists():
      (here / f"was{own}").touch()
      sys.exit(76)
  """
  out, err = (run := command(flaky, "--restarts=3")).communicate(timeout=60)
  assert run.returncode == 0
  assert out.count("starts") == 4
  assert "starts again (1 of 3)" in err and "(2 of 3)" not in err
  out, err = (run := command("sys.exit(76)", "--restarts=2")).communicate()
  assert run.returncode == 76
  assert "starts again (2 of 2)" in err


def test_signals_reach_all_and_a_second_one_ends_them_at_once(command):
  listen = """
    print("ready", flush=True)
    if sys.stdin.readline() == "stop\\n":
      print("told", flush=True)
    if "--deaf" in sys.argv:
      time.sleep(600)
    sys.exit(75)
  """
  for is_deaf in False, True:
    run = command(listen, *["--deaf"] * is_deaf)
    ready = [run.stdout.readline() for _ in range(2)]
    assert sorted(ready) == ["[0] ready\n", "[1] ready\n"]
    run.send_signal(signal.SIGINT)
    told = [run.stdout.readline() for _ in range(2)]
    assert sorted(told) == ["[0] told\n", "[1] told\n"]
    if is_deaf:
      run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 75
    assert err == "stopped at once; the same command goes on\n" * is_deaf


def test_launch_and_a_place_do_not_go_together(command):
  run = command("", "--coordinator=a:1", "--num_processes=2", "--process_id=0")
  _, err = run.communicate(timeout=60)
  assert "UserError: --launch is for one machine" in err


# From here on, real runs.


def run_child(arguments, log, own, ear):
  """The body of a process, alone or as `launch` would have started it."""
  if own["num_processes"] > 1:
    os.dup2(ear.fileno(), 0)
    os.environ[PLACE] = json.dumps(own)
  run_command(arguments, log)


class Together:
  """Two processes of one run, of a device each, without their parents."""

  def __init__(self, folder, crops, each=((), ()), epochs=3):
    options = {"root": crops, "cache_dir": folder / "cache"}
    common = ["--config=configs/cluster_contrast.py:folder,small"]
    common += [f"--config.dataset.{k}={v}" for k, v in options.items()]
    common += ["--config.encoder.width=0.125", f"--workdir={folder}/run"]
    common += [f"--config.epochs={epochs}", "--config.steps_per_epoch=2"]
    common += ["--config.num_devices=2", "--config.log_every=1 step"]
    common += ["--config.report=False"]
    common += ["--config.method.instance_epochs=1", "--config.method.eps=.9"]
    self.logs, self.mouths, self.processes = [], [], []
    with socket.socket() as listener:
      listener.bind(("127.0.0.1", 0))
      port = listener.getsockname()[1]
    places = place.local(len(each), port, {})
    for i, (own, where) in enumerate(zip(each, places, strict=True)):
      ear, mouth = FORKS.Pipe(duplex=False)
      self.logs.append(folder / f"log{i}")
      self.logs[i].touch()
      arguments = [*common, *own], self.logs[i], where, ear
      self.processes.append(FORKS.Process(target=run_child, args=arguments))
      self.processes[i].start()
      self.mouths.append(mouth)

  def say_stop(self, which):
    os.write(self.mouths[which].fileno(), b"stop\n")

  def ends(self):
    """The statuses, and what each has printed."""
    for process in self.processes:
      process.join(100)
    statuses = [process.exitcode for process in self.processes]
    return statuses, [log.read_text().strip() for log in self.logs]


@pytest.mark.parametrize(
  "own, line",
  [
    (
      ["--config.optim.lr=0.5"],
      "optim.lr is not the same everywhere: 0.001 on process 0, 0.5 on process "
      "1: start all processes with the same",
    ),
    (
      ["--config.dataset.root=/nowhere"],
      'dataset.root="/nowhere" is no folder: set it to a directory',
    ),
    (["--config.optim.x=1"], 'the config has no key "optim.x"'),
    (
      ["--workdir={other}"],
      "{other} is not the folder that process ",
    ),
  ],
)
def test_a_difference_ends_all_in_one_line(tmp_path, crops, own, line):
  other = str(tmp_path / "other")
  own, line = [x.format(other=other) for x in own], line.format(other=other)
  statuses, printed = Together(tmp_path, crops, ([], own)).ends()
  assert statuses == [2, 2], printed
  for text in printed:  # the main thread may log a word more
    (said,) = (x for x in text.splitlines() if x.startswith("error: "))
    said = said.removeprefix("error: ").removeprefix("process 1: ")
    assert said.startswith(line)
    assert "Traceback" not in text and "***" not in text
  if "optim.lr" not in line:  # else each has found it out by itself
    assert "error: process 1: " in printed[0]


def test_two_processes_are_stopped_go_on_and_equal_one(tmp_path, crops):
  """Killed, then told to stop; the numbers are those of one process."""
  one, two = tmp_path / "one", tmp_path / "two"
  one.mkdir(), two.mkdir()
  lost = Together(two, crops)
  wait_for(lost.logs[0], "epoch 1/3")
  lost.processes[1].kill()
  lost.processes[0].join(100)
  assert lost.processes[0].exitcode in (76, -signal.SIGABRT)
  stopped = Together(two, crops, epochs=1000)
  wait_for(stopped.logs[0], "epoch 2/1000")
  stopped.say_stop(1)
  statuses, printed = stopped.ends()
  assert statuses == [75, 75], printed
  ends = {text.splitlines()[-1] for text in printed}
  assert len(ends) == 1 and "which is saved" in ends.pop()
  steps = [int(x.name) for x in (two / "run/checkpoints/last").iterdir()]
  epochs = max(steps) // 2 + 2
  for folder, each in (two, ((), ())), (one, ((),)):
    statuses, printed = Together(folder, crops, each, epochs).ends()
    assert not any(statuses), printed
  one, two = ((x / "run/metrics.jsonl").read_text() for x in (one, two))
  assert '"cluster"' in one and '"train"' in one
  assert one == two


def test_all_stop_at_the_same_turn_while_they_encode(monkeypatch):
  """One is told to stop, and another one is two turns ahead of it."""
  store = {}

  class Client:
    def key_value_set(self, key, value):
      assert key not in store  # JAX raises, too
      store[key] = value

    def key_value_try_get(self, key):
      return store[key]

  monkeypatch.setattr(peers, "_client", Client)
  monkeypatch.setattr(peers, "_is_watched", lambda: True)
  stopped, turns = {}, {"told": 0, "ahead": 0}
  for _ in range(30):
    for name, lead in ("ahead", 2), ("told", 0):
      while name not in stopped and turns[name] < turns["told"] + lead + 1:
        turns[name] += 1
        is_told = name == "told" and turns[name] >= 5
        monkeypatch.setattr(peers._is_told, "is_set", lambda x=is_told: x)
        if peers.stops(turns[name]):
          stopped[name] = turns[name]
        if name == "told":
          break
  assert stopped == {"ahead": 13, "told": 13}
