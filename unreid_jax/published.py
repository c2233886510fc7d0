"""Published figures, and which run may stand beside them.

mAP and R1 in percent on the Market protocol, without re-ranking, of the best
epoch; the encoder is a ResNet-50 or its IBN-a form at 256x128 that starts from
ImageNet weights, or a vision transformer that starts from those of CLIP or
LUPerson. Of hyper-parameters those are compared that tell two figures apart.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

_ENCODER = {"encoder.arch": "resnet50", "encoder.width": 1.0}
_ENCODER |= {"dataset.height": 256, "dataset.width": 128}


class Published(NamedTuple):
  """A row of a paper's or a repository's table."""

  method: str
  dataset: str
  mAP: float
  R1: float
  source: str
  needs: Mapping[str, Any]  # settings of a run that may be compared with it


_CC, _CC_LOG = "Cluster Contrast, README", "Cluster Contrast, log"
_GEM = {"encoder.pooling": "gem", "batch_size": 256}
_DBSCAN, _INFOMAP = (
  _GEM | {"method.bank_update": "momentum", "method.clustering": x}
  for x in ("dbscan", "infomap")
)
_HARDEST = {"method.bank_update": "hardest"}
_LOG = {"encoder.arch": "resnet50_ibn_a", "method.eps": 0.4} | _GEM | _HARDEST
_VIT_S, _VIT_ICS, _CLIP = (
  {"encoder.arch": x, "encoder.pooling": "token", "batch_size": 256}
  for x in ("vit_small", "vit_small_ics", "clip_vit_base")
)
_MEAN_CLIP = _CLIP | {"method.bank_update": "momentum"}
_PCL, _SSL = "PCL-CLIP-USL", "TransReID-SSL"
_AVG = {"encoder.pooling": "avg"}
_IBN = {"encoder.arch": "resnet50_ibn_a"} | _AVG
_ROWS = {"method.memory": "two_rows"} | _AVG
_SCL = {"method.camera_penalty": 0.05}
_HHCL, _SPCL = "HHCL, README", "SpCL, README"
_PUBLISHED = [
  Published(*row)
  for row in (
    ("cluster_contrast", "market1501", 82.1, 92.3, _CC, _DBSCAN),
    ("cluster_contrast", "dukemtmc", 72.6, 84.9, _CC, _DBSCAN),
    ("cluster_contrast", "msmt17", 27.6, 56.0, _CC, _DBSCAN),
    ("cluster_contrast", "personx", 84.7, 94.4, _CC, _DBSCAN),
    ("cluster_contrast", "market1501", 83.0, 92.9, _CC, _INFOMAP),
    ("cluster_contrast", "dukemtmc", 73.6, 85.5, _CC, _INFOMAP),
    ("cluster_contrast", "msmt17", 31.2, 61.5, _CC, _INFOMAP),
    ("cluster_contrast", "personx", 86.6, 95.3, _CC, _INFOMAP),
    ("cluster_contrast", "market1501", 87.0, 94.6, _CC_LOG, _LOG),
    ("cluster_contrast", "market1501", 90.2, 95.5, _PCL, _CLIP | _HARDEST),
    ("cluster_contrast", "market1501", 88.5, 94.7, f"{_PCL}, log", _MEAN_CLIP),
    ("cluster_contrast", "msmt17", 67.5, 85.1, _PCL, _MEAN_CLIP),
    ("cluster_contrast", "market1501", 88.2, 94.2, _SSL, _VIT_S | _HARDEST),
    ("cluster_contrast", "msmt17", 40.9, 66.4, _SSL, _VIT_S | _HARDEST),
    ("cluster_contrast", "market1501", 89.6, 95.3, _SSL, _VIT_ICS | _HARDEST),
    ("cluster_contrast", "msmt17", 50.6, 75.0, _SSL, _VIT_ICS | _HARDEST),
    ("hhcl", "market1501", 84.2, 93.4, _HHCL, _ROWS),
    ("hhcl", "dukemtmc", 73.3, 85.1, _HHCL, _ROWS),
    ("hhcl", "msmt17", 31.8, 58.9, "HHCL, issue 7", _ROWS),
    ("spcl", "market1501", 73.1, 88.1, _SPCL, _AVG),
    ("spcl", "dukemtmc", 65.3, 81.2, _SPCL, _AVG),
    ("spcl", "msmt17", 19.1, 42.3, _SPCL, _AVG),
    ("spcl", "personx", 72.3, 88.1, _CC, _AVG),
    ("spcl", "market1501", 73.8, 88.4, _SPCL, _IBN),
    ("spcl", "msmt17", 24.0, 48.9, _SPCL, _IBN),
    ("selective", "market1501", 50.7, 78.9, "Unsup_ReID, logs", _SCL),
    ("supervised", "market1501", 87.2, 94.6, _HHCL, {}),
    ("supervised", "dukemtmc", 80.0, 89.8, _HHCL, {}),
  )
]
_RECONSTRUCTED = ("hngn", "dhcl_hnm")


def find(settings: Mapping[str, Any]) -> tuple[Published | None, str]:
  """The figure for a run, or why there is none.

  A run on MSMT17's second version, with its faces blurred, has none.

  Args:
    settings: the run's config by full paths of keys.
  """
  method, dataset = settings["method.name"], settings["dataset.name"]
  if method in _RECONSTRUCTED:
    return None, "the paper's figures are not known"
  rows = [x for x in _PUBLISHED if (x.method, x.dataset) == (method, dataset)]
  if not rows:
    return None, "none on this data set"
  if settings["dataset.version"] == "V2":
    return None, "none on version V2"
  if not settings["encoder.pretrained"]:
    return None, "none from random weights"
  for row in rows:
    needs = _ENCODER | row.needs
    if all(settings.get(key) == value for key, value in needs.items()):
      return row, ""
  return None, "none of this encoder and method"
