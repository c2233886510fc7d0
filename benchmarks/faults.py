"""Kills runs at random moments, goes on, and compares with an unbroken run.

  python -m benchmarks.faults --kills=50
  python -m benchmarks.faults --kills=50 --processes=2

A run is killed by SIGKILL, all of its processes or just one of them, whatever
it does by then: it starts, decodes, compiles, clusters, steps, saves or
evaluates. The same command is given again until the run ends. Its metrics, all
arrays of its last checkpoint and the names of its files must then be those of
the unbroken run, byte by byte.
"""

import argparse
import collections
import logging
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp
from PIL import Image

_ROOT = pathlib.Path(__file__).parent.parent
_IMAGES = 60


def main() -> None:
  """Prints what each kill hit, and ends with status 1 if a run differs."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--kills", type=int, default=50)
  parser.add_argument("--processes", type=int, default=1)
  parser.add_argument("--seed", type=int, default=0)
  flags = parser.parse_args()
  logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax
  draw, hits, bad = random.Random(flags.seed), collections.Counter(), 0
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    make_images(folder / "data")
    assert _run(folder, "unbroken", flags.processes) == 0
    expected = result(folder / "unbroken")
    start = time.monotonic()
    assert _run(folder, "again", flags.processes) == 0  # compiled by now
    seconds = time.monotonic() - start
    print(f"an unbroken run takes {seconds:.0f} s", flush=True)
    for kill in range(flags.kills):
      name, status, after = f"run{kill}", None, draw.uniform(0, seconds)
      while status != 0:
        status = _run(folder, name, flags.processes, after, draw)
        if after is not None:
          log = folder / f"{name}.txt"
          ends = "the run has ended", "process ", "another process"
          lines = ["nothing", *log.read_text().splitlines()]
          last = [x for x in lines if not x.startswith(ends)][-1]
          hits[last.removeprefix("[0] ")[:12].strip()] += 1
        if after is None and status != 0:
          print((folder / f"{name}.txt").read_text())
          break
        after = None
      differ = [k for k, x in result(folder / name).items() if x != expected[k]]
      bad += bool(differ)
      print(f"{name}: {', '.join(differ) or 'the same'}", flush=True)
  print(f"{bad} of {flags.kills} differ; the last line before a kill:")
  for line, count in hits.most_common():
    print(f"{count:>5}  {line}")
  sys.exit(bad > 0)


def make_images(folder):
  folder.mkdir()
  pixels = np.random.default_rng(0).integers(
    0, 256, (_IMAGES, 32, 16, 3), np.uint8
  )
  for i, image in enumerate(pixels):
    Image.fromarray(image).save(folder / f"{i}.png")


def options(folder, name, host=""):
  """Those of run.py for a small run on the images."""
  return [
    "--config=configs/cluster_contrast.py:folder,small",
    f"--workdir={folder / name}", f"--config.dataset.root={folder / 'data'}",
    f"--config.dataset.cache_dir={folder / f'{name}-cache{host}'}",
    "--config.epochs=8", "--config.steps_per_epoch=5",
    "--config.encoder.width=0.125", "--config.evaluate_every=2 epochs",
    "--config.method.instance_epochs=4", "--config.method.eps=.7",
  ]  # fmt: skip


def _run(folder, name, processes, after=None, draw=None):
  """Runs until its end, or kills some of it after so many seconds."""
  command = [sys.executable, "run.py", *options(folder, name)]
  command += [f"--launch={processes}"] if processes > 1 else []
  cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
  with open(folder / f"{name}.txt", "ab") as log:
    process = subprocess.Popen(
      command, cwd=_ROOT, stdout=log, stderr=log, env=os.environ | cache,
      start_new_session=True,
    )  # fmt: skip
    try:
      return process.wait(after)
    except subprocess.TimeoutExpired:
      pass
    family = [process.pid, *_children(process.pid)]
    victims = family if draw.random() < 0.5 else [draw.choice(family)]
    for pid in victims:
      os.kill(pid, signal.SIGKILL)
    process.wait()
    while any(map(_is_alive, family)):
      time.sleep(0.05)
    return -1


def _children(pid):
  path = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
  return [int(x) for x in path.read_text().split()]


def _is_alive(pid):
  path = pathlib.Path(f"/proc/{pid}/stat")
  try:
    return path.read_text().rpartition(")")[2].split()[0] != "Z"
  except FileNotFoundError:
    return False


def result(workdir):
  """What a run has left, piece by piece, so that two runs can be compared."""
  files = [x for x in workdir.rglob("*") if x.is_file()]
  names = sorted(str(x.relative_to(workdir)) for x in files)
  (last,) = (workdir / "checkpoints/last").iterdir()
  crc = {}
  for part in "encoder", "training":
    with ocp.PyTreeCheckpointer() as checkpointer:
      shapes = checkpointer.metadata(last / part).item_metadata.tree
      here = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes
      )
      arrays = checkpointer.restore(last / part, restore_args=here)
    for path, x in jax.tree.leaves_with_path(arrays):
      crc[part + jax.tree_util.keystr(path)] = zlib.crc32(np.asarray(x))
  return {
    "metrics": (workdir / "metrics.jsonl").read_text(),
    **crc,
    **dict.fromkeys(x for x in names if not re.search("tensorboard|/d/", x)),
  }


if __name__ == "__main__":
  main()
