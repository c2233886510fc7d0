"""The memory of a recipe's train step, with the batch in 1, 2, 4 and 8 parts.

  python benchmarks/micro_batches.py [--method=cluster_contrast] \
      [--micro_batches=1,2,4,8] [--dtype=bfloat16]

Compiles the step of the method's recipe for Market-1501 and runs nothing: the
figures are those of the compiled program, on the device that JAX finds. Its
arrays are what it is called with: parameters, optimizer, banks and a batch.
Temporary is what it needs beside them at its peak. Groups of batch norm have 64
images, or as many as a part if that has fewer.
"""

import argparse
import importlib
import pathlib
import sys
import time

import jax

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from unreid_jax import sharding
from unreid_jax.config import check, resolve
from unreid_jax.state import first_state, keys, make_parts
from unreid_jax.step import compile_step

IMAGES, STEPS_PER_EPOCH = 12_936, 400


def measure(config):
  """Prints the sizes of the step of this config."""
  with jax.set_mesh(sharding.make_mesh(1)):
    check(config, 1)
    parts = make_parts(resolve(config, STEPS_PER_EPOCH))
    state = first_state(parts, IMAGES, weights="")
    start = time.monotonic()
    compiled = compile_step(parts, state, keys(0)[0])
    seconds = time.monotonic() - start
  found = compiled.memory_analysis()
  temporary, arrays = (
    size / 2**30
    for size in (found.temp_size_in_bytes, found.argument_size_in_bytes)
  )
  print(
    f"micro_batches={config.micro_batches:<3} temporary {temporary:6.2f} GiB  "
    f"arrays {arrays:5.2f} GiB  together {temporary + arrays:6.2f} GiB  "
    f"(compiled in {seconds:.0f} s)",
    flush=True,
  )


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--method", default="cluster_contrast")
  parser.add_argument("--micro_batches", default="1,2,4,8")
  parser.add_argument("--dtype", default="float32")
  flags = parser.parse_args()
  module = importlib.import_module(f"configs.{flags.method}")
  config = module.get_config("market1501")
  config.encoder.dtype = flags.dtype
  for num in map(int, flags.micro_batches.split(",")):
    config.micro_batches = num
    config.encoder.bn_group_size = min(64, config.batch_size // num)
    measure(config)


if __name__ == "__main__":
  main()
