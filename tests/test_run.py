"""What a person sees who mistypes something: one line, no traceback."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize(
  "arguments, line",
  [
    (
      ["--config.optim.lrr=1"],
      'error: the config has no key "lrr"; did you mean "lr"?',
    ),
    (
      ["--config.optimm.lr=1"],
      'error: the config has no key "optimm"; did you mean "optim"?',
    ),
    (["--config=configs/none.py"], "error: --config=configs/none.py: no such"),
    (["--config=configs/selective.py:nowhere"], 'error: dataset.name is "nowh'),
    (["--config=configs/selective.py:market1501"], "error: dataset.root"),
    (
      ["--config.method.gradient=no", "--config.epochs=1"],
      'error: method.gradient is "no": set it to "sequential" or "frozen"',
    ),
    (["--config.batch_size=7000"], "error: 1080 train images are fewer than"),
    (
      ["--config=configs/hhcl.py", "--config.sampler.num_instances=5"],
      "error: batch_size=32 is no multiple of sampler.num_instances=5: ",
    ),
    (
      ["--config=configs/hngn.py", "--config.method.base.name=hhcl"],
      "error: method.base.update is unknown here; there are: name, ",
    ),
    (
      ["--config=configs/hngn.py", "--config.method.base.name=spcl"],
      "error: method.base.label_smoothing is unknown here; there are: name, ",
    ),
    (
      [
        "--config=configs/hhcl.py",
        "--config.encoder.head=stripes",
        "--config.encoder.num_stripes=4",
      ],
      "error: this method takes one feature an image, and the encoder ",
    ),
    (["--config.evaluate_every=never"], 'error: evaluate_every is "never": '),
    (["--config.num_devices=-1"], "error: num_devices=-1, but JAX sees "),
    (["--config.encoder.arch=vgg"], 'error: encoder.arch is "vgg": set it to'),
    (["--workdir=/dev/null/x"], "error: /dev/null/x"),
    (["--confg=x"], "error: Unknown command line flag 'confg'."),
    (["--config.optim.lr=x"], "error: flag --config.optim.lr=x: could not"),
    (["--mode=evaluate"], "error: "),
    (["train"], "error: what is 'train'?"),
  ],
)
def test_mistakes(tmp_path, arguments, line):
  command = [sys.executable, "run.py", f"--workdir={tmp_path}/run"]
  if not any(x.startswith("--config=") for x in arguments):
    command.append("--config=configs/selective.py")
  done = subprocess.run(
    [*command, *arguments],
    cwd=ROOT,
    timeout=60,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  last = done.stderr.strip().splitlines()[-1]
  assert last.startswith(line), done.stderr
  assert "Traceback" not in done.stderr
