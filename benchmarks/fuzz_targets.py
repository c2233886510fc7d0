"""What `fuzz.py` tries: a reader each, the good inputs, how they change.

A target is a function of a folder for its files. It returns `make(rng)`, the
next input, and `run(data)`, which hands it to the reader.
"""

import io
import itertools
import json
import pathlib
import pickletools
import random
import sys
import zipfile
from collections.abc import Callable

import jax
import numpy as np
import safetensors.numpy
from flax import traverse_util

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from configs import default
from unreid_jax import models
from unreid_jax.card import build
from unreid_jax.config import check_same
from unreid_jax.data.datasets import layout, market1501, msmt17
from unreid_jax.models import pretrained
from unreid_jax.workdir import Workdir, checkpoints, writer

Make, Run = Callable[[random.Random], bytes], Callable[[bytes], object]

_GOLDENS = pathlib.Path(__file__).parent.parent / "tests" / "goldens"
_NUMBERS = (0, 1, 0x7F, 0xFF, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1)
_TEXTS = ("-1", "0", "1e999", "NaN", "null", "true", "[]", "{}", '"', "\n", "~")
_TEXTS += ("9" * 5000, "[" * 5000, "\0", "\x1b[2J", "../", "_c", "٣", "²", "é")


def mutate(data: bytes, rng: random.Random) -> bytes:
  """Changes bits, numbers and slices, adds texts, or cuts the end off."""
  data = bytearray(data)
  for _ in range(rng.choice((1, 1, 2, 4, 16))):
    at, other = (rng.randrange(len(data) + 1) for _ in range(2))
    length, kind = rng.choice((1, 2, 4, 8, 64)), rng.randrange(8)
    number = rng.choice(_NUMBERS).to_bytes(8, "little")[:length]
    if kind == 0 and at < len(data):
      data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
      data[at : at + length] = number
    elif kind == 2:
      del data[at : at + length]
    elif kind == 3:
      data[at:at] = data[other : other + length]
    elif kind == 4:
      data[at : at + length] = data[other : other + length]
    elif kind == 5:
      data[at:at] = rng.choice(_TEXTS).encode()
    elif kind == 6:
      data[at : at + length] = rng.randbytes(length)
    elif rng.random() < 0.2:
      del data[at:]
  return bytes(data)


def mutate_pickle(pickle: bytes, rng: random.Random) -> bytes:
  """Leaves out, repeats, swaps, adds and changes whole steps of a pickle."""
  starts = [place for *_, place in pickletools.genops(pickle)]
  steps = [pickle[a:b] for a, b in itertools.pairwise([*starts, len(pickle)])]
  for _ in range(rng.choice((1, 2, 4, 8))):
    at, other = (rng.randrange(len(steps)) for _ in range(2))
    kind, length = rng.randrange(5), rng.choice((1, 1, 2, 8))
    if kind == 0 and len(steps) > length:
      del steps[at : at + length]
    elif kind == 1:
      steps[at:at] = steps[other : other + length]
    elif kind == 2:
      steps[at], steps[other] = steps[other], steps[at]
    elif kind == 3:
      code = rng.choice(pickletools.opcodes).code.encode("latin-1")
      steps.insert(at, code + rng.choice((b"", b"\0", b"\1", b"1\n1\n")))
    elif kind == 4:
      steps[at] = mutate(steps[at], rng)
  return b"".join(steps)


def mutate_parts(
  parts: dict[str, bytes], rng: random.Random
) -> dict[str, bytes]:
  """Changes one of them, and a pickle often by steps."""
  pickles = [name for name in parts if name.endswith(".pkl")]
  name = rng.choice(pickles or list(parts))
  if name in pickles and rng.random() < 0.7:
    return parts | {name: mutate_pickle(parts[name], rng)}
  name = rng.choice(list(parts))
  return parts | {name: mutate(parts[name], rng)}


def pack(parts: dict[str, bytes]) -> bytes:
  """A zip, with the right checksums."""
  packed = io.BytesIO()
  with zipfile.ZipFile(packed, "w") as file:
    for name, data in parts.items():
      file.writestr(name, data)
  return packed.getvalue()


