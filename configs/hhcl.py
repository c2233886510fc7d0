"""HHCL, hard-sample guided hybrid contrast (Hu et al., arXiv 2109.12333).

  python run.py --config=configs/hhcl.py                  drawn images, a laptop
  python run.py --config=configs/hhcl.py:market1501
  python run.py --config=configs/hhcl.py:cuhk03_np,small

The recipe on real data is the one of the authors' `run.sh`
(bupt-ai-cz/HHCL-ReID), for MSMT17 the one in their issue 7: 16 clusters x 16
images on four GPUs, whose batch norm sees 64 images each. Published, ResNet-50
with average pooling, mAP / R1: Market-1501 84.2 / 93.4, DukeMTMC-reID 73.3 /
85.1, MSMT17 31.8 / 58.9; a user with the same command reached 82.4 on
Market-1501. The paper's own memory: --config.method.memory=instances.

Hardware there: four RTX 2080 Ti. We have not run these recipes: ours needs
their data, and ImageNet weights: --config.encoder.pretrained=resnet50.pth.
"""

from configs import default

_EPS = {"market1501": 0.45, "dukemtmc": 0.6, "msmt17": 0.7}


def get_config(arguments: str = "synthetic,small"):
  """The config for "DATASET", as the authors, or "DATASET,SIZE"."""
  dataset, size = default.parse(arguments)
  config = default.get_config("hhcl", dataset)
  if size == "lite":
    config.encoder.pooling = "gem"
    return default.lite_clusters(config, num_instances=4)
  if size == "small":
    small_clustering = default.SMALL_CLUSTERING | {"num_instances": 4}
    return default.small_clusters(config, **small_clustering)
  config.method.eps = _EPS.get(dataset, 0.6)
  config.epochs = 60
  steps = 300 if dataset == "msmt17" else 200
  return default.published_clusters(config, steps)
