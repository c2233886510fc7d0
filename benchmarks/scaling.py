"""What a step moves between devices, and how banks divide: by compiled steps.

  python benchmarks/scaling.py [--methods=hhcl,spcl] [--devices=1,2,4,8]

Compiles each method's recipe for Market-1501 for so many virtual devices of the
CPU, and runs nothing. The time on paper is a device's arithmetic at `--tflops`,
and the bytes twice over a link of `--gigabytes` a second, as a ring's
all-reduce sends them. Nothing overlaps in it, and nothing waits.
"""

import argparse
import importlib
import pathlib
import sys

import jax

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from unreid_jax.plan import plan

METHODS = "supervised,cluster_contrast,hhcl,spcl,selective,dhcl_hnm,hngn"


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--methods", default=METHODS)
  parser.add_argument("--devices", default="1,2,4,8")
  parser.add_argument("--tflops", type=float, default=100)
  parser.add_argument("--gigabytes", type=float, default=50)
  flags = parser.parse_args()
  devices = [int(n) for n in flags.devices.split(",")]
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", max(devices))
  print("| method | devices | banks, MiB each | moved, MiB | GFLOP each | ms |")
  print("| --- | --- | --- | --- | --- | --- |")
  for method in flags.methods.split(","):
    module = importlib.import_module(f"configs.{method}")
    config = module.get_config("market1501")
    for config.num_devices in devices:
      if config.batch_size % config.num_devices:
        continue
      found = plan(config)
      moved = sum(found.moved.values())
      seconds = found.flops / 1e12 / flags.tflops
      seconds += 2 * moved / 1e9 / flags.gigabytes
      print(
        f"| {method} | {found.devices} "
        f"| {found.device['banks and labels'] / 2**20:,.1f} "
        f"| {moved / 2**20:,.1f} | {found.flops / 1e9:,.0f} "
        f"| {1000 * seconds:,.1f} |",
        flush=True,
      )


if __name__ == "__main__":
  main()
