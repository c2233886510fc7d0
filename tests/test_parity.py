"""Training and features against an independent PyTorch, in double precision.

The same weights and the same batches: what differs, differs for a reason.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from numpy.testing import assert_allclose

from unreid_jax import encode, export, load_encoder, sharding, step
from unreid_jax.card import build
from unreid_jax.config import resolve
from unreid_jax.models import pretrained
from unreid_jax.models.backbones import resnet
from unreid_jax.state import first_state, make_card, make_parts

torch = pytest.importorskip("torch", reason="compares with PyTorch")

import torch_methods
import torch_twin
from test_train import cluster_config, tiny_config, tiny_split

pytestmark = pytest.mark.usefixtures("two_blocks", "float64", "exact_pixels")
CHANNELS, GROUP, STEPS = 8, 8, 20
# Clusters of every size, one of a single image, and four outliers.
SIZES = {-1: 4, 0: 13, 1: 1, 2: 2, 3: 9, 4: 8, 5: 16, 6: 4, 7: 7}
LABELS = np.random.default_rng(2).permutation(
  np.repeat(np.int32(list(SIZES)), list(SIZES.values()))
)
SPLIT = tiny_split(np.random.default_rng(0), 64)
SPLIT = SPLIT._replace(
  images=np.random.default_rng(1).choice(np.uint8([0, 255]), (64, 32, 16, 3))
)
PARITY = {
  "num_devices": 1,
  "batch_size": 16,
  "encoder.width": 0.125,
  "encoder.dtype": "float64",
  "encoder.bn_group_size": GROUP,
  "augment.flip": False,
  "augment.pad": 0,
  "augment.erase_probability": 0.0,
  "optim.name": "adam",
  "optim.lr": 3.5e-4,
  "optim.milestones": ("10 steps",),
}
# Not at .5, where a weight and what it leaves are the same.
SELECTIVE = {
  "num_positives": 3,
  "num_negatives": 20,
  "self_weight": 0.4,
  "global_weight": 0.6,
  "bank_momentum": 0.3,
  "mixture_momentum": 0.6,
}
# The method's settings, and what the twin's is made of.
METHODS = {
  "cluster_contrast": (
    {"encoder.pooling": "gem"},
    torch_methods.ClusterContrast,
  ),
  "cluster_contrast, hardest": (
    {"method.bank_update": "hardest"},
    lambda *x: torch_methods.ClusterContrast(*x, hardest=True),
  ),
  "hhcl": (
    {"method.hard_weight": 0.3},
    lambda *x: torch_methods.TwoRows(*x, 0.3),
  ),
  "hhcl, instances": (
    {
      "method.memory": "instances",
      "method.num_instances": 4,
      "method.hard_weight": 0.3,
    },
    lambda *x: torch_methods.Instances(*x[:2], 0.3, x[2]),
  ),
  "spcl": ({}, torch_methods.SpCL),
  "selective": (
    {f"method.{k}": x for k, x in SELECTIVE.items()},
    lambda *x: torch_methods.Selective(*x, **SELECTIVE),
  ),
}


@pytest.fixture
def exact_pixels(monkeypatch):
  """Black is -1 and white is 1, whatever a division is rounded to."""
  for name in ("mean", "std"):
    monkeypatch.setattr(resnet.ResNet, name, (0.5, 0.5, 0.5))


def config_of(name, **changes):
  method = name.partition(",")[0]
  if method == "selective":
    return tiny_config(**PARITY | {"method.warmup": "0 steps"} | changes)
  return cluster_config(method, **PARITY | changes)


def twin_of(config):
  """The network in PyTorch, in double precision, with drawn weights."""
  depths = resnet._DEPTHS[18][0]
  if config.encoder.head == "stripes":
    net = torch_twin.Stripes(depths, CHANNELS, dim=64, num_stripes=2,
                             stripe_dim=32)  # fmt: skip
  else:
    net = torch_twin.Neck(depths, CHANNELS, config.encoder.pooling)
  return torch_twin.randomize(net.double())


def to_torch(card, images):
  """Normalised images in PyTorch's order of axes."""
  mean, std = (torch.tensor(card[k]).double() for k in ("mean", "std"))
  images = torch.from_numpy(np.asarray(images)).double() / 255
  return ((images - mean) / std).permute(0, 3, 1, 2)


