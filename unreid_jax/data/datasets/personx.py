"""PersonX: Sun and Zheng, CVPR 2019."""

from unreid_jax.data.datasets import layout


class PersonX(layout.Builder):
  """PersonX: 1,266 rendered people; cameras have the numbers 3 to 12."""

  name = "personx"
  FOLDER = "PersonX"
  SIZES = {"": (9_840, 5_136, 30_816)}  # noqa: RUF012
