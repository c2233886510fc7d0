"""`python -m unreid_jax.data.synthetic OUT_DIR` writes the set."""

import sys

from unreid_jax.data import synthetic

if len(sys.argv) != 2:
  sys.exit("usage: python -m unreid_jax.data.synthetic OUT_DIR")
synthetic.write(synthetic.make(), sys.argv[1])
