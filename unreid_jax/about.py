"""What a run is made by: the code and the machine."""

import functools
import pathlib
import platform
import subprocess

import jax

import unreid_jax


@functools.cache
def made_by() -> dict[str, str]:
  """Versions, commit and devices; for an encoder's card."""
  devices = jax.devices()
  return {
    "unreid_jax": f"{unreid_jax.__version__}{_commit()}",
    "jax": f"{jax.__version__}, Python {platform.python_version()}",
    "devices": f"{len(devices)} x {devices[0].device_kind}",
    "machine": f"{platform.system()} {platform.machine()}",
  }


def _commit():
  """The commit of the working tree, if the code lies in one."""
  folder = pathlib.Path(unreid_jax.__file__).parents[1]
  try:
    done = subprocess.run(
      ["git", "describe", "--always", "--dirty"],
      cwd=folder,
      capture_output=True,
      text=True,
      timeout=10,
    )
  except (OSError, subprocess.TimeoutExpired):
    return ""
  is_ours = (folder / ".git").exists() and done.returncode == 0
  return f", commit {done.stdout.strip()}" if is_ours else ""
