"""The report of a run that has ended, or that was made without one."""

import contextlib

import jax
from ml_collections import ConfigDict

from unreid_jax import UserError, data, report, sharding
from unreid_jax.config import check, from_json, resolve
from unreid_jax.encode import load_encoder
from unreid_jax.evaluate import Evaluation, evaluate
from unreid_jax.preemption import Preemption
from unreid_jax.scoring import make_distance
from unreid_jax.workdir import Workdir
from unreid_jax.workdir.checkpoints import find, read_labels, write_card
from unreid_jax.workdir.writer import Writer


def write(config: ConfigDict | None, path: str) -> None:
  """Writes the report of a workdir's last checkpoint; nothing is trained.

  If its encoder has no threshold yet that tells one person from another, the
  one that is measured here is added to its card.

  Args:
    config: its data set is taken, and its number of devices; None: the run's.
    path: the workdir.

  Raises:
    UserError: bad input, or there is no checkpoint.
  """
  with contextlib.ExitStack() as stack:
    workdir = Workdir(path)
    checkpoint = find(path)
    own = from_json(workdir.stored_config())
    if config:  # which may be of another encoder, and another method
      own.dataset, own.num_devices = config.dataset, config.num_devices
    config = own
    mesh = sharding.make_mesh(config.num_devices)
    stack.enter_context(jax.set_mesh(mesh))
    stack.enter_context(Preemption())
    check(config, mesh.size)
    encoder, labels = load_encoder(checkpoint), read_labels(checkpoint)
    writer = stack.enter_context(Writer(workdir, keeps_log=False))
    size = {name: encoder.card[name] for name in ("height", "width")}
    dataset = data.load(**config.dataset.to_dict() | size)
    num = len(dataset.train.names) if dataset.train else 0
    if num != len(labels):
      raise UserError(
        f"{checkpoint} was trained on {len(labels)} images, and the data set "
        f"has {num}: set --config.dataset to the one of the run"
      )
    config = resolve(config, config.steps_per_epoch or num // config.batch_size)
    distance = make_distance(config)
    found = Evaluation({}, {})
    if dataset.query is not None:
      batch_size = config.evaluate_batch_size
      found = evaluate(encoder, distance, dataset, batch_size)
    step = int(checkpoint.name)
    card = report.write(
      encoder, distance, dataset, labels, found, step, config, writer
    )
    if card and "same_person" not in encoder.card and jax.process_index() == 0:
      write_card(checkpoint, encoder.card | card)
