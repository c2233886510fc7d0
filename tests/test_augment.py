"""The device-side transforms against goldens and their slow, obvious twins."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from unreid_jax import sharding
from unreid_jax.data import augment
from unreid_jax.models.backbones.resnet import MEAN, STD

SIZE = (64, 32)
OFF = {"flip": False, "pad": 0, "erase_probability": 0.0, "erase_fill": "mean"}
OFF |= {"mean": MEAN, "std": STD}


@pytest.fixture
def images():
  rng = np.random.default_rng(0)
  return jnp.array(rng.integers(1, 256, (48, *SIZE, 3)), np.uint8)


def run(images, **changes):
  apply = jax.jit(functools.partial(augment.augment, **(OFF | changes)))
  return np.asarray(apply(jax.random.key(3), images))


def test_nothing_on_is_the_test_transform(images):
  assert np.allclose(
    run(images), augment.normalise(images, MEAN, STD), atol=1e-6
  )


def test_crops_come_from_the_flipped_and_padded_image(images):
  seen = set()
  for image, result in zip(images, run(images, flip=True, pad=3), strict=True):
    result = np.round((result * STD + MEAN) * 255)
    padded = {
      turn: np.pad(image[:, ::turn], ((3, 3), (3, 3), (0, 0)))
      for turn in (1, -1)
    }
    candidates = {
      (turn, top, left): padded[turn][
        top : top + SIZE[0], left : left + SIZE[1]
      ]
      for turn in (1, -1)
      for top in range(7)
      for left in range(7)
    }
    found = [
      place
      for place, crop in candidates.items()
      if np.array_equal(crop, result)
    ]
    assert len(found) == 1
    seen.add(found[0])
  turns, tops, lefts = map(set, zip(*seen, strict=True))
  assert turns == {1, -1}
  assert tops == lefts == set(range(7))


@pytest.mark.parametrize(
  ("fill", "value"), [("mean", MEAN), ("zero", (0.0, 0.0, 0.0))]
)
def test_erasing_writes_into_the_normalised_image(images, fill, value):
  result = run(images, erase_probability=1.0, erase_fill=fill)
  changed = (abs(result - augment.normalise(images, MEAN, STD)) > 1e-5).any(-1)
  assert (result[changed] == np.float32(value)).all()
  for mask in changed:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    assert mask.sum() == len(rows) * len(columns) > 0
    assert np.ptp(rows) == len(rows) - 1 and np.ptp(columns) == len(columns) - 1


def reference_rectangles(rng, count):
  """Height, width, top and left of random erasing, drawn one by one."""
  found = []
  while len(found) < count:
    area = rng.uniform(0.02, 0.4) * SIZE[0] * SIZE[1]
    aspect = rng.uniform(0.3, 1 / 0.3)
    h, w = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
    if h < SIZE[0] and w < SIZE[1]:
      top, left = rng.integers(SIZE[0] - h + 1), rng.integers(SIZE[1] - w + 1)
      found.append((h, w, top, left))
  return np.array(found)


def rectangles(masks):
  rows, columns = masks.any(2), masks.any(1)
  return np.stack(
    [rows.sum(1), columns.sum(1), rows.argmax(1), columns.argmax(1)], 1
  )


def test_erased_rectangles_have_the_references_distribution(golden):
  keys = jax.random.split(jax.random.key(0), 10_000)
  erase = functools.partial(augment.erase_mask, size=SIZE, probability=0.5)
  masks = np.asarray(jax.jit(jax.vmap(erase))(keys))
  fired = masks.any((1, 2))
  drawn = rectangles(masks[fired])
  share = masks[fired].mean((1, 2))
  aspect = drawn[:, 0] / drawn[:, 1]
  ours = [fired.mean(), share.mean(), share.min(), share.max()]
  ours += [aspect.min(), aspect.max()]
  # The golden has 2,000 draws: its extremes lie a little inside of ours.
  tolerance = [0.03, 0.008, 0.003, 0.012, 0.03, 0.3]
  assert (
    abs(np.array(ours) - golden("transforms")["erase_stats_f64"]) < tolerance
  ).all()
  slow = reference_rectangles(np.random.default_rng(1), 5_000)
  for quantile in (0.1, 0.5, 0.9):
    expected = np.quantile(slow, quantile, axis=0)
    assert np.allclose(np.quantile(drawn, quantile, axis=0), expected, atol=1.5)


def test_an_image_does_not_depend_on_the_devices(images):
  rows = NamedSharding(sharding.make_mesh(8), sharding.ROWS)
  options = OFF | {"flip": True, "pad": 4, "erase_probability": 0.5}
  apply = jax.jit(functools.partial(augment.augment, **options))
  key = jax.random.key(7)
  one, eight = apply(key, images), apply(key, jax.device_put(images, rows))
  assert len(eight.sharding.device_set) == 8
  assert np.array_equal(one, eight)
