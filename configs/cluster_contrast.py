"""Cluster Contrast (Dai et al., ACCV 2022, arXiv 2103.11568).

  python run.py --config=configs/cluster_contrast.py      drawn images, a laptop
  python run.py --config=configs/cluster_contrast.py:market1501
  python run.py --config=configs/cluster_contrast.py:cuhk03_np,small

The recipe on real data is the one of the authors' `run_code.sh`
(alibaba/cluster-contrast-reid): 16 clusters x 16 images on four GPUs, whose
batch norm sees 64 images each, hence encoder.bn_group_size. Published,
ResNet-50 with GeM, mAP / R1: Market-1501 82.1 / 92.3, DukeMTMC-reID 72.6 /
84.9, MSMT17 27.6 / 56.0. Their log of 87.0 / 94.6 on Market-1501 is another
recipe:

  --config.encoder.arch=resnet50_ibn_a --config.method.bank_update=hardest
  --config.method.eps=.4 --config.steps_per_epoch=400

InfoMap instead of DBSCAN (83.0 / 92.9 on Market-1501): --config.method.k1=15
--config.method.clustering=infomap --config.method.eps=.5
--config.method.min_samples=5

Hardware there: four RTX 2080 Ti, 2 h 44 min for the log. We have not run these
recipes: ours needs their data, and ImageNet weights:
--config.encoder.pretrained=resnet50.pth.
"""

from configs import default


def get_config(arguments: str = "synthetic,small"):
  """The config for "DATASET", as the authors, or "DATASET,small"."""
  dataset, small = default.parse(arguments)
  config = default.get_config("cluster_contrast", dataset)
  config.encoder.pooling = "gem"
  if small:
    return default.small_clusters(config, **default.SMALL_CLUSTERING)
  steps = 400 if dataset == "msmt17" else 200
  return default.published_clusters(config, steps)
