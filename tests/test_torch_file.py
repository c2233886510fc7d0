"""Files of torch.save, those of PyTorch 2.13 and hostile ones made by hand."""

import collections
import pathlib
import pickletools
import struct
import zipfile

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from unreid_jax import UserError
from unreid_jax.models import torch_file, torch_pickle

_GOLDENS = pathlib.Path(__file__).parent / "goldens"
_OLD, _NEW = _GOLDENS / "torch_stream.pth", _GOLDENS / "torch_zip.pth"


def _code(value) -> bytes:
  """A pickle's steps for dictionaries, texts, numbers; bytes are steps."""
  if isinstance(value, bytes):
    return value
  if isinstance(value, dict):
    return b"}(" + b"".join(map(_code, sum(value.items(), ()))) + b"u"
  if isinstance(value, tuple):
    return b"(" + b"".join(map(_code, value)) + b"t"
  if isinstance(value, str):
    return b"X" + struct.pack("<I", len(value)) + value.encode()
  return b"I%d\n" % value


def _tensor(shape=(2, 3), strides=(3, 1), offset=0, key="0", size=6):
  """A view of a storage of float32."""
  storage = ("storage", b"ctorch\nFloatStorage\n", key, "cpu", size)
  view = (_code(storage) + b"Q", offset, shape, strides, 0, b"N")
  return b"ctorch._utils\n_rebuild_tensor_v2\n" + _code(view) + b"R"


def _write(path, tree, **options):
  """A zip with a pickle and one storage, the numbers from 0 to 5."""
  with zipfile.ZipFile(path, "w", **options) as file:
    file.writestr("x/data.pkl", b"\x80\2" + _code(tree) + b".")
    file.writestr("x/data/0", np.arange(6, dtype="<f4").tobytes())
  return path


@pytest.fixture
def path(tmp_path):
  return tmp_path / "weights.pth"


@pytest.mark.parametrize("file", [_OLD, _NEW])
def test_what_torch_wrote(file):
  kinds = "float32 float16 bfloat16 float64 int8 uint8 int16 int32 int64 bool"
  kinds += " complex64 float8_e4m3fn uint16"
  base = np.arange(24, dtype="f").reshape(4, 6)
  want = {k: np.arange(6, dtype="f").reshape(2, 3) for k in kinds.split()}
  want["bool"] = want["bool"] > 0
  want["complex64"] = want["complex64"].astype("complex64")
  want |= {"rows": base[1:3], "column": base[:, 2], "transposed": base.T}
  want |= {"steps": base[::2, 1::3], "expanded": np.full((3, 4), 7, "f")}
  want |= {"scalar": np.float32(3.5), "empty": np.zeros((0, 3), "f")}
  want["channels_last"] = np.arange(120, dtype="f").reshape(2, 3, 4, 5)
  want |= dict.fromkeys(("parameter", "tagged"), np.arange(3, dtype="f"))
  got = torch_file.read(file)
  assert got.keys() == want.keys()
  for name, array in want.items():
    assert got[name].dtype == (name if name in kinds else "float32")
    assert_array_equal(got[name].astype(array.dtype), array, strict=True)


def test_where_the_weights_are(path):
  weights = {"a": _tensor()}
  trees = [weights, {"model": weights, "epoch": 3}, {"state_dict": weights}]
  trees += [{"net": {"state_dict": weights}, "optimizer": {"state": {}}}]
  trees += [{"mAP": _tensor((), ()), "model_state_dict": weights}]
  trees += [{"anything": weights, "args": {"lr": 1}}, weights | {"epoch": 3}]
  trees += [{"student": {"b": _tensor()}, "teacher": weights}]
  for tree in trees:
    (got,) = torch_file.read(_write(path, tree)).items()
    assert got[0] == "a"
    assert_array_equal(got[1], np.arange(6).reshape(2, 3))
  several = {"one": weights, "two": weights}
  for tree, message in (
    (several, "weights in one, two: save"),
    ({"epoch": 3}, "no weights: save"),
    (_tensor(), "a tensor, not a dictionary"),
    (_code((1, 2)), "a tuple, not a dictionary"),
    (b"]", "a list, not a dictionary"),
  ):
    with pytest.raises(UserError, match=message):
      torch_file.read(_write(path, tree))


