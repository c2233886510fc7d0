"""What `--mode=plan` says, beside what a run then has."""

import jax
import pytest
from test_run import printed_by

from configs import hhcl
from unreid_jax import UserError, sharding
from unreid_jax.config import resolve
from unreid_jax.plan import collectives, device_needs, plan
from unreid_jax.state import first_state, keys, make_parts, shapes_of_state
from unreid_jax.step import compile_step


@pytest.mark.usefixtures("two_blocks")
def test_the_bytes_of_a_device_are_those_that_a_run_has():
  config = hhcl.get_config("synthetic")
  config.num_devices, num_images = 8, 300
  with jax.set_mesh(sharding.make_mesh(8)):
    parts = make_parts(resolve(config, steps_per_epoch=10))
    state = first_state(parts, num_images, weights="")
    like = shapes_of_state(parts, num_images)
    step = compile_step(parts, state, keys(0)[0])
    needs = device_needs(like, config)
  same = jax.tree.map(
    lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype)
    and x.sharding.is_equivalent_to(y.sharding, x.ndim),
    state, like,
  )  # fmt: skip
  assert all(jax.tree.leaves(same))
  of_first = lambda tree: sum(
    x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree)
  )
  assert list(needs.values())[:3] == [
    of_first(state.variables),
    of_first(state.opt_state),
    of_first((state.method, state.labels)),
  ]
  found = plan(config, num_images)
  temporary = step.memory_analysis().temp_size_in_bytes
  assert found.device["in a step: activations, gradients"] == temporary
  saved = sum(x.nbytes for x in jax.tree.leaves(state))
  assert list(found.disk.values()) == [4 * saved]


def test_collectives():
  program = """
    %a = f32[3,4]{1,0} all-gather(%x), dimensions={0}
    %b = (bf16[8]{0}, u8[2,2]{1,0}) all-reduce-start(%y, %z)
    %c = f32[] add(%x, %y)
  """
  assert collectives(program) == [
    ("all-gather", 48), ("all-reduce", 16), ("all-reduce", 4),
  ]  # fmt: skip


def test_a_plan_for_more_devices_than_there_are(tmp_path):
  arguments = [
    "--config=configs/cluster_contrast.py:folder,small",
    "--mode=plan", "--config.num_devices=16", "--num_images=4000000",
    "--device_memory=0.1",
  ]  # fmt: skip
  printed = printed_by(tmp_path, arguments)
  assert "4,000,000 train images, 16 devices" in printed
  assert "does NOT fit in 0.1 GiB" in printed


def test_an_unknown_number_of_images():
  config = hhcl.get_config("folder,small")
  with pytest.raises(UserError, match=r"^0 train images .*: set --num_images$"):
    plan(config)
