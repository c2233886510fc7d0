"""Same person or not: what the page says of a threshold."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from unreid_jax.report import charts
from unreid_jax.report.charts import Chart
from unreid_jax.verification import RATES, decide


def describe(
  card: Mapping[str, Any], estimated: Mapping[str, Any]
) -> tuple[list[str], list[Chart]]:
  """How well a threshold tells, and how well the labels would have set it.

  Args:
    card: what `Evaluation.card` says of the encoder.
    estimated: what the pseudo labels say of it.

  Returns:
    Sentences and charts; none if the card has no threshold.
  """
  card = card.get("same_person")
  if not card:
    return [], []
  threshold = card["threshold"]
  found = decide(np.array([threshold]), card)
  text = [
    f"By the {card['source']}: at a squared distance of {threshold:.3f} "
    f"(cosine similarity {1 - threshold / 2:.3f}) "
    f"{100 * found.far[0]:.1f} % of the pairs of different people pass for one "
    f"person, and {100 * found.frr[0]:.1f} % of the pairs of one person do not."
  ]
  marks = {"threshold": threshold}
  estimated = estimated.get("same_person")
  if estimated and estimated["source"] != card["source"]:
    marks["estimated"] = value = estimated["threshold"]
    there = decide(np.array([value]), card)
    text.append(
      f"The {estimated['source']} of the train set would have set it to "
      f"{value:.3f}, with error rates of {100 * there.far[0]:.1f} % and "
      f"{100 * there.frr[0]:.1f} %."
    )
  draws = np.linspace(0.0005, 0.9995, 4000)
  names = {"same": "same person", "different": "different people"}
  values = {
    name: np.interp(draws, RATES, card[key]) for key, name in names.items()
  }
  rates = np.geomspace(1e-5, 1, 60)
  at = np.interp(rates, RATES, card["different"])
  tar = np.interp(at, card["same"], RATES, left=0)
  roc = {"TAR": (rates.tolist(), tar.tolist())}
  label, title = "squared distance", "False and true accept rates (ROC)"
  return text, [
    charts.histograms("Distances of pairs", values, label, marks),
    charts.lines(title, roc, "FAR", "TAR", log_x=True),
  ]
