"""Decoding, resizing and the cache, with whatever may happen to them."""

import errno
import os
import subprocess
import sys
import textwrap
import threading

import jax
import numpy as np
import pytest
from PIL import Image

from unreid_jax import UserError, data, progress
from unreid_jax.data import augment, cache, images
from unreid_jax.models.backbones.resnet import MEAN, STD

SIZE = {"height": 16, "width": 8}


@pytest.fixture
def folder(tmp_path):
  """Five crops of different shapes, modes and formats under two cameras."""
  rng = np.random.default_rng(0)
  root = tmp_path / "crops"
  kinds = ("RGB", "L", "RGBA", "P", "RGB")
  for i, mode in enumerate(kinds):
    pixels = rng.integers(0, 256, (20 + i, 9, 3)).astype(np.uint8)
    path = root / f"cam{1 + i % 2}" / f"{i}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)
  return root


def load(folder, **changes):
  options = SIZE | {"cache_dir": str(folder.parent / "cache")} | changes
  return data.load("folder", root=str(folder), **options)


def entries(folder):
  return sorted((folder.parent / "cache" / "images").iterdir())


def test_goldens(golden):
  transforms = golden("transforms")
  image = Image.fromarray(transforms["image"])
  resized = images.resize(image, 256, 128)
  assert np.array_equal(resized, transforms["resized_256x128"])
  small = images.resize(image, 64, 32)
  tensor = augment.normalise(jax.numpy.asarray(small[None]), MEAN, STD)[0]
  expected = transforms["test_tensor_64x32"].transpose(1, 2, 0)
  assert np.allclose(tensor, expected, atol=2e-6)
  padded = np.pad(small, ((10, 10), (10, 10), (0, 0)))
  assert np.array_equal(padded, transforms["padded_64x32"])


def test_folder(folder):
  dataset = load(folder)
  train = dataset.train
  assert dataset.query is None and dataset.gallery is None
  assert isinstance(train.images, np.memmap)
  assert train.names == (
    "cam1/0.png", "cam1/2.png", "cam1/4.png", "cam2/1.png", "cam2/3.png",
  )  # fmt: skip
  assert train.camids.tolist() == [1, 1, 1, 2, 2]
  assert set(train.pids) == {-1}
  for image, name in zip(train.images, train.names, strict=True):
    with Image.open(folder / name) as original:
      rgb = original.convert("RGB").resize((8, 16), Image.BICUBIC)
    assert np.array_equal(image, rgb)


RGB = np.random.default_rng(1).integers(0, 256, (16, 8, 3)).astype(np.uint8)
GREY = RGB[..., :1].repeat(3, axis=2)
IMAGE, TURNED = Image.fromarray(RGB), Image.fromarray(np.rot90(RGB))
BLACK = RGB * (np.arange(8) < 4)[:, None]  # the right half
EXIF = Image.Exif()
EXIF[0x0112] = 6  # to be turned by 90 degrees, clockwise


def two_frames(path):
  other = Image.fromarray(255 - RGB)
  lossless = {"lossless": True} if path.suffix == ".webp" else {}
  IMAGE.save(path, save_all=True, append_images=[other], **lossless)


def with_alpha(path):
  alpha = BLACK.any(2) * np.uint8(255)
  Image.fromarray(np.dstack([RGB, alpha])).save(path)


def with_clear_colour(path):
  grey = Image.fromarray(np.where(BLACK, 200, 100)[..., 0].astype(np.uint8))
  grey.save(path, transparency=100)


PIXELS = [
  ("a.png", Image.fromarray(RGB[..., 0].astype(np.uint16) * 257).save, GREY),
  ("a.tif", Image.fromarray(RGB[..., 0].astype(">u2") * 257).save, GREY),
  ("a.png", lambda path: TURNED.save(path, exif=EXIF), RGB),
  ("a.tif", lambda path: TURNED.save(path, exif=EXIF), RGB),
  ("a.webp", lambda path: TURNED.save(path, exif=EXIF, lossless=True), RGB),
  ("a.png", lambda path: IMAGE.save(path, exif=b"Exif\0\0garbage"), RGB),
  ("a.png", with_alpha, BLACK),
  ("a.png", with_clear_colour, np.where(BLACK, 200, 0)[..., :1].repeat(3, 2)),
  ("a.tif", IMAGE.convert("CMYK").save, RGB),
  ("a.png", two_frames, RGB),
  ("a.webp", two_frames, RGB),
  ("a.tif", two_frames, RGB),
]


