"""Where a process stands among those of a run, by flags or environment."""

import re
from collections.abc import Mapping
from typing import Any

from unreid_jax import UserError

# The ways to find the other processes, by the value of --distributed.
WAYS = ("auto", "manual", "slurm", "tpu", "gke", "off")
_OURS = {  # flags, and the variables that they replace
  "coordinator": "JAX_COORDINATOR_ADDRESS",
  "num_processes": "JAX_NUM_PROCESSES",
  "process_id": "JAX_PROCESS_ID",
}
_SLURM = (
  "SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS",
  "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE",
)  # fmt: skip


def find(
  way: str, flags: Mapping[str, Any], env: Mapping[str, str]
) -> dict[str, Any] | None:
  """The arguments of `jax.distributed.initialize`; None: no other process.

  Args:
    way: one of `WAYS`. "auto" takes the flags or their variables where there
      are any, a step of several tasks of Slurm, or the slice of several hosts
      that GKE names; on any other machine the process is alone.
    flags: coordinator ("HOST:PORT"), num_processes and process_id; None where
      they are not given.
    env: the environment's variables, such as JAX_COORDINATOR_ADDRESS,
      JAX_NUM_PROCESSES and JAX_PROCESS_ID, which the flags replace.

  Raises:
    UserError: something that this way needs is missing or is no number.
  """
  given = {
    name: env.get(variable) if flags[name] is None else str(flags[name])
    for name, variable in _OURS.items()
  }
  hosts = env.get("TPU_WORKER_HOSTNAMES", "").split(",")
  if way == "auto":
    if any(given.values()):
      way = "manual"
    elif int(env.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
      way = "slurm"
    else:  # outside of GKE, only the metadata server knows a TPU's hosts
      way = "gke" if len(hosts) > 1 else "off"
  if way == "manual":
    return _manual(given)
  if way == "slurm":
    return _slurm(env)
  methods = {"tpu": "gce_tpu", "gke": "gke_tpu" if any(hosts) else "k8s"}
  method = methods.get(way)
  return method and {"cluster_detection_method": method}


def _manual(given):
  for name, value in given.items():
    what = f"--{name} (or {_OURS[name]})"
    if not value:
      raise UserError(f"{what} is missing: several processes need all three")
    if name != "coordinator" and not value.isdecimal():
      raise UserError(f"{what} is {value}: set it to a whole number")
  address = given["coordinator"]
  if not re.fullmatch(r".+:\d+", address):
    raise UserError(f"--coordinator={address}: write HOST:PORT of process 0")
  num, own = int(given["num_processes"]), int(given["process_id"])
  if own >= num:
    raise UserError(
      f"--process_id={own}, but --num_processes={num}: count from 0"
    )
  return _place(address, num, own) if num > 1 else None


def _slurm(env):
  """The tasks of a step; each takes its share of the GPUs that it sees."""
  missing = [name for name in _SLURM if not env.get(name)]
  if missing:
    raise UserError(
      f"--distributed=slurm, but {missing[0]} is not set: start it by srun"
    )
  step = {name.removeprefix("SLURM_"): env[name] for name in _SLURM}
  first = re.sub(r"\[(\w+).*", r"\1", step["STEP_NODELIST"].split(",")[0])
  port = 61440 + int(step["JOB_ID"]) % 4096  # the same for all tasks of a job
  counts = []
  for part in step["STEP_TASKS_PER_NODE"].split(","):  # such as "2(x3),1"
    tasks, times = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part).groups()
    counts += [int(tasks)] * int(times or 1)
  own = _share(env, int(step["LOCALID"]), counts[int(step["NODEID"])])
  num, process = int(step["STEP_NUM_TASKS"]), int(step["PROCID"])
  return _place(f"{first}:{port}", num, process) | own


def local(num: int, port: int, env: Mapping[str, str]) -> list[dict[str, Any]]:
  """The places of some processes on this machine, which share its GPUs."""
  return [
    _place(f"127.0.0.1:{port}", num, i) | _share(env, i, num)
    for i in range(num)
  ]


def _share(env, local_id, num):
  """What a process may have of the GPUs that all on its machine can see."""
  seen = list(filter(None, env.get("CUDA_VISIBLE_DEVICES", "").split(",")))
  size = len(seen) // num
  own = range(size * local_id, size * (local_id + 1))
  return {"local_device_ids": list(own)} if 0 < size < len(seen) else {}


def _place(address, num, own):
  return {
    "coordinator_address": address,
    "num_processes": num,
    "process_id": own,
    "cluster_detection_method": "deactivate",  # it would take one GPU a task
  }