def test_big_endian(path):
  with zipfile.ZipFile(_NEW) as old, zipfile.ZipFile(path, "w") as new:
    for name in old.namelist():
      data = old.read(name)
      data = b"big" if name.endswith("byteorder") else data
      if "/data/" in name and len(data) == 24 * 4:  # those of float32
        data = np.frombuffer(data, "<u4").byteswap().tobytes()
      new.writestr(name, data)
  got, want = torch_file.read(path), torch_file.read(_NEW)
  assert_array_equal(got["steps"], want["steps"])
  with pytest.raises(AssertionError):
    assert_array_equal(got["scalar"], want["scalar"])


def test_nothing_is_run(path, tmp_path):
  mark = tmp_path / "mark"
  command = (f"touch {mark}",)
  run, get = b"cposix\nsystem\n", b"cbuiltins\ngetattr\n"
  hidden = _code("posix") + _code("system") + b"\x93"
  attacks = {
    "posix.system": run + _code(command) + b"R",
    "posix.system, which": hidden + _code(command) + b"R",
    "os.system": b"(" + _code(command[0]) + b"ios\nsystem\n",
    "builtins.eval": b"c__builtin__\neval\n" + _code(command) + b"R",
    "builtins.getattr": get + _code((b"cbuiltins\nobject\n", "x")) + b"R",
    "x.Model": b"cx\nModel\n)\x81}b",
    "a pickle has a DUP": b"N2",
    "pickle has a EXT1": b"\x82\1)R",
    "pickle has a PERSID": b"P1\n",
    "a kind that is not read": b"ctorch._utils\n_rebuild_qtensor\n)R",
  }
  for name, code in attacks.items():
    with pytest.raises(UserError, match=name.removeprefix("a ")):
      torch_file.read(_write(path, {"a": _tensor(), "b": code}))
  # The objects that are built here take no attributes, and call nothing.
  state = _code({"a": _tensor(), "keys": 1, "__class__": 2})
  odd = (
    b"ccollections\nOrderedDict\n)R" + state[1:] + _code({"items": 1}) + b"b"
  )
  assert list(torch_file.read(_write(path, odd))) == ["a"]
  odd = b"ctorch._utils\n_rebuild_tensor_v2\n" + _code({"__code__": 1}) + b"b"
  read = torch_file.read(_write(path, {"a": _tensor(), "b": odd}))
  assert_array_equal(read["a"].ravel(), np.arange(6))
  assert not mark.exists()


def test_sizes_that_lie(path):
  wrong = [_tensor((2, 4), (3, 1)), _tensor((6,), (2,)), _tensor(offset=1)]
  wrong += [_tensor((5,), (2**62,)), _tensor((5,), (2**66,)), _tensor(key="1")]
  wrong += [_tensor((2, -3)), _tensor((2,), ()), _tensor(("2",), (1,))]
  wrong += [_tensor((2**40, 6), (6, 1)), _tensor((2, 3), (3, -1))]
  wrong += [
    _tensor(size=5),
    _tensor((2**70,), (0,)),
    _tensor(key="../data.pkl"),
  ]
  wrong += [_tensor(offset=-1), b"N\x94\x85" * 9 + b"t", b"\x8e" + b"\x7f" * 8]
  wrong += [
    b"\x8b\xff\xff\xff\x7f",
    b"L" + b"9" * 5000 + b"L\n",
    b"h\7",
    b"\xff",
  ]
  for code in wrong:
    with pytest.raises(UserError, match="cut off or damaged"):
      torch_file.read(_write(path, {"a": code}))
  # One number, seen as many, whoever copies which; nothing is copied here.
  got = torch_file.read(_write(path, {"a": _tensor((20,), (0,))}))
  assert got["a"].strides == (0,)
  with pytest.raises(UserError, match="larger than the file"):
    torch_file.read(_write(path, {"a": _tensor((2**40,), (0,))}))
  for odd in (b"Nr\xff\xff\xff\xff", b"N" + b"\x85" * 50_000, b"]h\0a"):
    tree = {"a": _tensor(), "b": odd.replace(b"]h", b"]q\0h")}
    assert list(torch_file.read(_write(path, tree))) == ["a"]


