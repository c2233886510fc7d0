"""How long a run has taken, on what and with which code: sessions.json."""

import datetime
import json
import time
from typing import Any

import jax
from jax.sharding import Mesh

import unreid_jax
from unreid_jax import UserError
from unreid_jax.about import commit, hardware
from unreid_jax.workdir import Workdir, read_json, whole_file


class Session:
  """A process that works on a run; a run that goes on has several.

  What a killed process has done since its last checkpoint is not counted: it
  is done again. Sessions beyond the step at which a run goes on are forgotten.
  """

  def __init__(self, workdir: Workdir, mesh: Mesh, step: int, end: int):
    self._path, self._start = workdir.sessions, time.monotonic()
    found = read_sessions(workdir) if step else []
    self._earlier = [x for x in found if x["step"] <= step]
    self._about = {
      "began": datetime.datetime.now().astimezone().isoformat("T", "seconds"),
      "hardware": hardware(mesh.devices.size),
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
