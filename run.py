"""Trains or evaluates: python run.py --config=configs/selective.py

Single keys are overridden as --config.optim.lr=1e-3. A run that stopped, in
whatever way, goes on when it is started again with the same command.
"""

import pathlib
import re
import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from unreid_jax import UserError
from unreid_jax.train import Interrupted, score, train

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file; FILE:DATASET for a data set."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", "", "Where the run writes; runs/METHOD_DATASET if empty."
)
_MODE = flags.DEFINE_enum(
  "mode", "train", ["train", "evaluate"], "evaluate: score the checkpoints."
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Call jax.distributed.initialize: several hosts."
)
_STOPPED = 75  # the exit status of a run that was told to stop and can go on


def main(argv: list[str]) -> None:
  logging.set_verbosity(logging.WARNING)  # Orbax tells a lot
  try:
    if len(argv) > 1:
      raise UserError(f"what is {argv[1]!r}? Every option starts with --")
    if _DISTRIBUTED.value:
      jax.distributed.initialize()
    config = _config()
    workdir = _WORKDIR.value
    workdir = workdir or f"runs/{config.method.name}_{config.dataset.name}"
    {"train": train, "evaluate": score}[_MODE.value](config, workdir)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  except OSError as error:
    if not error.filename:
      raise
    print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
    sys.exit(2)
  except Interrupted as stopped:
    print(f"{stopped}; the same command goes on", file=sys.stderr)
    sys.exit(_STOPPED)


def _config():
  """The config, or in one line why there is none."""
  config = _CONFIG.value
  if config is None:
    raise UserError("say what to run: --config=configs/selective.py")
  name = config_flags.get_config_filename(flags.FLAGS["config"])
  path = pathlib.Path(name.partition(":")[0])
  if not path.is_file():
    raise UserError(f"--config={path}: no such file")
  config.seed  # noqa: B018 - what went wrong in the file is raised here
  return config


def _parse(argv):
  """absl's parsing, with each mistake answered in one line."""
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    text = str(error).strip().splitlines()[-1]
    text = text.removeprefix("unreid_jax.UserError: ")
  except (AttributeError, KeyError) as error:
    hint = re.search(r'Did you mean "(.*)" instead of "(.*)"', str(error))
    text = f"the config has no such key: {str(error).strip()}"
    if hint:
      text = f'the config has no key "{hint[2]}"; did you mean "{hint[1]}"?'
  print(f"error: {text}", file=sys.stderr)
  sys.exit(2)


if __name__ == "__main__":
  app.run(main, flags_parser=_parse)
