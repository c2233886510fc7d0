"""Cuts the link between two hosts in the middle of a run, and goes on.

  sudo python -m benchmarks.two_hosts [--cuts=3]

The hosts are two network namespaces of this machine (iproute2), with names, an
interface and a cache of images each, and one workdir. While the link is down
both processes must end with status 76; when it is up the same commands are
given again. The metrics and all arrays of the last checkpoint must then be
those of two processes whose link was never cut.
"""

import argparse
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

from benchmarks.faults import make_images, options, result

_ROOT = pathlib.Path(__file__).parent.parent
_HOSTS = {"unreid0": "10.77.0.1", "unreid1": "10.77.0.2"}


def main() -> None:
  """Prints how long each host took to end, and whether the runs differ."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--cuts", type=int, default=3)
  flags, draw, bad = parser.parse_args(), random.Random(0), False
  try:
    _connect()
    with tempfile.TemporaryDirectory() as folder:
      folder = pathlib.Path(folder)
      make_images(folder / "data")
      for name in "unbroken", "again":  # the second one has nothing to compile
        start = time.monotonic()
        assert _wait(_start(folder, name)) == [0, 0]
        seconds = time.monotonic() - start
      expected = result(folder / "unbroken")
      print(f"an unbroken run takes {seconds:.0f} s", flush=True)
      for cut in range(flags.cuts):
        name, after = f"run{cut}", draw.uniform(0.3, 0.9) * seconds
        both = _start(folder, name)
        time.sleep(after)
        _link("down")
        start, ends = time.monotonic(), []
        for process in both:
          process.wait(300)
          ends.append(f"{time.monotonic() - start:.0f} s")
        lost = [process.returncode for process in both]
        _link("up")
        again = _wait(_start(folder, name))
        found = result(folder / name)
        differ = [
          key for key in found | expected if found.get(key) != expected.get(key)
        ]
        bad |= bool(differ) or lost != [76, 76] or again != [0, 0]
        print(
          f"cut after {after:.0f} s: status {lost} after {', '.join(ends)}; "
          f"then {again}, {', '.join(differ) or 'the same'}",
          flush=True,
        )
  finally:
    for name in _HOSTS:
      subprocess.run(["ip", "netns", "del", name], check=False)
      shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)
  sys.exit(bad)


def _connect():
  """Makes both namespaces, and a pair of interfaces between them."""
  ip = lambda line: subprocess.run(["ip", *line.split()], check=True)
  hosts = "127.0.0.1 localhost\n" + "".join(
    f"{address} {name}\n" for name, address in _HOSTS.items()
  )
  for name in _HOSTS:
    ip(f"netns add {name}")
    path = pathlib.Path("/etc/netns", name, "hosts")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(hosts)
  one, other = _HOSTS
  ip(f"link add eth0 netns {one} type veth peer name eth0 netns {other}")
  for name, address in _HOSTS.items():
    ip(f"-n {name} addr add {address}/24 dev eth0")
    ip(f"-n {name} link set lo up")
    ip(f"-n {name} link set eth0 up")


def _link(state):
  command = ["ip", "-n", "unreid0", "link", "set", "eth0", state]
  subprocess.run(command, check=True)


def _start(folder, name):
  """Starts run.py on both hosts."""
  both = []
  for i, host in enumerate(_HOSTS):
    command = [sys.executable, "run.py", *options(folder, name, host)]
    command += ["--coordinator=unreid0:7733", "--num_processes=2"]
    command += [f"--process_id={i}"]
    inside = ["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c"]
    inside += [f'hostname {host}; exec "$@"', "sh", *command]
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled{i}"}
    with open(folder / f"{name}.{host}.txt", "ab") as log:
      both.append(
        subprocess.Popen(inside, cwd=_ROOT, stdout=log, stderr=log, env=env)
      )
  return both


def _wait(both):
  return [process.wait() for process in both]


if __name__ == "__main__":
  main()
