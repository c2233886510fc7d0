"""Eight virtual CPU devices and JAX at its strictest, in all tests."""

import os
import pathlib
import re
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),  # such as --xla_cpu_max_isa=AVX2
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",  # compiles in half the time
  ]
)
# Many tests compile the same step, and several processes share it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  compiled = tempfile.TemporaryDirectory(prefix="unreid_jax")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax
import jaxtyping
import numpy as np
import pytest
from PIL import Image

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jaxtyping.install_import_hook("unreid_jax", "beartype.beartype")


@pytest.fixture(scope="session")
def make_encoder():
  """`models.make` with the default config's values but for the changes."""
  from configs import default
  from unreid_jax import models

  options = dict(default.get_config("selective", "synthetic").encoder)
  del options["pretrained"]
  return lambda **changes: models.make(**options | changes)


@pytest.fixture
def two_blocks(monkeypatch):
  """A ResNet-18 of two stages of one block each, which compiles soon."""
  from unreid_jax.models.backbones import resnet

  monkeypatch.setitem(resnet._DEPTHS, 18, ((1, 1), False))


@pytest.fixture
def golden():
  """Loads tests/goldens/NAME.npz, made by running the references' code."""
  folder = pathlib.Path(__file__).parent / "goldens"
  return lambda name: np.load(folder / f"{name}.npz")


@pytest.fixture
def collective_sizes():
  """Reads a compiled program: how many elements each collective moves."""
  kinds = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"

  def read(text):
    lines = re.findall(rf"= (.*?) (?:{kinds})(?:-start)?\(", text)
    arrays = re.findall(r"[a-z]+\d*\[([\d,]*)\]", " ".join(lines))
    return [np.prod([int(n) for n in x.split(",") if n]) for x in arrays]

  return read


@pytest.fixture
def float64():
  """Double precision, in which no rounding turns the sign of a ReLU's input.

  What differs in it between two numbers of devices differs for a reason.
  """
  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
    yield


def pytest_collection_modifyitems(items):
  """The longest tests first, so that no process ends up with them alone."""
  items.sort(key=lambda item: item.path.stem != "test_train")


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
  """A folder of 40 images in which there is nothing to see."""
  folder = tmp_path_factory.mktemp("crops")
  rng = np.random.default_rng(0)
  for i in range(40):
    pixels = rng.integers(0, 256, (32, 16, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"{i}.png")
  return folder
