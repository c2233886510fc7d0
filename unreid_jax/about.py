"""What a run is made by: the code and the machine."""

import functools
import pathlib
import platform
import re
import subprocess

import jax

import unreid_jax


def made_by(num_devices: int) -> dict[str, str | None]:
  """Versions, commit and devices; for an encoder's card."""
  return {
    "unreid_jax": unreid_jax.__version__,
    "commit": commit(),
    "jax": f"{jax.__version__}, Python {platform.python_version()}",
    "hardware": hardware(num_devices),
  }


def hardware(num_devices: int) -> str:
  """Such as "4 x NVIDIA H200"; for CPUs, how many there are and their name."""
  device = jax.devices()[0]
  if device.platform != "cpu":
    return f"{num_devices} x {device.device_kind}"
  try:
    text = pathlib.Path("/proc/cpuinfo").read_text()
  except OSError:
    text = ""
  names = re.findall(r"model name\s*: (.*)", text)
  return f"{len(names) or 1} x {names[0] if names else platform.machine()}"


@functools.cache
def commit() -> str | None:
  """The commit of this package's checkout, with "-dirty" if it was changed.

  None where there is no checkout: a package that was installed, say.
  """
  folder = pathlib.Path(unreid_jax.__file__).parent
  git = ["git", "-C", str(folder)]
  describe = ["describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
  try:
    # Others' checkouts may hold an environment in which this is installed.
    for command in (["ls-files", "--error-unmatch", "__init__.py"], describe):
      done = subprocess.run(
        git + command, capture_output=True, text=True, timeout=20, check=True
      )
  except (OSError, subprocess.SubprocessError):
    return None
  return done.stdout.strip()
