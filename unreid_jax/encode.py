"""Images to features, by an encoder and its weights; no training, no method."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float, PyTree
from PIL import Image

from unreid_jax import UserError, progress, sharding, values, verification
from unreid_jax.card import Card, build, draw, make_apply
from unreid_jax.data.images import Sized
from unreid_jax.models import pretrained
from unreid_jax.workdir import checkpoints, read_json

CARD = "unreid_jax"  # the card's name in the metadata of a .safetensors
# A path, Pillow's, or uint8 [h, w, 3].
ImageLike = str | os.PathLike | Image.Image | np.ndarray | jax.Array


def load_encoder(
  path: str | os.PathLike, card: Card | None = None
) -> "Encoder":
  """Opens a trained encoder, without its data, its method or an optimizer.

  Args:
    path: a workdir, whose last checkpoint is taken; its checkpoints/best; one
      checkpoint in there; or a file of PyTorch weights, see `pretrained`.
    card: what builds the encoder of such a file. A file that `export` wrote
      has its own.

  Raises:
    UserError: there is no checkpoint, or one of an earlier version; or the
      file has no weights, or those of another encoder.
  """
  mesh = jax.sharding.get_mesh()
  mesh = mesh if mesh.axis_names == (sharding.AXIS,) else sharding.make_mesh()
  copies = NamedSharding(mesh, sharding.COPY)
  path = values.expand(path, "the path")
  if path.is_file():
    card, module, variables = _open_weights(path, card)
    variables = jax.device_put(variables, copies)
  else:
    card, module, variables = _open_checkpoint(path, copies)
  return Encoder(card, variables, make_apply(module, card, mesh), mesh)


def _open_checkpoint(path, copies):
  found = checkpoints.find(path)
  card = checkpoints.read_card(found)
  module, shapes = build(card, f"{found}/card")
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=copies), shapes
  )
  return card, module, checkpoints.read_encoder(found, like)


def _open_weights(path, card):
  """What a file lacks, such as a head of ImageNet weights, is drawn."""
  make = "make one by unreid_jax.state.make_card(config)"
  if stored := _stored_card(path):
    card, (module, shapes) = stored, build(stored, str(path))
  elif card:
    module, shapes = build(card, "the card that was passed", make)
  else:
    pretrained.read(path)  # if it is damaged, that is what is to be said
    raise UserError(
      f"{path} does not say what encoder it is of: pass --config, or a card "
      f"({make})"
    )
  size = card["height"], card["width"]
  variables = pretrained.load(path, module, shapes, size)
  is_left = lambda x: isinstance(x, jax.ShapeDtypeStruct)
  if any(map(is_left, jax.tree.leaves(variables))):
    drawn = draw(module, card, jax.random.key(0))
    fill = lambda x, other: other if is_left(x) else x
    variables = jax.tree.map(fill, variables, drawn)
  return card, module, variables


def _stored_card(path) -> dict | None:
  """The card in the metadata of a .safetensors, if it is one and has it."""
  try:
    with safetensors.safe_open(path, "numpy") as file:
      card = (file.metadata() or {}).get(CARD)
  except (safetensors.SafetensorError, OSError):  # `pretrained` says why
    return None
  what = f"{path}: its card"
  return read_json(card.encode(), what, "export it again") if card else None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Encoder:
  """A function from images to unit features; `load_encoder` opens one.

  Attributes:
    card: a `Card`; in a checkpoint also what tells its train images from
      others, and one person from another.
    variables: its parameters and running statistics.
    apply: the result of `make_apply`.
    mesh: the devices that share each batch.
  """

  card: dict
  variables: PyTree
  apply: Callable
  mesh: Mesh

  def __call__(
    self,
    images: ImageLike | Sequence[ImageLike],
    batch_size: int = 128,
    title: str = "encode",
  ) -> PyTree:
    """The features of any number of images of any size.

    Args:
      images: an array u8[n, h, w, 3], or a list of arrays u8[h, w, 3], of
        Pillow's images and of paths; or one of these. They are resized as the
        training images were.
      batch_size: how many images the devices work on at a time; rounded up to
        a multiple of the number of devices.
      title: the name of this phase, where `progress` is shown.

    Returns:
      f32[n, d], each row of length 1; or a dict of such arrays, if the encoder
      has several features an image.

    Raises:
      UserError: an image cannot be read, or there is none.
    """
    values.check({"batch_size": int}, {"batch_size": batch_size})
    images = Sized(images, self.card["height"], self.card["width"])
    if not len(images):
      raise UserError("there is no image to encode: pass at least one")
    size = min(max(batch_size, 1), len(images))
    size = -(-size // self.mesh.size) * self.mesh.size
    step = lambda variables, batch, _: (variables, self.apply(variables, batch))
    with jax.set_mesh(self.mesh):
      return encode(step, self.variables, images, size, title)[1]

  def same(
    self,
    a: ImageLike | Sequence[ImageLike],
    b: ImageLike | Sequence[ImageLike],
    far: float | None = None,
  ) -> verification.Answer:
    """Whether two images, or each pair of two lists, show the same person.

    Args:
      a: images as they are encoded.
      b: as many, or a single one.
      far: the false accept rate to be kept to, see `verification.decide`.

    Raises:
      UserError: the encoder was saved without an evaluation, an image cannot be
        read, or the lists differ in length.
    """
    if far is not None:
      values.check({"far": values.Fraction}, {"far": far})
    card = self.threshold()
    a, b = (flat(self(images)) for images in (a, b))
    if len(a) != len(b) and len(b) != 1:
      raise UserError(
        f"{len(a)} images cannot be compared with {len(b)}: pass as many"
      )
    return verification.decide(np.square(a - b).sum(axis=1), card, far)

  def export(
    self, path: str | os.PathLike, format: str, dtype: str = "float32"
  ) -> None:
    """Writes it for another framework; see `export.export`."""
    from unreid_jax.export import export  # which needs this file

    export(self, os.fspath(path), format, dtype)

  def threshold(self) -> dict[str, Any]:
    """What tells the same person from another one: a `Verification.card`.

    Raises:
      UserError: the encoder was saved without an evaluation.
    """
    if "same_person" not in self.card:
      raise UserError(
        "this encoder was saved without a threshold: --mode=report measures "
        "and stores it"
      )
    return self.card["same_person"]


def encode(
  step: Callable,
  carry: PyTree,
  images: Any,
  batch_size: int,
  title: str,
  order: np.ndarray | None = None,
) -> tuple[PyTree, PyTree]:
  """Runs a step over all images, batch after batch.

  Args:
    step: `step(carry, images, start) -> carry, features`.
    carry: what goes from batch to batch.
    images: uint8 [n, h, w, 3], or an object with such a `shape` that returns
      rows when it is indexed.
    batch_size: how many images a batch has, a multiple of the number of
      devices; the last batch is filled up with the first images.
    title: the name of this phase on the progress bar.
    order: a permutation of [n], the order in which the images are run.

  Returns:
    The carry after the last batch, and the features on the host, [n, ...] in
    the order of the images.
  """
  mesh, num = jax.sharding.get_mesh(), len(images)
  order = np.arange(num) if order is None else order
  parts, starts = [], range(0, num, batch_size)
  rows = (order[np.arange(x, x + batch_size) % num] for x in starts)
  batches = sharding.batches(mesh, {"images": images}, rows)
  both = zip(starts, batches, strict=True)
  for start, batch in progress.track(both, title, num, batch_size):
    carry, features = step(carry, batch["images"], start)
    parts.append(features)
    parts[-2:-1] = jax.device_get(parts[-2:-1])  # the device works meanwhile
  parts[-1] = jax.device_get(parts[-1])
  back = np.argsort(order)
  return carry, jax.tree.map(lambda *x: np.concatenate(x)[back], *parts)


def flat(features: PyTree) -> Float[np.ndarray | jax.Array, "n d"]:
  """One unit vector an image, whose inner product is the cosine similarity.

  Of a dict of features each kind has the same weight: the inner product is the
  mean over the kinds of their cosine similarity, and within a kind over the
  stripes.
  """
  kinds = features.values() if isinstance(features, dict) else [features]
  xp = jnp if any(isinstance(x, jax.core.Tracer) for x in kinds) else np
  if not isinstance(features, dict):
    return xp.asarray(features)
  kinds = [x.reshape(x.shape[0], -1) for x in kinds]
  unit = [x / xp.linalg.norm(x, axis=1, keepdims=True) for x in kinds]
  return xp.concatenate(unit, axis=1) / xp.sqrt(xp.float32(len(unit)))
