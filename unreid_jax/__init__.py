"""Unsupervised person re-identification in JAX: one config, one number."""

import importlib
from typing import Any

__version__ = "0.2.0"


class UserError(ValueError):
  """A user's mistake, in one line: what is wrong, where, what to do next.

  `run.py` prints the line and exits with status 2, without a traceback.
  """

  def __init__(self, line: str):
    super().__init__(printable(line))


def printable(line: str) -> str:
  """The line with "?" for what a terminal would obey instead of showing it.

  Names of files, of tensors and values are others', and may hold anything.
  """
  return "".join(c if c.isprintable() else "?" for c in line)


def __getattr__(name: str) -> Any:
  """`load_encoder`, `rank` and `rerank`, imported when first asked for."""
  homes = {"load_encoder": "encode", "rank": "search", "rerank": "search"}
  if name in homes:
    module = importlib.import_module(f"unreid_jax.{homes[name]}")
    return getattr(module, name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
