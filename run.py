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
import re
import traceback

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

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
  "checkpoint", "", "Workdir, checkpoint or PyTorch weights; not the workdir's."
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
flags.DEFINE_string("cache_dir", None, "Where features are kept.")
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
    if _MODE.value not in _OPTIONS:
      if launch.PLACE in os.environ:
        raise UserError(
          f"--mode={_MODE.value} is for one process: add --distributed=off, "
          "and leave --launch out"
        )
      return _use_encoder(_MODE.value)
    _check_options(_OPTIONS[_MODE.value])
    if _MODE.value == "plan":
      return _plan(_config())
    peers.join()
    workdir = _WORKDIR.value
    knows_its_config = _MODE.value in ("report", "evaluate") and workdir
    config = None if knows_its_config and not _CONFIG.value else _config()
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
    _fail(error)
  except OSError as error:
    if not error.filename:
      raise
    _fail(f"{error.filename}: {error.strerror}")
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
    _fail(
      f"out of memory ({str(error).partition(chr(10))[0][:150]}): lower "
      "batch_size, evaluate_batch_size, or the size of images or encoder"
    )


def _check_options(known):
  """Refuses an option that the mode would silently ignore."""
  own = flags.FLAGS.find_module_defining_flag("mode")
  given = (x for x in flags.FLAGS.get_flags_for_module(own) if x.present)
  always = {"config", "workdir", "mode"}
  for name in [x.name for x in given if x.name not in known | always]:
    line = f"--{name} is not for --mode={_MODE.value}"
    if (name, _MODE.value) == ("checkpoint", "train"):
      line += ": train from weights with --config.encoder.pretrained=FILE"
    raise UserError(f"{line}; see --help" if ":" not in line else line)


def _use_encoder(mode):
  """Runs a mode of `commands`; its arguments are the options it takes.

  A config is needed for PyTorch weights only, which may be of any encoder.
  """
  from unreid_jax import commands
  from unreid_jax.state import make_card

  run = getattr(commands, mode)
  takes = inspect.signature(run).parameters
  _check_options(set(takes))
  options = flags.FLAGS.flag_values_dict()
  given = {k: options[k] for k in takes if options.get(k) not in (None, "", [])}
  for name in takes:
    if name not in given and takes[name].default is inspect.Parameter.empty:
      raise UserError(f"--mode={mode} needs --{name}")
  if _config_file(sys.argv):
    given["card"] = make_card(_config())
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


def _config():
  """The config, or in one line why there is none."""
  from unreid_jax.config import kinds

  path = _config_file(sys.argv)
  if not path:
    raise UserError("say what to run: --config=configs/selective.py")
  if not pathlib.Path(path).is_file():
    raise UserError(_in_config(None))
  config = _CONFIG.value
  if not isinstance(config, ConfigDict):
    raise UserError(f"{path}: get_config() returns no ConfigDict")
  try:
    given = config.to_dict()  # what went wrong in the file is raised here
  except UserError:
    raise
  except Exception as error:
    raise UserError(_in_config(error)) from None
  missing = [key for key in kinds() if key not in given]
  if missing:
    raise UserError(f"{path}: no {missing[0]}: begin with configs/default.py")
  return config


def _config_file(argv):
  """The path in --config=PATH:ARGUMENT."""
  given = re.findall(r"^--?config[=\n]([^:\n]*)", "\n".join(argv), re.M)
  return given[-1] if given else None


def _parse(argv):
  """absl's parsing, with each mistake answered in one line."""
  try:
    return flags.FLAGS(argv)
  except (flags.Error, UserError) as error:
    # In the middle of a traceback, which has become a line by now.
    text = str(error).strip().rpartition("unreid_jax.UserError: ")[2]
    text = text.splitlines()[-1].rstrip("?")
  except (AttributeError, KeyError) as error:
    text = _unknown_key(str(error), argv) or _in_config(error)
  except BrokenPipeError:  # --help, and nobody reads on
    os._exit(0)
  except Exception as error:
    text = _in_config(error)
  _fail(text)


def _unknown_key(reason, argv):
  """A line about the override of a key that there is not, if it is one."""
  hint = re.search(r'Did you mean "(.*)" instead of "(.*)"', reason)
  name = re.search(r'lookup: ([\w.]+)|instead of "(\w+)|^"\'(\w+)\'"$', reason)
  name = name and name[name.lastindex]
  for override in re.findall(r"--?config\.([\w.]+)", "\n".join(argv)):
    if name in (override, *override.split(".")):
      meant = f'; did you mean "{hint[1]}"?' if hint else ""
      return f'the config has no key "{override}"{meant}'
  return None


def _in_config(error):
  """A line that says where in a config file something went wrong."""
  file, line, text = _config_file(sys.argv), None, str(error)
  if not pathlib.Path(file).is_file():
    return f"--config={file}: no such file"
  for place in traceback.extract_tb(error.__traceback__):
    if pathlib.Path(place.filename).resolve() == pathlib.Path(file).resolve():
      line = place.lineno
  if isinstance(error, SyntaxError):
    file, line, text = error.filename, error.lineno, error.msg
  place = f"{file}, line {line}" if line else file
  return f"{place}: {type(error).__name__}: {text}"


def _fail(line):
  print(f"error: {line}", file=sys.stderr, flush=True)
  if launch.PLACE in os.environ:
    from unreid_jax.hosts import peers

    peers.end(line)
    os._exit(2)  # JAX's exit would wait for the others
  sys.exit(2)


def _launch():
  """Becomes the parent of the processes of this machine, if there are any."""
  try:
    status = launch.launch(sys.argv)
  except UserError as error:
    _fail(error)
  except flags.Error:
    return  # `_parse` says it better
  if status is not None:
    os._exit(status)


if __name__ == "__main__":
  _launch()
  app.run(main, flags_parser=_parse)