def torch_zip(folder: pathlib.Path) -> tuple[Make, Run]:
  """The layout of torch.save since PyTorch 1.6."""
  with zipfile.ZipFile(_GOLDENS / "torch_zip.pth") as file:
    parts = {name: file.read(name) for name in file.namelist()}

  def make(rng):
    if rng.random() < 0.2:
      return mutate(pack(parts), rng)
    return pack(mutate_parts(parts, rng))

  return make, _read_weights(folder)


def torch_stream(folder: pathlib.Path) -> tuple[Make, Run]:
  """The layout of torch.save before."""
  stream = io.BytesIO((_GOLDENS / "torch_stream.pth").read_bytes())
  parts, start = {}, 0
  for i in range(5):
    list(pickletools.genops(stream))
    parts[f"{i}.pkl"] = stream.getvalue()[start : stream.tell()]
    start = stream.tell()
  parts["storages"] = stream.read()
  make = lambda rng: b"".join(mutate_parts(parts, rng).values())
  return make, _read_weights(folder)


def safetensors_file(folder: pathlib.Path) -> tuple[Make, Run]:
  """Of .safetensors, the header above all."""
  arrays = {"conv1.weight": np.ones((2, 3), "f"), "half": np.ones(5, "f2")}
  good = safetensors.numpy.save(arrays)
  end = 8 + int.from_bytes(good[:8], "little")

  def make(rng):
    if rng.random() < 0.2:
      return mutate(good, rng)
    header = mutate(good[8:end], rng)
    return len(header).to_bytes(8, "little") + header + good[end:]

  return make, _read_weights(folder)


def _read_weights(folder):
  path = folder / "weights.pth"

  def run(data):
    path.write_bytes(data)
    for array in pretrained.read(path).values():
      array[(-1,) * array.ndim] if array.size else None  # the last number

  return run


def state_dicts(folder: pathlib.Path) -> tuple[Make, Run]:
  """Names, shapes and dtypes of weights, against those of an encoder."""
  np.seterr(all="ignore")
  del folder

  options = dict(default.get_config("selective", "synthetic").encoder)
  del options["pretrained"]
  options |= {"arch": "resnet18", "width": 0.125, "head": "stripes"}
  encoder = models.make(**options)
  image = jax.ShapeDtypeStruct((1, 128, 16, 3), "float32")
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), image)
  state = {}
  for path, leaf in traverse_util.flatten_dict(shapes).items():
    name, array = pretrained.torch_name(encoder, path), np.ones(leaf.shape, "f")
    if "{}" not in name:
      state[name] = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
      continue
    for i in range(8):
      part = array[i] if path[2] == "stripes" else np.split(array, 8)[i]
      state[name.format(i)] = part.T
  pretrained.from_torch(state, encoder, shapes)

  def run(data):
    rng, changed = random.Random(data), dict(state)
    for _ in range(rng.choice((1, 2, 4))):
      name, kind = rng.choice(list(changed)), rng.randrange(7)
      array = np.asarray(changed[name])
      if kind == 0 or array.size > 1e6:
        del changed[name]
      elif kind == 1:
        changed[name] = array.reshape(rng.choice(((-1,), (1, -1), (-1, 1, 1))))
      elif kind == 2:
        changed[name] = array.astype(rng.choice(("f2", "f8", "i8", "?", "S1")))
      elif kind == 3:
        odd = mutate(name.encode(), rng).decode("ascii", "ignore")
        changed["".join(filter(str.isprintable, odd))] = array
      elif kind == 4:
        changed[name] = np.broadcast_to(array, (2**30, *array.shape))
      elif kind == 5:
        changed[name] = array[..., :0]
      elif array.dtype.kind == "f":
        changed[name] = array * rng.choice((np.nan, np.inf, -1, 1e38))
    pretrained.from_torch(changed, encoder, shapes)

  return lambda rng: rng.randbytes(8), run


