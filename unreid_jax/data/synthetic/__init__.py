"""Procedural pedestrians: a small re-ID set drawn from a seed, no download.

It is hard in the ways of the real sets. Each camera has a colour cast, an
exposure, a blur, a scale, a pitch and a scene of its own. Pose, heading, crop
and occluders change from image to image. The people come in families of three,
who wear the same but for a few details: one has another bag, hat and shoes,
one has other hair and another pattern.

`python -m unreid_jax.data.synthetic OUT_DIR` writes it in Market-1501 layout.
"""

import itertools
import pathlib
from collections.abc import Collection

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from unreid_jax import progress
from unreid_jax.data.images import Dataset, Split
from unreid_jax.data.synthetic import pedestrian
from unreid_jax.data.synthetic.camera import (
  BOTTOMS,
  HEIGHT,
  TOPS,
  WIDTH,
  Camera,
  expose,
  make_cameras,
  make_rng,
  pick_colour,
)
from unreid_jax.data.synthetic.pedestrian import Person

FAMILY = 3

_HAIR = (
  (0.06, 0.05, 0.05), (0.28, 0.16, 0.08), (0.85, 0.70, 0.36),
  (0.55, 0.20, 0.08), (0.68, 0.68, 0.68),
)  # fmt: skip
_SKIN = (
  (0.94, 0.76, 0.64), (0.84, 0.62, 0.47), (0.66, 0.44, 0.30), (0.40, 0.26, 0.18)
)  # fmt: skip


def _family(rng: np.random.Generator, top, bottom) -> list[Person]:
  """One person, and two who differ from that one in a few details."""
  legs = ("trousers", "trousers", "shorts", "skirt")[rng.integers(4)]
  bags = rng.permutation(["none", "backpack", "shoulder", "hand"])
  patterns = rng.permutation(["plain", "plain", "band", "stripes", "yoke"])
  hairs = rng.permutation(len(_HAIR))
  base = Person(
    build=rng.uniform(0.9, 1.1),
    skin=pick_colour(rng, _SKIN),
    hair=np.asarray(_HAIR[hairs[0]], np.float32),
    long_hair=bool(rng.integers(2)),
    top=top,
    band=_contrast(rng, top),
    pattern=str(patterns[0]),
    sleeves=bool(rng.integers(2)),
    bottom=bottom,
    legs=legs,
    shoes=pick_colour(rng, BOTTOMS),
    bag=str(bags[0]),
    bag_colour=_contrast(rng, top),
    hat=None,
  )
  other = patterns[3] if patterns[3] != "plain" else patterns[4]
  own = [
    {
      "bag": str(bags[1]),
      "hat": _contrast(rng, base.hair),
      "shoes": _contrast(rng, bottom),
    },
    {
      "pattern": str(other),
      "hair": np.asarray(_HAIR[hairs[1]], np.float32),
      "long_hair": not base.long_hair,
    },
  ]
  people = [base] + [base._replace(**detail) for detail in own]
  return [p._replace(build=p.build * rng.uniform(0.93, 1.07)) for p in people]