def in_chunks(net, images):
  """As DataParallel trains: only the first chunk moves running statistics."""
  first, *others = images.split(GROUP)
  buffers = {k: x.clone() for k, x in net.named_buffers()}
  out = [net(first)]
  out += [torch.func.functional_call(net, buffers, x) for x in others]
  if isinstance(out[0], dict):
    return {k: torch.cat([x[k] for x in out]) for k in out[0]}
  return torch.cat(out)


def close(got, want, tolerance=1e-9):
  """Arrays or dictionaries of such; `got` may have more rows and names."""
  if not isinstance(want, dict):
    got, want = {"features": got}, {"features": want}
  for key, x in want.items():
    x = x.detach().numpy()
    scale = max(abs(x).max(), 1e-3)
    rows = np.asarray(got[key])[: len(x)] if x.ndim else got[key]
    assert_allclose(rows, x, 0, tolerance * scale, err_msg=key)


@pytest.mark.parametrize("head", ["neck", "stripes"])
def test_features_and_weights_both_ways(head, tmp_path):
  """PyTorch's file gives its features here, and ours gives them there."""
  name = {"neck": "cluster_contrast", "stripes": "selective"}[head]
  config = config_of(
    name, **{"encoder.num_stripes": 2, "encoder.stripe_dim": 32}
  )
  if head == "neck":
    config.encoder.pooling = "gem"
  net, card = twin_of(config), make_card(config)
  path = tmp_path / "model_best.pth.tar"
  state = {f"module.{k}": x for k, x in net.state_dict().items()}
  torch.save({"state_dict": state, "epoch": 50, "best_mAP": 0.8}, path)
  with jax.set_mesh(sharding.make_mesh(1)):
    encoder = load_encoder(path, card)
  images = to_torch(card, SPLIT.images[:16])

  def check(net):
    close(encoder(SPLIT.images[:16]), net.eval()(images))

  check(net)
  module, _ = build(card, "")
  run = lambda v, x: module.apply(v, x, True, mutable=["batch_stats"])
  pixels = jnp.asarray(images.permute(0, 2, 3, 1).numpy())
  got, updated = jax.jit(run)(encoder.variables, pixels)
  close(got, in_chunks(net.train(), images))
  moved = encode.Encoder(
    card, encoder.variables | updated, encoder.apply, encoder.mesh
  )
  close(export.reference_state(moved), _floats(net))

  written = tmp_path / "encoder.safetensors"
  fresh = torch_twin.randomize(twin_of(config), seed=1)
  for format in ("torch_reference", "torch"):
    export.export(encoder, str(written), format)
    state = {k: torch.tensor(x) for k, x in pretrained.read(written).items()}
    if format == "torch_reference":
      fresh.load_state_dict(state, strict=True)
      check(fresh)
    else:
      backbone = torch_twin.ResNet((1, 1), CHANNELS).double()
      heads = ("feat_bn.", "gap.", "avg_pooling.", "local_pooling.")
      body = {k: x for k, x in state.items() if not k.startswith(heads)}
      backbone.load_state_dict(body, strict=True)
      maps = fresh.base if head == "neck" else fresh.CNN
      close(backbone.eval()(images).detach(), maps(images))


def _floats(net):
  state = net.state_dict().items()
  return {k: x for k, x in state if not k.endswith("num_batches_tracked")}