@pytest.mark.parametrize(("name", "save", "expected"), PIXELS)
def test_pixels_of_every_kind(tmp_path, name, save, expected):
  save(tmp_path / name)
  assert np.array_equal(images.decode(tmp_path / name, **SIZE), expected)


@pytest.mark.parametrize(
  ("name", "image", "words"),
  [
    ("a.tif", Image.fromarray(np.ones((9, 9), np.float32)), "convert it to 8"),
    ("a.tif", Image.fromarray(np.ones((9, 9), np.int32)), "convert it to 8"),
    ("a.eps", IMAGE, "not an image"),
  ],
)
def test_pixels_that_mean_nothing_here(tmp_path, name, image, words):
  image.save(tmp_path / name)
  (tmp_path / name).rename(tmp_path / "a.jpg")
  with pytest.raises(images.CorruptImage, match=words):
    images.decode(tmp_path / "a.jpg", **SIZE)


def test_large_images_are_decoded_alone(folder, monkeypatch):
  """By the thread that writes, while the others are at the small ones."""
  expected = load(folder).train.images
  monkeypatch.setattr(images, "_MANY_PIXELS", 9 * 22)
  alone, resize = [], images.resize

  def watched(image, *size):
    if threading.current_thread() is threading.main_thread():
      alone.append(image.height)
    return resize(image, *size)

  monkeypatch.setattr(images, "resize", watched)
  cache_dir = str(folder.parent / "other")
  assert np.array_equal(
    load(folder, cache_dir=cache_dir).train.images, expected
  )
  assert alone == [24, 23]


def test_one_camera_without_sub_folders(folder):
  assert set(load(folder / "cam2").train.camids) == {1}


def test_cache_is_used_until_something_changes(folder, monkeypatch):
  first = load(folder).train.images
  (entry,) = entries(folder)
  with monkeypatch.context() as patch:
    patch.setattr(cache, "_make", None)
    assert np.array_equal(load(folder).train.images, first)
  assert load(folder, height=12).train.images.shape[1] == 12
  other = Image.fromarray(np.zeros((20, 9, 3), np.uint8))
  other.save(folder / "cam1" / "0.png")
  assert not load(folder).train.images[0].any()
  (folder / "cam2" / "1.png").unlink()
  assert len(load(folder).train.images) == 4
  assert len(entries(folder)) == 4
  assert np.array_equal(np.load(entry / "images.npy"), first)


def test_two_datasets_do_not_share_an_entry(folder):
  one = load(folder / "cam1").train.images
  two = load(folder / "cam2", cache_dir=str(folder / "cache")).train.images
  assert one.shape != two.shape


def test_killed_while_decoding(folder):
  script = f"""
    import os, signal
    from unreid_jax import data, progress
    def track(items, *_):
      for i, item in enumerate(items):
        if i == 3:
          os.kill(os.getpid(), signal.SIGKILL)
        yield item
    with progress.shown_by(track):
      data.load("folder", root={str(folder)!r}, height=16, width=8,
                cache_dir={str(folder.parent / "cache")!r})
  """
  command = [sys.executable, "-c", textwrap.dedent(script)]
  assert subprocess.run(command, check=False).returncode == -9
  unfinished, _ = entries(folder)  # and a lock that nobody holds
  assert unfinished.name.endswith(".unfinished")
  assert len(load(folder).train.images) == 5
  assert unfinished in entries(folder)  # another process may be at it
  os.utime(unfinished, (0, 0))
  load(folder, height=20)
  assert unfinished not in entries(folder)


def test_another_process_was_faster(folder, monkeypatch):
  """Where the file system has no locks."""

  def no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")

  def track(items, *_):
    yield from items
    with progress.shown_by(lambda items, *_: iter(items)):
      load(folder)

  monkeypatch.setattr(cache.fcntl, "flock", no_locks)
  with progress.shown_by(track):
    assert len(load(folder).train.images) == 5
  assert len(entries(folder)) == 1


