"""One contract for every method, and for one that wraps another."""

import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KEY, gives, make_batch, make_split, step_of

from unreid_jax import UserError, memory, methods, relabel, sharding
from unreid_jax.state import shardings

NAMES = [module.name for module in pkgutil.iter_modules(methods.__path__)]
WRAPPED = [name for name in NAMES if methods.make(name).proxies is not None]
N, B = 200, 16
CAMIDS = np.arange(N, dtype=np.int32) % 4
PIDS = np.arange(N, dtype=np.int32) // 20


def wrap(base):
  """A toy wrapper: the features of the others in the batch are negatives."""

  def step(state, features, batch, key):
    unit = jax.lax.stop_gradient(memory.normalize(features))
    logits = features @ unit.T / base.proxies(state).temperature
    is_other = batch.labels[:, None] != batch.labels[None]
    logits = jnp.where(is_other, logits, -jnp.inf)
    return base.step(state, features, batch, key, negatives=logits)

  return base._replace(step=step)


def make(name):
  """The method, or a toy wrapper around it if the name says so."""
  name, _, variant = name.partition(" ")
  small = {"generator_width": 32} if name == "hngn" else {}
  small |= {"memory": "instances"} if variant == "instances" else {}
  method = methods.make(name, **small)
  return wrap(method) if variant == "wrapped" else method


ALL = NAMES + [f"{name} wrapped" for name in WRAPPED]


def test_who_can_be_wrapped():
  assert {"cluster_contrast", "hhcl", "supervised"} <= {*WRAPPED}
  assert not {"selective", "spcl", "dhcl_hnm", "hngn"} & {*WRAPPED}


def make_features(name, pids, seed):
  """Unit features of some people, as the method's encoder returns them."""
  rng, people = np.random.default_rng(seed), np.random.default_rng(99)
  name = name.partition(" ")[0]
  head = importlib.import_module(f"configs.{name}").get_config().encoder.head
  shapes = {"global": (32,), "local": (8, 4)}

  def draw(shape):
    centers = people.standard_normal((PIDS.max() + 1, *shape))[pids]
    raw = centers + 0.7 * rng.standard_normal(centers.shape)
    raw /= np.linalg.norm(raw, axis=-1, keepdims=True)
    return raw.astype(jax.dtypes.canonicalize_dtype(float))

  features = {name: draw(shape) for name, shape in shapes.items()}
  return features if head == "stripes" else features["global"]


def begin(name):
  """The method, its first state, features of all images, and their labels."""
  method, features = make(name), make_features(name, PIDS, 0)
  shapes = jax.eval_shape(lambda: features)
  state = jax.jit(lambda key: method.init(key, shapes))(KEY)
  labels = method.label(state, gives(features), make_split(CAMIDS, PIDS), 0)
  return method, state, labels


def draw_batch(seed, labels, step, epoch):
  """Images that have a label, as a sampler draws them."""
  rng = np.random.default_rng(seed)
  rows = rng.permutation(np.flatnonzero(labels >= 0))[:B]
  return make_batch(rows, labels[rows], CAMIDS[rows], step, epoch)


def run(name, num_devices, *more_labels):
  """Epochs of two steps; all that comes out, and the compiled step."""
  with jax.set_mesh(sharding.make_mesh(num_devices)):
    method, first, found = begin(name)
    assert found.values.max() > 0
    state, outs = first, []
    refresh, step = jax.jit(method.refresh), jax.jit(step_of(method))
    for epoch, labels in enumerate([found.values, *more_labels]):
      key = jax.random.fold_in(KEY, epoch)
      state = refresh(state, labels, found.given, key)
      for i in range(2):
        batch = draw_batch(i, labels, 2 * epoch + i, epoch)
        features = make_features(name, PIDS[batch.indices], 10 * epoch + i + 1)
        outcome = step(state, features, batch, KEY)
        state = outcome.state
        outs.append(jax.device_get(outcome._replace(state=None)))
    return step, first, state, outs


