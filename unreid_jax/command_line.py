"""The command line: what is wrong with it is said in one line."""

import os
import pathlib
import re
import sys
import traceback
from collections.abc import Collection
from typing import NoReturn

from absl import flags
from ml_collections import ConfigDict

from unreid_jax import UserError
from unreid_jax.hosts import launch


def become_parent() -> None:
  """Becomes the parent of the processes of this machine, if there are any."""
  try:
    status = launch.launch(sys.argv)
  except UserError as error:
    fail(error)
  except flags.Error:
    return  # `parse` says it better
  if status is not None:
    os._exit(status)


def load_config() -> ConfigDict:
  """The config, or in one line why there is none."""
  from unreid_jax.config import kinds

  path = config_file(sys.argv)
  if not path:
    raise UserError("say what to run: --config=configs/selective.py")
  if not pathlib.Path(path).is_file():
    raise UserError(_in_config(None))
  config = flags.FLAGS["config"].value
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


def config_file(argv: list[str]) -> str | None:
  """The path in --config=PATH:ARGUMENT."""
  given = re.findall(r"^--?config[=\n]([^:\n]*)", "\n".join(argv), re.M)
  return given[-1] if given else None


def parse(argv: list[str]) -> list[str]:
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
  fail(text)


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
  file, line, text = config_file(sys.argv), None, str(error)
  if not pathlib.Path(file).is_file():
    return f"--config={file}: no such file"
  for place in traceback.extract_tb(error.__traceback__):
    if pathlib.Path(place.filename).resolve() == pathlib.Path(file).resolve():
      line = place.lineno
  if isinstance(error, SyntaxError):
    file, line, text = error.filename, error.lineno, error.msg
  place = f"{file}, line {line}" if line else file
  return f"{place}: {type(error).__name__}: {text}"


def check_options(mode: str, known: Collection[str]) -> None:
  """Refuses an option that the mode would silently ignore."""
  own = flags.FLAGS.find_module_defining_flag("mode")
  given = (x for x in flags.FLAGS.get_flags_for_module(own) if x.present)
  always = {"config", "workdir", "mode"}
  for name in [x.name for x in given if x.name not in known | always]:
    line = f"--{name} is not for --mode={mode}; see --help"
    if (name, mode) == ("checkpoint", "train"):
      line = f"--checkpoint is not for --mode={mode}: train from weights with "
      line += "--config.encoder.pretrained=FILE"
    raise UserError(line)


def fail(line: str | Exception) -> NoReturn:
  """Says what is wrong, to the other processes too, and ends with status 2."""
  print(f"error: {line}", file=sys.stderr, flush=True)
  if launch.PLACE in os.environ:
    from unreid_jax.hosts import peers

    peers.end(line)
    os._exit(2)  # JAX's exit would wait for the others
  sys.exit(2)