def _groups(seed: int, *counts: int) -> list[list[Person]]:
  """Groups of people, of these sizes; no family is in two of them."""
  outfits = list(itertools.product(TOPS, BOTTOMS))
  order = itertools.cycle(make_rng(seed, 1).permutation(len(outfits)))
  families = (
    _family(make_rng(seed, 2, number), *outfits[i])
    for number, i in enumerate(order)
  )
  groups = (itertools.islice(families, -(-n // FAMILY)) for n in counts)
  return [
    [*itertools.chain(*group)][:count]
    for group, count in zip(groups, counts, strict=True)
  ]


def _contrast(rng: np.random.Generator, colour):
  """A colour of the palette that is easily told from the given one."""
  far = [c for c in TOPS if np.abs(colour - np.asarray(c)).sum() > 0.7]
  return pick_colour(rng, far)


def _shoot(
  key: tuple[int, ...],
  frame: int,
  person: Person,
  camera: Camera,
  strangers: list[Person],
) -> UInt8[np.ndarray, "h w 3"]:
  """One crop: scene, passers-by, the person, an occluder, the sensor."""
  rng = make_rng(*key)  # one place and one way for all frames of a track
  place = rng.uniform(0, 3 * WIDTH)
  heading = camera.heading + rng.uniform(-1.2, 1.2)
  rng = make_rng(*key, frame)
  x = int(np.clip(place + rng.uniform(-24, 24), 0, 3 * WIDTH))
  y = int(rng.integers(32))
  canvas = camera.scene[y : y + HEIGHT, x : x + WIDTH].copy()
  height = HEIGHT * camera.scale * rng.uniform(0.93, 1.1)
  foot_y = HEIGHT * (0.5 + 0.5 * camera.scale) + rng.uniform(-7, 7)

  def walk(who, foot_x, turn, size):
    pedestrian.draw(
      canvas, who, foot=(foot_x, foot_y + 30 * (size - 1)),
      height=height * size, heading=turn, pitch=camera.pitch,
      phase=rng.uniform(0, 2 * np.pi), stride=rng.uniform(0.12, 0.5),
      light=camera.light,
    )  # fmt: skip

  def stranger(size):
    edge = rng.choice([-1, 1]) * rng.uniform(0.42, 0.6)
    who = strangers[rng.integers(len(strangers))]
    walk(who, WIDTH * (0.5 + edge), rng.uniform(0, 2 * np.pi), size)

  if rng.random() < 0.15:
    stranger(rng.uniform(0.7, 0.9))
  turn = heading + rng.uniform(-0.7, 0.7)
  walk(person, WIDTH / 2 + rng.uniform(-6, 6), turn, 1.0)
  chance = rng.random()
  if chance < 0.06:
    stranger(rng.uniform(1.05, 1.2))
  elif chance < 0.2:
    _occlude(rng, canvas)
  return expose(rng, canvas, camera)


def _occlude(rng: np.random.Generator, canvas) -> None:
  """A post, the edge of a car, or a bin in front of the person."""
  colour, x = pick_colour(rng, TOPS), rng.uniform(0, WIDTH)
  kind = rng.integers(3)
  if kind == 0:
    pedestrian.capsule(canvas, (x, -9), (x, HEIGHT + 9), 3.5, 4.5, colour * 0.7)
  elif kind == 1:
    left = x - WIDTH if x < WIDTH / 2 else x
    pedestrian.capsule(canvas, (left, 112), (left + WIDTH, 112), 17, 17, colour)
  else:
    pedestrian.capsule(canvas, (x, 100), (x, 135), 12, 10, colour * 0.6)


def make(
  seed: int = 0,
  *,
  splits: Collection[str] = Dataset._fields,
  num_train_ids: int = 90,
  num_test_ids: int = 40,
  num_distractors: int = 40,
  num_cameras: int = 4,
  images_per_camera: int = 3,
) -> Dataset:
  """Draws the set, 128 x 64 pixels; the same arguments draw the same set.

  No family is in both the train and the test splits. Under each camera, a test
  identity has one image in the query split, and a train or test identity has
  `images_per_camera` in the train split or the gallery. A distractor (pid 0)
  has one image in all, in the gallery.

  Args:
    seed: the random seed of people, cameras and poses.
    splits: the splits to draw; the others are None.
    num_train_ids: the number of identities in the train split.
    num_test_ids: the number of identities in the query split and the gallery.
    num_distractors: the number of people in the gallery who match no query.
    num_cameras: the number of cameras, 2 or more.
    images_per_camera: see above.
  """
  cameras = make_cameras(seed, num_cameras)
  train, test, strangers = _groups(
    seed, num_train_ids, num_test_ids, max(num_distractors, FAMILY)
  )
  camids, frames = range(1, num_cameras + 1), range(1, images_per_camera + 1)
  test_pids = range(num_train_ids + 1, num_train_ids + num_test_ids + 1)
  shots = {
    "train": itertools.product(range(1, num_train_ids + 1), camids, frames),
    "query": itertools.product(test_pids, camids, [0]),
    "gallery": itertools.chain(
      sorted((0, 1 + i % num_cameras, i) for i in range(num_distractors)),
      itertools.product(test_pids, camids, frames),
    ),
  }
  people = train + test

  def shoot(pid, camid, frame):
    person = people[pid - 1] if pid else strangers[frame]
    key = (seed, 3, pid, camid)
    return _shoot(key, frame, person, cameras[camid - 1], strangers)

  def draw(split):
    keys = list(shots[split])
    images = [shoot(*key) for key in progress.track(keys, f"draw {split}")]
    pids, camids, _ = np.asarray(keys, np.int32).T
    names = (f"{p:04d}_c{c}s1_{f:06d}_00.jpg" for p, c, f in keys)
    return Split(np.stack(images), pids, camids, tuple(names))

  return Dataset(*(draw(x) if x in splits else None for x in Dataset._fields))


def write(dataset: Dataset, out_dir: str) -> None:
  """Writes all three splits as JPEGs in Market-1501 layout."""
  folders = ("bounding_box_train", "query", "bounding_box_test")
  for folder, split in zip(folders, dataset, strict=True):
    path = pathlib.Path(out_dir, folder)
    path.mkdir(parents=True, exist_ok=True)
    for image, name in zip(split.images, split.names, strict=True):
      Image.fromarray(image).save(path / name, quality=95, subsampling=0)
