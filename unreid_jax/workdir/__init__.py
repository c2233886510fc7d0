"""A workdir: what a run keeps in its folder, under which names."""

import contextlib
import fcntl
import json
import os
import pathlib
import platform
from collections.abc import Iterator
from typing import Any, BinaryIO

from ml_collections import ConfigDict

from unreid_jax import UserError
from unreid_jax.hosts import peers
from unreid_jax.values import expand


class Workdir:
  """The folder of a run.

  Attributes:
    path: the folder.
    metrics: a JSON object a line: losses, clusters, scores.
    log: what stood on the terminal, with the time.
    events: TensorBoard's folder.
    features: the features of the train set, if the data set has no queries.
    sessions: when, on what and with which code the run was made.
    report: a page for people, with pictures.
    profile: the folder of the traces of `jax.profiler`.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = expand(path, "--workdir")
    self.metrics = self.path / "metrics.jsonl"
    self.log = self.path / "log.txt"
    self.events = self.path / "tensorboard"
    self.features = self.path / "features.npz"
    self.sessions = self.path / "sessions.json"
    self.report = self.path / "report.html"
    self.profile = self.path / "profile"
    self._config = self.path / "config.json"

  @contextlib.contextmanager
  def locked(self) -> Iterator[None]:
    """Keeps the folder, which is made if need be, from any other run.

    The lock is the kernel's: whatever ends the process releases it.
    """
    with named(self.path):
      self.path.mkdir(parents=True, exist_ok=True)
    if not peers.is_first():
      yield
      return
    path = self.path / ".lock"
    with contextlib.ExitStack() as stack:
      with named(path):
        file = stack.enter_context(open(path, "a+b", buffering=0))
        try:
          fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
          owner = path.read_text() or "another run"
          raise UserError(
            f"{self.path} is in use by {owner}: wait for its end, or choose "
            "another --workdir"
          ) from None
        except OSError:
          pass  # a file system without locks
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}".encode())
        os.fsync(file.fileno())  # for other hosts
      yield

  def check_shared(self) -> None:
    """Refuses a folder that is not the same one on all hosts."""
    path = self.path / ".lock"
    read = lambda: path.read_text() if path.exists() else "nobody"
    if peers.decide(read()) != read():
      raise UserError(
        f"{self.path} is not the folder that process 0 has under this name: "
        "set --workdir to one on a file system that all hosts share"
      )

  def checkpoints(self, which: str) -> pathlib.Path:
    """The folder of the checkpoints of one kind, "last" or "best"."""
    return self.path / "checkpoints" / which

  def newest(self, which: str) -> pathlib.Path | None:
    """The newest checkpoint of a kind that was written to its end, if any.

    Raises:
      UserError: something else has the name of a checkpoint, a number.
    """
    found = self.checkpoints(which).glob("*")
    found = [path for path in found if path.name.isdecimal()]
    for path in found:
      if not any((path / part).is_dir() for part in ("card", "default")):
        raise UserError(f"{path} is no checkpoint: move it away")
    return max(found, key=lambda path: int(path.name), default=None)

  def check_unused(self) -> None:
    """Refuses a folder that holds a run, but no checkpoint to go on from."""
    has_metrics = self.metrics.exists() and self.metrics.stat().st_size
    if has_metrics or self.newest("best"):
      raise UserError(
        f"{self.checkpoints('last')} is gone, and without it the run cannot go "
        "on; its best encoder and its metrics stay: choose another --workdir"
      )

  def check_metrics(self) -> None:
    """Refuses to go on without what the best encoder is compared by."""
    if not self.metrics.exists():
      raise UserError(
        f"{self.metrics} is gone, and with it the scores of the best encoder: "
        "bring it back, or choose another --workdir"
      )

  def stored_config(self) -> dict[str, Any]:
    """The config of the run in this folder."""
    advice = "bring it back, or choose another --workdir"
    if not self._config.exists():
      raise UserError(f"{self._config} is gone: {advice}")
    return read_json(self._config.read_bytes(), self._config, advice)

  def write_config(self, config: ConfigDict) -> None:
    """Writes every key of the config, config.json."""
    if peers.is_first():
      text = json.dumps(config.to_dict(), indent=2, sort_keys=True)
      with whole_file(self._config) as file:
        file.write(f"{text}\n".encode())


def read_json(text: bytes, where: Any, advice: str) -> dict[str, Any]:
  """A JSON object; where it is, and what to do, is said if it is damaged."""
  try:
    value = json.loads(text)
  except (ValueError, RecursionError) as error:
    value = error
  if not isinstance(value, dict):
    problem = value if isinstance(value, Exception) else "it is no JSON object"
    raise UserError(f"{where} is damaged ({problem}): {advice}")
  return value


@contextlib.contextmanager
def named(path: pathlib.Path, option: str = "--workdir") -> Iterator[None]:
  """Within it, what the system refuses to write is a user's mistake.

  `option` is where the user has said to write.
  """
  try:
    yield
  except OSError as error:
    raise UserError(
      f"{path} cannot be written ({error.strerror or error}): mend that, or "
      f"choose another {option}"
    ) from None


@contextlib.contextmanager
def whole_file(
  path: pathlib.Path, option: str = "--workdir"
) -> Iterator[BinaryIO]:
  """Writes a file that, whatever happens, is the old one or the new one."""
  partial = path.with_name(f"{path.name}.partial")
  with named(path, option):
    try:
      with open(partial, "wb") as file:
        yield file
      os.replace(partial, path)
    finally:
      partial.unlink(missing_ok=True)
