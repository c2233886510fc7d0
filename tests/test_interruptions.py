"""Signals at any time of a run's life, a full disk, a folder in use."""

import ctypes
import functools
import importlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from test_run import FORKS, refused, run_command

from unreid_jax import UserError, train
from unreid_jax.workdir import Workdir, checkpoints

ROOT = pathlib.Path(__file__).parent.parent


def hang_in(owner, name, here, is_deaf, arguments, log):
  """The body of a process: run.py, which hangs in the function of that name."""

  def hang(*_, **__):
    here.touch()
    if is_deaf:  # as in a compiler: no handler of Python's is called
      libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
      libc.pthread_mutex_init(mutex, None)
      libc.pthread_mutex_lock(mutex)
      libc.pthread_mutex_lock(mutex)
    threading.Event().wait()

  for number in (signal.SIGHUP, signal.SIGINT):  # nohup lets us ignore them
    signal.signal(number, signal.default_int_handler)
  train.compile_step = lambda *_: None  # is slow, and never called
  setattr(importlib.import_module(owner), name, hang)
  run_command(arguments, log)


@pytest.mark.parametrize(
  "owner, name, is_deaf, signals",
  [
    ("unreid_jax.data.cache", "_write", False, [signal.SIGTERM]),
    ("unreid_jax.train", "first_state", True, [signal.SIGHUP]),
    ("unreid_jax.train", "first_state", True, [signal.SIGINT, signal.SIGTERM]),
    ("unreid_jax.train", "relabel", False, [signal.SIGINT, signal.SIGTERM]),
  ],
)
def test_a_signal_while_it_starts(
  tmp_path, crops, owner, name, is_deaf, signals
):
  """It ends with the status that says: start me again."""
  here, log, cache = (tmp_path / x for x in ("here", "log", "cache"))
  workdir = tmp_path / "run"
  options = {"name": "folder", "root": crops, "cache_dir": cache}
  arguments = ["--config=configs/selective.py", f"--workdir={workdir}"]
  arguments += [f"--config.dataset.{k}={v}" for k, v in options.items()]
  arguments += ["--config.encoder.width=0.125"]
  hang = owner, name, here, is_deaf, arguments, log
  process = FORKS.Process(target=hang_in, args=hang)
  process.start()
  while not here.exists():
    assert process.is_alive(), log.read_text()
    time.sleep(0.01)
  for number in signals:
    os.kill(process.pid, number)
    wait_for(log, "stop")  # "stops now", or by then "stopped before a step"
  process.join(60)
  printed = log.read_text()
  assert process.exitcode == 75, printed
  assert "the same command goes on" in printed.splitlines()[-1]
  assert "Traceback" not in printed
  assert not list(cache.rglob("*.unfinished"))


def wait_for(log, text):
  for _ in range(6000):
    if text in log.read_text():
      return
    time.sleep(0.01)
  raise AssertionError(log.read_text())


def test_a_signal_before_anything_is_imported(tmp_path):
  command = [sys.executable, "run.py", "--config=configs/selective.py"]
  command += [f"--workdir={tmp_path}"]
  process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
  bit = 1 << (signal.SIGTERM - 1)
  status = pathlib.Path(f"/proc/{process.pid}/status")
  if not status.exists():
    pytest.skip("without /proc nobody knows when the handler is there")
  caught = lambda: int(status.read_text().split("SigCgt:")[1].split()[0], 16)
  while not caught() & bit:
    assert process.poll() is None
  process.send_signal(signal.SIGTERM)
  _, printed = process.communicate(timeout=60)
  assert process.returncode == 75
  assert printed == b"stopped at once; the same command goes on\n"


def test_what_is_ignored_stays_ignored():
  """As under nohup, and in a script's background job."""
  program = """if True:
    import os, signal, sys, time
    from unreid_jax import preemption
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    preemption.exit_on_signals()
    with preemption.Preemption() as stop:
      os.kill(os.getpid(), signal.SIGHUP)
      assert not stop.requested(1)
      stop.defer()
      os.kill(os.getpid(), signal.SIGINT)
      while not stop.requested(1):
        time.sleep(.01)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
  """
  assert subprocess.run([sys.executable, "-c", program]).returncode == 75


def test_two_runs_in_one_folder(tmp_path):
  """The second is refused; a folder that a killed run had is free."""
  hold = f"""if True:
    from unreid_jax import progress
    from unreid_jax.workdir import Workdir
    with Workdir({str(tmp_path)!r}).locked():
      print("locked", flush=True)
      input()
  """
  command = [sys.executable, "-c", hold]
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
  with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
    assert process.stdout.readline() == b"locked\n"
    line = f"{tmp_path} is in use by process {process.pid} on .*: wait for its"
    with pytest.raises(UserError, match=line), Workdir(tmp_path).locked():
      pass
    process.kill()
    process.wait()
  with Workdir(tmp_path).locked():
    pass


