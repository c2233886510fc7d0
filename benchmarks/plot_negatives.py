"""Plots how hard HNGN's negatives are, epoch by epoch.

  python benchmarks/plot_negatives.py OUT.png NAME=WORKDIR [NAME=WORKDIR ...]

Needs matplotlib. One panel a run: similarity of the generated negatives to
their anchor, between that of the proxies which they start from and that of the
anchor's own centroid.
"""

import json
import pathlib
import sys

import matplotlib.pyplot as plt

LINES = {
  "own_to_anchor": ("the anchor's own centroid", "tab:green"),
  "to_anchor": ("generated negatives", "tab:red"),
  "proxy_to_anchor": ("the centroids they start from", "tab:blue"),
}


def main(path: str, *runs: str) -> None:
  _, panels = plt.subplots(
    1, len(runs), figsize=(4.5 * len(runs), 3.5), sharey=True, squeeze=False
  )
  for panel, run in zip(panels[0], runs, strict=True):
    name, _, workdir = run.partition("=")
    text = (pathlib.Path(workdir) / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    config = json.loads((pathlib.Path(workdir) / "config.json").read_text())
    end = max(x["step"] for x in lines)
    lines = [x for x in lines if x["kind"] == "epoch"]
    epochs = [x["step"] * config["epochs"] / end for x in lines]
    for key, (label, color) in LINES.items():
      panel.plot(epochs, [x[key] for x in lines], color, label=label)
    panel.set(title=name, xlabel="epoch", ylim=(0, 1))
    panel.grid(alpha=0.3)
  panels[0][0].set_ylabel("similarity to the anchor")
  panels[0][0].legend()
  plt.tight_layout()
  plt.savefig(path, dpi=100)


if __name__ == "__main__":
  main(*sys.argv[1:])