class Pair:
  """The train step, compiled, and the twin, both with the same state."""

  def __init__(self, name):
    changes, self.memory_of = METHODS[name]
    if name == "selective":
      changes = changes | {"encoder.num_stripes": 2, "encoder.stripe_dim": 32}
    config = config_of(name, **changes)
    parts = self.parts = make_parts(resolve(config, steps_per_epoch=5))
    self.net = twin_of(config).eval()
    state = first_state(parts, 64, weights="")
    arrays = {k: x.numpy() for k, x in self.net.state_dict().items()}
    variables = pretrained.from_torch(arrays, parts.module, state.variables)
    with torch.no_grad():
      features = self.net(to_torch(parts.card, SPLIT.images))
    copies = NamedSharding(parts.mesh, sharding.COPY)
    self.key = jax.device_put(jax.random.key(0), copies)
    given = jax.tree.map(lambda x: jnp.asarray(x.numpy()), features)
    if name == "spcl":
      given = {"features": given, "threshold": np.float32(0)}
    if name == "selective":
      given = {"features": given, "camids": SPLIT.camids}
    refresh = jax.jit(parts.method.refresh)
    self.labels = LABELS.copy()
    if name == "spcl":  # an outlier is a class of its own
      self.labels[LABELS < 0] = np.arange(8, 12)
    banks = refresh(state.method, self.labels, given, self.key)
    state = state.replace(method=banks, **variables)
    self.state = jax.device_put(state, copies)
    self.step = step.compile_step(parts, self.state, self.key)
    self.start_twin(name, features, banks)

  def start_twin(self, name, features, banks):
    arguments = [features, torch.from_numpy(self.labels).long()]
    if name == "hhcl, instances":
      arguments.append(torch.tensor(np.asarray(banks.hard)[:8]))
    if name == "selective":
      arguments = [features, torch.from_numpy(SPLIT.camids)]
    self.memory = self.memory_of(*arguments)
    self.net.train()
    trained = [p for p in self.net.parameters() if p.requires_grad]
    lr = float(np.float32(3.5e-4))  # a schedule is in single precision
    self.optimizer = torch.optim.Adam(trained, lr, weight_decay=5e-4)
    self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 10, 0.1)

  def run(self, rows):
    """One step of both; the two losses."""
    arrays = {"images": SPLIT.images, "camids": SPLIT.camids}
    arrays |= {"labels": self.labels}
    arrays |= {"indices": np.arange(64, dtype=np.int32)}
    batch = {
      k: sharding.put_rows(self.parts.mesh, x, rows) for k, x in arrays.items()
    }
    self.state, figures = self.step(self.state, batch, self.key)
    images = to_torch(self.parts.card, SPLIT.images[rows])
    ids = (torch.from_numpy(x[rows]) for x in (self.labels, SPLIT.camids))
    labels, camids = ids
    self.optimizer.zero_grad()
    features = in_chunks(self.net, images)
    loss = self.memory.step(features, torch.from_numpy(rows), labels.long(),
                            camids)  # fmt: skip
    self.optimizer.step()
    self.schedule.step()
    return float(figures["loss"]), loss.item()

  def named(self, tree):
    """Variables, or what is shaped like parameters, by the twin's names."""
    parts = self.parts
    encoder = encode.Encoder(parts.card, tree, parts.apply, parts.mesh)
    return export.reference_state(encoder)

  def check(self, tolerance):
    """Parameters and running statistics, Adam's moments, and the banks."""
    close(self.named(self.state.variables), _floats(self.net), tolerance)
    adam = self.state.opt_state[1]
    names = {p: name for name, p in self.net.named_parameters()}
    for ours, theirs in ((adam.mu, "exp_avg"), (adam.nu, "exp_avg_sq")):
      moments = self.optimizer.state.items()
      want = {names[p]: moment[theirs] for p, moment in moments}
      close(self.named({"params": ours}), want, tolerance)
    close(vars(self.state.method), self.memory.banks(), tolerance)


@pytest.fixture
def soon_compiled(monkeypatch, name):
  """One block for all methods but the first, and no weights drawn in vain."""
  if name != "cluster_contrast":
    monkeypatch.setitem(resnet._DEPTHS, 18, ((1,), False))

  def nan(module, card, key):
    shapes = build(card, "")[1]
    return jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan), shapes)

  monkeypatch.setattr("unreid_jax.state.draw", nan)


@pytest.mark.parametrize("name", METHODS)
def test_training(name, soon_compiled):
  """One step agrees in all there is, and twenty stay together.

  Adam's moments after the first step are the gradients with their decay. A
  batch has four images of a cluster, some of them twice where it is smaller.
  """
  rng = np.random.default_rng(0)
  with jax.set_mesh(sharding.make_mesh(1)):
    pair, losses = Pair(name), []
    for i in range(STEPS):
      classes = rng.permutation(pair.labels.max() + 1)[:4]
      images = [np.flatnonzero(pair.labels == c) for c in classes]
      rows = [rng.choice(x, 4, replace=len(x) < 4) for x in images]
      losses.append(pair.run(np.concatenate(rows)))
      if i == 0:
        pair.check(1e-10)
  ours, theirs = np.transpose(losses)
  assert_allclose(ours, theirs, 1e-7)
  assert len(set(np.round(ours, 3))) > 6  # it does learn something
  pair.check(1e-6)
