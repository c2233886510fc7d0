"""What a person sees who mistypes something: one line, no traceback."""

import multiprocessing
import os
import sys

import pytest

# Processes that have imported everything already.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["run", "unreid_jax.train"])


def run_command(arguments, log):
  """The body of a process: run.py, with what it prints in a file.

  Its ResNet-18 has two blocks, and compiles soon.
  """
  with open(log, "wb") as file:
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
  sys.argv = ["run.py", *arguments]
  import run
  from unreid_jax.models.backbones import resnet

  resnet._DEPTHS[18] = ((1, 1), False)
  run.preemption.exit_on_signals()
  run.become_parent()
  run.app.run(run.main, flags_parser=run.parse)


@pytest.mark.parametrize(
  "arguments, line",
  [
    (
      ["--config.optim.lrr=1"],
      'error: the config has no key "optim.lrr"; did you mean "lr"?',
    ),
    (
      ["--config.optimm.lr=1"],
      'error: the config has no key "optimm.lr"; did you mean "optim"?',
    ),
    (["--config.method.zzz=1"], 'error: the config has no key "method.zzz"'),
    (["--config.optim.lr.x=1"], 'error: the config has no key "optim.lr.x"'),
    (["--config=configs/none.py"], "error: --config=configs/none.py: no such"),
    (["--config=configs/selective.py:nowhere"], 'error: dataset.name is "nowh'),
    (["--config=configs/selective.py:market1501"], "error: dataset.root"),
    (
      ["--config=configs/selective.py:synthetic,large"],
      'error: no config "synthetic,large": write DATASET, DATASET,small or',
    ),
    (
      ["--config=configs/cluster_contrast.py:market1501,clipp"],
      'error: no config "market1501,clipp": write DATASET, DATASET,small, '
      "DATASET,lite, DATASET,clip or DATASET,vit_s",
    ),
    (
      ["--config=configs/hngn.py:synthetic,small,default"],
      'error: no config "synthetic,small,default": write DATASET, DATASET,',
    ),
    (["--workdir=~nosuchuser/x"], "error: ~nosuchuser/x: the home directory"),
    (
      ["--distributed=manual"],
      "error: --coordinator (or JAX_COORDINATOR_ADDRESS) is missing: several ",
    ),
    (["--distributed=mpi"], "error: flag --distributed=mpi: value should be"),
    (
      ["--config.method.warmup=99999999999999 steps"],
      'error: method.warmup is "99999999999999 steps": set it to a duration',
    ),
    (
      ["--config.encoder.bn_group_size=5"],
      "error: bn_group_size=5 does not divide the batch of 32 images: ",
    ),
    (
      ["--config.method.gradient=no", "--config.epochs=1"],
      'error: method.gradient is "no": set it to "sequential" or "frozen"',
    ),
    (
      ["--config.micro_batches=4"],
      "error: micro_batches=4 would cut a group of batch norm: set it to a div",
    ),
    (
      ["--config.micro_batches=3", "--config.num_devices=1"],
      "error: micro_batches=3: batch_size=32 is no multiple of 3 x 1 devices: ",
    ),
    (["--profile=-1"], "error: flag --profile=-1: "),
    (["--config.batch_size=7000"], "error: 1080 train images are fewer than"),
    (
      ["--config=configs/hhcl.py", "--config.sampler.num_instances=5"],
      "error: batch_size=32 is no multiple of sampler.num_instances=5: ",
    ),
    (
      ["--config=configs/hngn.py", "--config.method.base.name=hhcl"],
      "error: method.base.bank_update is unknown here; there are: name, ",
    ),
    (
      ["--config=configs/hngn.py", "--config.method.base.name=spcl"],
      "error: method.base.bank_update is unknown here; there are: name, ",
    ),
    (
      [
        "--config=configs/hhcl.py",
        "--config.encoder.head=stripes",
        "--config.encoder.num_stripes=4",
      ],
      "error: this method takes one feature an image, and the encoder ",
    ),
    (["--config.encoder.pretrained=/none.pth"], "error: /none.pth: no such fi"),
    (["--config.encoder.pretrained=run.py"], "error: run.py: it is a text, as"),
    (["--config.evaluate_every=never"], 'error: evaluate_every is "never": '),
    (["--config.num_devices=-1"], "error: num_devices=-1, but JAX sees "),
    (["--config.encoder.arch=vgg"], 'error: encoder.arch is "vgg": set it to'),
    (["--config.augment.pad=32"], "error: augment.pad=32: set it below 32 pi"),
    (["--config.optim=3"], "error: flag --config.optim=3: Failed to parse"),
    (["--config.dataset.width=nan"], "error: flag --config.dataset.width=nan"),
    (["--config.seed=-1"], "error: seed is -1: set it to a whole number in [0"),
    (["--config.zzz.y=3"], 'error: the config has no key "zzz.y"'),
    (["--mode=foo"], "error: flag --mode=foo: value should be one of <train|"),
    (
      ["--config=configs/spcl.py", "--config.method.name=hhcl"],
      "error: method.eps_gap is unknown here; there are: name, ",
    ),
    (["--workdir=/dev/null/x"], "error: /dev/null/x"),
    (["--confg=x"], "error: Unknown command line flag 'confg'."),
    (["--config.optim.lr=x"], "error: flag --config.optim.lr=x: could not"),
    (["--mode=evaluate"], "error: "),
    (["--mode=evaluate", "--checkpoint=/none"], "error: /none holds no check"),
    (["--mode=evaluate", "--checkpoint=run.py"], "error: run.py: it is a text"),
    (["--checkpoint=x.pth"], "error: --checkpoint is not for --mode=train: "),
    (["--query=x.png"], "error: --query is not for --mode=train; see --help"),
    (
      ["--mode=export", "--checkpoint=.", "--output=x.onnx", "--top=3"],
      "error: --top is not for --mode=export; see --help",
    ),
    (["--mode=export"], "error: "),
    (["--mode=report"], "error: "),
    (["train"], "error: what is 'train'?"),
    (["--mode=search"], "error: --mode=search needs --query"),
    (
      ["--mode=encode", "--checkpoint=.", "--images=.", "--output=x.txt"],
      "error: --output=x.txt: end it in .parquet or .npz or .npy",
    ),
    (
      ["--mode=verify", "--checkpoint=/none", "--query=a", "--gallery=b"],
      "error: /none holds no checkpoint: ",
    ),
  ],
)
def test_mistakes(tmp_path, arguments, line):
  if not any(x.startswith("--config=") for x in arguments):
    arguments = ["--config=configs/selective.py", *arguments]
  printed = refused(tmp_path, arguments)
  assert printed.splitlines()[-1].startswith(line), printed
  assert "images in" not in printed or "train images" in line  # found before


