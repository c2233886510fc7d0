"""Market-1501: Zheng et al., ICCV 2015."""

from unreid_jax.data.datasets import layout


class Market1501(layout.Builder):
  """Market-1501: 1,501 people under 6 cameras on a campus."""

  name = "market1501"
  FOLDER = "Market-1501-v15.09.15"
  SIZES = {"": (12_936, 3_368, 15_913)}  # noqa: RUF012
