"""Which images make up which step: pure functions of the seed and the epoch."""

import numpy as np
from jaxtyping import Int

from unreid_jax import UserError


def shuffled(
  num_images: int, batch_size: int, seed: int, epoch: int
) -> Int[np.ndarray, "steps b"]:
  """Every image once an epoch, in an order of its own.

  The images of the last, incomplete batch are left out; they are others in
  each epoch.

  Raises:
    UserError: fewer images than a batch.
  """
  steps = num_images // batch_size
  if not steps:
    raise UserError(
      f"{num_images} train images are fewer than batch_size={batch_size}: "
      "lower batch_size"
    )
  order = np.random.default_rng((seed, epoch)).permutation(num_images)
  return order[: steps * batch_size].reshape(steps, batch_size)
