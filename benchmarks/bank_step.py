"""How a method's step grows with its bank; features alone, without an encoder.

  python benchmarks/bank_step.py [--methods=spcl,cluster_contrast] [--dim=256]
      [--rows=1000,10000,100000,1000000]

The step is the loss, its gradient in 64 features and the writes, jitted, with
the state given away as in training. Classes have ten images each. The figure is
the fastest of ten.
"""

import argparse
import math
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from unreid_jax import methods, sharding
from unreid_jax.methods import Batch

BATCH = 64


def measure(name: str, rows: int, dim: int) -> float:
  """The seconds of a step."""
  rng, key = np.random.default_rng(0), jax.random.key(0)
  method = methods.make(name)
  features = rng.standard_normal((rows, dim), np.float32)
  features /= np.linalg.norm(features, axis=1, keepdims=True)
  labels = np.arange(rows, dtype=np.int32) // 10
  state = method.init(key, jax.ShapeDtypeStruct(features.shape, jnp.float32))
  given = features
  if name != "cluster_contrast":
    given = {"features": features, "threshold": np.float32(1)}
  state = jax.jit(method.refresh)(state, labels, given, key)
  indices = jnp.asarray(rng.permutation(rows)[:BATCH].astype(np.int32))
  zero = jnp.zeros((), jnp.int32)
  images = jnp.zeros((BATCH, 1, 1, 3), jnp.uint8)
  batch = Batch(images, indices, indices // 10, indices % 3, zero, zero)
  in_features = jax.value_and_grad(method.step, 1, has_aux=True)
  step = jax.jit(
    lambda state, x: in_features(state, x, batch, key), donate_argnums=0
  )
  x, seconds = jnp.asarray(features[:BATCH]), []
  for _ in range(11):
    start = time.perf_counter()
    (_, (state, _)), slope = jax.block_until_ready(step(state, x))
    seconds.append(time.perf_counter() - start)
  del slope
  return min(seconds[1:])


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--methods", default="cluster_contrast,spcl")
  parser.add_argument("--rows", default="1000,10000,100000,1000000")
  parser.add_argument("--dim", type=int, default=256)
  flags = parser.parse_args()
  sizes = [int(n) for n in flags.rows.split(",")]
  with jax.set_mesh(sharding.make_mesh(1)):
    for name in flags.methods.split(","):
      found = [measure(name, rows, flags.dim) for rows in sizes]
      for rows, seconds in zip(sizes, found, strict=True):
        print(
          f"{name:<17}{rows:>9,} images {1000 * seconds:8.2f} ms", flush=True
        )
      if len(sizes) > 1:
        growth = math.log(found[-1] / found[-2])
        growth /= math.log(sizes[-1] / sizes[-2])
        print(f"{name:<17}grows as n^{growth:.2f} at the end")


if __name__ == "__main__":
  main()
