"""The processes of a run, from within: they agree, and they end together.

They speak through the key-value store of JAX's coordination service, which
works also where no collective would: before the meshes are known to be the
same, and while one of them waits. A process that is alone agrees with itself.
"""

import atexit
import contextlib
import functools
import itertools
import json
import os
import select
import signal
import sys
import threading
import time
import zlib
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import multihost

from unreid_jax import UserError, preemption
from unreid_jax.hosts.launch import LOST, PATIENCE, PLACE

_END = "unreid_jax/end"
_ERROR, _STOP = f"{_END}/error", f"{_END}/stop"
_LONG = 7 * 24 * 3600 * 1000  # ms; who waits is ended by its watcher
_turns = itertools.count()
_has_met, _is_ending = threading.Event(), threading.Event()
_is_told = threading.Event()  # to stop
_TURN = "unreid_jax/turn"
_AHEAD = 8  # turns, more than a process can be ahead of another


class Lost(Exception):
  """Another process of the run has ended, or cannot be reached any more."""


def join() -> None:
  """Meets the other processes, if `launch` has said that there are any.

  From then on the error of one ends all of them, with its line.

  Raises:
    Lost: they did not all come.
  """
  place = os.environ.get(PLACE)
  if not place or jax.distributed.is_initialized():
    return
  watcher = threading.Thread(target=_watch, daemon=True)
  watcher.start()
  try:
    jax.distributed.initialize(
      **json.loads(place),
      initialization_timeout=5 * PATIENCE,
      heartbeat_timeout_seconds=PATIENCE,
      shutdown_timeout_seconds=PATIENCE,
    )
  except Exception as error:
    reason = str(error).partition("\n")[0][:200]
    raise Lost(f"the other processes cannot be met ({reason})") from None
  _has_met.set()  # a client that is not connected ends the process if asked
  atexit.register(watcher.join)
  atexit.register(_is_ending.set)


def is_first() -> bool:
  """Whether this is process 0, which decides and writes for all."""
  return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
  """The value, JSON, of every process; all of them must call it."""
  if jax.process_count() == 1:
    return [value]
  client, turn = _client(), f"unreid_jax/{next(_turns)}"
  client.key_value_set(f"{turn}/{jax.process_index()}", json.dumps(value))
  keys = (f"{turn}/{i}" for i in range(jax.process_count()))
  return [json.loads(client.blocking_key_value_get(k, _LONG)) for k in keys]


def decide(value: Any) -> Any:
  """The value, JSON, of process 0; all processes must call it."""
  return gather(value)[0]


def agree(facts: dict[str, Any]) -> None:
  """Refuses to go on where a fact, JSON, is not the same on all processes.

  Raises:
    UserError: on all of them, which fact has which value on which processes.
  """
  everywhere = gather(facts)
  for key in sorted(set().union(*everywhere)):
    where = {}
    for process, there in enumerate(everywhere):
      where.setdefault(json.dumps(there.get(key)), []).append(process)
    if len(where) > 1:
      each = ", ".join(f"{value} on {_some(on)}" for value, on in where.items())
      raise UserError(
        f"{key} is not the same everywhere: {each}: start all processes with "
        "the same"
      )


def stops(turn: int) -> bool:
  """Whether all processes are to stop at this turn.

  Each asks at every turn, and none is far ahead of another, as between two
  turns they wait for each other. So a turn soon to come can be agreed on.
  """
  if not _is_watched():
    return False
  client = _client()
  with contextlib.suppress(Exception):  # another one was faster
    if _is_told.is_set():
      client.key_value_set(_TURN, str(turn + _AHEAD))
  try:
    return turn >= int(client.key_value_try_get(_TURN))
  except Exception:  # nobody has said anything
    return False


def end(line: str) -> None:
  """Tells the others that this process ends, and why; they end as well."""
  _is_ending.set()
  with contextlib.suppress(Lost):
    join()  # the others wait there
  if _is_watched():
    with contextlib.suppress(Exception):  # another one was faster
      line = f"process {jax.process_index()}: {line}"
      _client().key_value_set(_ERROR, line)
    leave()


def leave() -> None:
  """Waits, not for long, for the others to be as far: one serves them all."""
  _is_ending.set()
  if _is_watched():
    with contextlib.suppress(Exception):
      _client().wait_at_barrier("unreid_jax_leave", 10_000)


def explain(error: Exception) -> str | None:
  """A line, if an error comes of the loss of another process.

  If that one has said why it has ended, this process ends with its line.
  """
  if isinstance(error, Lost):
    return str(error)
  text = str(error)
  names = "Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "heartbeat"
  if not _is_watched() or not any(name in text for name in names):
    return None
  time.sleep(3)  # for the watcher
  return f"another process is lost ({text.partition(chr(10))[0][:150]})"


def _client():
  return multihost.get_jax_distributed_client()


def _is_watched():
  return _has_met.is_set()


def _some(processes):
  names = ", ".join(map(str, processes[:8]))
  more = f" and {len(processes) - 8} more" if len(processes) > 8 else ""
  return f"process{'es' if len(processes) > 1 else ''} {names}{more}"


def _watch():
  """Heeds what `launch` and the other processes say, beside the main thread.

  A SIGTERM stays pending, as `launch` blocks it: thus it can be heeded here,
  and reaches the handler of JAX, which another one would find gone, just once.
  """
  has_stopped = False
  while not _is_ending.is_set():
    said, is_told = {}, signal.SIGTERM in signal.sigpending()
    if select.select([0], [], [], 0.5)[0]:
      if not os.read(0, 1024):
        os._exit(LOST)  # `launch` has been killed
      is_told = True
    if not _has_met.is_set():
      if is_told:
        preemption.notice()
      continue
    with contextlib.suppress(Exception):  # the run ends, in whatever way
      if is_told:
        _is_told.set()
      if is_told and not has_stopped:
        _client().key_value_set(_STOP, "", allow_overwrite=True)
      said = dict(_client().key_value_dir_get(_END))
    if _ERROR in said and not _is_ending.is_set():  # by now
      print(f"error: {said[_ERROR]}", file=sys.stderr, flush=True)
      leave()
      os._exit(2)
    if _STOP in said and not has_stopped:
      has_stopped = True
      preemption.notice()


def checksum(tree: Any) -> int:
  """A number that tells one tree of replicated arrays from another."""
  arrays = map(np.ascontiguousarray, jax.tree.leaves(jax.device_get(tree)))
  return functools.reduce(lambda crc, x: zlib.crc32(x, crc), arrays, 0)