@pytest.fixture
def small_disk(tmp_path):
  """A function that mounts a file system of so many bytes."""
  mounted = []

  def mount(size):
    folder = tmp_path / f"disk{size}"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if not shutil.which("mount") or subprocess.call(command):
      pytest.skip("this machine lets nobody mount a file system")
    mounted.append(folder)
    return folder

  yield mount
  for folder in mounted:
    subprocess.call(["umount", folder])


@pytest.mark.parametrize(
  "size, line",
  [
    (0, r"error: .* cannot be written \(No space left on device\): mend that"),
    (2**15, r"error: .*last: step 0 cannot be saved \(No space left on device"),
  ],
)
def test_a_full_disk(small_disk, crops, tmp_path, size, line):
  disk = small_disk(size + 2**12)
  if not size:
    (disk / "x").write_bytes(bytes(2**12))
  options = {"dataset.name": "folder", "dataset.root": crops}
  options |= {"dataset.cache_dir": tmp_path, "encoder.width": 0.125}
  arguments = ["--config=configs/selective.py", f"--workdir={disk}/run"]
  arguments += [f"--config.{k}={v}" for k, v in options.items()]
  printed = refused(tmp_path, arguments)
  (last,) = [x for x in printed.splitlines() if x.startswith("error")]
  assert last == printed.splitlines()[-1]
  assert re.match(line, last), last


def test_a_checkpoint_that_cannot_be_saved(tmp_path, monkeypatch):
  """The earlier one stays, and nothing half-written."""
  save = functools.partial(checkpoints.Checkpoints.save, card={"height": 1})
  with checkpoints.Checkpoints(Workdir(tmp_path)) as saved:
    save(saved, "last", 4, state=State(8))

    def break_down(*_, **__):
      (tmp_path / "checkpoints/last/8.orbax-checkpoint-tmp").mkdir()
      raise ValueError("RESOURCE_EXHAUSTED: No space left on device [...]")

    monkeypatch.setattr(saved._managers["last"], "save", break_down)
    line = r"last: step 8 cannot be saved \(No space left on device\): it needs"
    with pytest.raises(UserError, match=line):
      save(saved, "last", 8, state=State(8))
  assert Workdir(tmp_path).newest("last").name == "4"
  assert not list(tmp_path.rglob("*tmp*"))


def test_a_checkpoint_that_fails_in_the_background(tmp_path, monkeypatch):
  """It is said at the next chance, and the earlier one stays."""
  save = functools.partial(checkpoints.Checkpoints.save, card={"height": 1})
  saved = checkpoints.Checkpoints(Workdir(tmp_path))
  save(saved, "last", 4, state=State(8))
  saved.wait()
  whole = saved._managers["last"].wait_until_finished

  def break_down():
    whole()
    shutil.rmtree(tmp_path / "checkpoints/last/8")
    monkeypatch.undo()
    raise ValueError("UNAVAILABLE: the file system is gone")

  save(saved, "last", 8, state=State(8))
  monkeypatch.setattr(
    saved._managers["last"], "wait_until_finished", break_down
  )
  line = (
    r"last: step 8 cannot be saved \(UNAVAILABLE: the file system is gone\)"
  )
  with pytest.raises(UserError, match=line):
    save(saved, "best", 8, state=State(8))
  saved.__exit__()
  assert Workdir(tmp_path).newest("last").name == "4"
  assert not Workdir(tmp_path).newest("best")


class State:
  """As a `TrainState` of one array."""

  def __init__(self, size):
    self.encoder = {"x": np.zeros(size)}
    self.training = {"y": np.ones(size)}


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "2>&1 | true"])
def test_a_run_without_a_terminal_goes_on(tmp_path, closed):
  """Its log is whole, also if what it writes to is closed or has gone away."""
  program = """if True:
    from unreid_jax import progress
    from unreid_jax.workdir import Workdir
    from unreid_jax.workdir.writer import Writer
    with Writer(Workdir(sys.argv[1])) as writer:
      for _ in progress.track(range(3), "count"):
        time.sleep(.1)
      names = ("step", "mAP", "R1", "R5", "R10")
      writer.table([dict.fromkeys(names, 0)])
  """
  script = f"import sys, time\n{program}"
  command = f'"{sys.executable}" -c "$0" "{tmp_path}" {closed}'
  subprocess.check_call(["bash", "-c", command, script], cwd=ROOT)
  log = (tmp_path / "log.txt").read_text()
  assert "3 images in" in log and "before training" in log
