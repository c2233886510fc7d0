"""Draws one pedestrian: tapered capsules in 3-D, projected and shaded."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Person(NamedTuple):
  """What stays the same from camera to camera; colours are RGB in 0..1."""

  build: float
  skin: np.ndarray
  hair: np.ndarray
  long_hair: bool
  top: np.ndarray
  band: np.ndarray
  pattern: str
  sleeves: bool
  bottom: np.ndarray
  legs: str
  shoes: np.ndarray
  bag: str
  bag_colour: np.ndarray
  hat: np.ndarray | None


class Part(NamedTuple):
  """A tapered capsule from `a` to `b`; a person is one unit tall."""

  a: tuple[float, float, float]
  b: tuple[float, float, float]
  radius_a: float
  radius_b: float
  colour: np.ndarray
  band: np.ndarray | None = None
  pattern: str = "plain"


def _limb(start, length, first, second):
  """Joints of a limb that hangs and swings by two angles in its y-z plane."""
  x, y, z = start
  mid = (x, y + length * np.cos(first), z + length * np.sin(first))
  end = (x, mid[1] + length * np.cos(second), mid[2] + length * np.sin(second))
  return mid, end


def _body(p: Person, phase: float, stride: float) -> list[Part]:
  """Parts of a walking person: x to the person's left, y down, z ahead."""
  parts, shirt = [], (p.top, p.band, p.pattern)
  for side in (-1, 1):
    swing = side * stride * np.sin(phase)
    hip = (side * 0.045 * p.build, 0.51, 0.0)
    bend = 0.9 * stride * max(0.0, side * np.sin(phase + 1.8))
    knee, ankle = _limb(hip, 0.215, swing, swing - bend)
    heel = (ankle[0], ankle[1] + 0.025, ankle[2] - 0.01)
    toe = (ankle[0] + side * 0.01, ankle[1] + 0.025, ankle[2] + 0.075)
    shank = p.bottom if p.legs == "trousers" else p.skin
    thigh = p.skin if p.legs == "skirt" else p.bottom
    if p.legs == "skirt":  # hides the thigh
      hip = knee
    wide = p.build * (1.12 if p.legs == "shorts" else 1.0)
    shoulder = (side * 0.118 * p.build, 0.215, 0.0)
    swing = -0.8 * swing - 0.05
    elbow, hand = _limb(shoulder, 0.155, swing, swing + 0.35)
    x, y, z = hand
    forearm = p.top if p.sleeves else p.skin
    parts += [
      Part(hip, knee, 0.058 * wide, 0.046 * wide, thigh),
      Part(knee, ankle, 0.042 * p.build, 0.030 * p.build, shank),
      Part(heel, toe, 0.028, 0.02, p.shoes),
      Part(shoulder, elbow, 0.041 * p.build, 0.034, p.top),
      Part(elbow, hand, 0.032, 0.024, forearm),
      Part(hand, (x, y + 0.02, z), 0.024, 0.02, p.skin),
    ]
    if p.bag == "hand" and side == 1:
      top, low = (x, y + 0.06, z), (x, y + 0.13, z)
      parts.append(Part(top, low, 0.05, 0.06, p.bag_colour))
    chest = (side * 0.062 * p.build, 0.225, 0.0)
    waist = (side * 0.042 * p.build, 0.50, 0.0)
    parts.append(Part(chest, waist, 0.06, 0.058 * p.build, *shirt))
  parts.append(Part((0, 0.225, 0), (0, 0.5, 0), 0.065, 0.06, *shirt))
  return parts + _head_and_extras(p)


def _head_and_extras(p: Person) -> list[Part]:
  parts = [
    Part((0, 0.15, -0.005), (0, 0.19, 0), 0.032, 0.034, p.skin),
    Part((0, 0.078, 0.016), (0, 0.112, 0.022), 0.048, 0.038, p.skin),
    Part((0, 0.058, -0.012), (0, 0.09, -0.018), 0.056, 0.05, p.hair),
  ]
  if p.long_hair:
    parts += [
      Part((0, 0.08, -0.04), (0, 0.22, -0.06), 0.052, 0.045, p.hair),
      Part((-0.045, 0.07, 0), (-0.055, 0.19, 0), 0.024, 0.018, p.hair),
      Part((0.045, 0.07, 0), (0.055, 0.19, 0), 0.024, 0.018, p.hair),
    ]
  if p.hat is not None:
    parts += [
      Part((-0.022, 0.034, 0.02), (0.022, 0.034, 0.02), 0.046, 0.046, p.hat),
      Part((0, 0.05, 0.03), (0, 0.055, 0.085), 0.036, 0.03, p.hat),
    ]
  colour = p.bag_colour
  if p.legs == "skirt":
    parts += [Part((0, 0.49, 0.01), (0, 0.655, 0.03), 0.085, 0.108, p.bottom)]
  if p.bag == "backpack":
    parts += [
      Part((0, 0.27, -0.1), (0, 0.40, -0.11), 0.085, 0.095, colour),
      Part((-0.07, 0.2, 0.08), (-0.07, 0.36, 0.09), 0.013, 0.013, colour),
      Part((0.07, 0.2, 0.08), (0.07, 0.36, 0.09), 0.013, 0.013, colour),
    ]
  if p.bag == "shoulder":
    parts += [
      Part((0.15, 0.46, -0.02), (0.15, 0.53, 0.02), 0.07, 0.075, colour),
      Part((-0.09, 0.2, 0.08), (0.13, 0.44, 0.09), 0.013, 0.013, colour),
      Part((-0.09, 0.2, -0.08), (0.13, 0.44, -0.09), 0.013, 0.013, colour),
    ]
  return parts


