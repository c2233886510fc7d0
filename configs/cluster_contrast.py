"""Cluster Contrast (Dai et al., ACCV 2022, arXiv 2103.11568).

  python run.py --config=configs/cluster_contrast.py      drawn images, a laptop
  python run.py --config=configs/cluster_contrast.py:market1501
  python run.py --config=configs/cluster_contrast.py:cuhk03_np,small
  python run.py --config=configs/cluster_contrast.py:market1501,clip
  python run.py --config=configs/cluster_contrast.py:market1501,vit_s

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

Two recipes have a vision transformer, mAP / R1 of its class token:

  DATASET,clip    CLIP's ViT-B/16; 90.2 / 95.5 on Market-1501 and 67.5 / 85.1 on
                  MSMT17 (Trangle12/PCL-CLIP-USL, an unofficial reproduction),
                  86.9 / 94.2 and 56.4 / 77.9 in PCL-CLIP (Li and Gong, 2023).
                  With eps=.5 and bank_update=momentum their log of Market-1501
                  ends at 88.5 / 94.7.
  DATASET,vit_s   ViT-S/16, trained on LUPerson; 88.2 / 94.2 and 40.9 / 66.4
                  (TransReID-SSL, Luo et al., 2021); 89.6 / 95.3 and 50.6 / 75.0
                  with its stem: --config.encoder.arch=vit_small_ics

The former's colours are those of CLIP here, of ImageNet there; its rate grows
at each step of the warm-up here, once an epoch there. The weights of CLIP or
LUPerson are a state dict: --config.encoder.pretrained=FILE.

Hardware there: four RTX 2080 Ti, 2 h 44 min for the log; for CLIP one A100, 2 h
12 min. We have not run these recipes: ours needs their data, and ImageNet
weights: --config.encoder.pretrained=resnet50.pth.
"""

from configs import default

_RECIPES = {
  "clip": {
    "epochs": 60,
    "encoder.arch": "clip_vit_base",
    "encoder.bn_group_size": 0,  # on one GPU
    "optim.frozen": ("patch_embed_proj",),
    "optim.warmup": "10 epochs",
  },
  "vit_s": {
    "sampler.num_instances": 8,
    "encoder.arch": "vit_small",
    "encoder.drop_path": 0.3,
    "method.momentum": 0.2,
    "method.bank_update": "hardest",
  },
}


def get_config(arguments: str = "synthetic,small"):
  """The config for "DATASET", as the authors, or "DATASET,SIZE".

  "DATASET,clip" and "DATASET,vit_s" are those with a vision transformer.
  """
  dataset, size = default.parse(arguments, *_RECIPES)
  if size in _RECIPES:
    return _transformer(dataset, size)
  config = default.get_config("cluster_contrast", dataset)
  config.encoder.pooling = "gem"
  if size == "lite":
    return default.lite_clusters(config)
  if size == "small":
    return default.small_clusters(config, **default.SMALL_CLUSTERING)
  steps = 400 if dataset == "msmt17" else 200
  return default.published_clusters(config, steps)


def _transformer(dataset, recipe):
  """What both recipes have in common, then their own."""
  config = default.get_config("cluster_contrast", dataset)
  config = default.published_clusters(config, steps_per_epoch=200)
  config.encoder.pooling = "token"
  config.optim.name = "sgd"
  config.method.eps = 0.7 if dataset == "msmt17" else 0.6
  config.update_from_flattened_dict(_RECIPES[recipe])
  if recipe == "clip" and dataset == "market1501":
    config.method.eps, config.method.bank_update = 0.4, "hardest"
  if recipe == "vit_s" and dataset == "msmt17":
    config.encoder.bn_group_size = 128  # on two GPUs
  return config