@pytest.mark.parametrize("is_killed", [False, True])
def test_two_processes_want_the_same_entry(folder, is_killed):
  """The second waits, and says so, while the first lives and is at work."""
  script = f"""
    import sys
    from unreid_jax import data, progress
    def track(items, *_):
      print("decodes", flush=True)
      sys.stdin.readline()
      return iter(items)
    with progress.shown_by(track):
      data.load("folder", root={str(folder)!r}, height=16, width=8,
                cache_dir={str(folder.parent / "cache")!r})
    print("done")
  """
  command = [sys.executable, "-c", textwrap.dedent(script)]
  pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
  start = lambda: subprocess.Popen(command, text=True, **pipes)
  with start() as first:
    assert first.stdout.readline() == "decodes\n"
    with start() as second:
      assert "waiting" in second.stderr.readline()
      if is_killed:
        first.kill()
      else:
        assert first.communicate("\n") == ("done\n", "")
      out, _ = second.communicate("\n")
  assert out == ("decodes\ndone\n" if is_killed else "done\n")
  finished = [x for x in entries(folder) if not x.name.endswith(".unfinished")]
  assert len(finished) == 1


def truncate(path):
  path.write_bytes(path.read_bytes()[:200])


def write_text(path):
  path.write_text("this is a web page")


def write_nothing(path):
  path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, write_text, write_nothing])
def test_corrupt_image(folder, damage, caplog):
  noise = np.random.default_rng(0).integers(0, 256, (99, 99, 3))
  jpeg = folder / "cam2" / "1.jpg"
  Image.fromarray(noise.astype(np.uint8)).save(jpeg)
  damage(jpeg)
  with pytest.raises(UserError) as caught:
    load(folder)
  line = str(caught.value)
  assert "\n" not in line and str(jpeg) in line and "on_corrupt" in line
  assert entries(folder) == []
  for _ in range(2):  # decoded, then from the cache
    caplog.clear()
    train = load(folder, on_corrupt="skip").train
    assert len(train.images) == len(train.names) == len(train.camids) == 5
    assert "cam2/1.jpg" not in train.names
    assert train.images[3:].any((1, 2, 3)).all()
    assert "1 of 6" in caplog.text and str(jpeg) in caplog.text
  with pytest.raises(UserError, match=r"1\.jpg"):
    load(folder)  # the cache knows


def test_nothing_but_corrupt_images(tmp_path):
  (tmp_path / "crops").mkdir()
  (tmp_path / "crops" / "a.jpg").write_text("no image")
  with pytest.raises(UserError, match=r"no image can be read.*a\.jpg"):
    load(tmp_path / "crops", on_corrupt="skip")


def test_an_error_does_not_wait_for_the_rest(folder, monkeypatch):
  """Of a large folder only the images at hand are decoded."""
  (folder / "cam1" / "0.png").write_text("no image")
  for i in range(500):
    os.link(folder / "cam2" / "1.png", folder / "cam2" / f"more{i}.png")
  decode, seen = images.decode, []

  def watched(path, *args, **options):
    seen.append(path)
    return decode(path, *args, **options)

  monkeypatch.setattr(images, "decode", watched)
  with pytest.raises(UserError, match="is not an image"):
    load(folder)
  assert len(seen) < 200


@pytest.mark.parametrize(
  ("root", "words"),
  [("nowhere", "no folder"), ("empty", "no image"), ("", "no folder")],
)
def test_no_folder_or_no_image(tmp_path, root, words):
  (tmp_path / "empty").mkdir()
  path = root and str(tmp_path / root)
  with pytest.raises(UserError, match=words) as caught:
    data.load("folder", root=path, **SIZE)
  assert path in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_name():
  with pytest.raises(UserError, match="market1501"):
    data.load("market", **SIZE)


def test_progress_sees_every_image(folder):
  seen = []

  def track(items, description, total, *_):
    for item in items:
      seen.append((description, total))
      yield item

  with progress.shown_by(track):
    load(folder)
  assert seen == [("decode folder-train", 5)] * 5
