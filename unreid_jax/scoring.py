"""Scores of encoders, as a person reads them; those of a workdir."""

import contextlib
import functools
import pathlib
import tempfile

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Int
from ml_collections import ConfigDict

from unreid_jax import UserError, data, encode, methods, sharding
from unreid_jax.config import check, facts, from_json, resolve
from unreid_jax.evaluate import (
  Evaluation,
  by_labels,
  evaluate,
  export_features,
)
from unreid_jax.hosts import peers
from unreid_jax.preemption import Preemption
from unreid_jax.state import make_card
from unreid_jax.workdir import Workdir
from unreid_jax.workdir.checkpoints import find
from unreid_jax.workdir.writer import Writer


def score(config: ConfigDict | None, path: str, checkpoint: str = "") -> None:
  """Scores a workdir's last and best checkpoint and trains nothing.

  The encoders are the checkpoints'; the config says which data set they are
  scored on, and by which method's distance. The train images are read where
  there are no queries: then their features are written.

  Args:
    config: None: the run's own.
    path: the workdir, to whose log is written; "": there is none.
    checkpoint: what is scored instead: another checkpoint, or a file of
      PyTorch weights, whose encoder is the config's; see `load_encoder`.

  Raises:
    UserError: bad input, or there is no checkpoint.
  """
  with contextlib.ExitStack() as stack:
    config = config or from_json(Workdir(path).stored_config())
    peers.agree(facts(config))
    mesh = sharding.make_mesh(config.num_devices)
    stack.enter_context(jax.set_mesh(mesh))
    stack.enter_context(Preemption())
    check(config, mesh.size)
    keeps = bool(path)
    path = path or stack.enter_context(tempfile.TemporaryDirectory())
    workdir = Workdir(path)
    saved = filter(None, map(workdir.newest, ("last", "best")))
    saved = [checkpoint] if checkpoint else list(saved) or [find(path)]
    writer = stack.enter_context(Writer(workdir))
    distance = make_distance(resolve(config, 1))
    rows, dataset = {}, None
    for found in saved:
      name = checkpoint or f"step {found.name}"
      if name in rows:  # the last one is the best one too
        continue
      encoder = encode.load_encoder(found, make_card(config))
      dataset = dataset or load_test_set(config, encoder)
      if dataset.query is None and not keeps:
        raise UserError(
          "the data set has no queries: --mode=encode writes the features of a "
          "folder, or set --workdir to where they are to be written"
        )
      batch_size = config.evaluate_batch_size
      result = report_scores(
        encoder, distance, dataset, None, name, batch_size, writer
      )
      title = {"step": 0, "name": pathlib.Path(checkpoint).name}
      title = title if checkpoint else {"step": int(found.name)}
      rows[name] = title | result.scores
    writer.table(list(rows.values()))


def load_test_set(config: ConfigDict, encoder: encode.Encoder) -> data.Dataset:
  """Queries and gallery at the encoder's size; without any, the train set."""
  size = {name: encoder.card[name] for name in ("height", "width")}
  load = functools.partial(data.load, **config.dataset.to_dict() | size)
  dataset = load(splits=("query", "gallery"))
  return load(splits=("train",)) if dataset.query is None else dataset


def report_scores(
  encoder: encode.Encoder,
  distance: methods.Distance,
  dataset: data.Dataset,
  labels: Int[np.ndarray, " n"] | None,
  name: str,
  batch_size: int,
  writer: Writer,
) -> Evaluation:
  """Scores an encoder; without queries, exports the train set's features.

  Then its pseudo labels, if they are given, set the encoder's threshold.
  """
  if dataset.query is None:
    path = writer.workdir.features
    features = export_features(encoder, dataset.train, batch_size, path)
    writer.log(f"{name:<19} features are in {path}")
    if labels is None:
      return Evaluation({}, {})
    return by_labels(features, labels, dataset.train.camids)
  found = evaluate(encoder, distance, dataset, batch_size)
  text = "  ".join(f"{key} {100 * x:.1f}" for key, x in found.scores.items())
  writer.log(f"{name:<19} {text}")
  return found


def make_distance(config: ConfigDict) -> methods.Distance:
  """The distance of a resolved config's method, on the mesh in use."""
  copies = NamedSharding(jax.sharding.get_mesh(), sharding.COPY)
  method = methods.make(**config.method.to_dict())
  return jax.jit(method.distance, out_shardings=copies)


def is_best(
  scores: dict[str, float], history: list[dict], saved: int | None
) -> bool:
  """Whether mAP is higher than that of the best encoder, saved at a step.

  It is the test set's, as usual. What a killed run had found to be better, but
  has lost, does not count.
  """
  best = [line["mAP"] for line in history if line["step"] == saved]
  return bool(scores) and all(scores["mAP"] > mAP for mAP in best)
