"""The upper bound: Cluster Contrast with the true identities as clusters.

  python run.py --config=configs/supervised.py            drawn images, a laptop
  python run.py --config=configs/supervised.py:market1501
  python run.py --config=configs/supervised.py:cuhk03_np,small

No paper: encoder, sampler, schedule and loss are Cluster Contrast's. HHCL's
authors report 87.2 mAP, 94.6 R1 on Market-1501 for theirs with true labels.
Hardware there: four RTX 2080 Ti. We have not run it: ours needs the data, and
ImageNet weights: --config.encoder.pretrained=resnet50.pth.
"""

from configs import default


def get_config(arguments: str = "synthetic,small"):
  """The config for "DATASET" or "DATASET,SIZE"."""
  dataset, size = default.parse(arguments)
  config = default.get_config("supervised", dataset)
  config.encoder.pooling = "gem"
  if size == "lite":
    return default.lite(config)
  if size == "small":
    return default.small_clusters(config)
  steps = 400 if dataset == "msmt17" else 200
  return default.published_clusters(config, steps)
