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
from PIL import Image

from unreid_jax import progress
from unreid_jax.data.images import Dataset, Split
from unreid_jax.data.synthetic import camera
from unreid_jax.data.synthetic.camera import BOTTOMS, TOPS, make_rng
from unreid_jax.data.synthetic.pedestrian import Person

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
  hairs = rng.permutation(np.float32(_HAIR))
  base = Person(
    build=rng.uniform(0.9, 1.1), skin=camera.pick_colour(rng, _SKIN),
    hair=hairs[0], long_hair=bool(rng.integers(2)),
    top=top, band=_contrast(rng, top), pattern=str(patterns[0]),
    sleeves=bool(rng.integers(2)), bottom=bottom, legs=legs,
    shoes=camera.pick_colour(rng, BOTTOMS), bag=str(bags[0]),
    bag_colour=_contrast(rng, top), hat=None,
  )  # fmt: skip
  hat, shoes = _contrast(rng, base.hair), _contrast(rng, bottom)
  second = base._replace(bag=str(bags[1]), hat=hat, shoes=shoes)
  pattern = str(patterns[3] if patterns[3] != "plain" else patterns[4])
  third = base._replace(pattern=pattern, hair=hairs[1])
  third = third._replace(long_hair=not base.long_hair)
  people = base, second, third
  return [p._replace(build=p.build * rng.uniform(0.93, 1.07)) for p in people]


def _groups(seed: int, *counts: int) -> list[list[Person]]:
  """Groups of people, of these sizes; no family is in two of them."""
  outfits = list(itertools.product(TOPS, BOTTOMS))
  order = itertools.cycle(make_rng(seed, 1).permutation(len(outfits)))
  rngs = (make_rng(seed, 2, number) for number in itertools.count())
  groups = []
  for count in counts:
    people = []
    while len(people) < count:
      people += _family(next(rngs), *outfits[next(order)])
    groups.append(people[:count])
  return groups


def _contrast(rng: np.random.Generator, colour):
  """A colour of the palette that is easily told from the given one."""
  far = [c for c in TOPS if np.abs(colour - np.asarray(c)).sum() > 0.7]
  return camera.pick_colour(rng, far)


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

  No family is in both the train and the test splits. Under each of two or more
  cameras, a test identity has one image in the query split, and a train or test
  identity has `images_per_camera` in the train split or the gallery. A
  distractor (pid 0) has one image in all, in the gallery. Only the given
  `splits` are drawn; the others are None.
  """
  cameras = camera.make_cameras(seed, num_cameras)
  sizes = num_train_ids, num_test_ids, max(num_distractors, 3)  # passers-by too
  train, test, strangers = _groups(seed, *sizes)
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
    return camera.shoot(key, frame, person, cameras[camid - 1], strangers)

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
