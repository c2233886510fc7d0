"""Normalisation and training augmentation, on the device, inside the step."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, UInt8, UInt32

from unreid_jax import UserError

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalise(images: UInt8[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
  """Pixels of 0..255 to zero mean and unit variance, by ImageNet's figures."""
  return (images / jnp.float32(255) - jnp.array(MEAN)) / jnp.array(STD)


def augment(
  key: Key[Array, ""] | UInt32[Array, "2"],
  images: UInt8[Array, "b h w 3"],
  *,
  flip: bool,
  pad: int,
  erase_probability: float,
  erase_fill: str,
) -> Float[Array, "b h w 3"]:
  """The training transform: flip, pad and crop, normalise, erase.

  Each image has a key of its own, so that an image does not depend on how the
  batch is spread over devices.

  Args:
    key: one key for the batch.
    images: pixels.
    flip: mirror every other image, left to right.
    pad: black pixels added on each side before a crop of the old size.
    erase_probability: of random erasing.
    erase_fill: "mean" writes ImageNet's mean into the already normalised image,
      as the references do; "zero" writes what a pixel of mean colour becomes.

  Raises:
    UserError: `erase_fill` is neither.

  Source: train transform of alibaba/cluster-contrast-reid; Zhong et al.,
  Random Erasing, arXiv 1708.04896.
  """
  fills = {"mean": MEAN, "zero": (0.0, 0.0, 0.0)}
  if erase_fill not in fills:
    raise UserError(
      f'augment.erase_fill is "{erase_fill}": set it to "mean" or "zero"'
    )

  def one(key, image):
    crop_key, erase_key = jax.random.split(key)
    return (
      _flip_and_crop(crop_key, image, flip, pad),
      erase_mask(erase_key, image.shape[:2], erase_probability),
    )

  keys = jax.random.split(key, len(images))
  images, erased = jax.vmap(one)(keys, images)
  fill = jnp.array(fills[erase_fill])
  return jnp.where(erased[..., None], fill, normalise(images))


def _flip_and_crop(
  key: Key[Array, ""] | UInt32[Array, "2"],
  image: UInt8[Array, "h w 3"],
  flip: bool,
  pad: int,
) -> UInt8[Array, "h w 3"]:
  flip_key, crop_key = jax.random.split(key)
  height, width, _ = image.shape
  top, left = jax.random.randint(crop_key, (2,), -pad, pad + 1)
  rows, columns = top + jnp.arange(height), left + jnp.arange(width)
  if flip:
    mirrored = jax.random.bernoulli(flip_key)
    columns = jnp.where(mirrored, width - 1 - columns, columns)
  # Negative indices would count from the end; the far ones are filled.
  rows, columns = (
    jnp.where(index < 0, size, index)
    for index, size in ((rows, height), (columns, width))
  )
  return image.at[rows[:, None], columns].get(mode="fill", fill_value=0)


def erase_mask(
  key: Key[Array, ""] | UInt32[Array, "2"],
  size: tuple[int, int],
  probability: float,
) -> Bool[Array, "h w"]:
  """The rectangle that random erasing hides in one image of `size` (h, w).

  Area uniform in 2-40 % of the image, height over width uniform in 0.3-3.33,
  drawn up to 100 times until it fits: here 100 at once, and the first that
  fits is taken, which is the same distribution.
  """
  fire_key, shape_key, place_key = jax.random.split(key, 3)
  area, aspect = jax.random.uniform(
    shape_key,
    (2, 100),
    minval=jnp.array([[0.02], [0.3]]),
    maxval=jnp.array([[0.4], [1 / 0.3]]),
  )
  area *= size[0] * size[1]
  sides = jnp.round(jnp.sqrt(jnp.stack([area * aspect, area / aspect])))
  fits = (sides < jnp.array(size)[:, None]).all(0)
  side = sides[:, jnp.argmax(fits)].astype(int)
  start = jax.random.randint(place_key, (2,), 0, jnp.array(size) - side + 1)
  inside = (
    (jnp.arange(n) >= begin) & (jnp.arange(n) < begin + length)
    for n, begin, length in zip(size, start, side, strict=True)
  )
  rows, columns = inside
  fires = jax.random.bernoulli(fire_key, probability) & fits.any()
  return fires & rows[:, None] & columns