@pytest.mark.parametrize(
  "text, line",
  [
    ("def get_config():\n  return (", "line 2: SyntaxError: '(' was never cl"),
    ("import nosuch", "line 1: ModuleNotFoundError: No module named 'nosuch'"),
    ("def get_config(): 1 / 0", "line 1: ZeroDivisionError: division by zero"),
    ("def get_config(): pass", "get_config() returns no ConfigDict"),
    ("x = 1", "AttributeError: "),
    (
      "import ml_collections\nget_config = ml_collections.ConfigDict",
      "no seed: begin with configs/default.py",
    ),
    ("def get_config(): return 3", "get_config() returns no ConfigDict"),
  ],
)
def test_mistakes_in_a_config_file(tmp_path, text, line):
  path = tmp_path / "config.py"
  path.write_text(text)
  printed = refused(tmp_path, [f"--config={path}"])
  place, _, problem = printed.splitlines()[-1].partition(f"{path}")
  assert place == "error: " and problem.lstrip(":, ").startswith(line), printed


def refused(tmp_path, arguments):
  """What run.py prints before it ends with status 2."""
  return printed_by(tmp_path, [f"--workdir={tmp_path}/run", *arguments], 2)


def printed_by(tmp_path, arguments, status=0):
  """What run.py prints before it ends with this status."""
  log = tmp_path / "log"
  process = FORKS.Process(target=run_command, args=(arguments, log))
  process.start()
  process.join(100)
  printed = log.read_text()
  assert process.exitcode == status, printed
  assert "Traceback" not in printed
  return printed.strip()


def compile_one(home, folder, log):
  """The body of a process: run.py's cache, one program, hits and misses."""
  import jax

  import run

  os.environ["HOME"] = str(home)
  if folder is None:
    del os.environ["JAX_COMPILATION_CACHE_DIR"]
  else:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
  jax.config.update("jax_compilation_cache_dir", folder)
  seen = []
  jax.monitoring.register_event_listener(lambda event, **_: seen.append(event))
  run._keep_compiled()
  assert jax.jit(lambda x: 3 * x + 1)(jax.numpy.arange(4.0)).sum() == 22
  count = lambda what: sum(x.endswith(f"cache_{what}") for x in seen)
  log.write_text(f"{count('hits') > 0} {count('misses') > 0}")


def test_what_is_compiled_is_kept(tmp_path):
  """For the next start; not if it is damaged, or the user has said where."""

  def start(home=tmp_path, folder=None):
    log = tmp_path / "log"
    process = FORKS.Process(target=compile_one, args=(home, folder, log))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    return log.read_text()

  kept = tmp_path / ".cache" / "unreid_jax" / "compiled"
  for folder in "", f"{tmp_path}/own":
    start(folder=folder)
    assert not kept.exists()
  assert start(home="/dev/null") == "False False"
  assert start() == "False True"
  assert start() == "True False"
  for path in kept.glob("*-cache"):
    path.write_bytes(path.read_bytes()[:99])
  assert start().startswith("False")
