"""A trace has the steps that were asked for, and is written when it stops."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from unreid_jax.workdir import Workdir
from unreid_jax.workdir.trace import Trace


@pytest.mark.parametrize("num, traced", [(0, []), (2, [3, 4]), (9, [3, 4, 5])])
def test_trace(tmp_path, num, traced):
  """Also of a run that ends before."""
  step, state = jax.jit(lambda x: x + 1), jnp.zeros(3)
  with Trace(Workdir(tmp_path), 3, num) as trace:
    for i in range(2, 6):
      with trace.step(i, state):
        state = step(state)
  assert len(list(tmp_path.glob("profile/**/*.xplane.pb"))) == bool(traced)
  found = []
  for path in tmp_path.glob("profile/**/perfetto_trace.json.gz"):
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    found += [x["args"]["step_num"] for x in events if x.get("name") == "train"]
  assert sorted(map(int, found)) == traced
