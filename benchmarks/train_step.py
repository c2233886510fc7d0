"""A training step: ours, and the same one in PyTorch, on the same device.

  python benchmarks/train_step.py --arch=resnet50 --batch=32 --height=256 \
      --width=128 [--dtype=bfloat16] [--steps=5]

The step takes uint8 images, encodes them (last stride 1, average pooling or the
class token, BN neck), compares the unit features with 700 centroids
(cross-entropy, temperature .05), and updates all weights by Adam with weight
decay. Ours is the library's own train step with that loss as its method.
PyTorch runs as it is, with channels last, and that compiled. Each contender has
a process of its own, one after the other, for --rounds rounds, and its fastest
round counts. Utilisation is the share of what a large matrix product of the
same type reaches on this device in the same process. PyTorch is left out where
it is not installed. Memory is the device's peak, on a CPU the process's.
"""

import argparse
import importlib.util
import json
import pathlib
import resource
import subprocess
import sys
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
CENTROIDS, TEMPERATURE, LR, DECAY = 700, 0.05, 3.5e-4, 5e-4
ARCHS = (
  "resnet18", "resnet34", "resnet50", "efficientnet_lite0", "vit_small"
)  # fmt: skip
FORMS = "eager", "channels_last", "compiled"  # of PyTorch


def time_steps(step, wait, args) -> float:
  """Seconds a step, after one step to warm up."""
  step()
  wait()
  start = time.perf_counter()
  for _ in range(args.steps):
    step()
  wait()
  return (time.perf_counter() - start) / args.steps


def images_and_labels(args):
  rng = np.random.default_rng(0)
  shape = (args.batch, args.height, args.width, 3)
  labels = rng.integers(0, CENTROIDS, args.batch)
  return rng.integers(0, 256, shape, np.uint8), labels


def run_jax(args) -> dict:
  """The library's step."""
  import jax
  import jax.numpy as jnp
  import optax
  from jax import lax
  from jax.sharding import NamedSharding

  from configs import default
  from unreid_jax import methods, sharding, state, step
  from unreid_jax.config import resolve

  def loss_and_state(bank, features, batch, key):
    logits = features @ bank.T / TEMPERATURE
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return loss.mean(), (bank, {})

  def init(key, shapes):
    bank = jax.random.normal(key, (CENTROIDS, shapes.shape[1]))
    return bank / jnp.linalg.norm(bank, axis=1, keepdims=True)

  method = methods.Method(init, label=None, refresh=None, step=loss_and_state)
  methods.make = lambda name, **_: method
  config = default.get_config("supervised", "synthetic")
  config.update(
    {
      "batch_size": args.batch,
      "num_devices": 1,
      "dataset": {"height": args.height, "width": args.width},
      "encoder": {
        "arch": args.arch,
        "dtype": args.dtype,
        "width": args.channels,
        "pooling": "token" if args.arch.startswith("vit") else "avg",
      },
      "augment": {"flip": False, "pad": 0, "erase_probability": 0.0},
      "optim": {"lr": LR, "weight_decay": DECAY, "milestones": ()},
    }
  )
  images, labels = images_and_labels(args)
  labels = labels.astype(np.int32)
  with jax.set_mesh(sharding.make_mesh(1)):
    mesh = jax.sharding.get_mesh()
    parts = state.make_parts(resolve(config, 1))
    first = state.first_state(parts, args.batch, weights="")
    key = jax.device_put(jax.random.key(0), NamedSharding(mesh, sharding.COPY))
    start = time.perf_counter()
    compiled = step.compile_step(parts, first, key)
    seconds_to_compile = time.perf_counter() - start
    rows = np.arange(args.batch)
    arrays = dict.fromkeys(("indices", "labels", "camids"), labels)
    arrays["images"] = images
    batch = {k: sharding.put_rows(mesh, x, rows) for k, x in arrays.items()}
    box = [first]

    def run():
      box[0], _ = compiled(box[0], batch, key)

    seconds = time_steps(run, lambda: jax.block_until_ready(box), args)
  square = jnp.ones((4096, 4096), args.dtype)
  product = jax.jit(lambda x: lax.dot(x, x, precision=lax.Precision.DEFAULT))
  product(square).block_until_ready()
  start = time.perf_counter()
  for _ in range(3):
    out = product(square)
  out.block_until_ready()
  peak = 3 * 2 * 4096**3 / (time.perf_counter() - start)
  device = jax.devices()[0]
  stats = device.memory_stats() or {}
  return {
    "device": device.device_kind,
    "seconds": seconds,
    "compile": seconds_to_compile,
    "memory": stats.get("peak_bytes_in_use", resident()),
    "flops": compiled.cost_analysis()["flops"],
    "peak": peak,
  }


