"""Hands damaged and hostile files to whatever reads the files of others.

  python benchmarks/fuzz.py [--seconds=60] [--seed=0] [--keep=FOLDER] [TARGET..]

Each target (see `fuzz_targets.py`) starts from good inputs and changes them at
random: bits, numbers and slices, whole steps of a pickle. A finding is any
exception but a UserError of one line, an input that takes more than 10 seconds
or 512 MB, and the death of the process. The first input of each kind of finding
is kept, with its traceback. Each target has a process and the seconds for
itself.
"""

import argparse
import logging
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback

from fuzz_targets import TARGETS

from unreid_jax import UserError

_MOST_SECONDS, _MOST_BYTES = 10, 512 << 20
_IN_MEMORY = pathlib.Path("/dev/shm")  # a disk would take most of the time


class _Slow(BaseException):
  """An input takes too long; no `except Exception` may swallow it."""


def fuzz(
  target: str,
  seconds: float,
  seed: int,
  scratch: pathlib.Path,
  keep: pathlib.Path,
) -> int:
  """Runs one target in this process; returns how many kinds of findings."""
  rng, kinds, count, slowest = random.Random(seed), {}, 0, 0.0
  signal.signal(signal.SIGALRM, _stop)
  logging.disable()
  make, run = TARGETS[target](scratch)
  start = time.monotonic()
  while time.monotonic() - start < seconds:
    data = make(rng)
    (scratch / "last").write_bytes(data)  # if the process dies of it
    peak, begin = _peak(), time.monotonic()
    signal.alarm(_MOST_SECONDS)
    try:
      run(data)
    except UserError as error:
      if not str(error).isprintable():
        kinds.setdefault("more than a line", (data, error))
    except (Exception, _Slow) as error:
      place = traceback.extract_tb(error.__traceback__)[-1]
      kind = f"{type(error).__name__}, {place.filename}:{place.lineno}"
      kinds.setdefault(kind, (data, error))
    finally:
      signal.alarm(0)
    if _peak() - peak > _MOST_BYTES:
      kinds.setdefault("memory", (data, MemoryError(_peak() - peak)))
    slowest, count = max(slowest, time.monotonic() - begin), count + 1
  for i, (kind, (data, error)) in enumerate(kinds.items()):
    name = keep / f"{target}.{i}"
    name.write_bytes(data)
    text = "".join(traceback.format_exception(error))
    name.with_suffix(f".{i}.txt").write_text(text, errors="replace")
    print(f"  {name}: {kind}: {str(error)[:100]!a}")
  print(
    f"{target:<17}{count:>10,} inputs in {seconds:,.0f} s, the slowest in "
    f"{1e3 * slowest:,.0f} ms; {len(kinds)} kinds of findings",
    flush=True,
  )
  return len(kinds)


def _stop(*_):
  raise _Slow


def _peak() -> int:
  """The most memory of this process so far, in bytes."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("targets", nargs="*", metavar="TARGET")
  parser.add_argument("--seconds", type=float, default=60)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--keep", type=pathlib.Path, help="for the findings")
  parser.add_argument("--here", type=pathlib.Path, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if unknown := set(args.targets).difference(TARGETS):
    parser.error(f"no {', '.join(unknown)}; there are {', '.join(TARGETS)}")
  keep = args.keep or pathlib.Path(tempfile.mkdtemp(prefix="fuzz"))
  keep.mkdir(parents=True, exist_ok=True)
  if args.here:
    return fuzz(*args.targets, args.seconds, args.seed, args.here, keep) > 0
  failed = 0
  for target in args.targets or TARGETS:
    memory = _IN_MEMORY if _IN_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as scratch:
      command = [sys.executable, __file__, target, f"--here={scratch}"]
      command += [f"--keep={keep}", f"--seconds={args.seconds}"]
      command += [f"--seed={args.seed}"]
      try:
        status = subprocess.run(command, timeout=args.seconds + 90).returncode
      except subprocess.TimeoutExpired:
        status = "hung"
      if status not in (0, 1):
        shutil.copy(f"{scratch}/last", keep / f"{target}.died")
        print(f"{target} died ({status}) of {keep / target}.died")
    failed += status != 0
  print(f"findings are in {keep}" if failed else "nothing found")
  return failed > 0


if __name__ == "__main__":
  sys.exit(main())
