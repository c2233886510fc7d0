"""run.py with a ResNet-18 of two blocks, which a process compiles soon."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import run
from unreid_jax.models.backbones import resnet

if __name__ == "__main__":
  resnet._DEPTHS[18] = ((1, 1), False)
  run.preemption.exit_on_signals()
  run.become_parent()
  run.app.run(run.main, flags_parser=run.parse)
