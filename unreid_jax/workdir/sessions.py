"""How long a run has taken, on what and with which code: sessions.json."""

import datetime
import json
import pathlib
import platform
import re
import subprocess
import time
from typing import Any

import jax
from jax.sharding import Mesh

import unreid_jax
from unreid_jax import UserError
from unreid_jax.workdir import Workdir, read_json, whole_file


class Session:
  """A process that works on a run; a run that goes on has several.

  What a killed process has done since its last checkpoint is not counted: it
  is done again. A run that begins at step 0 forgets earlier ones.
  """

  def __init__(self, workdir: Workdir, mesh: Mesh, step: int, end: int):
    self._path, self._start = workdir.sessions, time.monotonic()
    self._earlier = read_sessions(workdir) if step else []
    self._about = {
      "began": datetime.datetime.now().astimezone().isoformat("T", "seconds"),
      "hardware": hardware(mesh),
      "jax": jax.__version__,
      "version": unreid_jax.__version__,
      "commit": commit(),
      "end": end,
    }

  def save(self, step: int) -> None:
    """Notes how far the run is, and the time that this process has taken."""
    if jax.process_index() > 0:
      return
    seconds = round(time.monotonic() - self._start, 1)
    latest = self._about | {"step": step, "seconds": seconds}
    sessions = [*self._earlier, latest]
    with whole_file(self._path) as file:
      file.write(json.dumps({"sessions": sessions}, indent=2).encode() + b"\n")


def read_sessions(workdir: Workdir) -> list[dict[str, Any]]:
  """The sessions of a run, the oldest first; none if they were not noted."""
  path = workdir.sessions
  if not path.exists():
    return []
  advice = "delete it; only the times of the run are lost"
  sessions = read_json(path.read_bytes(), path, advice).get("sessions")
  needed = {"hardware", "jax", "commit", "step", "end", "seconds"}
  is_one = lambda x: isinstance(x, dict) and needed <= x.keys()
  if not isinstance(sessions, list) or not all(map(is_one, sessions)):
    raise UserError(f"{path} is damaged (it has no sessions): {advice}")
  return sessions


def hardware(mesh: Mesh) -> str:
  """Such as "4 x NVIDIA H200", or the name of a CPU."""
  device = mesh.devices.flat[0]
  if device.platform != "cpu":
    return f"{mesh.size} x {device.device_kind}"
  try:
    text = pathlib.Path("/proc/cpuinfo").read_text()
  except OSError:
    text = ""
  names = re.findall(r"model name\s*: (.*)", text)
  return f"{len(names) or 1} x {names[0] if names else platform.machine()}"


def commit() -> str | None:
  """The commit of this package's checkout, with "-dirty" if it was changed.

  None where there is no checkout: a package that was installed, say.
  """
  folder = pathlib.Path(unreid_jax.__file__).parent
  git = ["git", "-C", str(folder)]
  describe = ["describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
  try:
    # Others' checkouts may hold an environment in which this is installed.
    for command in (["ls-files", "--error-unmatch", "__init__.py"], describe):
      done = subprocess.run(
        git + command, capture_output=True, text=True, timeout=20, check=True
      )
  except (OSError, subprocess.SubprocessError):
    return None
  return done.stdout.strip()
