"""Pictures of people, as they stand in the page itself."""

import base64
import io
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from unreid_jax.data import Split

_SIZE = 96, 160  # pixels, width and height at most
# What a mark means is drawn, written and read out.
MARKS = {
  "query": "query",
  "right": "✓ right",
  "wrong": "✗ wrong",
  "junk": "· not counted",
  "": "",
}


class Crop(NamedTuple):
  """A picture with what is written under it."""

  source: str  # a data URL
  text: str
  mark: str = ""  # a key of `MARKS`


class Row(NamedTuple):
  """Pictures that belong together."""

  title: str
  crops: list[Crop]


def picture(pixels: UInt8[np.ndarray, "h w 3"]) -> str:
  """A thumbnail in WebP, as a data URL of about 2 kB."""
  image = Image.fromarray(pixels)
  image.thumbnail(_SIZE)
  file = io.BytesIO()
  image.save(file, "WEBP", quality=80)
  return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def crop(
  split: Split, i: int | np.integer, mark: str = "", text: str = ""
) -> Crop:
  """An image of a split, by default with its person and camera."""
  pid, camid = split.pids[i], split.camids[i]
  who = {0: "stranger", -1: ""}.get(int(pid), f"person {pid}")
  text = text or ", ".join(filter(None, (who, f"camera {camid}")))
  return Crop(picture(np.asarray(split.images[i])), text, mark)
