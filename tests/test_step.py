"""A batch in parts: the same step, for every method, on any devices."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
from helpers import KEY, gives, make_split
from jax.sharding import NamedSharding
from test_methods import CAMIDS, NAMES, PIDS, N, make_features

from configs import default
from unreid_jax import sharding
from unreid_jax.config import resolve
from unreid_jax.models import Encoder
from unreid_jax.models.backbones.vit import ViT
from unreid_jax.models.heads import Neck, Stripes
from unreid_jax.models.norm import GhostBatchNorm
from unreid_jax.state import first_state, make_parts, shardings
from unreid_jax.step import compile_step


class OneLayer(nn.Module):
  """A convolution and a batch norm: what compiles soon."""

  norm: functools.partial

  @nn.compact
  def __call__(self, x, train):
    x = nn.Conv(32, (3, 3), dtype=float)(x)
    return nn.relu(self.norm(name="bn")(x, train))


def tiny_encoder(name, head, running):
  norm = functools.partial(GhostBatchNorm, 4, running)
  if name == "supervised":  # with a block that half of the images skip
    options = {"dim": 32, "heads": 1, "depth": 2, "patch": 4, "stride": 4}
    options |= {"drop_path": 0.5, "dtype": "float64"}
    return Encoder(ViT(**options, norm=norm), Neck("token", norm))
  if head == "stripes":
    return Encoder(OneLayer(norm), Stripes("avg", norm, 32, 4, 8))
  return Encoder(OneLayer(norm), Neck("gem", norm))


def begin(name, running):
  """The parts of a run, its state when an epoch begins, and its labels."""
  config = default.get_config(name, "synthetic")
  config.update_from_flattened_dict(
    {
      "batch_size": 32,
      "dataset.height": 8,
      "dataset.width": 8,
      "encoder.bn_running": running,
      "encoder.dtype": "float64",
      "optim.name": "sgd",  # the gradients of both steps are in its momentum
      "optim.lr": 0.1,
    }
  )
  if name == "selective":
    config.encoder.head = "stripes"
  if name == "hngn":
    config.method.generator_width = 32
  parts = make_parts(resolve(config, steps_per_epoch=4))
  module = tiny_encoder(name, config.encoder.head, running)
  scale = lambda key, images: images.astype(float) / 255  # compiles soon
  parts = parts._replace(module=module, augment=scale)
  state = first_state(parts, N, weights="")
  split, encode = make_split(CAMIDS, PIDS), gives(make_features(name, PIDS, 0))
  found = parts.method.label(state.method, encode, split, 0)
  refresh = jax.jit(parts.method.refresh)
  banks = refresh(state.method, found.values, found.given, KEY)
  return parts, state.replace(method=banks), found.values


def run(parts, state, labels, num_devices, micro_batches):
  """What two steps report, the state after them, and the compiled step."""
  config = parts.config.copy_and_resolve_references()
  config.micro_batches = micro_batches
  mesh = sharding.make_mesh(num_devices)
  images = np.random.default_rng(0).integers(0, 256, (N, 8, 8, 3), np.uint8)
  arrays = {"images": images, "indices": np.arange(N, dtype=np.int32)}
  arrays |= {"labels": labels, "camids": CAMIDS}
  rng, outs = np.random.default_rng(0), []
  with jax.set_mesh(mesh):
    state = jax.device_put(jax.device_get(state), shardings(mesh, state))
    key = jax.device_put(KEY, NamedSharding(mesh, sharding.COPY))
    parts = parts._replace(config=config, mesh=mesh)
    step = compile_step(parts, state, key)
    for _ in range(2):
      rows = rng.permutation(np.flatnonzero(labels >= 0))[:32]
      put = functools.partial(sharding.put_rows, mesh, rows=rows)
      state, figures = step(state, jax.tree.map(put, arrays), key)
      outs.append(jax.device_get(figures))
  return (outs, jax.device_get(state)), step


@pytest.mark.parametrize("name", NAMES)
def test_parts_equal_the_batch(float64, name):
  """Figures, gradients, running statistics and banks, in double precision."""
  running = "mean" if name in ("selective", "supervised") else "first"
  with jax.set_mesh(sharding.make_mesh(8)):
    begun = begin(name, running)
  whole, _ = run(*begun, num_devices=1, micro_batches=1)
  parted, step = run(*begun, num_devices=8, micro_batches=4)
  program = step.as_text()
  assert program.count(" while(") >= 2  # there and back
  if name != "supervised":  # each device has one of the eight images of a part
    assert "f64[1,8,8,32]" in program and "f64[8,8,8,32]" not in program
  for a, b in zip(*map(jax.tree.leaves, (whole, parted)), strict=True):
    assert np.linalg.norm(a - b) <= 1e-9 * max(np.linalg.norm(a), 0.1)


def test_an_xla_that_does_not_know_the_option(monkeypatch, float64):
  """The step is compiled without it."""
  compile_it, given = jax.stages.Lowered.compile, []

  def compile_strictly(lowered, options=None):
    given.append(options)
    if options:
      raise jax.errors.JaxRuntimeError("No such compile option: 'xla_cpu_x'")
    return compile_it(lowered)

  with jax.set_mesh(sharding.make_mesh(1)):
    parts, state, labels = begin("supervised", "first")
  monkeypatch.setattr(jax.stages.Lowered, "compile", compile_strictly)
  run(parts, state, labels, num_devices=1, micro_batches=1)
  assert given[0] and given[1] is None
