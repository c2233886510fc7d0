"""A run on one page: WORKDIR/report.html, which needs no network.

Each function here makes one part of the page; `write` is the page. The page
has no script; its charts are SVG, its pictures WebP.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jinja2
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Int
from ml_collections import ConfigDict

from unreid_jax.data import Dataset
from unreid_jax.encode import Encoder, flat
from unreid_jax.evaluate import Evaluation, by_labels
from unreid_jax.methods import Distance
from unreid_jax.report import charts, clusters, curves, pairs, ranks
from unreid_jax.report.charts import Chart
from unreid_jax.report.crops import MARKS, Row
from unreid_jax.workdir import Workdir, whole_file
from unreid_jax.workdir.writer import Writer

_SCORES = ("mAP", "R1", "R5", "R10", "mINP", "EER", "TAR@FAR=1e-3",
           "TAR@FAR=1e-4")  # fmt: skip


class Part(NamedTuple):
  """A part of the page."""

  id: str
  title: str
  text: Sequence[str] = ()
  tables: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]] = ()
  charts: Sequence[Chart] = ()
  rows: Mapping[str, Sequence[Row]] = {}


def write(
  encoder: Encoder,
  distance: Distance,
  dataset: Dataset,
  labels: Int[np.ndarray, " n"],
  found: Evaluation,
  step: int,
  config: ConfigDict,
  writer: Writer,
) -> dict[str, Any]:
  """Writes the report of a run.

  Args:
    encoder: the run's, as it is now.
    distance: the method's, jitted.
    dataset: with its train split, and with queries if they have been scored.
    labels: the pseudo labels of the train images; -1: outlier.
    found: what `evaluate` has found.
    step: how many steps are done.
    config: the run's, with durations in steps.
    writer: knows the workdir and its metrics.

  Returns:
    What may be added to the encoder's card; see `Evaluation.card`.

  Raises:
    UserError: the page cannot be written.
  """
  kinds = ("evaluate", "train", "cluster", "epoch")
  history = {kind: writer.history(kind) for kind in kinds}
  # All processes encode and rank together; the first one draws.
  mapped = _map(encoder, dataset, labels, config.evaluate_batch_size)
  ranked = None
  if dataset.query is not None:
    query_and_gallery = dataset.query, dataset.gallery
    ranked = ranks.rank(found, *query_and_gallery, distance)
  card = found.card or mapped.card
  if jax.process_index() > 0:
    return card
  same, distances = pairs.describe(card, mapped.card)
  parts = [_scores(history["evaluate"])]
  if ranked:
    parts += _ranked(ranked, *query_and_gallery)
  parts += [
    Part("same", "Same person?", same, charts=distances),
    _curves(history, config, writer.workdir),
    Part("method", "The method's own figures", charts=curves.own(history)),
    _clusters(dataset, labels),
    mapped.part,
    _card(encoder, config),
  ]
  parts = [part for part in parts if any(part[2:])]
  name = f"{config.method.name} on {config.dataset.name}"
  text = f"Unsupervised person re-identification, after {step:,} steps."
  page = render("report.html", title=name, subtitle=text, parts=parts)
  with whole_file(writer.workdir.report) as file:
    file.write(page.encode())
  writer.log(f"{f'step {step}':<20}report in {writer.workdir.report}")
  return card


def render(template: str, **values: Any) -> str:
  """A page of this folder, with all texts escaped."""
  return _templates().get_template(template).render(marks=MARKS, **values)


@functools.cache
def _templates():
  return jinja2.Environment(
    loader=jinja2.PackageLoader("unreid_jax", "report"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )


def _scores(lines) -> Part:
  """The first, the best and the last evaluation."""
  lines = [line for line in lines if "mAP" in line]
  if not lines:
    text = "The data set has no queries, so there is nothing to score."
    return Part("scores", "Scores", [text])
  best = max(lines, key=lambda line: (line["step"] > 0, line["mAP"]))
  body = []
  for line in {x["step"]: x for x in (lines[0], best, lines[-1])}.values():
    name = f"after {line['step']:,} steps" if line["step"] else "untrained"
    note = " (best)" if line is best else ""
    body.append([name + note, *(_percent(line.get(key)) for key in _SCORES)])
  body.sort(key=lambda line: "untrained" not in line[0])
  text = "In percent. The best one is chosen on the test set, as usual."
  return Part("scores", "Scores", [text], [(("", *_SCORES), body)])


def _percent(value):
  return "" if value is None else f"{100 * value:.1f}"


def _ranked(ranked, query, gallery) -> list[Part]:
  text, people = ranks.confusions(ranked, query, gallery)
  lists = ranks.lists(ranked, query, gallery)
  legend = (
    "Each list begins with the query; then come the nearest gallery images. "
    "Images of its person under its own camera are not counted."
  )
  people = {"The most frequent ones": people} if people else {}
  return [
    Part("confused", "Who is taken for whom", [text], rows=people),
    Part("ranked", "Ranked lists", [legend], rows=lists),
  ]


def _curves(history, config, workdir: Workdir) -> Part:
  drawn = curves.common(history, config)
  log = workdir.log.read_text(errors="replace") if workdir.log.exists() else ""
  body = [
    (name, f"{count:,}", f"{took:,.1f}")
    for name, count, took in curves.seconds(log)
  ]
  tables = [(("phase", "times", "seconds in all"), body)] if body else []
  return Part("curves", "The course of the run", (), tables, drawn)


def _clusters(dataset, labels) -> Part:
  title = "Clusters of the last labelling"
  found = clusters.mosaic(dataset.train, labels)
  text = [] if found else ["The method has made no clusters."]
  return Part("clusters", title, text, rows=found)


class _Mapped(NamedTuple):
  part: Part
  card: dict


def _map(encoder, dataset, labels, batch_size) -> _Mapped:
  """A map of some train images, and the threshold that their labels set."""
  train = dataset.train
  kinds = {"label": labels, "person": train.pids}
  repeated = lambda x: len(np.unique(x[x >= 0])) < np.sum(x >= 0)
  kind = next((k for k, x in kinds.items() if repeated(x)), "image")
  groups = kinds.get(kind, np.zeros(len(labels), int))
  rows = clusters.sample(groups)
  features = flat(encoder(train.images[rows], batch_size, "encode map"))
  card = by_labels(features, labels[rows], train.camids[rows]).card
  if jax.process_index() > 0:
    return _Mapped(Part("map", ""), card)
  places = clusters.place(features)
  drawn = [
    charts.points(
      f"Coloured by {name}",
      places,
      values[rows],
      f"Map of {len(rows)} train images, coloured by {name}",
    )
    for name, values in {kind: groups, "camera": train.camids}.items()
  ]
  text = (
    f"{len(rows)} train images, laid out by t-SNE: what is near in the "
    "features is near here. Where the colours of the cameras form islands, the "
    "features show the camera, not the person."
  )
  if (groups < 0).any():
    text += " Crosses are outliers."
  return _Mapped(Part("map", "Map of the features", [text], charts=drawn), card)


def _card(encoder, config) -> Part:
  """What ran: the code, the machine, and every key of the config."""
  made_by = encoder.card.get("made_by", {})
  known = [(key, x) for key, x in made_by.items() if x is not None]
  plain = json.loads(json.dumps(config.to_dict()))
  keys = sorted(flatten_dict(plain, sep=".").items())
  body = [*known, *((key, json.dumps(x)) for key, x in keys)]
  return Part("card", "What ran", tables=[(("key", "value"), body)])
