"""Time, memory and disk that a large set in Market-1501 layout takes.

  python benchmarks/data_set.py [--gigabytes=2] [--height=256] [--width=128]
    [--tfds]

The set is made up of noise in a temporary folder, which is removed at the end:
JPEG files of some 17 kB, almost all of them in the gallery. A fresh process
loads it, a second one finds the cache, encodes all images and scores them. With
--tfds a third prepares the set with TFDS, which nobody needs who trains here.
Memory is the process's peak without mapped files,
where Linux says it. The temporary folder lies where $TMPDIR says.
"""

import argparse
import io
import multiprocessing
import pathlib
import sys
import tempfile
import threading
import time

import jax
import numpy as np
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from configs import default
from unreid_jax import data, sharding
from unreid_jax.config import resolve
from unreid_jax.evaluate import evaluate
from unreid_jax.state import first_state, make_parts


def make_set(root: pathlib.Path, num_bytes: float) -> None:
  """Fifty different images, over and over."""
  rng = np.random.default_rng(0)
  encoded = []
  for _ in range(50):
    buffer = io.BytesIO()
    noise = rng.integers(0, 256, (192, 96, 3)).astype(np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG", quality=90)
    encoded.append(buffer.getvalue())
  num_images = int(num_bytes / np.mean([len(x) for x in encoded]))
  for part, count in (
    ("bounding_box_train", 64), ("query", 64), ("bounding_box_test", num_images)
  ):  # fmt: skip
    (root / part).mkdir(parents=True)
    for i in range(count):
      name = f"{i % 1_000:04d}_c{i % 6 + 1}s1_{i:06d}_00.jpg"
      (root / part / name).write_bytes(encoded[i % 50])


def load(root: pathlib.Path, height: int, width: int) -> data.Dataset:
  cache_dir = str(root.parent / "cache")
  options = {"root": str(root), "cache_dir": cache_dir}
  return data.load("market1501", height=height, width=width, **options)


def load_and_score(root: pathlib.Path, height: int, width: int) -> None:
  """As --mode=evaluate does it, by a thin ResNet-18 of random weights."""
  config = default.get_config("cluster_contrast", "market1501")
  config.encoder.update({"arch": "resnet18", "width": 0.125})
  config.dataset.update({"height": height, "width": width})
  with jax.set_mesh(sharding.make_mesh(1)):
    parts = make_parts(resolve(config, steps_per_epoch=1))
    state = first_state(parts, 64, weights="")
    dataset = load(root, height, width)
    evaluate(parts.encoder(state), parts.distance, dataset, 128)


def prepare(root: pathlib.Path, *_: int) -> None:
  from unreid_jax.data.datasets.market1501 import Market1501

  data_dir = root.parent / "tfds"
  Market1501(root=str(root), data_dir=data_dir).download_and_prepare()


def anonymous_memory() -> float:
  """GB of this process that are no mapped files."""
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith("RssAnon"):
      return int(line.split()[1]) / 1e6
  return float("nan")


def measure(label: str, work, root: pathlib.Path, *size: int) -> None:
  """Prints the seconds and the peak of memory of this process."""
  peak, is_done = [anonymous_memory()], threading.Event()

  def watch():
    while not is_done.wait(0.05):
      peak.append(anonymous_memory())

  threading.Thread(target=watch, daemon=True).start()
  start = time.perf_counter()
  work(root, *size)
  seconds = time.perf_counter() - start
  is_done.set()
  print(f"{label:34}{seconds:8.1f} s {max(peak):8.2f} GB of memory", flush=True)


def size_on_disk(folder: pathlib.Path) -> float:
  sizes = [p.stat().st_size for p in folder.rglob("*") if p.is_file()]
  return sum(sizes) / 1e9


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--gigabytes", type=float, default=2)
  parser.add_argument("--height", type=int, default=256)
  parser.add_argument("--width", type=int, default=128)
  parser.add_argument("--tfds", action="store_true")
  options = parser.parse_args()
  context = multiprocessing.get_context("spawn")
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder, "set")
    make_set(root, options.gigabytes * 1e9)
    count = len(list((root / "bounding_box_test").iterdir()))
    print(f"{count:,} gallery images, {size_on_disk(root):.2f} GB")
    works = [("load", load), ("load again, encode and score", load_and_score)]
    works += [("prepare with TFDS", prepare)] if options.tfds else []
    for label, work in works:
      arguments = label, work, root, options.height, options.width
      process = context.Process(target=measure, args=arguments)
      process.start()
      process.join()
    for child in sorted(pathlib.Path(folder).iterdir()):
      print(f"{child.name:34}{size_on_disk(child):8.2f} GB on disk")


if __name__ == "__main__":
  main()
