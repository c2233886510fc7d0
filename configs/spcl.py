"""SpCL, self-paced contrastive learning (Ge et al., NeurIPS 2020, 2006.02713).

  python run.py --config=configs/spcl.py                  drawn images, a laptop
  python run.py --config=configs/spcl.py:market1501
  python run.py --config=configs/spcl.py:cuhk03_np,small

The recipe on real data is the one of the authors' defaults and README
(yxgeee/SpCL, unsupervised): 16 clusters x 4 images on four GPUs, whose batch
norm sees 16 images each, hence encoder.bn_group_size; 400 steps an epoch, 800
on MSMT17. Published, ResNet-50 with average pooling, mAP / R1: Market-1501
73.1 / 88.1, DukeMTMC-reID 65.3 / 81.2, MSMT17 19.1 / 42.3.

Clusters of freshly extracted features instead of the memory's, as DATASET,small
and DATASET,lite have it: --config.method.recluster=features.

Hardware there: four GTX 1080 Ti. We have not run these recipes: ours needs
their data, and ImageNet weights: --config.encoder.pretrained=resnet50.pth.
"""

from configs import default


def get_config(arguments: str = "synthetic,small", method: str = "spcl"):
  """The config for "DATASET", as the authors, or "DATASET,SIZE"."""
  dataset, size = default.parse(arguments)
  config = default.get_config(method, dataset)
  if size == "lite":
    # Most images are outliers at first: as classes they would be torn apart.
    fresh = {"recluster": "features", "outliers": "none"}
    return default.lite_clusters(config, **fresh)
  if size == "small":
    # The memory's clusters are worse here than those of fresh features.
    fresh = default.SMALL_CLUSTERING | {"recluster": "features"}
    return default.small_clusters(config, **fresh)
  config.batch_size = 64
  config.sampler.num_instances = 4
  config.steps_per_epoch = 800 if dataset == "msmt17" else 400
  config.encoder.bn_group_size = 16  # a batch on each of four GPUs
  return config
