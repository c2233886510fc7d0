"""Plots what several runs have reached, epoch by epoch.

  python benchmarks/plot_runs.py OUT.png mAP,EER,precision,recall \
      NAME=WORKDIR[,WORKDIR...] [NAME=WORKDIR...]

Needs matplotlib. Each figure has a panel, in percent, and each name a line: the
mean of its workdirs, which are seeds of one run, with dots for each of them.
Figures are those of evaluations and of clusterings in metrics.jsonl.
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
  names = names.split(",")
  _, panels = plt.subplots(
    1, len(names), figsize=(4 * len(names), 3.6), squeeze=False
  )
  for number, run in enumerate(runs):
    title, _, workdirs = run.partition("=")
    each = [read(workdir) for workdir in workdirs.split(",")]
    for panel, name in zip(panels[0], names, strict=True):
      values = collections.defaultdict(list)
      for figures in each:
        for epoch, value in figures[name].items():
          values[epoch].append(value)
      epochs, color = sorted(values), f"C{number}"
      means = [statistics.mean(values[x]) for x in epochs]
      panel.plot(epochs, means, color, label=title)
      for epoch in epochs:
        dots = [epoch] * len(values[epoch]), values[epoch]
        panel.plot(*dots, ".", color=color, alpha=0.5)
  for panel, name in zip(panels[0], names, strict=True):
    panel.set(title=f"{name}, %", xlabel="epoch")
    panel.grid(alpha=0.3)
  panels[0][0].legend(fontsize="small")
  plt.tight_layout()
  plt.savefig(path, dpi=90)


if __name__ == "__main__":
  main(*sys.argv[1:])
