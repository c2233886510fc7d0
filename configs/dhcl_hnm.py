"""DHCL-HNM (Zhao & Shu, Digital Signal Processing 156, 2025): a reconstruction.

  python run.py --config=configs/dhcl_hnm.py              drawn images, a laptop
  python run.py --config=configs/dhcl_hnm.py:market1501
  python run.py --config=configs/dhcl_hnm.py:cuhk03_np,small

Only the paper's abstract was at hand, and there is no code. So neither the
method (see unreid_jax/methods/dhcl_hnm.py for what is known, inferred and ours)
nor this recipe is the authors', and no figure of theirs is to be expected. The
recipe on real data is SpCL's, on whose memory the method stands: 16 clusters x
4 images, batch norm over 16, 400 steps an epoch, 800 on MSMT17.

Its parts, one by one:

  --config.method.debias=none         or estimator, instead of the mask
  --config.method.beta=0              no weights of hard negatives
  --config.method.instance_weight=0   no instance term
  --config.method.recluster=features  clusters of freshly extracted features, as
                                      in small and lite; or memory

We have not run this recipe: it needs its data, and ImageNet weights:
--config.encoder.pretrained=resnet50.pth. DATASET,lite is in docs/results.md.
"""

from configs import spcl


def get_config(arguments: str = "synthetic,small"):
  """The config for "DATASET", with SpCL's recipe, or "DATASET,SIZE"."""
  return spcl.get_config(arguments, "dhcl_hnm")
