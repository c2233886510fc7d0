"""Cameras of the synthetic set, each with a scene, an optic and a sensor."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, UInt8
from scipy import ndimage

from unreid_jax.data.synthetic import pedestrian

HEIGHT, WIDTH = 128, 64

TOPS = (
  (0.70, 0.10, 0.10), (0.12, 0.28, 0.68), (0.12, 0.45, 0.18),
  (0.88, 0.74, 0.14), (0.92, 0.92, 0.90), (0.09, 0.09, 0.11),
  (0.50, 0.50, 0.52), (0.90, 0.42, 0.08), (0.44, 0.16, 0.55),
  (0.92, 0.52, 0.64), (0.08, 0.52, 0.52), (0.42, 0.27, 0.15),
)  # fmt: skip
BOTTOMS = (
  (0.08, 0.08, 0.10), (0.18, 0.26, 0.46), (0.66, 0.57, 0.40),
  (0.42, 0.42, 0.44), (0.86, 0.86, 0.84), (0.40, 0.10, 0.14),
)  # fmt: skip


class Camera(NamedTuple):
  """What stays the same from person to person."""

  scene: Float[np.ndarray, "scene_h scene_w 3"]  # RGB in 0..1
  gains: Float[np.ndarray, " 3"]  # exposure, with a colour cast
  gamma: float
  blur: float  # pixels, one standard deviation
  scale: float  # a person's height over the image's
  pitch: float  # radians by which it looks down
  heading: float  # radians, the direction of most people; 0: towards it
  light: float  # -1: from the left, 1: from the right


def make_rng(*key: int) -> np.random.Generator:
  """Random numbers that depend on nothing but the key."""
  return np.random.Generator(np.random.PCG64(key))


def pick_colour(
  rng: np.random.Generator, colours: Sequence, jitter: float = 0.04
) -> Float32[np.ndarray, "3"]:
  """A random one of the colours, each channel changed by up to `jitter`."""
  colour = np.asarray(colours[rng.integers(len(colours))], np.float32)
  shift = rng.uniform(-jitter, jitter, 3).astype(np.float32)
  return np.clip(colour + shift, 0, 1)


def make_cameras(seed: int, count: int) -> list[Camera]:
  """Cameras whose casts, exposures, blurs, scales and pitches all differ."""
  rng = make_rng(seed, 0)
  spread = [rng.permutation(count) / max(count - 1, 1) for _ in range(5)]
  turns = rng.permutation(count)[:, None] / count + np.arange(3) / 3
  exposure = 0.87 * 1.25 ** spread[0]
  gains = exposure[:, None] * (1 + 0.05 * np.cos(2 * np.pi * turns))
  return [
    Camera(
      scene=_scene(rng),
      gains=gains[i].astype(np.float32),
      gamma=0.93 + 0.14 * spread[1][i],
      blur=0.3 + 0.5 * spread[2][i],
      scale=0.8 + 0.12 * spread[3][i],
      pitch=0.05 + 0.3 * spread[4][i],
      heading=2 * np.pi * (i + rng.uniform()) / count,
      light=rng.uniform(-1, 1),
    )
    for i in range(count)
  ]


def _scene(rng: np.random.Generator) -> Float[np.ndarray, "scene_h scene_w 3"]:
  """A wall above a ground, four crops wide, with doors and posts."""
  height, width = HEIGHT + 32, 4 * WIDTH
  horizon = int(rng.integers(45, 90))
  y, x = np.mgrid[:height, :width].astype(np.float32)
  wall = pick_colour(rng, TOPS + BOTTOMS, 0.1)
  ground = pick_colour(rng, BOTTOMS, 0.1)
  scene = np.where(y[..., None] < horizon, wall, ground) * 0.6 + 0.2
  # Bricks or panels on the wall, tiles that shrink with distance below it.
  bricks = rng.integers(6, 28, 2)
  lines = (y % bricks[0] < 1.5) | ((x + y // bricks[0] * 9) % bricks[1] < 1.5)
  depth = np.maximum(y - horizon, 1)
  tiles = (np.floor(700 / depth) + np.floor((x - width / 2) * 9 / depth)) % 2
  amount = rng.uniform(-0.16, 0.16, 2).astype(np.float32)
  texture = np.where(y < horizon, lines * amount[0], tiles * amount[1])
  scene += texture[..., None]
  for _ in range(int(rng.integers(4, 9))):
    left, top = int(rng.integers(width)), int(rng.integers(horizon - 30))
    right, low = left + int(rng.integers(6, 45)), horizon - int(rng.integers(9))
    scene[top:low, left:right] = pick_colour(rng, TOPS + BOTTOMS) * 0.8
    scene[top + 2 : low - 2, left + 2 : right - 2] *= rng.uniform(0.5, 0.9)
  grey = scene.mean(-1, keepdims=True)
  scene += 0.75 * (grey - scene)
  clouds = rng.random((height, width, 1), np.float32) - 0.5
  clouds = 14 * ndimage.gaussian_filter(clouds, (9, 9, 0))
  grain = 0.12 * (rng.random((height, width, 1), np.float32) - 0.5)
  return np.clip(scene + 0.3 * clouds + grain, 0, 1).astype(np.float32)


def shoot(
  key: tuple[int, ...],
  frame: int,
  person: pedestrian.Person,
  camera: Camera,
  strangers: list[pedestrian.Person],
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
  return _expose(rng, canvas, camera)


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


def _expose(rng: np.random.Generator, canvas, camera: Camera):
  """The canvas as the camera sees it: blur, gains, gamma, noise, 8 bits."""
  sigma = camera.blur * rng.uniform(0.8, 1.3)
  canvas = ndimage.gaussian_filter(canvas, (sigma, sigma, 0))
  gains = camera.gains * np.float32(rng.uniform(0.9, 1.1))
  image = gains * np.clip(canvas, 0, 1) ** np.float32(camera.gamma)
  image += 0.05 * (rng.random(image.shape, np.float32) - 0.5)
  return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)
