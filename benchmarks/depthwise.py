"""Depthwise convolutions: ours, XLA's, plain shifted products, and PyTorch's.

  python benchmarks/depthwise.py [--batch=128] [--rounds=5]

Times the convolution of ReLU6 of the maps, its gradient in the maps and its
gradient in the kernel, on the shapes that EfficientNet-Lite0 has for images of
128x64 (last stride 1). "shifted" is the same sum as ours with the gradients
that JAX derives. In each round every contender runs once, one after the other.
Printed are each one's fastest round in milliseconds and, beside PyTorch's, the
median over the rounds of PyTorch's time over ours, with its quartiles. PyTorch
has its usual layout, and in its gradients ReLU6 and padding were done before;
it is left out where it is not installed. The last lines add all layers up, as
often as the network has them.
"""

import argparse
import importlib.util
import pathlib
import sys
import time

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from unreid_jax.models import conv
from unreid_jax.models.backbones.efficientnet_lite import relu6

# Rows, columns and channels; size of the kernel, stride; how often it occurs.
LAYERS = (
  (64, 32, 32, 3, 1, 1),
  (64, 32, 96, 3, 2, 1),
  (32, 16, 144, 3, 1, 1),
  (32, 16, 144, 5, 2, 1),
  (16, 8, 240, 5, 1, 1),
  (16, 8, 240, 3, 2, 1),
  (8, 4, 480, 3, 1, 2),
  (8, 4, 480, 5, 1, 1),
  (8, 4, 672, 5, 1, 3),
  (8, 4, 1152, 5, 1, 3),
  (8, 4, 1152, 3, 1, 1),
)
PASSES = "forward", "maps", "kernel"


def grouped(x, kernel, stride):
  """XLA's own operation."""
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    "SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=x.shape[-1],
  )


def shifted(x, kernel, stride):
  """Our sum, which JAX differentiates by itself."""
  return conv._depthwise.__wrapped__(x, kernel, stride)


def in_jax(form, x, kernel, slope, stride):
  """A function for each pass, which returns when it is done."""
  x, kernel, slope = (jax.device_put(a) for a in (x, kernel, slope))

  def maps(x, kernel, slope):
    return jax.vjp(lambda x: form(relu6(x), kernel, stride), x)[1](slope)

  def of_kernel(x, kernel, slope):
    return jax.vjp(lambda k: form(relu6(x), k, stride), kernel)[1](slope)

  run = lambda f: lambda: jax.block_until_ready(f(x, kernel, slope))
  forward = lambda x, kernel, slope: form(relu6(x), kernel, stride)
  return [run(jax.jit(f)) for f in (forward, maps, of_kernel)]


def in_torch(x, kernel, slope, stride):
  """The same functions of PyTorch."""
  import torch

  tensor = lambda a, axes: torch.from_numpy(a.transpose(axes).copy())
  x, slope = (tensor(a, (0, 3, 1, 2)) for a in (x, slope))
  channels, size, kernel = x.shape[1], len(kernel), tensor(kernel, (3, 2, 0, 1))
  pads = []
  for length in reversed(x.shape[2:]):
    pads += conv._same_pads(length, size, stride)
  functional, aten = torch.nn.functional, torch.ops.aten
  pad = lambda: functional.pad(functional.relu6(x), pads)
  padded, options = pad(), ([stride, stride], [0, 0], [1, 1])

  def forward():
    functional.conv2d(pad(), kernel, None, stride, groups=channels)

  def backward(*which):
    return aten.convolution_backward(
      slope, padded, kernel, None, *options, False, [0, 0], channels,
      [*which, False],
    )  # fmt: skip

  def maps():
    inner = functional.pad(backward(True, False)[0], [-n for n in pads])
    aten.hardtanh_backward(inner, x, 0, 6)

  return [forward, maps, lambda: backward(False, True)]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--batch", type=int, default=128)
  parser.add_argument("--rounds", type=int, default=5)
  args = parser.parse_args()
  forms = {"ours": conv.depthwise, "shifted": shifted, "grouped": grouped}
  names = [*forms, *(["PyTorch"] if importlib.util.find_spec("torch") else [])]
  print(f"{'':<26}" + "".join(f"{name:>9}" for name in names))
  rng, total = np.random.default_rng(0), 0
  for *shape, size, stride, count in LAYERS:
    out = [-(-n // stride) for n in shape[:2]] + shape[2:]
    shapes = (args.batch, *shape), (size, size, 1, shape[2]), (args.batch, *out)
    arrays = [rng.standard_normal(s, np.float32) for s in shapes]
    runs = {k: in_jax(form, *arrays, stride) for k, form in forms.items()}
    if "PyTorch" in names:
      runs["PyTorch"] = in_torch(*arrays, stride)
    seconds = np.zeros((args.rounds + 1, len(names), len(PASSES)))
    for round_ in seconds:  # the first one warms up
      for i, name in enumerate(names):
        for j, run in enumerate(runs[name]):
          start = time.perf_counter()
          run()
          round_[i, j] = time.perf_counter() - start
    total = total + count * seconds[1:]
    title = "x".join(map(str, shape)) + f" k{size} s{stride} "
    show(title, seconds[1:], names)
  show("all 17 layers ", total, names)


def show(title: str, seconds: np.ndarray, names: list[str]) -> None:
  """One line for each pass: seconds [round, contender, pass]."""
  for j, what in enumerate(PASSES):
    best = "".join(f"{1e3 * s:>9.1f}" for s in seconds[..., j].min(0))
    if names[-1] == "PyTorch":
      ratio = seconds[:, -1, j] / seconds[:, 0, j]
      low, median, high = np.quantile(ratio, (0.25, 0.5, 0.75))
      best += f"   {median:.2f}x ({low:.2f} to {high:.2f})"
    print(f"{title + what:<26}{best}", flush=True)


if __name__ == "__main__":
  main()
