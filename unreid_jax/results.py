"""Finished runs in a table, beside the published figures.

  python -m unreid_jax.results runs/* > table.md
  python -m unreid_jax.results --format=csv runs/* > table.csv

Runs that differ in nothing but their seeds are one row: mean and standard
deviation, in percent. "Before" is the encoder before training; "best" the best
epoch on the test set, which is what the authors publish too, so that it is what
the difference is taken of. Markdown has what all rows share beneath the table.
"""

import argparse
import csv
import dataclasses
import io
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict

from unreid_jax import UserError, values
from unreid_jax.config import is_off, kinds
from unreid_jax.published import find
from unreid_jax.terminal import duration
from unreid_jax.workdir import Workdir
from unreid_jax.workdir.sessions import read_sessions
from unreid_jax.workdir.writer import read_metrics

# Where a run happens, what it reports, and what is another seed's. A method's
# marks are not among them: they may change its score.
_ELSEWHERE = {k for k, kind in kinds().items() if values.has(kind, values.FREE)}
_ELSEWHERE -= {"epochs"}
_ELSEWHERE |= {"seed", "dataset.seed", "dataset.root", "dataset.cache_dir"}
_NEEDED = ("seed", "method.name", "dataset.name", "dataset.version")
_NEEDED += ("dataset.height", "dataset.width", "encoder.arch", "encoder.width")
_NEEDED += ("encoder.head", "encoder.pooling", "encoder.pretrained")
_SCORES = ("mAP", "R1")
Row = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished run: its config by full paths of keys, scores, sessions."""

  settings: Mapping[str, Any]
  before: Mapping[str, Any] | None
  last: Mapping[str, Any]
  best: Mapping[str, Any]
  sessions: Sequence[Mapping[str, Any]]


def main(arguments: Sequence[str] | None = None) -> None:
  """The command line."""
  parser = argparse.ArgumentParser("python -m unreid_jax.results")
  parser.add_argument("workdirs", nargs="+", metavar="WORKDIR")
  formats = {"markdown": to_markdown, "csv": to_csv}
  parser.add_argument("--format", choices=formats, default="markdown")
  options = parser.parse_args(arguments)
  runs = []
  for path in options.workdirs:
    run = read_run(path)
    if isinstance(run, str):
      print(f"{path}: {run}, left out", file=sys.stderr)
    else:
      runs.append(run)
  print(formats[options.format](make_rows(runs)), end="")


def read_run(path: str) -> Run | str:
  """The run in a workdir, or why it has no place in a table.

  Raises:
    UserError: it is damaged.
  """
  workdir = Workdir(path)
  if not workdir.metrics.exists():
    return "holds no run"
  settings = flatten_dict(workdir.stored_config(), sep=".")
  if missing := [key for key in _NEEDED if key not in settings]:
    return f"of an earlier version, without {missing[0]}"
  weights = pathlib.Path(settings["encoder.pretrained"])
  settings["encoder.pretrained"] = weights.name  # wherever it lies
  sessions = read_sessions(workdir)
  if sessions and sessions[-1]["step"] < sessions[-1]["end"]:
    step, end = sessions[-1]["step"], sessions[-1]["end"]
    return f"stopped after step {step:,} of {end:,}"
  lines = read_metrics(workdir.metrics)
  lines = [x for x in lines if x["kind"] == "evaluate"]
  scores = [x for x in lines if x["step"]]
  if not scores:
    return "no score of a trained encoder"
  before = next((x for x in lines if not x["step"]), None)
  best = max(scores, key=lambda x: x["mAP"])
  return Run(settings, before, scores[-1], best, sessions)


def make_rows(runs: Sequence[Run]) -> list[Row]:
  """The cells of each row, by the names of the columns."""
  groups = {}
  for run in _of_one_version(runs):
    kept = {k: v for k, v in run.settings.items() if k not in _ELSEWHERE}
    groups.setdefault(repr(sorted(kept.items())), []).append(run)
  groups = sorted(groups.values(), key=lambda runs: _title(runs[0]))
  return [_row(runs, groups) for runs in groups]


def _of_one_version(runs):
  """The runs, those of earlier versions with the keys that others have off."""
  off = {}
  for run in runs:
    method = run.settings["method.name"]
    known = off.setdefault(_title(run), {})
    known |= {k: x for k, x in run.settings.items() if is_off(k, x, method)}
  filled = ((run, off[_title(run)] | dict(run.settings)) for run in runs)
  return [dataclasses.replace(run, settings=full) for run, full in filled]


def _row(runs, groups) -> Row:
  method, dataset, encoder = _title(runs[0])
  row = {"method": method, "data set": dataset, "encoder": encoder}
  seeds = sorted(run.settings["seed"] for run in runs)
  row["seeds"] = ", ".join(map(str, seeds))
  for which in ("before", "last", "best"):
    lines = [x for run in runs if (x := getattr(run, which))]
    for score in _SCORES:
      mean, sd = _spread([100 * x[score] for x in lines])
      row |= {f"{which} {score}": mean, f"{which} {score} sd": sd}
  row |= _comparison(runs)
  row |= _circumstances(runs)
  row["other settings"] = _others(runs[0], groups)
  return row


def _spread(values: Sequence[float]) -> tuple[str, str]:
  """Mean and standard deviation, or why there is none."""
  if not values:
    return "not measured", "not measured"
  mean = f"{statistics.fmean(values):.1f}"
  return mean, f"{statistics.stdev(values):.1f}" if values[1:] else "one run"


def _comparison(runs) -> Row:
  """The published figure and the best epochs' distance from it."""
  columns = [f"published {x}" for x in _SCORES]
  columns += [f"{x} difference" for x in _SCORES] + ["source"]
  figure, reason = find(runs[0].settings)
  if not figure:
    return dict.fromkeys(columns, "no figure") | {columns[0]: reason}
  theirs = [getattr(figure, x) for x in _SCORES]
  ours = [statistics.fmean(100 * run.best[x] for run in runs) for x in _SCORES]
  cells = [f"{x:.1f}" for x in theirs]
  cells += [f"{x - y:+.1f}" for x, y in zip(ours, theirs, strict=True)]
  return dict(zip(columns, [*cells, figure.source], strict=True))


