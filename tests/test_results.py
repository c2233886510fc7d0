"""The table of finished runs: what is averaged, compared and left out."""

import csv
import io
import json
import shutil
import subprocess

import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from configs import cluster_contrast, dhcl_hnm
from unreid_jax import UserError, about, published, results

_SESSION = {"hardware": "2 x GPU", "jax": "0.10.2", "commit": "abc"}
_SESSION |= {"step": 90, "end": 90, "seconds": 60.0}


def write_run(path, config, scores, **session):
  """A workdir with mAP and R1 by step; `session` changes what is noted."""
  path.mkdir()
  (path / "config.json").write_text(json.dumps(config.to_dict()))
  lines = [{"step": 0, "kind": "evaluate", "mAP": 0.99, "R1": 0.99}]
  for step, (mAP, R1) in scores.items():
    lines.append({"step": step, "kind": "evaluate", "mAP": mAP, "R1": R1})
    lines.append({"step": step, "kind": "train", "loss": 1.0})
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (path / "metrics.jsonl").write_text(text)
  if session is not None:
    noted = {"sessions": [_SESSION | {"step": 30}, _SESSION | session]}
    (path / "sessions.json").write_text(json.dumps(noted))
  return str(path)


def market(seed, **changes):
  config = cluster_contrast.get_config("market1501")
  config.update_from_flattened_dict(
    {"seed": seed, "encoder.pretrained": "w/r50.pth"} | changes
  )
  return config


def table(capsys, *arguments):
  """What is printed, as a dictionary a row; and what is left out."""
  results.main(["--format=csv", *arguments])
  out, left = capsys.readouterr()
  return list(csv.DictReader(io.StringIO(out))), left


def test_seeds_are_averaged_and_compared(tmp_path, capsys):
  """Best with best; where it ran and how often it reported play no part."""
  scores = {30: (0.80, 0.91), 60: (0.84, 0.93), 90: (0.82, 0.92)}
  first = write_run(tmp_path / "a", market(2), scores)
  elsewhere = {"dataset.root": "/other", "encoder.pretrained": "/x/r50.pth"}
  changes = {"num_devices": 4, "micro_batches": 2, "report": False}
  other = market(11, **changes, **elsewhere)
  second = write_run(
    tmp_path / "b", other, {90: (0.80, 0.90)}, commit=None, seconds=180.0
  )
  (row,), left = table(capsys, first, second)
  assert left == ""
  assert row == {
    "method": "cluster_contrast", "data set": "market1501",
    "encoder": "resnet50, gem, 256x128, r50.pth", "seeds": "2, 11",
    "before mAP": "99.0", "before mAP sd": "0.0",
    "before R1": "99.0", "before R1 sd": "0.0",
    "last mAP": "81.0", "last mAP sd": "1.4",
    "last R1": "91.0", "last R1 sd": "1.4",
    "best mAP": "82.0", "best mAP sd": "2.8",
    "best R1": "91.5", "best R1 sd": "2.1",
    "published mAP": "82.1", "published R1": "92.3",
    "mAP difference": "-0.1", "R1 difference": "-0.8",
    "source": "Cluster Contrast, README", "time": "3 min 00 s",
    "hardware": "2 x GPU", "jax": "0.10.2", "commit": "abc, no checkout",
    "other settings": "none",
  }  # fmt: skip
  results.main([first, second])
  head, rule, line = capsys.readouterr().out.splitlines()
  assert " 81.0 ± 1.4 | 91.0 ± 1.4 | 82.0 ± 2.8 " in line
  assert head.count("|") == rule.count("|") == line.count("|") == 21


def test_what_all_rows_share_is_said_once(tmp_path, capsys):
  """In Markdown, where a dozen columns of one value hide the others."""
  runs = [
    write_run(tmp_path / "a", market(0), {90: (0.5, 0.6)}),
    write_run(tmp_path / "b", market(0, batch_size=128), {90: (0.4, 0.6)}),
  ]
  lines = (tmp_path / "b" / "metrics.jsonl").read_text().splitlines(True)
  (tmp_path / "b" / "metrics.jsonl").write_text("".join(lines[1:]))
  results.main(runs)
  head, _, first, second, empty, shared = capsys.readouterr().out.splitlines()
  assert "| before mAP |" in head and "| last mAP |" in head and not empty
  assert "| 99.0 |" in first and "| not measured |" in second
  assert "method" not in head and "last R1" not in head
  assert "method: cluster_contrast" in shared
  assert "last R1, best R1: 60.0; " in shared


def test_what_is_not_alike_is_not_averaged(tmp_path, capsys):
  scores = {90: (0.5, 0.6)}
  for name, changes in (
    ("a", {}),
    ("b", {"method.eps": 0.4}),
    ("c", {"encoder.arch": "resnet50_ibn_a"}),
    ("d", {"encoder.pretrained": ""}),
    ("e", {"epochs": 10}),
    ("f", {"batch_size": 128}),
  ):
    write_run(tmp_path / name, market(0, **changes), scores)
  rows, _ = table(capsys, *(str(tmp_path / x) for x in "abcdef"))
  none = "none of this encoder and method"
  assert [(x["other settings"], x["published mAP"]) for x in rows] == [
    ("batch_size=256, epochs=50, method.eps=0.6", "82.1"),
    ("batch_size=256, epochs=50, method.eps=0.4", "82.1"),
    ("batch_size=256, epochs=10, method.eps=0.6", "82.1"),
    ("batch_size=128, epochs=50, method.eps=0.6", none),
    ("none", "none from random weights"),
    ("none", none),
  ]
  assert {x["last mAP sd"] for x in rows} == {"one run"}


