"""What sloppy and hostile people hand in as data: one line each, or healed."""

import contextlib
import os
import pathlib
import resource
import shutil
import tempfile
import threading
import zipfile

import numpy as np
import pytest
from test_datasets import (
  check_market,
  load,
  make_market,
  make_msmt,
  write_image,
)

from unreid_jax import UserError

SET = "Market-1501-v15.09.15"  # what holds it is a folder of crops, too
NOT_UTF8 = os.fsdecode(b"0001_c1_\xff.jpg")


def refused(call, *words):
  """Checks that a call ends in a UserError of one line with these words."""
  with pytest.raises(UserError) as caught:
    call()
  line = str(caught.value)
  assert "\n" not in line
  for word in words:
    assert str(word) in line, line
  return line


def to_nowhere(path):
  path.symlink_to("/nowhere/at/all")


def to_itself(path):
  path.symlink_to(path.name)


def to_device(path):
  path.symlink_to("/dev/zero")


STRANGE = [  # what stands where an image should, and what is said of it
  (to_nowhere, "missing"),
  (to_itself, "cannot be read"),
  (to_device, "no regular file"),
  (os.mkfifo, "no regular file"),
]


@pytest.mark.parametrize(("make", "words"), STRANGE)
@pytest.mark.parametrize("name", ["folder", "market1501", "msmt17"])
@pytest.mark.parametrize("on_corrupt", ["error", "skip"])
def test_no_regular_file(tmp_path, name, make, words, on_corrupt):
  """Reading some of these would never end."""
  root = tmp_path / "root"
  path = root / SET / "bounding_box_train" / "0007_c1_strange.jpg"
  make_market(root / SET)
  if name == "msmt17":
    shutil.rmtree(root)
    make_msmt(root, "train", "test")
    path = root / "train" / "0001" / "0001_001_03_0113noon_1_0.jpg"
    path.unlink()
  make(path)
  call = lambda: load(name, root, on_corrupt=on_corrupt)
  refused(call, path, words)
  assert not (tmp_path / "cache").exists()  # nothing has been decoded


@pytest.mark.parametrize("name", ["folder", "market1501"])
@pytest.mark.parametrize(
  "bad", [NOT_UTF8, "0001_c1_a\nb.jpg", "0001_c1_\x1b[0m.jpg"]
)
def test_name_that_is_no_text(tmp_path, name, bad):
  make_market(tmp_path / "root" / SET)
  path = tmp_path / "root" / SET / "query" / "0001_c1_a.jpg"
  write_image(path)
  path.rename(path.with_name(bad))
  refused(lambda: load(name, tmp_path / "root"), "rename", "query")


@pytest.mark.parametrize(
  "bad",
  [
    "2147483648_c1_0",
    "0001_c2147483648_0",
    f"{'9' * 200}_c1_0",
    "-2_c1_0",
    "\u0661_c1_0",
  ],
)
def test_numbers_of_a_name(tmp_path, bad):
  make_market(tmp_path / "root")
  write_image(tmp_path / "root" / "query" / f"{bad}.jpg")
  refused(lambda: load("market1501", tmp_path / "root"), bad, "rename")


def test_nothing_but_junk(tmp_path):
  make_market(tmp_path / "root")
  query = tmp_path / "root" / "query"
  shutil.rmtree(query)
  write_image(query / "-1_c1s1_1_00.jpg")
  refused(lambda: load("market1501", tmp_path / "root"), query, "junk")


IMAGE = "0000/0000_005_02_0302_1_0.jpg"
LISTS = [
  ("", "no image"),
  ("\n \n", "no image"),
  (f"{IMAGE} 1_0\n", "PATH PID"),
  (f"{IMAGE} -1\n", "PATH PID"),
  (f"{IMAGE} 2147483648\n", "PATH PID"),
  (f"{IMAGE}\n", "PATH PID"),
  (f"{IMAGE} 0\n{IMAGE} 0\n", "again"),
  (f"{'a' * 10_000} 0\n", "PATH PID"),
  (b"\xff\xfe\x00\x00", "cannot be read"),
]