def _circumstances(runs) -> Row:
  """How long the runs took, on what and with which code."""
  sessions = [x for run in runs for x in run.sessions]
  seconds = [sum(x["seconds"] for x in run.sessions) for run in runs]
  unknown = "not noted"
  mean = statistics.fmean(seconds)
  cells = {"time": duration(mean) if all(seconds) else unknown}
  for key in ("hardware", "jax", "commit"):
    known = sorted({x[key] or "no checkout" for x in sessions})
    cells[key] = ", ".join(known) or unknown
  return cells


def _title(run) -> tuple[str, str, str]:
  """The method, the data set and the encoder of a run."""
  s = run.settings
  method, dataset = s["method.name"], s["dataset.name"]
  if "method.base.name" in s:
    method += f" over {s['method.base.name']}"
  dataset += f" {s['dataset.version']}" if s["dataset.version"] else ""
  width = "" if s["encoder.width"] == 1 else f" x {s['encoder.width']:g}"
  weights = s["encoder.pretrained"] or "random weights"
  size = f"{s['dataset.height']}x{s['dataset.width']}"
  pooling = s["encoder.pooling"] if s["encoder.head"] == "neck" else "stripes"
  encoder = f"{s['encoder.arch']}{width}, {pooling}, {size}, {weights}"
  return method, dataset, encoder


def _others(run, groups) -> str:
  """In which settings the rows differ that would look like the same one."""
  alike = [g[0].settings for g in groups if _title(g[0]) == _title(run)]
  keys = sorted({key for s in alike for key in s} - _ELSEWHERE)
  differ = [k for k in keys if len({repr(s.get(k)) for s in alike}) > 1]
  return ", ".join(f"{k}={run.settings.get(k)}" for k in differ) or "none"


def to_markdown(rows: Sequence[Row]) -> str:
  """A table of Markdown, with mean and deviation in one cell.

  A column of one value is no column, but in a sentence beneath the table.
  """
  cells = [
    {key: _with_deviation(row, key) for key in row if not key.endswith(" sd")}
    for row in rows
  ]
  shared = {}
  for key in cells[0] if cells[1:] else ():
    if len(found := {row[key] for row in cells}) == 1:
      shared.setdefault(found.pop(), []).append(key)
  hidden = {key for keys in shared.values() for key in keys}
  cells = [{k: x for k, x in row.items() if k not in hidden} for row in cells]
  lines = [_line(row.values()) for row in cells]
  if lines:
    lines = [_line(cells[0]), _line("---" for _ in cells[0]), *lines]
  if shared:
    each = (f"{', '.join(keys)}: {value}" for value, keys in shared.items())
    lines.append(f"\nThe same in all rows: {'; '.join(each)}.\n")
  return "".join(lines)


def _with_deviation(row, key) -> str:
  deviation = row.get(f"{key} sd", "")
  is_figure = deviation.replace(".", "").isdigit()
  return f"{row[key]} ± {deviation}" if is_figure else row[key]


def to_csv(rows: Sequence[Row]) -> str:
  """The same with a column for each deviation."""
  text = io.StringIO()
  writer = csv.DictWriter(text, list(rows[0]) if rows else [])
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue()


def _line(cells):
  return f"| {' | '.join(str(x).replace('|', '/') for x in cells)} |\n"


if __name__ == "__main__":
  try:
    main()
  except (UserError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