def draw(
  canvas: Float[np.ndarray, "h w 3"],
  person: Person,
  *,
  foot: tuple[float, float],
  height: float,
  heading: float,
  pitch: float,
  phase: float,
  stride: float,
  light: float,
) -> None:
  """Paints a person onto a canvas, RGB in 0..1, in place.

  Args:
    canvas: the image so far.
    person: who is painted.
    foot: x and y of the place where the person stands, in pixels.
    height: how tall the person is, in pixels.
    heading: where the person walks, in radians; 0: to the camera, pi: away.
    pitch: by how much the camera looks down, in radians.
    phase: how far the person is in the walking cycle, in radians.
    stride: the greatest angle of the legs, in radians.
    light: where the light comes from, -1 (the left) to 1 (the right).
  """
  rows, columns = np.ogrid[: canvas.shape[0], : canvas.shape[1]]
  away = ((columns - foot[0]) / (0.2 * height)) ** 2
  away = away + ((rows - foot[1]) / (0.045 * height)) ** 2
  canvas *= (1 - 0.45 * np.exp(-away)).astype(np.float32)[..., None]  # a shadow
  cos, sin = np.cos(heading), np.sin(heading)

  def project(point):
    x, y, z = point
    side, ahead = x * cos + z * sin, z * cos - x * sin
    up = (1 - y) * np.cos(pitch) - ahead * np.sin(pitch)
    near = ahead * np.cos(pitch) + (1 - y) * np.sin(pitch)
    return foot[0] + side * height, foot[1] - up * height, near

  def nearness(part):  # of the surface
    axis = (project(part.a)[2] + project(part.b)[2]) / 2
    return axis + max(part.radius_a, part.radius_b)

  for part in sorted(_body(person, phase, stride), key=nearness):
    a, b = project(part.a)[:2], project(part.b)[:2]
    capsule(
      canvas, a, b, part.radius_a * height, part.radius_b * height,
      part.colour, part.band, part.pattern, light,
    )  # fmt: skip


def capsule(
  canvas, a, b, radius_a, radius_b, colour, band=None, pattern="plain", light=0
) -> None:
  """Paints a shaded tapered capsule from a to b, given in pixels, in place."""
  a, b = np.float32(a), np.float32(b)
  reach = max(radius_a, radius_b) + 1
  low = np.maximum(np.floor(np.minimum(a, b) - reach), 0).astype(int)
  high = np.ceil(np.maximum(a, b) + reach).astype(int) + 1
  patch = canvas[low[1] : max(high[1], 0), low[0] : max(high[0], 0)]
  if not patch.size:
    return
  y, x = np.ogrid[: patch.shape[0], : patch.shape[1]]
  x = (x + (low[0] - a[0])).astype(np.float32)
  y = (y + (low[1] - a[1])).astype(np.float32)
  axis = b - a
  along = (x * axis[0] + y * axis[1]) / max(axis @ axis, np.float32(1e-6))
  t = np.clip(along, 0, 1)
  dx, dy = x - t * axis[0], y - t * axis[1]
  radius = np.float32(radius_a) + t * np.float32(radius_b - radius_a)
  alpha = np.clip(radius + 0.5 - np.sqrt(dx * dx + dy * dy), 0, 1)
  if pattern != "plain":
    colour = np.where(_marked(along, pattern)[..., None], band, colour)
  shade = 0.88 + 0.16 * (light * dx - 0.6 * dy) / radius
  patch += alpha[..., None] * (colour * shade[..., None] - patch)


def _marked(along, pattern: str):
  """Whether a shirt has its second colour, at each height of the trunk."""
  if pattern == "stripes":
    return np.floor(along * 7) % 2 == 1
  return (along < 0.3) if pattern == "yoke" else (abs(along - 0.45) < 0.17)
