"""Selective contrastive learning (Pang et al., TOMM 2022, arXiv 2010.07608).

  python run.py --config=configs/selective.py             synthetic, on a laptop
  python run.py --config=configs/selective.py:market1501  the authors' recipe
"""

from configs import default


def get_config(dataset: str = "synthetic"):
  """The config for a data set."""
  config = default.get_config("selective", dataset, warmup="3 epochs")
  config.encoder.head = "stripes"
  return config
