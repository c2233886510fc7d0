"""Unsupervised person re-identification in JAX: one config, one number."""


class UserError(ValueError):
  """A user's mistake, in one line: what is wrong, where, what to do next.

  `run.py` prints the line and exits with status 2, without a traceback.
  """
