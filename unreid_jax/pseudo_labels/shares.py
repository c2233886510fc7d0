"""What the processes share: row i is the work of process i % processes."""

from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int

_MOST = 2**22  # numbers that are gathered at a time, of all processes


def own_rows() -> tuple[int, int]:
  """The first row of this process, and the step to its next one."""
  return jax.process_index(), jax.process_count()


def gather(*arrays: np.ndarray) -> Iterator[tuple[slice, list[np.ndarray]]]:
  """Yields some rows, and what each process has in them: [processes, ...].

  The arrays have the same shape in all processes and an equal number of rows.
  """
  num, processes = len(arrays[0]), jax.process_count()
  width = max(x[:1].size for x in arrays)
  most = 2 ** max(_MOST // (processes * max(width, 1)), 1).bit_length() // 2
  for start in range(0, num, most):
    rows = slice(start, min(start + most, num))
    size = rows.stop - start
    filled = 2 ** (size - 1).bit_length()  # so that few shapes are compiled
    own = [np.resize(x[rows], (filled, *x.shape[1:])) for x in arrays]
    each = multihost_utils.process_allgather(own)
    yield rows, [x[:, :size] for x in each]


def add_up(counts: Int[np.ndarray, " n"]) -> None:
  """Adds what the other processes have counted, in place."""
  if jax.process_count() > 1:
    for rows, (each,) in gather(counts.astype(np.int32)):
      counts[rows] = each.sum(axis=0)


def complete(
  starts: Int[np.ndarray, " n"],
  counts: Int[np.ndarray, " n"],
  arrays: tuple[np.ndarray, ...],
) -> None:
  """Adds the rows that the other processes have written, in place.

  Of row i there are `counts[i]` entries, which stand in each of the arrays from
  `starts[i]` on.
  """
  own, processes = own_rows()
  if processes == 1:
    return
  places = []
  for process in range(processes):
    of = counts[process::processes]
    first = starts[process::processes] - (np.cumsum(of) - of)
    place = np.repeat(first, of) + np.arange(of.sum())
    places.append(place.astype(np.int32))
  most = max(map(len, places))
  fill = lambda x: np.resize(x[places[own]], most)
  for some, parts in gather(*map(fill, arrays)):
    for process, place in enumerate(places):
      at = place[some]
      for array, part in zip(arrays, parts, strict=True):
        array[at] = part[process, : len(at)]
