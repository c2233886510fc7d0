"""Trains, evaluates, exports: python run.py --config=configs/selective.py

Single keys are overridden as --config.optim.lr=1e-3. A run that stopped, in
whatever way, goes on when it is started again with the same command.

Several processes: --launch=N here, or one on each host, see --distributed,
--coordinator, --num_processes, --process_id, --restarts (--helpfull).
"""

import os
import sys

from unreid_jax import UserError, preemption

if __name__ == "__main__":
  preemption.exit_on_signals()  # they count while the rest is imported, too

import inspect
import pathlib

from absl import app, flags, logging
from ml_collections import config_flags

from unreid_jax.command_line import (
  become_parent,
  check_options,
  config_file,
  fail,
  load_config,
  parse,
)
from unreid_jax.hosts import launch

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file; FILE:DATASET for a data set."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", "", "Where the run writes; runs/METHOD_DATASET if empty."
)
_MODE = flags.DEFINE_enum(
  "mode",
  "train",
  [
    "train",
    "plan",
    "evaluate",
    "report",
    "encode",
    "search",
    "verify",
    "export",
  ],
  "plan: say what a run would need on --config.num_devices. "
  "evaluate: score the checkpoints. report: write WORKDIR/report.html anew. "
  "encode, search, verify, export: use the encoder of --checkpoint.",
)
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", "", "Workdir, checkpoint or PyTorch weights, not --workdir's."
)
flags.DEFINE_string(
  "format", None, "export: torch, torch_reference, onnx or stablehlo."
)
flags.DEFINE_string(
  "dtype", None, "export to onnx, stablehlo: float16 or bfloat16, for less."
)
flags.DEFINE_string("images", None, "encode: the folder of the images.")
flags.DEFINE_string(
  "query", None, "search, verify: an image; search: a folder."
)
flags.DEFINE_string("gallery", None, "search: a folder; verify: an image.")
flags.DEFINE_list("output", None, "encode, search, export: files.")
flags.DEFINE_integer("top", None, "search: how many images are shown; 10.", 1)
flags.DEFINE_bool("rerank", None, "search: by k-reciprocal re-ranking.")
flags.DEFINE_bool(
  "approximate", None, "search: by an index, in large galleries."
)
flags.DEFINE_float("far", None, "search, verify: false accept rate.", 0, 1)
flags.DEFINE_string("cache_dir", None, "Features are kept below it.")
_NUM_IMAGES = flags.DEFINE_integer(
  "num_images", 0, "plan: train images; as in the published set.", lower_bound=0
)
_DEVICE_MEMORY = flags.DEFINE_float(
  "device_memory", 0.0, "plan: of each device, in GiB.", lower_bound=0.0
)
_PROFILE = flags.DEFINE_integer(
  "profile", 0, "Steps whose times go to WORKDIR/profile.", lower_bound=0
)


# What is for some modes only: the others refuse it.
_OPTIONS = {
  "train": {"profile"},
  "plan": {"num_images", "device_memory"},
  "evaluate": {"checkpoint"},
  "report": set(),
}


def main(argv: list[str]) -> None:
  from unreid_jax import scoring, train  # not earlier: it takes seconds
  from unreid_jax.hosts import peers

  logging.set_verbosity(logging.WARNING)  # Orbax tells a lot
  try:
    if len(argv) > 1:
      raise UserError(f"what is {argv[1]!r}? Every option starts with --")
    _keep_compiled()
    is_alone = _MODE.value not in ("train", "evaluate", "report")
    if is_alone and launch.PLACE in os.environ:
      raise UserError(
        f"--mode={_MODE.value} is for one process: add --distributed=off, "
        "and leave --launch out"
      )
    if _MODE.value not in _OPTIONS:
      return _use_encoder(_MODE.value)
    check_options(_MODE.value, _OPTIONS[_MODE.value])
    if _MODE.value == "plan":
      return _plan(load_config())
    peers.join()
    workdir = _WORKDIR.value
    knows_its_config = _MODE.value in ("report", "evaluate") and workdir
    config = None if knows_its_config and not _CONFIG.value else load_config()
    if not workdir and not _CHECKPOINT.value:
      workdir = f"runs/{config.method.name}_{config.dataset.name}"
    if _MODE.value == "evaluate":
      scoring.score(config, workdir, _CHECKPOINT.value or "")
    elif _MODE.value == "report":
      from unreid_jax.report import from_workdir  # it takes a second, too

      from_workdir.write(config, workdir)
    else:
      train.train(config, workdir, _PROFILE.value)
  except UserError as error:
    fail(error)
  except OSError as error:
    if not error.filename:
      raise
    fail(f"{error.filename}: {error.strerror}")
  except preemption.Interrupted as stopped:
    print(f"{stopped}; the same command goes on", file=sys.stderr, flush=True)
    peers.leave()
    os._exit(preemption.STATUS)  # an exit of Python's has no ear for signals
  except Exception as error:
    if lost := peers.explain(error):
      print(lost, file=sys.stderr, flush=True)
      os._exit(launch.LOST)
    is_full = isinstance(error, MemoryError)
    if not is_full and "RESOURCE_EXHAUSTED" not in str(error):
      peers.end(f"{type(error).__name__}: {error}")
      raise
    fail(
      f"out of memory ({str(error).partition(chr(10))[0][:150]}): lower "
      "batch_size, evaluate_batch_size, or the size of images or encoder"
    )


def _use_encoder(mode):
  """Runs a mode of `commands`; its arguments are the options it takes.

  A config is needed for PyTorch weights only, which may be of any encoder.
  """
  from unreid_jax import commands
  from unreid_jax.state import make_card

  run = getattr(commands, mode)
  takes = inspect.signature(run).parameters
  check_options(mode, set(takes))
  options = flags.FLAGS.flag_values_dict()
  options["checkpoint"] = options["checkpoint"] or options["workdir"]
  given = {k: options[k] for k in takes if options.get(k) not in (None, "", [])}
  for name in takes:
    if name not in given and takes[name].default is inspect.Parameter.empty:
      raise UserError(f"--mode={mode} needs --{name}")
  if config_file(sys.argv):
    given["card"] = make_card(load_config())
  run(**given)


def _plan(config):
  """Prints what a run would need, of as many virtual devices of the CPU."""
  import jax

  from unreid_jax.plan import lines, plan

  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", max(config.num_devices, 1))
  found = plan(config, _NUM_IMAGES.value)
  print("\n".join(lines(found, _DEVICE_MEMORY.value)))


def _keep_compiled():
  """Lets JAX keep what it compiles for the next start, if it is not told where.

  Where nothing can be written, everything is compiled each time.
  """
  import jax

  if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  try:
    folder = pathlib.Path.home() / ".cache" / "unreid_jax" / "compiled"
    folder.mkdir(parents=True, exist_ok=True)
  except (OSError, RuntimeError):  # RuntimeError: there is no home
    return
  if os.access(folder, os.R_OK | os.W_OK | os.X_OK):
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Also what compiles soon: there is a lot of it.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


if __name__ == "__main__":
  become_parent()
  app.run(main, flags_parser=parse)
