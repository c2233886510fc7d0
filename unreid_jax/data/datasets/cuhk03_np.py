"""CUHK03, new protocol: Li et al., CVPR 2014; Zhong et al., CVPR 2017."""

from unreid_jax.data.datasets import layout
from unreid_jax.data.images import File


class CUHK03NP(layout.Builder):
  """CUHK03-NP: 1,467 people under 2 cameras; boxes detected or labeled."""

  name = "cuhk03_np"
  SIZES = {  # noqa: RUF012
    "detected": (7_365, 1_400, 5_332),
    "labeled": (7_368, 1_400, 5_328),
  }

  @classmethod
  def find(cls, root: str, version: str) -> dict[str, list[File]]:
    """Takes the root as it is if no folder in it is named after a version."""
    folders = [f"cuhk03-np/{version}", version, "cuhk03-np"]
    folder = layout.locate(root, folders, "bounding_box_train")
    return layout.market_files(folder)
