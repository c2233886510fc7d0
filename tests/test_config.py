"""Every value of a config is checked by its type; durations become steps."""

import importlib
import json
import math
import pathlib
from typing import Annotated, Literal

import jax
import pytest
from ml_collections import ConfigDict

from unreid_jax import UserError, config, methods, sharding, values
from unreid_jax.state import make_parts

FOLDER = pathlib.Path(__file__).parent.parent / "configs"
NAMES = sorted(x.stem for x in FOLDER.glob("*.py") if x.stem != "default")


def load(name, *arguments):
  return importlib.import_module(f"configs.{name}").get_config(*arguments)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dataset", ["market1501", "msmt17", None])
def test_every_config(name, dataset):
  """Its values are valid, and its docstring says where they come from."""
  module = importlib.import_module(f"configs.{name}")
  made = load(name, *[dataset] if dataset else [])
  assert made.dataset.name == (dataset or "synthetic")
  values.check(config.kinds(), made.to_dict())
  with jax.set_mesh(sharding.make_mesh(1)):
    make_parts(config.resolve(made, steps_per_epoch=10))
    if dataset != "msmt17":
      config.check(made, 1)
  command = f"python run.py --config=configs/{name}.py:market1501"
  assert command in module.__doc__


@pytest.mark.parametrize("recipe, eps", [("clip", 0.4), ("vit_s", 0.6)])
def test_recipes_with_a_vision_transformer(recipe, eps):
  made = load("cluster_contrast", f"market1501,{recipe}")
  config.check(made, 1)
  other = load("cluster_contrast", f"msmt17,{recipe}")
  values.check(config.kinds(), other.to_dict())
  assert (made.method.eps, other.method.eps) == (eps, 0.7)
  with pytest.raises(UserError, match='no config "market1501,'):
    load("cluster_contrast", f"market1501,{recipe}x")
  with pytest.raises(UserError, match='no config "market1501,small,'):
    config.check(load("cluster_contrast", f"market1501,small,{recipe}"), 1)


@pytest.mark.parametrize("name", NAMES)
def test_every_number_has_a_range_and_every_key_a_type(name):
  """No key takes nan or infinity, and none takes a value of another type."""
  made = load(name)
  for path, kind, value in flat(made):
    assert kind is not None, path
    wrong = [None, {"a": 1}]
    if isinstance(value, float):
      wrong += [math.nan, math.inf, -math.inf, "x"]
    if isinstance(value, int):
      wrong += [1.5, "x", math.nan]
    for bad in wrong:
      with pytest.raises(values.BadValue) as refused:
        values.check(config.kinds(), change(made, path, bad))
      shown = f'"{bad}"' if isinstance(bad, str) else bad
      assert str(refused.value).startswith(f"{path} is {shown}: set it to ")
    if isinstance(value, float | int) and not isinstance(value, bool):
      below = change(made, path, -1 if isinstance(value, int) else -1.0)
      with pytest.raises(values.BadValue, match=f"^{path} is -1"):
        values.check(config.kinds(), below)


def test_no_key_hides_a_method_of_the_config():
  """`--config.method.update=x` would be refused: `ConfigDict.update` is one."""

  sections = [methods.fields({"name": name}) for name in methods.names()]
  kinds = config.kinds()
  given = {"name": "hhcl"}
  sections += [values.nested_fields(x, given) or {} for x in kinds.values()]
  keys = {*kinds, *(key for section in sections for key in section)}
  assert {"optim", "lr", "bank_update", "base"} <= keys
  assert not keys & set(dir(ConfigDict))


def flat(made):
  return list(config._leaves(config.kinds(), made.to_dict()))


def change(made, path, value):
  settings = made.to_dict()
  *sections, key = path.split(".")
  section = settings
  for name in sections:
    section = section[name]
  section[key] = value
  return settings


@pytest.mark.parametrize(
  "name, path, value, line",
  [
    ("hhcl", "method.memory", "x", '"x": set it to "two_rows" or "instances"'),
    ("hngn", "method.base.k1", 1, "1: set it to a whole number of 2 or more"),
    ("hngn", "method.base.eps", 1.0, "1.0: set it to a number in (0, 1)"),
    ("spcl", "optim.lr", 0.0, "0.0: set it to a number above 0"),
    ("spcl", "optim.name", "adamw", '"adamw": set it to "adam" or "sgd"'),
    ("spcl", "optim.milestones", ("x",), "('x',): set it to a duration: "),
    ("spcl", "optim.frozen", "x", '"x": set it to a tuple, each of it a text'),
    ("spcl", "evaluate_every", "never", '"never": set it to a duration: "10'),
    ("spcl", "sampler.num_instances", -4, "-4: set it to a whole number of 0"),
    (
      "spcl",
      "augment.erase_probability",
      2.0,
      "2.0: set it to a number in [0, 1]",
    ),
    (
      "spcl",
      "encoder.arch",
      "vgg",
      '"vgg": set it to "efficientnet_lite0" or ',
    ),
    ("spcl", "dataset.name", "cifar", '"cifar": set it to "synthetic" or '),
    ("spcl", "dataset.height", 0, "0: set it to a whole number of 1 or more"),
    (
      "selective",
      "method.self_weight",
      5.0,
      "5.0: set it to a number in [0, 1]",
    ),
    ("selective", "method.temperature", -1.0, "-1.0: set it to a number above"),
    (
      "selective",
      "seed",
      2**31,
      "2147483648: set it to a whole number in [0, 2147483647]",
    ),
    ("spcl", "method.eps_gap", 0.9, "0.9: set it to 0 or more, with which"),
  ],
)
def test_one_line(name, path, value, line):
  made = ConfigDict(change(load(name), path, value))
  with pytest.raises(UserError) as refused:
    config.check(made, 1)
  assert str(refused.value).startswith(f"{path} is {line}")


