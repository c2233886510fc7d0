"""What a vision transformer keeps for its gradient, with and without remat.

  python benchmarks/remat.py [--arch=clip_vit_base] [--batch=256]

Counts the bytes of the arrays that the forward pass hands to the backward pass,
without the parameters. Nothing is computed, so that any machine gives the same
figures. What a device needs at its peak is more.
"""

import argparse
import itertools
import pathlib
import sys

import jax
import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from unreid_jax.models import backbones


def num_bytes(tree) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def kept(arch: str, batch: int, **options) -> int:
  """The bytes between the two passes of a batch of 256x128 pixels."""
  backbone = backbones.archs()[arch](drop_path=0.1, **options)
  images = jax.ShapeDtypeStruct((batch, 256, 128, 3), jnp.float32)
  key = jax.random.key(0)
  init = lambda key, images: backbone.init(key, images, False)
  variables = jax.eval_shape(init, key, images)

  def backward(variables, images):
    forward = lambda variables: backbone.apply(
      variables, images, True, rngs={"drop_path": key}
    )
    return jax.vjp(forward, variables)[1]

  residuals = jax.eval_shape(backward, variables, images)
  return num_bytes(residuals) - num_bytes(variables)


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--arch", default="clip_vit_base")
  parser.add_argument("--batch", type=int, default=256)
  flags = parser.parse_args()
  for dtype, remat in itertools.product(("float32", "bfloat16"), (False, True)):
    size = kept(flags.arch, flags.batch, dtype=dtype, remat=remat)
    print(f"{dtype:<9} remat={remat!s:<6} {size / 2**30:6.2f} GiB")


if __name__ == "__main__":
  main()
