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
      'error: method.gradient is "no": ',
    ),
    (["--config.batch_size=7000"], "error: "),
    (["--config.evaluate_every=never"], 'error: evaluate_every="never" is no'),
    (["--config.num_devices=-1"], "error: num_devices=-1, but JAX sees "),
    (["--config.encoder.arch=vgg"], "error: encoder.arch='vgg' is unknown"),
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