@pytest.mark.parametrize(("text", "words"), LISTS)
def test_msmt17_list(tmp_path, text, words):
  make_msmt(tmp_path / "root", "train", "test")
  path = tmp_path / "root" / "list_query.txt"
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  line = refused(lambda: load("msmt17", tmp_path / "root"), path, words)
  assert len(line) < 1_000


def test_msmt17_list_of_another_system(tmp_path):
  make_msmt(tmp_path / "root", "train", "test")
  path = tmp_path / "root" / "list_query.txt"
  path.write_bytes(b"\xef\xbb\xbf" + IMAGE.encode() + b" 0\r\n\r\n")
  assert load("msmt17", tmp_path / "root").query.names == (IMAGE,)


TRAIN = "bounding_box_train/0010_c3s2_1_01.jpg"


def make_zip(tmp_path):
  make_market(tmp_path / "root")
  path = tmp_path / "set.zip"
  with zipfile.ZipFile(path, "w") as archive:  # stored, not compressed
    for file in sorted((tmp_path / "root").rglob("*.jpg")):
      archive.write(file, file.relative_to(tmp_path / "root"))
  return path


def flip(path, offset):
  content = bytearray(path.read_bytes())
  content[offset] ^= 1
  path.write_bytes(content)


def with_bad_checksum(path):
  info = zipfile.ZipFile(path).getinfo(TRAIN)
  flip(path, info.header_offset + 30 + len(TRAIN) + 50)


def encrypted(path):
  flip(path, zipfile.ZipFile(path).getinfo(TRAIN).header_offset + 6)
  flip(path, path.read_bytes().rindex(TRAIN.encode()) - 46 + 8)


def with_unknown_compression(path):
  flip(path, zipfile.ZipFile(path).getinfo(TRAIN).header_offset + 9)
  flip(path, path.read_bytes().rindex(TRAIN.encode()) - 46 + 11)


@pytest.mark.parametrize(
  ("damage", "words"),
  [
    (with_bad_checksum, "CRC"),
    (encrypted, "encrypted"),
    (with_unknown_compression, "compression"),
  ],
)
def test_damaged_image_in_a_zip(tmp_path, damage, words):
  path = make_zip(tmp_path)
  whole = path.read_bytes()
  damage(path)
  refused(lambda: load("market1501", path), path, TRAIN, words, "on_corrupt")
  kept = load("market1501", path, on_corrupt="skip").train.names
  assert kept == ("0002_c1s1_000451_03.jpg",)
  path.write_bytes(whole)
  check_market(load("market1501", path))


def test_an_image_twice_in_a_zip(tmp_path):
  path = make_zip(tmp_path)
  with (
    pytest.warns(UserWarning, match="Duplicate name"),
    zipfile.ZipFile(path, "a") as archive,
  ):
    archive.writestr(TRAIN, archive.read(TRAIN))
  refused(lambda: load("market1501", path), TRAIN, "is there twice")


def test_damaged_table_of_a_zip(tmp_path):
  path = make_zip(tmp_path)
  flip(path, path.read_bytes().index(b"PK\1\2"))
  refused(lambda: load("market1501", path), path, "get it again")


def test_pipe_as_root_or_zip(tmp_path):
  os.mkfifo(tmp_path / "set.zip")
  refused(lambda: load("market1501", tmp_path / "set.zip"), "not a zip")
  refused(lambda: load("market1501", tmp_path), "set dataset.root")


@pytest.fixture
def crops(tmp_path):
  root = tmp_path / "root"
  for name in ("a/0", "a/deep/1", "b/0"):
    write_image(root / f"{name}.jpg")
  return root


def names_and_cameras(root):
  train = load("folder", root).train
  return dict(zip(train.names, train.camids.tolist(), strict=True))


PLAIN = {"a/0.jpg": 1, "a/deep/1.jpg": 1, "b/0.jpg": 2}


def test_linked_camera_is_followed(crops, tmp_path):
  (crops / "b").rename(tmp_path / "elsewhere")
  (crops / "b").symlink_to(tmp_path / "elsewhere")
  assert names_and_cameras(crops) == PLAIN