def run_torch(args) -> dict:
  """The same network, loss and optimizer in PyTorch, in one of its forms."""
  import torch
  from torch.nn import functional as F

  from benchmarks import torch_networks

  device = "cuda" if torch.cuda.is_available() else "cpu"
  size = args.height, args.width
  is_eager = args.only == "eager"
  layout = torch.contiguous_format if is_eager else torch.channels_last
  net = torch_networks.make(args.arch, args.channels, size)
  net = net.to(device, memory_format=layout)
  inputs = net[-1].num_features
  bank = F.normalize(torch.randn(CENTROIDS, inputs, device=device))
  optimizer = torch.optim.Adam(
    [p for p in net.parameters() if p.requires_grad], LR, weight_decay=DECAY
  )
  images, labels = (
    torch.from_numpy(x).to(device) for x in images_and_labels(args)
  )
  mean = torch.tensor((0.485, 0.456, 0.406), device=device)
  std = torch.tensor((0.229, 0.224, 0.225), device=device)

  def loss_of(images):
    x = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
    x = x.contiguous(memory_format=layout)
    with torch.autocast(device, torch.bfloat16, args.dtype == "bfloat16"):
      features = F.normalize(net(x).float())
    return F.cross_entropy(features @ bank.T / TEMPERATURE, labels)

  if args.only == "compiled":
    loss_of = torch.compile(loss_of)

  def step():
    optimizer.zero_grad()
    loss_of(images).backward()
    optimizer.step()

  wait = torch.cuda.synchronize if device == "cuda" else lambda: None
  start = time.perf_counter()
  step()
  wait()
  first = time.perf_counter() - start
  seconds = time_steps(step, wait, args)
  memory = resident()
  if device == "cuda":
    memory = torch.cuda.max_memory_allocated()
  return {
    "seconds": seconds,
    "compile": max(first - seconds, 0),
    "memory": memory,
  }


def resident() -> int:
  """The most memory that this process had, in bytes."""
  return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--arch", default="resnet50", choices=ARCHS)
  thin = "a ResNet's channels, times this: a multiple of 1/8"
  parser.add_argument("--channels", type=float, default=1.0, help=thin)
  parser.add_argument("--batch", type=int, default=32)
  parser.add_argument("--height", type=int, default=256)
  parser.add_argument("--width", type=int, default=128)
  parser.add_argument("--dtype", default="float32", help="or bfloat16")
  parser.add_argument("--steps", type=int, default=3)
  parser.add_argument("--rounds", type=int, default=2)
  parser.add_argument("--only", choices=["jax", *FORMS])
  args = parser.parse_args()
  is_resnet = args.arch.startswith("resnet")
  if args.channels != 1 and not (
    is_resnet and (8 * args.channels).is_integer()
  ):
    parser.error(f"--channels: {thin}")
  if args.only:
    result = run_jax(args) if args.only == "jax" else run_torch(args)
    print(json.dumps(result))
    return
  names = ["jax"]
  if importlib.util.find_spec("torch"):
    names += FORMS
  runs = {name: [] for name in names}
  for _ in range(args.rounds):
    for name in names:
      command = [sys.executable, *sys.argv, f"--only={name}"]
      done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
      runs[name].append(json.loads(done.stdout.splitlines()[-1]))
  best = {k: min(v, key=lambda run: run["seconds"]) for k, v in runs.items()}
  ours = best["jax"]
  print(
    f"{args.arch} {args.dtype}, batch {args.batch} of {args.height}x"
    f"{args.width}, on {ours['device']}: {ours['flops'] / 1e9:.0f} GFLOP a step"
  )
  print(
    f"{'':<18}{'images/s':>9}{'ours':>7}{'compile':>9}{'memory':>9}{'use':>6}"
  )
  for name, run in best.items():
    use = ours["flops"] / run["seconds"] / ours["peak"]
    title = "unreid_jax" if name == "jax" else f"PyTorch {name}"
    print(
      f"{title:<18}{args.batch / run['seconds']:>9.1f}"
      f"{run['seconds'] / ours['seconds']:>6.2f}x{run['compile']:>7.1f} s"
      f"{run['memory'] / 1e9:>6.1f} GB{100 * use:>5.0f}%"
    )


if __name__ == "__main__":
  main()
