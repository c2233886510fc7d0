"""DukeMTMC-reID: Ristani et al., ECCVW 2016; Zheng et al., ICCV 2017."""

from unreid_jax.data.datasets import layout


class DukeMTMCReID(layout.Builder):
  """DukeMTMC-reID: 1,404 people under 8 cameras; withdrawn in 2019."""

  name = "dukemtmc"
  FOLDER = "DukeMTMC-reID"
  SIZES = {"": (16_522, 2_228, 17_661)}  # noqa: RUF012
  NOTE = (
    "its authors withdrew this set, since the people in it had not consented: "
    "do not pass it on, and report results on another one"
  )
