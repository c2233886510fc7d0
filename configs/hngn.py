"""HNGN (Li et al., IJCAI 2022), generated hard negatives: a reconstruction.

  python run.py --config=configs/hngn.py                  drawn images, a laptop
  python run.py --config=configs/hngn.py:market1501
  python run.py --config=configs/hngn.py:market1501,hhcl  over HHCL's memory
  python run.py --config=configs/hngn.py:cuhk03_np,small

Only the paper's abstract was at hand, and there is no code. So neither the
method (see unreid_jax/methods/hngn/ for what is known, inferred and ours) nor
this recipe is the authors', and no figure of theirs is to be expected. The
recipe on real data is the baseline of ISE (CVPR 2022) by the same authors, a
Cluster Contrast with average pooling: 82.5 / 92.5 on Market-1501 (mAP / R1),
30.1 / 58.6 on MSMT17, which a generator would have to beat. Over HHCL, or over
supervised (",supervised"), it is theirs. The wrapped method's keys are
config.method.base.*: --config.method.base.eps=.5.

Its parts, one by one:

  --config.method.generated_weight=0          the baseline, and the figures
  --config.method.generator=interpolation     negatives without a network
  --config.method.identity_weight=0           collapses, unless radius is .3
  --config.method.alternate=epoch '--config.method.generator_steps=1 epoch'

We have not run this recipe: it needs its data, and ImageNet weights:
--config.encoder.pretrained=resnet50.pth. DATASET,lite is in docs/results.md.
"""

import importlib

from ml_collections import ConfigDict

from configs import default
from unreid_jax import methods


def get_config(arguments: str = "synthetic,small"):
  """The config for "DATASET" or "DATASET,SIZE", with ",METHOD" over another.

  METHOD is any config whose method can be wrapped, such as hhcl.
  """
  rest, _, over = arguments.rpartition(",")
  is_default = not rest or over not in methods.names()
  base, arguments = (
    ("cluster_contrast", arguments) if is_default else (over, rest)
  )
  config = importlib.import_module(f"configs.{base}").get_config(arguments)
  _, size = default.parse(arguments)
  if not size and is_default:
    _like_ise(config)
  method = default.method_section("hngn")
  method["base"] = config.method.to_dict()
  warmup, ramp = {"small": (20, 5), "lite": (2, 2), "": (5, 5)}[size]
  method["warmup"], method["ramp"] = f"{warmup} epochs", f"{ramp} epochs"
  if size:
    method["generator_width"] = 256
  if size == "lite":
    method["radius"] = 0.2  # else they become harder than the positives
  config.method = ConfigDict(method)
  return config


def _like_ise(config):
  """The baseline of the authors' other paper."""
  config.encoder.pooling = "avg"
  config.steps_per_epoch = 400
  if config.dataset.name == "msmt17":
    config.method.eps = 0.7
    return
  config.epochs = 70
  config.optim.milestones = ("30 epochs", "60 epochs")
  config.method.bank_update = "hardest"
  config.method.momentum = 0.2
  config.method.eps = 0.4