@pytest.mark.parametrize("name", ALL)
def test_one_device_equals_eight(float64, name):
  """Loss, figures, gradients and banks, where rounding is harmless."""
  labels = np.arange(N, dtype=np.int32) % 9
  runs = [run(name, num_devices, labels) for num_devices in (1, 8)]
  for one, eight in zip(*(jax.tree.leaves(x[2:]) for x in runs), strict=True):
    np.testing.assert_allclose(one, eight, 1e-9, 1e-12)
  split = [
    x
    for x in jax.tree.leaves(runs[1][2])
    if x.addressable_shards[0].data.size * 8 == x.size
  ]
  assert split, "no bank is split over the devices"


@pytest.mark.parametrize("name", [*ALL, "hhcl instances"])
def test_no_device_gets_all_features(name, collective_sizes):
  """Reads the compiled refresh: what moves is one device's share at most."""
  mesh = sharding.make_mesh(8)
  with jax.set_mesh(mesh):
    method, state, found = begin(name)
    refresh = relabel.make_refresh(method, shardings(mesh, state))
    given = relabel.split_rows(mesh, found.given, N)
    refresh = refresh.lower(state, found.values, given, KEY)
    sizes = collective_sizes(refresh.compile().as_text())
  assert max(sizes, default=0) <= memory.capacity(N) // 8 * 32, sizes


@pytest.mark.parametrize("name", ALL)
def test_the_step(name):
  """It compiles once, keeps the state's arrays, and teaches the features.

  Finite, also with all images outliers but one cluster.
  """
  one_cluster = np.full(N, -1, np.int32)
  one_cluster[:30] = 0
  step, first, last, outs = run(name, 8, one_cluster)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(outs))
  assert step._cache_size() == 1
  for slope in jax.tree.leaves(outs[0].slope):
    assert np.abs(slope).max() > 0
  for a, b in zip(*map(jax.tree.leaves, (first, last)), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
  assert all(x.shape == () for x in jax.tree.leaves(outs[0].figures))


@pytest.mark.parametrize("name", ALL)
def test_what_is_written_is_a_constant(name):
  """The state after the step has no slope in the features."""
  method, state, found = begin(name)
  state = jax.jit(method.refresh)(state, found.values, found.given, KEY)
  batch = draw_batch(0, found.values, 0, 0)
  features = make_features(name, PIDS[batch.indices], 1)

  @jax.jit
  @jax.grad
  def slope(features):
    after = jax.tree.leaves(method.step(state, features, batch, KEY)[1][0])
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return sum(jnp.sum(x**2) for x in after if is_float(x))

  assert not any(np.any(x) for x in jax.tree.leaves(slope(features)))


@pytest.mark.parametrize("name", WRAPPED)
def test_negatives_add_what_the_method_says(name):
  """The loss without them plus `loss_negatives`; the bank is the same."""
  plain, wrapped = (run(x, 1)[2:] for x in (name, f"{name} wrapped"))
  for a, b in zip(plain[1], wrapped[1], strict=True):
    added = b.figures["loss_negatives"]
    assert added > 0
    np.testing.assert_allclose(a.loss + added, b.loss, 1e-5)
  for a, b in zip(
    *(jax.tree.leaves(x[0]) for x in (plain, wrapped)), strict=True
  ):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", sorted({*NAMES} - {"supervised"}))
def test_labels_do_not_depend_on_identities(name):
  with jax.set_mesh(sharding.make_mesh(8)):
    method, state, one = begin(name)
    encode = gives(make_features(name, PIDS, 0))
    two = method.label(state, encode, make_split(CAMIDS, PIDS * 0), 0)
  np.testing.assert_array_equal(one.values, two.values)
  assert one.values.shape == (N,) and one.values.dtype == np.int32


def test_unknown_names():
  with pytest.raises(UserError, match=r"name is .selectiv.: set it to"):
    methods.make("selectiv")
  with pytest.raises(UserError, match="lambda_x is unknown here; there are: "):
    methods.make("selective", lambda_x=1)