def test_durations():
  made = load("hngn", "market1501")
  made.method.generator_steps = "0.5 epochs"
  made.log_every = "0 steps"
  resolved = config.resolve(made, 400)
  assert resolved.optim.milestones == (30 * 400, 60 * 400)
  assert resolved.method.warmup == 5 * 400 and resolved.steps_per_epoch == 400
  assert resolved.method.generator_steps == 200 and resolved.log_every == 0
  # Half of an epoch of one step is a step at least.
  assert config.resolve(made, 1).method.generator_steps == 1
  assert made.method.generator_steps == "0.5 epochs"


def test_what_may_change_within_a_run():
  made = load("selective")
  stored = json.loads(json.dumps(made.to_dict()))
  stored["key_of_an_older_version"] = 1
  free = {"epochs": 99, "dataset.root": "/other", "num_devices": 4}
  free |= {"method.camera_at_test": False, "evaluate_every": "1 epoch"}
  for path, value in free.items():
    config.check_same(stored, ConfigDict(change(made, path, value)))
  for path, value in (("seed", 3), ("method.warmup", "9 epochs")):
    with pytest.raises(UserError, match=f"holds a run with {path}="):
      config.check_same(stored, ConfigDict(change(made, path, value)))


def test_types_are_all_that_there_is_to_say():
  """A new choice, range or duration is a line; this is one of each."""

  def make(
    colour: Literal["red", "blue"],
    share: Annotated[float, values.Range(0, 0.5)],
    rest: values.Free[values.Duration],
  ) -> None:
    """Has three arguments."""

  kinds = values.fields(make)
  values.check(kinds, {"colour": "red", "share": 0.5, "rest": "2 epochs"})
  for bad, line in (
    ({"colour": "green"}, 'colour is "green": set it to "red" or "blue"'),
    ({"share": 0.6}, "share is 0.6: set it to a number in [0, 0.5]"),
    ({"rest": "2 days"}, 'rest is "2 days": set it to a duration: '),
    ({"shape": 1}, "shape is unknown here; there are: colour, share, rest"),
  ):
    with pytest.raises(values.BadValue) as refused:
      values.check(kinds, bad)
    assert str(refused.value).startswith(line)
  assert values.has(kinds["rest"], values.FREE)
  assert not values.has(kinds["share"], values.FREE)


def test_durations_of_a_method_are_steps_and_of_a_config_texts():
  with pytest.raises(
    UserError, match=r"^warmup is \"2 epochs\": set it to a num"
  ):
    methods.make("selective", warmup="2 epochs")
  section = load("selective", "market1501").method
  assert (section.warmup, section.name) == ("3 epochs", "selective")
  hngn = load("hngn", "market1501").method
  assert (hngn.generator_steps, hngn.ramp) == ("1 steps", "5 epochs")


@pytest.mark.parametrize(
  "kind, good, bad",
  [
    (Literal[16, 32], [16], ["16", 8, 16.0]),
    (tuple[values.Positive, ...], [(1.0, 2), ()], [3.0, (0.0,), "x"]),
    (Annotated[values.Duration, values.Range(1)], ["1 step"], ["0 steps", 0]),
    (values.Duration, [5, "2.5 epochs"], [2.5, "2.5", "٣ epochs", True]),
    (float, [1, 1e300], [10**400, True, "1"]),
    (Annotated[dict, values.Nested(lambda _: {})], [{}], [3, "x", {"a": 1}]),
  ],
)
def test_kinds_of_values(kind, good, bad):
  for value in good:
    values.check({"key": kind}, {"key": value})
  for value in bad:
    with pytest.raises(values.BadValue, match=r"^key"):
      values.check({"key": kind}, {"key": value})


def test_a_method_says_the_short_name():
  with pytest.raises(
    UserError, match=r"^k1 is 1: set it to a whole number of 2"
  ):
    methods.make("hhcl", k1=1)


def test_keys_that_an_earlier_version_had_not():
  """A run goes on if they change nothing; it does not take up a new way."""
  now = load("spcl", "synthetic")
  stored = json.loads(json.dumps(now.to_dict()))
  del stored["ema"], stored["method"]["outliers"], stored["encoder"]["remat"]
  config.check_same(stored, now)
  for key, value in ("ema", 0.9), ("method.outliers", "none"):
    other = load("spcl", "synthetic")
    other.update_from_flattened_dict({key: value})
    with pytest.raises(
      UserError, match=rf"with {key}=no such key, but this on"
    ):
      config.check_same(stored, other)
