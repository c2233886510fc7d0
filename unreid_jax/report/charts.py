"""Charts as SVG that stands in the page and takes its colours."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

Numbers = Sequence[float | int]
Series = Mapping[str, tuple[Numbers, Numbers]]
_INK, _GRID = "#010203", "#010204"  # become colours of the page
# Near Okabe and Ito's, which colour-blind people tell apart, and legible on
# light and on dark; dashes help, too.
_COLOURS = ("#2a88c8", "#d9641e", "#12a07c", "#c973a8", "#a8861a")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)))
_MARKERS = "o^sDvP*X<"  # nine, and ten colours: ninety ways to look
_POINTS = 400  # of a line, at most
_STYLE = {
  "svg.fonttype": "none",  # text stays text, to be read out and searched
  "font.family": "sans-serif",
  "font.size": 9,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "grid.color": _GRID,
  "axes.axisbelow": True,
}
for _key in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color",
             "ytick.color"):  # fmt: skip
  _STYLE[_key] = _INK


class Chart(NamedTuple):
  """A drawing, what it shows in words, and its figures as a table."""

  title: str
  svg: str
  text: str  # the alternative text
  header: Sequence[str] = ()
  rows: Sequence[Sequence[str]] = ()


@matplotlib.rc_context(_STYLE)
def lines(
  title: str,
  series: Series,
  x_label: str = "step",
  y_label: str = "",
  log_x: bool = False,
  upright: Mapping[str, float] = {},
) -> Chart:
  """Lines over a common axis; `upright` marks some positions on it."""
  figure, axes = _figure()
  axes.set(xlabel=x_label, ylabel=y_label)
  if log_x:
    axes.set_xscale("log")
  for i, (name, (x, y)) in enumerate(series.items()):
    every = max(1, len(x) // _POINTS)
    marker = "." if len(x) < 25 else ""
    colour, dashes = _COLOURS[i % 5], _DASHES[i % 5]
    axes.plot(x[::every], y[::every], marker=marker, color=colour,
              linestyle=dashes, label=name)  # fmt: skip
  for name, x in upright.items():
    axes.axvline(x, color=_INK, linewidth=1, linestyle=":", label=name)
  if len(series) + len(upright) > 1:
    axes.legend(frameon=False)
  ends = [f"{name} from {_short(y[0])} to {_short(y[-1])}"
          for name, (_, y) in series.items() if len(y)]  # fmt: skip
  text = f"{title}: {'; '.join(ends)}"
  return Chart(title, _svg(figure, title), text, *_table(x_label, series))


@matplotlib.rc_context(_STYLE)
def histograms(
  title: str,
  values: Mapping[str, np.ndarray],
  x_label: str,
  upright: Mapping[str, float],
) -> Chart:
  """Distributions over each other, each of the same area."""
  figure, axes = _figure()
  axes.set(xlabel=x_label, ylabel="share of the pairs", yticks=[])
  everything = np.concatenate(list(values.values()))
  bins = np.linspace(*np.quantile(everything, (0, 0.999)), 60)
  for i, (name, array) in enumerate(values.items()):
    axes.hist(array, bins, density=True, histtype="stepfilled", alpha=0.35,
              color=_COLOURS[i], label=name)  # fmt: skip
    axes.hist(array, bins, density=True, histtype="step", color=_COLOURS[i],
              linestyle=_DASHES[i])  # fmt: skip
  for i, (name, x) in enumerate(upright.items()):
    axes.axvline(x, color=_INK, linewidth=1.2, linestyle=_DASHES[i], label=name)
  axes.legend(frameon=False)
  quantiles = (0.05, 0.25, 0.5, 0.75, 0.95)
  rows = [
    (name, *(_short(x) for x in np.quantile(array, quantiles)))
    for name, array in values.items()
  ]
  marks = "; ".join(f"{name} at {_short(x)}" for name, x in upright.items())
  medians = "; ".join(f"median of {row[0]} {row[3]}" for row in rows)
  header = ("pairs", *(f"{100 * q:.0f} % are nearer than" for q in quantiles))
  text = f"{title}: {medians}; {marks}"
  return Chart(title, _svg(figure, title), text, header, rows)


@matplotlib.rc_context(_STYLE)
def points(
  title: str, places: np.ndarray, groups: np.ndarray, text: str
) -> Chart:
  """A map of points; each group has a colour and a shape, -1 small crosses."""
  figure, axes = _figure(height=4.2)
  axes.set(xticks=[], yticks=[])
  axes.spines[:].set_visible(False)
  names = np.unique(groups)
  for i, name in enumerate(names):
    x, y = places[groups == name].T
    if name < 0:
      axes.scatter(x, y, marker="x", s=9, c=_INK, linewidth=0.6)
    else:
      axes.scatter(x, y, color=f"C{i % 10}", marker=_MARKERS[i % 9], s=14,
                   linewidth=0, label=str(name))  # fmt: skip
  if len(names) <= 8:
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
  return Chart(title, _svg(figure, title), text)


def _figure(height=2.6):
  figure = Figure(figsize=(5.2, height), layout="constrained")
  FigureCanvasSVG(figure)
  return figure, figure.add_subplot()


def _svg(figure, title) -> str:
  """The drawing without a size of its own, and with names of its own."""
  file = io.StringIO()
  with matplotlib.rc_context({"svg.hashsalt": title}):  # the same each time
    figure.savefig(
      file, format="svg", transparent=True, metadata={"Date": None}
    )
  svg = file.getvalue()
  svg = svg[svg.index("<svg") :]
  svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
  svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
  svg = svg.replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
  own = re.sub(r"\W+", "-", title)
  svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{own}-", svg)
  return re.sub(r"\n\s*", "\n", svg)


def _table(x_label, series):
  """At most 25 rows: the values of each line at common positions."""
  every = sorted({float(x) for xs, _ in series.values() for x in xs})
  some = every[:: max(1, -(-len(every) // 24))] + every[-1:]
  at = {name: dict(zip(map(float, x), y, strict=True))
        for name, (x, y) in series.items()}  # fmt: skip
  rows = [
    (_short(x), *(_short(at[name][x]) if x in at[name] else "" for name in at))
    for x in sorted(set(some))
  ]
  return (x_label, *series), rows


def _short(value) -> str:
  return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
