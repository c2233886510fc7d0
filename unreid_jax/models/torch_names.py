"""What code bases call the parts of a network besides its backbone."""

import logging
import re
from collections.abc import Iterable

from unreid_jax import UserError

# To the names of Cluster Contrast, SpCL and HHCL.
_HEADS = (
  (r"(head\.)?feat_bn\.", "feat_bn."),  # OpenUnReID
  (r"heads\.(bottleneck\.0|bnneck)\.", "feat_bn."),  # fast-reid
  (r"(global_pooling|heads\.pool_layer)\.(?=p$)", "gap."),
)
_REFUSED = (
  (r"(head\.feat_reduction|feat|heads\.bottleneck\.1)\.", "an embedding layer"),
  (r"backbone\.NL_\d\.", "a non-local block"),
)
_log = logging.getLogger(__name__)


def of_heads(keys: Iterable[str], pad_pool: bool = False) -> dict[str, str]:
  """The keys that are taken, and their names if they are a head's.

  Other keys stay, but for what a wrapper puts in front: "module." of
  DataParallel, and "mean_net." of OpenUnReID's mean teacher, which is what it
  evaluates; its student, "net.", keeps a name that no encoder has.

  Args:
    keys: of a state dict.
    pad_pool: whether the encoder pads its first pooling, as fast-reid does not.

  Raises:
    UserError: a layer that no encoder here has, and without which the features
      would be others.
  """
  bare = {key: re.sub(r"^(module\.)?(mean_net\.)?", "", key) for key in keys}
  if pad_pool and any(name.startswith("heads.") for name in bare.values()):
    _log.warning(
      "weights of fast-reid, whose first pooling is not padded: for the same "
      "features set encoder.arch to a name that ends in _fastreid"
    )
  for key, name in bare.items():
    for pattern, what in _REFUSED:
      if re.match(pattern, name):
        raise UserError(f"its {key} is of {what}, which no encoder here has")
    for pattern, ours in _HEADS:
      if found := re.match(pattern, name):
        bare[key] = ours + name[found.end() :]
  return bare
