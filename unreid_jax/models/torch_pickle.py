"""The pickle in a file of torch.save, understood without being run.

A pickle is a program: it may import and call whatever it names. Here
`pickletools` only takes it apart, and `follow` builds what it says about
tensors, containers, texts and numbers. A name in it is a text, looked up in the
tables below; nothing is imported, called or given an attribute because the file
says so. The pickle's length bounds the memory, and the time.
"""

import io
import mmap
import pickletools
import re
from typing import Any, NamedTuple

from unreid_jax import UserError

ALONE = "save model.state_dict() alone, where PyTorch is installed"
_MOST_STEPS = 1_000_000  # 3 seconds; the weights of a ResNet-152 take 40,000
# The dtypes of storages, by the names of their classes.
_TYPES = {"Float": "float32", "Double": "float64", "Half": "float16"}
_TYPES |= {"BFloat16": "bfloat16", "Bool": "bool", "Byte": "uint8"}
_TYPES |= {"Char": "int8", "Short": "int16", "Int": "int32", "Long": "int64"}
_TYPES |= {"ComplexFloat": "complex64", "ComplexDouble": "complex128"}
_TYPES |= {"Untyped": "uint8"}
_STORAGES = {
  f"{module}.{name}Storage": dtype
  for name, dtype in _TYPES.items()
  for module in ("torch", "torch.cuda", "torch.storage")
}
_FLOAT8 = {f"float8_{x}" for x in ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz")}
_DTYPES = {*_TYPES.values(), "uint16", "uint32", "uint64", *_FLOAT8}
_DTYPES = {f"torch.{dtype}": dtype for dtype in _DTYPES}
_TENSORS = {f"torch._utils._rebuild_tensor{x}" for x in ("", "_v2", "_v3")}
_AROUND = {  # functions whose first argument is a tensor already
  "torch._utils._rebuild_parameter",
  "torch._utils._rebuild_parameter_with_state",
  "torch._utils._rebuild_device_tensor_from_cpu_tensor",
}
_OF_TYPE = "torch._tensor._rebuild_from_type_v2"
_DICTS = {"collections.OrderedDict", "collections.defaultdict"}
_DICTS |= {"easydict.EasyDict", "yacs.config.CfgNode"}
_KNOWN = {*_STORAGES, *_DTYPES, *_TENSORS, *_AROUND, *_DICTS, _OF_TYPE}
# What often lies beside weights, and says nothing of them.
_IGNORED = re.compile(
  r"builtins\.(object|dict|list|tuple|set|frozenset|int|float|bool|complex"
  r"|str|bytes|bytearray|slice|range)|copyreg\._reconstructor|_codecs\.encode"
  r"|collections\.(Counter|deque)|argparse\.Namespace|types\.SimpleNamespace"
  r"|datetime\.(date|time|datetime|timedelta)"
  r"|pathlib\.(_local\.)?(Pure)?(Posix|Windows)?Path"
  r"|numpy\.(ndarray|dtype|dtypes\.\w+|bool_?|u?int\d+|float\d+)"
  r"|numpy\.(_core|core)\.multiarray\.(scalar|_reconstruct)"
  r"|numpy\.(_core|core)\.numeric\._frombuffer"
  r"|torch\.(Size|Tensor|device|\w+_format|strided|nn\.parameter\.\w+)"
  r"|torch\.serialization\._get_layout"
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


class Storage(NamedTuple):
  """Numbers that tensors share: `size` of them, from number `start` on."""

  dtype: str
  key: str
  size: int
  start: int


class Tensor(NamedTuple):
  """A view of a storage; offset and strides in numbers, all unchecked."""

  storage: Storage
  dtype: str
  offset: int
  shape: tuple
  strides: tuple


class _Name(NamedTuple):
  """What a pickle calls a class or a function, which nobody looks up."""

  path: str


class Ignored:
  """What is neither a tensor nor a container, text or number."""


def follow(stream: io.BytesIO | mmap.mmap) -> tuple[Any, dict[str, Storage]]:
  """What the pickle at the stream's position describes, and its storages.

  Dictionaries keep the entries only whose keys are texts.

  Raises:
    UserError: it names something that is not known to be harmless, or is long.
    Exception: of some kind, if it is damaged.
  """
  stack, below, memo, storages = [], [], {}, {}
  for count, (step, given, _) in enumerate(pickletools.genops(stream)):
    if count > _MOST_STEPS:
      raise UserError(f"its pickle is too long to be one of weights: {ALONE}")
    takes, taken = step.stack_before, []
    if pickletools.markobject in takes:
      taken, stack = stack, below.pop()
      takes = takes[: takes.index(pickletools.markobject)]
    taken = [stack.pop() for _ in takes][::-1] + taken
    match step.name:
      case "STOP":
        return taken[0], storages
      case "PROTO" | "FRAME" | "POP" | "POP_MARK":
        pass
      case "MARK":
        below.append(stack)
        stack = []
      case "PUT" | "BINPUT" | "LONG_BINPUT":
        memo[given] = stack[-1]
      case "MEMOIZE":
        memo[len(memo)] = taken[0]
        stack.append(taken[0])
      case "GET" | "BINGET" | "LONG_BINGET":
        stack.append(memo[given])
      case "EMPTY_TUPLE" | "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
        stack.append(tuple(taken))
      case "EMPTY_LIST" | "LIST":
        stack.append(taken)
      case "EMPTY_DICT" | "DICT":
        stack.append(_put({}, taken))
      case "APPEND" | "APPENDS":
        if isinstance(taken[0], list):
          taken[0].extend(taken[1:])
        stack.append(taken[0])
      case "SETITEM" | "SETITEMS":
        stack.append(_put(taken[0], taken[1:]))
      case "EMPTY_SET" | "ADDITEMS" | "FROZENSET":
        stack.append(Ignored())
      case "BUILD":  # would give the object attributes
        stack.append(taken[0])
      case "GLOBAL":
        stack.append(_name(*given.split(" ", 1)))
      case "STACK_GLOBAL":
        if not all(isinstance(x, str) for x in taken):
          raise ValueError("it names something by what is no text")
        stack.append(_name(*taken))
      case "INST":
        stack.append(_call(_name(*given.split(" ", 1)), tuple(taken)))
      case "REDUCE" | "NEWOBJ" | "NEWOBJ_EX":
        stack.append(_call(*taken[:2]))
      case "BINPERSID":
        storage = _storage(taken[0])
        if storages.setdefault(storage.key, storage).dtype != storage.dtype:
          raise ValueError(f"storage {storage.key} has two types")
        stack.append(storage)
      case kind if kind in _CONSTANTS:
        stack.append(_CONSTANTS[kind])
      case _ if step.arg and step.stack_after[0] is not pickletools.anyobject:
        stack.append(given)
      case kind:
        raise UserError(
          f"its pickle has a {kind}, which torch.save never writes: {ALONE}"
        )
  raise ValueError("its pickle has no end")


def _name(module: str, name: str) -> _Name:
  old = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # of Python 2
  path = f"{old.get(module, module)}.{name}"
  if path not in _KNOWN and not _IGNORED.fullmatch(path):
    if path.startswith("torch._utils._rebuild_"):  # quantised, sparse, ...
      raise UserError(
        f"it has a tensor of a kind that is not read ({path}): save the "
        "weights as plain float32"
      )
    raise UserError(
      f"it holds {path}, which is no weight, and was not opened: {ALONE}"
    )
  return _Name(path)


def _call(name: _Name, arguments: tuple) -> Any:
  """What the pickle wants a call for."""
  match name.path, arguments:
    case path, (Storage() as storage, *view) if path in _TENSORS:
      offset, shape, strides, _, _, *rest = (*view, None, None)
      is_v3 = path.endswith("v3")
      dtype = _DTYPES[rest[0].path] if is_v3 else storage.dtype
      return Tensor(storage, dtype, offset, shape, strides)
    case path, (Tensor() as tensor, *_) if path in _AROUND:
      return tensor
    case path, (_Name() as inner, _, inside, *_) if path == _OF_TYPE:
      return _call(inner, inside)
    case "collections.OrderedDict", ([*pairs],):  # Python 2
      return _put({}, [x for key, value in pairs for x in (key, value)])
    case path, _ if path in _DICTS:
      return {}
    case path, _ if _IGNORED.fullmatch(path):
      return Ignored()
  raise ValueError(f"{name.path} has other arguments")


def _put(target: Any, items: list) -> Any:
  """Puts keys and values that alternate; only texts name a tensor."""
  pairs = zip(items[::2], items[1::2], strict=True)
  if isinstance(target, dict):
    target.update((key, value) for key, value in pairs if isinstance(key, str))
  return target


def _storage(what: Any) -> Storage:
  match what:
    case ("storage", _Name(path), str(key), _, int(size), *view):
      start = 0
      if view and view[0] is not None:
        _, start, size = view[0]
      return Storage(_STORAGES[path], key, size, start)
  raise ValueError("it refers to something that is not a storage")
