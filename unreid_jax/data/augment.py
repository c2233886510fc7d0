"""Normalisation and training augmentation, on the device, inside the step."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Key, UInt8, UInt32

from unreid_jax.values import CountOrZero, Fraction

Colour = tuple[float, float, float]
RandomKey = Key[Array, ""] | UInt32[Array, "2"]


def normalise(
  images: UInt8[Array, "b h w 3"], mean: Colour, std: Colour
) -> Float[Array, "b h w 3"]:
  """Pixels of 0..255, scaled to 0..1, less the mean, divided by `std`."""
  scaled = images.astype(jnp.float32) / 255
  return (scaled - jnp.float32([[[mean]]])) / jnp.float32([[[std]]])


def augment(
  key: RandomKey,
  images: UInt8[Array, "b h w 3"],
  *,
  flip: bool,
  pad: CountOrZero,
  erase_probability: Fraction,
  erase_fill: Literal["mean", "zero"],
  mean: Colour,
  std: Colour,
) -> Float[Array, "b h w 3"]:
  """The training transform: flip, pad and crop, normalise, erase.

  Each image gets a key of its own, so that the result does not depend on how
  the batch is spread over devices.

  Args:
    key: one key for the batch.
    images: pixels of 0..255.
    flip: whether to mirror an image left to right, with probability 1/2.
    pad: how many black pixels to add on each side, before a random crop of the
      old size.
    erase_probability: the probability of hiding a random rectangle.
    erase_fill: what the rectangle is filled with, after normalisation: "mean"
      is the mean colour, not normalised, as in the references; "zero" is what
      normalisation makes of the mean colour.
    mean, std: see `normalise`.

  Source: train transform of alibaba/cluster-contrast-reid; Zhong et al.,
  Random Erasing, arXiv 1708.04896.
  """

  def one(key, image):
    crop_key, erase_key = jax.random.split(key)
    mask = erase_mask(erase_key, image.shape[:2], erase_probability)
    return _flip_and_crop(crop_key, image, flip, pad), mask

  keys = jax.random.split(key, len(images))
  images, erased = jax.vmap(one)(keys, images)
  fill = jnp.float32([[[mean if erase_fill == "mean" else (0, 0, 0)]]])
  return jnp.where(erased[..., None], fill, normalise(images, mean, std))


def _flip_and_crop(key, image, flip, pad) -> UInt8[Array, "h w 3"]:
  flip_key, crop_key = jax.random.split(key)
  height, width, _ = image.shape
  top, left = jax.random.randint(crop_key, (2,), -pad, pad + 1, jnp.int32)
  rows, columns = top + _range(height), left + _range(width)
  if flip:
    mirrored = jax.random.bernoulli(flip_key)
    columns = jnp.where(mirrored, width - 1 - columns, columns)
  # Negative indices would count from the end; the far ones are filled.
  rows = jnp.where(rows < 0, height, rows)
  columns = jnp.where(columns < 0, width, columns)
  return image.at[rows[:, None], columns[None]].get(mode="fill", fill_value=0)


def erase_mask(
  key: RandomKey, size: tuple[int, int], probability: float
) -> Bool[Array, "h w"]:
  """The rectangle that random erasing hides in one image of `size` (h, w).

  Its area is uniform in 2 to 40 % of the image, its height over its width
  uniform in 0.3 to 3.33. The references draw up to 100 times until it fits;
  here 100 are drawn at once, and the first that fits is taken.
  """
  fire_key, shape_key, place_key = jax.random.split(key, 3)
  low, high = jnp.float32([[0.02], [0.3]]), jnp.float32([[0.4], [1 / 0.3]])
  shape = (2, 100)
  area, aspect = jax.random.uniform(shape_key, shape, jnp.float32, low, high)
  area *= size[0] * size[1]
  sides = jnp.round(jnp.sqrt(jnp.stack([area * aspect, area / aspect])))
  fits = (sides < jnp.float32(size)[:, None]).all(0)
  side = sides[:, jnp.argmax(fits)].astype(jnp.int32)
  stop = jnp.int32(size) - side + 1
  start = jax.random.randint(place_key, (2,), 0, stop, jnp.int32)
  rows, columns = (
    (_range(n) >= begin) & (_range(n) < begin + length)
    for n, begin, length in zip(size, start, side, strict=True)
  )
  fires = jax.random.bernoulli(fire_key, jnp.float32(probability)) & fits.any()
  return fires & rows[:, None] & columns[None]


def _range(size: int) -> Int32[Array, " size"]:
  return jnp.arange(size, dtype=jnp.int32)