@pytest.mark.parametrize("build", [b"l", b"t"])
def test_what_looks_huge_is_never_looked_at(path, build):
  """A list or tuple that holds the one before twice, ten times over.

  Sixty times would take for ever; a thousand parts fail at once, if they do.
  """
  huge = b"".join(
    b"(h%ch%c" % (i, i) + build + b"q%c" % (i + 1) for i in range(10)
  )
  huge = b"Nq\0" + huge
  for names in (_code("posix") + huge, huge + _code("system")):
    code = b"]" + names + b"\x93a"
    with pytest.raises(UserError, match="by what is no text"):
      torch_file.read(_write(path, {"a": _tensor(), "b": code}))
  stream = _OLD.read_bytes()
  keys = stream.rindex(b"\x80\2")  # of the last pickle, the list of storages
  path.write_bytes(stream[:keys] + b"\x80\2](" + huge + b"e.")
  with pytest.raises(UserError, match="a storage that no tensor uses"):
    torch_file.read(path)


def test_a_program_is_not_run(path):
  """TorchScript is a zip with more in it, some of it compressed."""
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
    for name in "data.pkl", "code/__torch__.py", "constants.pkl":
      file.writestr(f"model/{name}", b"x")
  with pytest.raises(
    UserError, match=r"a program \(TorchScript\).*\.safetensors"
  ):
    torch_file.read(path)


def test_zips_that_lie(path, monkeypatch):
  weights = {"a": _tensor()}
  with pytest.raises(UserError, match="compressed"):
    torch_file.read(_write(path, weights, compression=zipfile.ZIP_DEFLATED))
  with zipfile.ZipFile(path, "w") as file:
    file.writestr("photo.jpg", b"")
  with pytest.raises(UserError, match="a zip that torch"):
    torch_file.read(path)
  data = bytearray(_write(path, weights).read_bytes())
  data[data.index(np.arange(6, dtype="<f4").tobytes())] ^= 1
  path.write_bytes(data)
  with pytest.raises(UserError, match="Bad CRC"):
    torch_file.read(path)
  monkeypatch.setattr(torch_pickle, "_MOST_STEPS", 10)
  with pytest.raises(UserError, match="too long"):
    torch_file.read(_write(path, weights))


@pytest.mark.parametrize("file", [_OLD, _NEW])
def test_cut_off_anywhere(file, path):
  whole = file.read_bytes()
  ends = range(3, len(whole), 53)
  for end in [*ends, *range(len(whole) - 30, len(whole))]:
    path.write_bytes(whole[:end])
    with pytest.raises(UserError, match="cut off or damaged"):
      torch_file.read(path)


def test_every_step_of_a_pickle_is_known_or_refused(path):
  for step in pickletools.opcodes:
    for left in (b"", b"N", b"NN", b"(N", b"}(NN", b"](N"):
      code = left + step.code.encode("latin-1") + b"1\n1\n"
      path.write_bytes(b"\x80\2" + code + b".")
      with pytest.raises(UserError):
        torch_file.read(path)


def test_agrees_with_torch(path):
  torch = pytest.importorskip("torch")
  model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
  tree = {"model": model.state_dict(), "counts": collections.Counter("ab")}
  for is_zip in (True, False):
    for protocol in (1, 2, 4, 5):
      torch.save(
        tree, path, pickle_protocol=protocol,
        _use_new_zipfile_serialization=is_zip,
      )  # fmt: skip
      got = torch_file.read(path)
      assert got.keys() == model.state_dict().keys()
      for name, tensor in model.state_dict().items():
        assert_array_equal(got[name], tensor.numpy(), strict=True)
