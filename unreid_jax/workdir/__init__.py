"""A workdir: what a run keeps in its folder, under which names."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import jax
from ml_collections import ConfigDict

from unreid_jax import UserError


class Workdir:
  """The folder of a run.

  Attributes:
    path: the folder.
    metrics: a JSON object a line: losses, clusters, scores.
    log: what stood on the terminal, with the time.
    events: TensorBoard's folder.
    features: the features of the train set, if the data set has no queries.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    self.metrics = self.path / "metrics.jsonl"
    self.log = self.path / "log.txt"
    self.events = self.path / "tensorboard"
    self.features = self.path / "features.npz"
    self._config = self.path / "config.json"

  def checkpoints(self, which: str) -> pathlib.Path:
    """The folder of the checkpoints of one kind, "last" or "best"."""
    return self.path / "checkpoints" / which

  def newest(self, which: str) -> pathlib.Path | None:
    """The newest checkpoint of a kind that was written to its end, if any."""
    found = self.checkpoints(which).glob("*")
    steps = [int(x.name) for x in found if x.name.isdigit()]
    return self.checkpoints(which) / str(max(steps)) if steps else None

  def stored_config(self) -> dict[str, Any]:
    """The config of the run in this folder; empty without any."""
    if not self._config.exists():
      return {}
    try:
      return json.loads(self._config.read_text())
    except ValueError as error:
      raise UserError(
        f"{self._config} is damaged ({error}): delete it to go on without it"
      ) from None

  def write_config(self, config: ConfigDict) -> None:
    """Writes the resolved config, config.json."""
    if jax.process_index() == 0:
      text = json.dumps(config.to_dict(), indent=2, sort_keys=True)
      with whole_file(self._config) as file:
        file.write(f"{text}\n".encode())


@contextlib.contextmanager
def whole_file(path: pathlib.Path) -> Iterator[BinaryIO]:
  """Writes a file that, whatever happens, is the old one or the new one."""
  partial = path.with_suffix(".partial")
  with open(partial, "wb") as file:
    yield file
  os.replace(partial, path)