@pytest.mark.parametrize(
  ("arguments", "changes", "mAP"),
  [
    ("market1501,clip", {}, 90.2),
    ("market1501,clip", {"method.bank_update": "momentum"}, 88.5),
    ("msmt17,clip", {}, 67.5),
    ("market1501,vit_s", {}, 88.2),
    ("msmt17,vit_s", {}, 40.9),
    ("market1501,vit_s", {"encoder.arch": "vit_small_ics"}, 89.6),
    ("msmt17,vit_s", {"encoder.arch": "vit_small_ics"}, 50.6),
    ("market1501,vit_s", {"method.bank_update": "momentum"}, None),
    ("market1501", {}, 82.1),
    ("market1501", {"encoder.pooling": "avg"}, None),
    ("market1501", {"method.bank_update": "hardest"}, None),
    ("market1501", {"batch_size": 128}, None),
    ("market1501", {"method.clustering": "infomap"}, 83.0),
  ],
)
def test_the_recipe_of_a_figure(arguments, changes, mAP):
  config = cluster_contrast.get_config(arguments)
  weights = {"encoder.pretrained": "x.pth"}
  config.update_from_flattened_dict(weights | changes)
  figure, reason = published.find(flatten_dict(config.to_dict(), sep="."))
  assert (figure and figure.mAP) == mAP and bool(reason) == (mAP is None)


def test_runs_of_two_versions_are_alike(tmp_path, capsys):
  """What the earlier one had not is off in the later one, or another row."""
  old = market(0).to_dict()
  del old["ema"], old["sampler"]["other_camera"]
  scores = {90: (0.5, 0.6)}
  runs = [write_run(tmp_path / "old", ConfigDict(old), scores)]
  runs.append(write_run(tmp_path / "new", market(1), scores))
  (row,), _ = table(capsys, *runs)
  assert row["seeds"] == "0, 1" and row["other settings"] == "none"
  runs.append(write_run(tmp_path / "ema", market(1, ema=0.9), scores))
  rows, _ = table(capsys, *runs)
  found = [(x["seeds"], x["other settings"]) for x in rows]
  assert found == [("0, 1", "ema=0.0"), ("1", "ema=0.9")]


def test_empty_cells_say_why(tmp_path, capsys):
  old = write_run(tmp_path / "a", dhcl_hnm.get_config(), {90: (0.5, 0.6)})
  (tmp_path / "a" / "sessions.json").unlink()
  stopped = write_run(tmp_path / "b", market(0), {30: (0.5, 0.6)}, step=30)
  without = write_run(tmp_path / "c", market(0), {})
  (tmp_path / "d").mkdir()
  folder = str(tmp_path / "d")
  (row,), left = table(capsys, folder, old, stopped, without)
  assert row["published mAP"] == "the paper's figures are not known"
  assert row["time"] == row["hardware"] == row["commit"] == "not noted"
  assert left.splitlines() == [
    f"{folder}: holds no run, left out",
    f"{stopped}: stopped after step 30 of 90, left out",
    f"{without}: no score of a trained encoder, left out",
  ]
  (tmp_path / "a" / "config.json").write_text('{"seed": 1}')
  assert "earlier version, without method.name" in table(capsys, old)[1]


def test_mistakes(tmp_path):
  path = write_run(tmp_path / "a", market(0), {90: (0.5, 0.6)})
  for text in ("{", "{}", '{"sessions": [{"step": 3}]}'):
    (tmp_path / "a" / "sessions.json").write_text(text)
    with pytest.raises(UserError, match=r"sessions\.json is damaged .*delete"):
      results.read_run(path)


def test_the_commit_of_a_checkout(tmp_path, monkeypatch):
  """Of this package's own, not of one that an environment lies in."""
  package = tmp_path / "env" / "unreid_jax"
  package.mkdir(parents=True)
  (package / "__init__.py").touch()
  monkeypatch.setattr(
    about.unreid_jax, "__file__", str(package / "__init__.py")
  )
  assert about.commit.__wrapped__() is None
  git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a"]
  run = lambda *x: subprocess.run(
    git + list(x), check=True, capture_output=True, text=True
  )
  run("init")
  run("commit", "--allow-empty", "-m", "a")
  assert about.commit.__wrapped__() is None
  run("add", ".")
  run("commit", "-m", "b")
  full = run("rev-parse", "HEAD").stdout
  assert full.startswith(about.commit.__wrapped__())
  (package / "__init__.py").write_text("changed")
  assert about.commit.__wrapped__() == full[:12] + "-dirty"
  shutil.rmtree(tmp_path / ".git")
  monkeypatch.setenv("PATH", "")
  assert about.commit.__wrapped__() is None
