"""Every key of a config but the method's, with its default and a remark.

A method's keys stand in the `Hyperparameters` of its file in
unreid_jax/methods, those of the clustering in pseudo_labels/clustering.py.

Durations are written "10 epochs" or "500 steps". "0 steps" switches a warm-up
or a cosine off; what is done every "0 steps" is done at the end only.
"""

from ml_collections import ConfigDict

from unreid_jax import UserError, methods, values


def parse(arguments: str, *recipes: str) -> tuple[str, str]:
  """The data set in "DATASET" or "DATASET,SIZE", and the size.

  A size is "small", "lite" or one of a config's own recipes. Without one it is
  "", which is the published recipe; synthetic's, which has none, is "small".
  """
  dataset, _, size = arguments.partition(",")
  sizes = "small", "lite", *recipes
  if size not in ("", *sizes):
    forms = "".join(f", DATASET,{x}" for x in sizes[:-1])
    raise UserError(
      f'no config "{arguments}": write DATASET{forms} or DATASET,{sizes[-1]}'
    )
  return dataset, size or ("small" if dataset == "synthetic" else "")


def method_section(name: str) -> dict:
  """A method's defaults; durations as texts, so that any can be set."""
  kinds = methods.fields({"name": name})
  is_duration = lambda key: values.has(kinds[key], values.DURATION)
  return {"name": name} | {
    key: f"{value} steps" if is_duration(key) else value
    for key, value in methods.defaults(name).items()
  }


def get_config(method: str, dataset: str, **hyperparameters) -> ConfigDict:
  """The defaults for a method, as its module has them, and a data set."""
  return ConfigDict(
    {
      "seed": 0,
      "num_devices": 0,  # 0: all
      "epochs": 50,
      "batch_size": 8,  # over all devices
      "micro_batches": 1,  # parts of it, encoded in turn: less memory
      "evaluate_batch_size": 128,
      "evaluate_every": "10 epochs",
      "checkpoint_every": "1 epoch",
      "log_every": "10 steps",  # a line in metrics.jsonl
      "report": True,  # report.html at each evaluation; it shows people
      "steps_per_epoch": 0,  # 0: train images / batch_size
      "ema": 0.0,  # decay of the average of weights that is evaluated; 0: none
      "sampler": {
        "num_instances": 0,  # of a cluster in a batch; 0: shuffled images
        "other_camera": True,  # than the first instance's, where there are any
      },
      "dataset": {
        "name": dataset,
        "root": "",  # folder or zip; not for synthetic
        "version": "",  # CUHK03-NP: detected, labeled; MSMT17: V1, V2
        "height": 256,
        "width": 128,
        "seed": 0,  # of the synthetic images
        "cache_dir": "",  # decoded images; ~/.cache/unreid_jax if empty
        "on_corrupt": "error",  # or "skip"
      },
      "augment": {
        "flip": True,
        "pad": 10,  # pixels, then a random crop of the old size; 0: none
        "erase_probability": 0.5,
        "erase_fill": "mean",  # the references' quirk, or "zero"
      },
      "encoder": {
        "arch": "resnet50",  # or another name in models/backbones
        "width": 1.0,  # of every layer, for small machines
        "head": "neck",  # or "stripes"
        "pooling": "avg",  # "gem"; "token": a transformer's class token
        "bn_group_size": 0,  # images that share statistics; 0: the batch
        "bn_running": "first",  # or "mean": groups behind the running ones
        "bn_momentum": 0.0,  # weight of the old running ones; 0: the backbone's
        "embedding_dim": 2048,  # of the head "stripes"
        "stripe_dim": 256,
        "num_stripes": 8,
        "dtype": "float32",  # of the computation; "bfloat16"; or "float64"
        "last_stride": 1,  # 2, as for ImageNet: maps of half the height
        "drop_path": 0.0,  # images skip blocks, of transformers and of Lite
        "remat": False,  # of vision transformers: less memory, more time
        "pretrained": "",  # .safetensors or .pth; or "efficientnet_lite0"
      },
      "optim": {
        "name": "adam",  # or "sgd"; weight decay is in the gradient
        "lr": 3.5e-4,
        "weight_decay": 5e-4,
        "momentum": 0.9,  # of sgd
        "nesterov": False,  # of sgd
        "frozen": (),  # layers that stay as they are, such as "conv1"
        "layer_decay": 1.0,  # of the rate, by layers of vision transformers
        "cosine": "0 steps",  # when a cosine instead of milestones ends
        "cosine_end": 0.0,  # times the learning rate, from then on
        "milestones": ("20 epochs", "40 epochs"),
        "gamma": 0.1,  # times the learning rate at each milestone
        "warmup": "0 steps",
        "warmup_factor": 0.01,  # of the first step's learning rate
        "warmup_curve": "linear",  # or "constant"
      },
      "method": method_section(method) | hyperparameters,
    }
  )


def small(config: ConfigDict) -> ConfigDict:
  """An encoder, images and lengths for two CPU cores and a few minutes."""
  config.batch_size = 32
  config.evaluate_every = "20 epochs"
  config.checkpoint_every = "5 epochs"
  config.update(
    {
      "dataset": {"height": 64, "width": 32},
      "augment": {"pad": 4},
      "encoder": {"arch": "resnet18", "width": 0.25},
    }
  )
  return config


def lite(config: ConfigDict) -> ConfigDict:
  """An encoder from ImageNet, and a schedule for two cores and half an hour."""
  config.batch_size = 128
  config.steps_per_epoch = 40
  config.epochs = 16
  config.evaluate_every = "4 epochs"
  config.update(
    {
      "dataset": {"height": 128, "width": 64},
      "augment": {"pad": 5},
      "sampler": {"num_instances": 4},
      "encoder": {
        "arch": "efficientnet_lite0",
        "pretrained": "efficientnet_lite0",
        "bn_momentum": 0.9,  # the published .99 lags behind the weights
      },
      "optim": {"milestones": ("14 epochs",)},
    }
  )
  return config


def published_clusters(config: ConfigDict, steps_per_epoch: int) -> ConfigDict:
  """What the authors' commands of the cluster methods have in common."""
  config.batch_size = 256
  config.sampler.num_instances = 16
  config.steps_per_epoch = steps_per_epoch
  config.encoder.bn_group_size = 64  # a batch on each of four GPUs
  return config


# From random weights a feature shows its camera, and its clusters are worth
# nothing: hence some epochs of instance discrimination before the first ones,
# and features that are centred by camera for the clustering.
SMALL_CLUSTERING = {"eps": 0.5, "center_cameras": True, "instance_epochs": 10}


# Small and pure clusters: k1 is of the order of an identity's images.
LITE_CLUSTERING = {
  "k1": 20,
  "k2": 4,
  "min_samples": 2,
  "eps": 0.5,
  "center_cameras": True,
}


def lite_clusters(config: ConfigDict, **hyperparameters) -> ConfigDict:
  """`lite` for the cluster methods, with some of the method's own values."""
  config = lite(config)
  config.method.update(LITE_CLUSTERING | hyperparameters)
  return config


def small_clusters(config: ConfigDict, **hyperparameters) -> ConfigDict:
  """`small` for the cluster methods, with some of the method's own values."""
  config = small(config)
  config.epochs = 60
  config.sampler.num_instances = 4
  config.optim.lr = 1e-3
  config.optim.milestones = ("45 epochs",)
  config.method.update_from_flattened_dict(hyperparameters)
  return config
