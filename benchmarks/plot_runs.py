"""Plots what several runs have reached, epoch by epoch.

  python benchmarks/plot_runs.py OUT.png mAP,EER,precision,recall \
      NAME=WORKDIR[,WORKDIR...] [NAME=WORKDIR...]

Needs matplotlib. Each figure has a panel, in percent, and each name a line: the
mean of its workdirs, which are seeds of one run, with dots for each of them. A
name like hhcl/PyTorch means PyTorch, in panels of hhcl's own. Figures are those
of evaluations and of clusterings in metrics.jsonl.
"""

import collections
import json
import pathlib
import statistics
import sys

import matplotlib.pyplot as plt


def read(workdir: str) -> dict[str, dict[int, float]]:
  """Each figure, in percent, by the epochs after which it was measured."""
  folder = pathlib.Path(workdir)
  config = json.loads((folder / "config.json").read_text())
  text = (folder / "metrics.jsonl").read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  sessions = json.loads((folder / "sessions.json").read_text())["sessions"]
  end = sessions[-1]["end"]
  figures = collections.defaultdict(dict)
  for line in lines:
    if line["kind"] in ("evaluate", "cluster"):
      # A clustering is written down with the first step that uses it.
      step = line["step"] - (line["kind"] == "cluster")
      for name, value in line.items():
        if isinstance(value, float):
          figures[name][round(step * config["epochs"] / end)] = 100 * value
  return figures


def main(path: str, names: str, *runs: str) -> None:
  titles, workdirs = zip(*(run.split("=", 1) for run in runs), strict=True)
  groups = list(dict.fromkeys(title.rpartition("/")[0] for title in titles))
  of_panels = [(group, name) for group in groups for name in names.split(",")]
  columns = min(len(of_panels), 4)
  rows = -(-len(of_panels) // columns)
  size = (4 * columns, 3.6 * rows)
  figure = plt.figure(figsize=size, layout="constrained")
  for place, (group, name) in enumerate(of_panels, 1):
    panel = figure.add_subplot(rows, columns, place)
    for title, folders in zip(titles, workdirs, strict=True):
      if title.rpartition("/")[0] == group:
        draw(panel, title.rpartition("/")[2], name, folders.split(","))
    panel.set(title=f"{group} {name}, %".strip(), xlabel="epoch")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(alpha=0.3)
    if group:
      panel.legend(fontsize="small")
  if groups == [""]:  # all panels have the same lines
    lines = panel.get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=len(runs))
  plt.savefig(path, dpi=90)


def draw(panel, title: str, name: str, workdirs: list[str]) -> None:
  """One line of a panel, and its dots."""
  values = collections.defaultdict(list)
  for workdir in workdirs:
    for epoch, value in read(workdir)[name].items():
      values[epoch].append(value)
  epochs = sorted(values)
  means = [statistics.mean(values[x]) for x in epochs]
  (line,) = panel.plot(epochs, means, label=title)
  for epoch in epochs:
    dots = [epoch] * len(values[epoch]), values[epoch]
    panel.plot(*dots, ".", color=line.get_color(), alpha=0.5)


if __name__ == "__main__":
  main(*sys.argv[1:])