@pytest.mark.parametrize("target", [".", "..", "../..", "/"])
def test_link_back_up_ends(crops, target):
  (crops / "a" / "up").symlink_to(target)
  assert names_and_cameras(crops) == PLAIN


def test_one_camera_under_two_names(crops):
  (crops / "c").symlink_to("b")
  refused(lambda: load("folder", crops), crops / "b", crops / "c", "same")


def test_camera_on_a_disk_that_is_not_there(crops, tmp_path):
  (crops / "c").symlink_to(tmp_path / "not_mounted")
  refused(lambda: load("folder", crops), crops / "c", "leads nowhere")


def test_hidden_folders_are_no_cameras(crops):
  write_image(crops / ".thumbnails" / "0.jpg")
  (crops / ".#lock").symlink_to("someone@somewhere")
  assert names_and_cameras(crops) == PLAIN


def test_linked_folders_of_a_set(tmp_path):
  make_market(tmp_path / "root")
  (tmp_path / "root" / "query").rename(tmp_path / "elsewhere")
  (tmp_path / "root" / "query").symlink_to(tmp_path / "elsewhere")
  check_market(load("market1501", tmp_path / "root"))


@pytest.fixture
def public():
  """A folder for `as_user`: those of pytest belong to one user."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder)
    path.chmod(0o777)
    make_market(path / "root" / SET)
    yield path


@contextlib.contextmanager
def as_user(*withheld):
  """Within it, these paths cannot be used, not even by root."""
  modes = {path: path.stat().st_mode for path in withheld}
  for path in withheld:
    path.chmod(0)
  user = os.geteuid()
  try:
    try:
      os.seteuid(user or 65534)
    except OSError:
      pytest.skip("there is no other user to be")
    yield
  finally:
    os.seteuid(user)
    for path, mode in modes.items():
      path.chmod(mode)


@pytest.mark.parametrize("name", ["folder", "market1501"])
@pytest.mark.parametrize("on_corrupt", ["error", "skip"])
def test_image_that_we_may_not_read(public, name, on_corrupt):
  """Says nothing of the image: it is neither left out nor remembered."""
  folder = public / "root" / SET / "bounding_box_train"
  path = folder / "0002_c1s1_000451_03.jpg"
  call = lambda: load(name, public / "root", on_corrupt=on_corrupt)
  with as_user(path):
    refused(call, path, "Permission denied")
  assert any(path.name in name for name in call().train.names)


@pytest.mark.parametrize("name", ["folder", "market1501"])
@pytest.mark.parametrize(
  "what", [f"{SET}/bounding_box_train", f"{SET}/query", ""]
)
def test_folder_that_we_may_not_read(public, name, what):
  path = public / "root" / what
  with as_user(path):
    call = lambda: load(name, public / "root")
    refused(call, path, "Permission denied")


def test_zip_that_we_may_not_read(public):
  path = public / "set.zip"
  shutil.make_archive(str(public / "set"), "zip", public / "root")
  with as_user(path):
    refused(lambda: load("market1501", path), path, "Permission denied")


def test_cache_that_we_may_not_write(public):
  (public / "cache").mkdir()
  call = lambda: load("folder", public / "root")
  with as_user(public / "cache"):
    refused(call, public / "cache", "Permission denied", "dataset.cache_dir")
  call()
  with as_user():  # owned by another, yet readable
    assert len(call().train.names) == 7
  (entry,) = (public / "cache" / "images").iterdir()
  with as_user(entry):
    refused(call, entry, "Permission denied", "dataset.cache_dir")


def test_others_may_read_the_cache(tmp_path):
  make_market(tmp_path / "root" / SET)
  before = os.umask(0o027)
  try:
    load("folder", tmp_path / "root")
  finally:
    os.umask(before)
  (entry,) = (tmp_path / "cache" / "images").iterdir()
  modes = [path.stat().st_mode & 0o777 for path in (entry, *entry.iterdir())]
  assert modes == [0o750, 0o640, 0o640]


def cut(entry):
  path = entry / "images.npy"
  path.write_bytes(path.read_bytes()[:-1])


def empty(entry):
  (entry / "images.npy").write_bytes(b"")


def pickled(entry):
  np.save(entry / "images.npy", np.array([{}]), allow_pickle=True)


def of_another_size(entry):
  np.save(entry / "images.npy", np.zeros((6, 16, 8, 3), np.uint8))


def of_floats(entry):
  np.save(entry / "images.npy", np.zeros((7, 16, 8, 3), np.float32))


def without_images(entry):
  (entry / "images.npy").unlink()


def without_notes(entry):
  (entry / "corrupt.json").unlink()


def notes_of_nothing(entry):
  (entry / "corrupt.json").write_text('{"a": 1')


def notes_of_another_kind(entry):
  (entry / "corrupt.json").write_text("[1, 2]")


def notes_of_no_image(entry):
  (entry / "corrupt.json").write_text('[[99, "x"]]')
  np.save(entry / "images.npy", np.zeros((6, 16, 8, 3), np.uint8))


def a_file(entry):
  shutil.rmtree(entry)
  entry.write_text("")


@pytest.mark.parametrize("damage", [
  cut, empty, pickled, of_another_size, of_floats, without_images,
  without_notes, notes_of_nothing, notes_of_another_kind, notes_of_no_image,
  a_file,
])  # fmt: skip
def test_damaged_cache_is_made_again(tmp_path, damage, caplog):
  make_market(tmp_path / "root" / SET)
  expected = np.array(load("folder", tmp_path / "root").train.images)
  (entry,) = (tmp_path / "cache" / "images").iterdir()
  damage(entry)
  again = load("folder", tmp_path / "root").train.images
  assert np.array_equal(again, expected)
  assert f"{entry} is damaged" in caplog.text
  caplog.clear()
  load("folder", tmp_path / "root")
  assert caplog.text == ""


def test_disk_that_is_too_small(tmp_path):
  """Found before the first image is decoded."""
  make_market(tmp_path / "root" / SET)
  size = {"height": 10**7, "width": 10**7}
  line = refused(lambda: load("folder", tmp_path / "root", **size), "space")
  assert str(tmp_path / "cache" / "images") in line and "2100000.00 GB" in line


def test_disk_that_fills_up(tmp_path):
  make_market(tmp_path / "root" / SET)
  call = lambda: load("folder", tmp_path / "root")
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
  try:
    refused(call, tmp_path / "cache", "0.00 GB", "dataset.cache_dir")
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert not list((tmp_path / "cache" / "images").iterdir())
  call()


def test_cache_below_a_file(tmp_path):
  make_market(tmp_path / "root" / SET)
  (tmp_path / "cache").write_text("")
  call = lambda: load("folder", tmp_path / "root")
  refused(call, tmp_path / "cache", "cannot be written", "dataset.cache_dir")


def test_no_home(tmp_path):
  make_market(tmp_path / "root" / SET)
  call = lambda root, cache: load("folder", root, cache_dir=cache)
  nobody = "~nobody_of_this_name/x"
  refused(lambda: call(tmp_path / "root", nobody), "set dataset.cache_dir")
  refused(lambda: call(nobody, str(tmp_path)), "set dataset.root")


@pytest.mark.parametrize("key", ["height", "width"])
def test_size_of_nothing(tmp_path, key):
  with pytest.raises(UserError, match=f"{key} is 0"):
    load("folder", tmp_path, **{key: 0})


def test_no_thread_outlives_an_unreadable_image(crops):
  """Whoever keeps the error keeps no pool that waits for its own thread."""
  (crops / "a" / "0.jpg").write_text("no image")
  with pytest.raises(UserError, match="not an image"):
    load("folder", crops)
  names = [thread.name for thread in threading.enumerate()]
  assert not [name for name in names if "ThreadPool" in name]


def test_no_memory_is_not_the_fault_of_an_image(crops, monkeypatch):
  def no_memory(*_):
    raise MemoryError

  with monkeypatch.context() as patch:
    patch.setattr("unreid_jax.data.images.resize", no_memory)
    call = lambda: load("folder", crops, on_corrupt="skip")
    refused(call, crops / "a" / "0.jpg", "memory")
  assert names_and_cameras(crops) == PLAIN