def names(folder: pathlib.Path) -> tuple[Make, Run]:
  """The parser of names like Market-1501's."""
  del folder

  good = (b"0002_c1s1_000451_03.jpg", b"-1_c2s1_000451_03.png", b"0_c6.bmp")
  make = lambda rng: mutate(rng.choice(good), rng)
  run = lambda data: layout.parse(
    pathlib.Path(data.replace(b"\0", b"").decode(errors="surrogateescape"))
  )
  return make, run


def _sets(folder, change):
  """Lists the files of sets in a zip, which `change(parts, rng)` makes."""
  market, msmt = "Market-1501-v15.09.15/", "MSMT17_V1/"
  parts = {
    f"{market}{split}/{pid:04}_c{pid}s1_0.jpg": b"jpg"
    for split in ("bounding_box_train", "query", "bounding_box_test")
    for pid in (-1, 0, 2)
  }
  lines = {"train": 0, "val": 0, "query": 1, "gallery": 1}
  for name, is_test in lines.items():
    image = "0000/0000_000_01_0303_8_0.jpg"
    where = "test" if is_test else "train"
    parts[f"{msmt}list_{name}.txt"] = f"{image} 0\n".encode()
    parts[f"{msmt}{where}/{image}"] = b"jpg"
  path = folder / "set.zip"

  def run(data):
    path.write_bytes(data)
    builder = (market1501.Market1501, msmt17.MSMT17)[len(data) % 2]
    builder(root=str(path), data_dir=folder / "tfds")

  return lambda rng: change(parts, rng), run


def zips(folder: pathlib.Path) -> tuple[Make, Run]:
  """The sets' lists of files, in damaged zips."""
  return _sets(folder, lambda parts, rng: mutate(pack(parts), rng))


def sets(folder: pathlib.Path) -> tuple[Make, Run]:
  """The sets' lists of files, in good zips of odd names and odd lists."""

  def change(parts, rng):
    for _ in range(rng.choice((1, 2, 4))):
      name = rng.choice(list(parts))
      data = mutate(parts.pop(name), rng)
      if rng.random() < 0.7:
        name = mutate(name.encode(), rng).replace(b"\0", b"").decode("latin-1")
      parts |= {name or "x": data}
    return pack(parts)

  return _sets(folder, lambda parts, rng: change(dict(parts), rng))


def metrics(folder: pathlib.Path) -> tuple[Make, Run]:
  """metrics.jsonl, and what a run that goes on asks of its lines."""
  lines = [
    {"step": 10 * i, "kind": kind, "loss": 0.5, "mAP": 0.1}
    for i in range(3)
    for kind in ("train", "evaluate")
  ]
  good = "".join(json.dumps(line) + "\n" for line in lines).encode()
  path = folder / "metrics.jsonl"

  def run(data):
    path.write_bytes(data)
    for line in writer.read_metrics(path):
      _ = line["step"] <= 10, line["kind"]

  return lambda rng: mutate(good, rng), run


def config(folder: pathlib.Path) -> tuple[Make, Run]:
  """config.json, and its comparison with the config of a run."""
  given = default.get_config("selective", "synthetic")
  good = json.dumps(given.to_dict(), indent=2).encode()

  def run(data):
    (folder / "config.json").write_bytes(data)
    check_same(Workdir(folder).stored_config(), given)

  return lambda rng: mutate(good, rng), run


def card(folder: pathlib.Path) -> tuple[Make, Run]:
  """The card of a checkpoint, and the encoder that it describes."""
  options = dict(default.get_config("selective", "synthetic").encoder)
  del options["pretrained"]
  colour = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
  good = {"encoder": options, "height": 64, "width": 32} | colour
  good = json.dumps(good).encode()
  (folder / "card").mkdir()

  def run(data):
    (folder / "card" / "metadata").write_bytes(data)
    build(checkpoints.read_card(folder), "card")

  return lambda rng: mutate(good, rng), run


_ALL = (torch_zip, torch_stream, safetensors_file, state_dicts)
_ALL += (names, zips, sets, metrics, config, card)
TARGETS = {target.__name__: target for target in _ALL}
