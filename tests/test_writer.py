import io
import json
import logging

import jax
import pytest

from unreid_jax import progress
from unreid_jax.workdir import Workdir, whole_file
from unreid_jax.workdir import writer as writer_lib


def open_writer(folder):
  return writer_lib.Writer(Workdir(folder))


def lines(folder):
  text = (folder / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def write_run(writer, steps):
  for step in steps:
    writer.write(step, "train", {"loss": 1 / step, "lr": jax.numpy.ones(())})
    if step % 2 == 0:
      writer.write(step, "evaluate", {"mAP": step / 10})


class Terminal(io.StringIO):
  def isatty(self):
    return True


def use_terminal(monkeypatch):
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setattr("sys.stderr", terminal := Terminal())
  return terminal


def test_write_is_on_disk_at_once(tmp_path):
  writer = open_writer(str(tmp_path))
  writer.write(7, "train", {"loss": jax.numpy.float32(0.5), "n": 3})
  want = {"step": 7, "kind": "train", "loss": 0.5, "n": 3}
  assert lines(tmp_path) == [want] == writer.history("train")
  assert writer.history("evaluate") == []
  writer.__exit__()
  (events,) = (tmp_path / "tensorboard").iterdir()
  assert b"train/loss" in events.read_bytes()


def test_whole_files_of_one_stem_do_not_meet(tmp_path):
  paths = [tmp_path / "hits.json", tmp_path / "hits.html"]
  (tmp_path / "hits.partial").write_text("the user's")
  with whole_file(paths[0]) as one, whole_file(paths[1]) as other:
    one.write(b"one")
    other.write(b"other")
  assert [path.read_text() for path in paths] == ["one", "other"]
  assert (tmp_path / "hits.partial").read_text() == "the user's"
  assert len(list(tmp_path.iterdir())) == 3


def test_a_resumed_run_leaves_the_file_of_an_unbroken_one(tmp_path):
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  with open_writer(str(whole)) as writer:
    writer.resume(0)
    write_run(writer, range(1, 9))
  with open_writer(str(broken)) as writer:
    writer.resume(0)
    write_run(writer, range(1, 6))
  with open(broken / "metrics.jsonl", "a") as file:
    file.write('{"step": 6, "kin')  # killed in the middle of a line
  with open_writer(str(broken)) as writer:
    writer.resume(4)
    assert [x["step"] for x in writer.history("evaluate")] == [2, 4]
    assert [x["step"] for x in lines(broken)] == [1, 2, 2, 3, 4, 4]
    write_run(writer, range(5, 9))
  texts = [(x / "metrics.jsonl").read_bytes() for x in (whole, broken)]
  assert texts[0] == texts[1]


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path):
  for _ in range(2):
    with open_writer(str(tmp_path)) as writer:
      writer.resume(0)
      writer.write(0, "evaluate", {"mAP": 0.1})
  assert len(lines(tmp_path)) == 1


def test_other_processes_know_the_history_and_write_nothing(
  tmp_path, monkeypatch, capsys
):
  with open_writer(str(tmp_path)) as writer:
    write_run(writer, [2, 4])
  before = {x: x.stat().st_mtime_ns for x in tmp_path.rglob("*")}
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  with open_writer(str(tmp_path)) as writer:
    writer.resume(2)
    writer.write(3, "evaluate", {"mAP": 0.3})
    writer.log("hello")
    assert list(progress.track([1, 2], "phase")) == [1, 2]
    writer.table(writer.history("evaluate"))
    assert [x["mAP"] for x in writer.history("evaluate")] == [0.2, 0.3]
  assert before == {x: x.stat().st_mtime_ns for x in tmp_path.rglob("*")}
  assert capsys.readouterr() == ("", "")


def test_progress_without_a_terminal(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr("unreid_jax.terminal._PLAIN_EVERY", 0.0)
  with open_writer(str(tmp_path)) as writer:
    items = list(progress.track("abc", "encode", total=20, scale=8))
    writer.log("[b]done[/b] " + 90 * "x")
  assert items == ["a", "b", "c"]
  text = capsys.readouterr().err
  assert "\x1b" not in text and "\r" not in text
  shown = text.splitlines()
  assert [x.split()[2] for x in shown[:3]] == ["40%", "80%", "100%"]
  assert "encode" in shown[3] and "20 images in" in shown[3]
  assert shown[4] == "[b]done[/b] " + 90 * "x"
  log = (tmp_path / "log.txt").read_text().splitlines()
  assert [x[21:] for x in log] == shown[3:]


def test_a_short_phase_is_one_line(tmp_path, capsys):
  with open_writer(str(tmp_path)):
    list(progress.track(iter("abc"), "rank", unit="queries"))
  (line,) = capsys.readouterr().err.splitlines()
  assert "3 queries in" in line


def test_nested_progress_bars(tmp_path, monkeypatch):
  terminal = use_terminal(monkeypatch)
  with open_writer(str(tmp_path)):
    pairs = [
      (a, b)
      for a in progress.track(range(3), "outer")
      for b in progress.track(range(2), "inner")
    ]
  assert pairs == [(a, b) for a in range(3) for b in range(2)]
  assert "━" in terminal.getvalue()
  log = (tmp_path / "log.txt").read_text()
  assert (log.count("inner"), log.count("outer")) == (3, 1)


def test_a_broken_phase_takes_its_bar_away(tmp_path, monkeypatch):
  terminal = use_terminal(monkeypatch)
  with open_writer(str(tmp_path)) as writer:
    with pytest.raises(ZeroDivisionError):
      for _ in progress.track(range(3), "phase"):
        1 / 0  # noqa: B018
    for _ in progress.track(range(3), "phase"):
      break
    show_cursor = "\x1b[?25h"
    assert show_cursor in terminal.getvalue().rpartition("phase")[2]
    writer.log("after")
  assert terminal.getvalue().endswith("after\n")
  assert len((tmp_path / "log.txt").read_text().splitlines()) == 1


def test_what_the_library_logs_is_in_the_log(tmp_path, capsys):
  logger = logging.getLogger("unreid_jax.some.module")
  with open_writer(str(tmp_path)):
    logger.info("loaded %d tensors", 3)
    logger.info("of %s", "fc\x1b[2J\n2026")  # as a file may call a tensor
    logger.debug("not this")
  logger.info("nor this")
  assert capsys.readouterr().err == "loaded 3 tensors\nof fc?[2J?2026\n"
  first, second = (tmp_path / "log.txt").read_text().splitlines()
  assert first.endswith("  loaded 3 tensors") and second.endswith(
    "  of fc?[2J?2026"
  )


def test_without_a_writer_nothing_is_shown(tmp_path, capsys):
  with open_writer(str(tmp_path)):
    pass
  assert list(progress.track("abc", "encode")) == ["a", "b", "c"]
  assert capsys.readouterr() == ("", "")


def test_table(tmp_path, capsys):
  names = ("mAP", "R1", "R5", "R10")
  scores = {0: 0.9, 4: 0.2, 8: 0.3, 12: 0.25}
  rows = [{"step": k} | dict.fromkeys(names, v) for k, v in scores.items()]
  with open_writer(str(tmp_path)) as writer:
    writer.table([])
    writer.table(rows)
  text = capsys.readouterr().out
  cells = [x.split() for x in text.splitlines() if "." in x]
  assert cells == [
    ["before", "training", *4 * ["90.0"]],
    ["after", "8", "steps", "(best)", *4 * ["30.0"]],
    ["after", "12", "steps", *4 * ["25.0"]],
  ]
  assert text in (tmp_path / "log.txt").read_text()
