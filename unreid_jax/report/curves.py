"""What a run has written about itself, as charts."""

import re
from collections.abc import Iterable

import numpy as np
from ml_collections import ConfigDict

from unreid_jax import optim, values
from unreid_jax.report import charts
from unreid_jax.report.charts import Chart

_PERCENT = 100.0
# The charts that every run has: title, kind of line, keys, scale.
_COMMON = (
  ("Scores, %", "evaluate", ("mAP", "R1", "R5", "R10"), _PERCENT),
  ("Verification, %", "evaluate",
   ("EER", "TAR@FAR=1e-3", "TAR@FAR=1e-4"), _PERCENT),
  ("Loss", "train", ("loss",), 1.0),
  ("Clusters and outliers", "cluster", ("clusters", "outliers"), 1.0),
  ("Truth of the clusters, %", "cluster",
   ("precision", "recall", "NMI", "ARI"), _PERCENT),
  ("Cluster sizes", "cluster", ("size_min", "size_median", "size_max"), 1.0),
  ("Norms", "train", ("grad_norm", "param_norm"), 1.0),
)  # fmt: skip
_ELSEWHERE = {"step", "kind", "mINP", "size_q25", "size_q75", "loss"}
# A line of `Writer.track` in log.txt.
_PHASE = re.compile(
  r"^\S+ \S+  (.*?)\s+[\d,]+ \w+ in "
  r"(?:(\d+) h )?(?:(\d+) min ?)?(?:([\d.]+) s)? \("
)


def common(history: dict[str, list[dict]], config: ConfigDict) -> list[Chart]:
  """The charts that every run has, of those lines that it has written."""
  out = [
    _chart(title, history.get(kind, ()), keys, scale)
    for title, kind, keys, scale in _COMMON
  ]
  out.insert(3, learning_rate(history.get("train", ()), config))
  return [chart for chart in out if chart]


def own(history: dict[str, list[dict]]) -> list[Chart]:
  """The figures of the method itself: all that `common` does not show.

  Figures of one kind whose names begin alike share a chart, as loss_local and
  loss_global do.
  """
  shown = _ELSEWHERE.union(*(keys for _, _, keys, _ in _COMMON))
  out = []
  for kind in ("cluster", "train", "epoch"):
    lines, groups = history.get(kind, ()), {}
    for key in dict.fromkeys(key for line in lines for key in line):
      if key not in shown:
        groups.setdefault(key.partition("_")[0], []).append(key)
        shown.add(key)
    out += [
      _chart(keys[0] if len(keys) == 1 else f"{name} ...", lines, keys)
      for name, keys in groups.items()
    ]
  return [chart for chart in out if chart]


def learning_rate(lines: Iterable[dict], config: ConfigDict) -> Chart | None:
  """The learning rate at each step that the run has reported."""
  options = {key: config.optim[key] for key in values.fields(optim.schedule)}
  options["milestones"] = tuple(options["milestones"])  # JSON has lists
  rate = optim.schedule(**options)
  steps = [line["step"] for line in lines][:: max(1, len(list(lines)) // 200)]
  if not steps:
    return None
  rates = [float(rate(step - 1)) for step in steps]
  return charts.lines("Learning rate", {"learning rate": (steps, rates)})


def seconds(log: str) -> list[tuple[str, int, float]]:
  """How often each phase has run, and its seconds in all, longest first."""
  total: dict[str, tuple[int, float]] = {}
  for line in log.splitlines():
    if found := _PHASE.match(line):
      name, hours, minutes, rest = found.groups()
      name = "train" if name.startswith("epoch ") else name
      count, before = total.get(name, (0, 0.0))
      took = 3600 * int(hours or 0) + 60 * int(minutes or 0) + float(rest or 0)
      total[name] = count + 1, before + took
  return sorted(((n, *x) for n, x in total.items()), key=lambda x: -x[2])


def _chart(title, lines, keys, scale=1.0) -> Chart | None:
  series = {}
  for key in keys:
    known = [(line["step"], line[key]) for line in lines if key in line]
    if known:
      x, y = np.array(known, float).T
      series[key] = x.tolist(), (scale * y).tolist()
  return charts.lines(title, series) if series else None
