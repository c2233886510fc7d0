"""What functions of arrays say of mistakes, and where numba cannot write."""

import os
import pathlib
import shutil
import subprocess
import sys

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from scipy.sparse import csr_array

import unreid_jax
from unreid_jax import UserError
from unreid_jax.arrays import as_floats, as_whole_numbers
from unreid_jax.data import sampler
from unreid_jax.pseudo_labels import (
  dbscan,
  false_negatives,
  infomap,
  jaccard_distance,
  jaccard_from_neighbors,
  neighbors,
  self_paced,
)
from unreid_jax.ranking import QueryRanks, evaluate_rank, rerank, summarize

X = np.eye(3, dtype=np.float32)
NEAR = np.array([[0, 2, 2], [0, 2, 2], [0, 2, 2]], np.float32)
ROWS = np.array([[0, 1, 2], [1, 0, 2], [2, 0, 1]])
FAR = 1 - X
PIDS = [0, 1, 1]
CASE = {"query_pids": PIDS, "gallery_pids": PIDS, "query_camids": [0, 0, 0]}
CASE |= {"distances": FAR, "gallery_camids": [1, 1, 1]}


def changed(x, place, value):
  x = np.array(x)
  x[place] = value
  return x


def near(distances=NEAR, indices=ROWS, **options):
  return jaccard_from_neighbors(X, distances, indices, **options)


def beyond(kind):
  """A sparse matrix of a column that it does not have."""
  made = csr_array(FAR).asformat(kind)
  if kind == "coo":
    made.coords[0][0] = 500
  else:
    made.rows[0] = [1, 500]
  return made


@pytest.mark.parametrize(
  ("call", "line"),
  [
    (lambda: near(indices=changed(ROWS, (2, 1), 3)), "indices has the value 3"),
    (lambda: near(indices=changed(ROWS, (2, 1), -1)), "-1 is a neighbour that"),
    (lambda: near(indices=ROWS[:, 1:], distances=NEAR[:, 1:]), "without image"),
    (lambda: near(indices=changed(ROWS, (1, 1), 2)), "row 1 .* an image twice"),
    (
      lambda: near(indices=ROWS[:2]),
      r"indices has the shape \(2, 3\), but n is",
    ),
    (lambda: near(indices=ROWS[:, :0], distances=NEAR[:, :0]), "without image"),
    (lambda: near(indices=ROWS + 0.5), r"indices has the value 0\.5"),
    (
      lambda: near(changed(NEAR, 1, np.nan)),
      "row 1 of distances has no squared",
    ),
    (lambda: near(changed(NEAR, 1, -2)), "row 1 of distances has no squared"),
    (
      lambda: near(changed(NEAR, 2, np.inf)),
      "row 2 of distances has no squared",
    ),
    (lambda: near(1 - NEAR), "row 0 of distances has no squared"),
    (lambda: near(k2=0), "k2 is 0: set it to a whole number of 1"),
    (
      lambda: near(np.zeros((3, 32001)), np.zeros((3, 32001), int)),
      "indices has 32001 columns: pass 32000",
    ),
    (lambda: jaccard_distance(X, 40000), "k1 is 40000: set it to"),
    (lambda: jaccard_distance(X * np.nan), "NaN or infinity"),
    (lambda: neighbors([[1], [2, 3]], 1), "features is no array of numbers: "),
    (lambda: neighbors(X + 1j, 1), "features has the dtype complex"),
    (lambda: neighbors(X, 1.0), r"k is 1\.0: set it to a whole number"),
    (lambda: neighbors(X, np.arange(9)), "k is <class 'numpy.ndarray'>: set"),
    (lambda: dbscan(X[:2]), r"distances has the shape \(2, 3\), but n is 2 in"),
    (
      lambda: dbscan(np.triu(FAR) + 9 * np.tril(FAR), 2),
      r"\[0, 1\] is at most",
    ),
    (lambda: dbscan(csr_array(FAR[:2])), r"shape \(2, 3\): pass \[n, n\]"),
    (lambda: dbscan(csr_array(-FAR)), r"distances has the value -1\.0: pass"),
    (lambda: dbscan(FAR * np.nan), "distances has the value nan: pass"),
    (
      lambda: dbscan(csr_array((np.ones(1), [7], [0, 1, 1, 1]), (3, 3))),
      "distances is no valid matrix: ",
    ),
    (
      lambda: dbscan(beyond("coo")),
      "no valid matrix: it has row or column 500",
    ),
    (
      lambda: dbscan(beyond("lil")),
      "no valid matrix: it has row or column 500",
    ),
    (
      lambda: near(changed(NEAR, (0, 1), 9), ROWS),
      "row 0 of distances does not ascend: pass the nearest first",
    ),
    (lambda: dbscan(FAR, np.nan), "eps is nan: set it to a number above 0"),
    (lambda: dbscan(FAR, 0.5, 0), "min_samples is 0: set it to a whole number"),
    (
      lambda: evaluate_rank(**CASE | {"query_pids": ["a"] * 3}),
      "query_pids has",
    ),
    (
      lambda: evaluate_rank(**CASE | {"query_pids": [0, 1]}),
      "but q is 3 in dis",
    ),
    (lambda: evaluate_rank(**CASE, max_rank=0), "max_rank is 0: set it to"),
    (
      lambda: evaluate_rank(**CASE | {"gallery_camids": [0.5, 1, 1]}),
      r"gallery_camids has the value 0\.5: pass whole numbers",
    ),
    (lambda: summarize([]), "no query has a match"),
    (
      lambda: rerank(X, X[:, :2]),
      r"gallery has the shape \(3, 2\), but d is 3",
    ),
    (
      lambda: rerank(X, X, lambda_value=np.nan),
      "lambda_value is nan: set it to",
    ),
    (
      lambda: rerank(X, X, lambda_value=1.5),
      r"lambda_value is 1\.5: set it to",
    ),
    (lambda: infomap(X, min_similarity=2), "min_similarity is 2: set it to"),
    (lambda: false_negatives.merged_into([0, 2], [0, 0]), "number the classes"),
    (
      lambda: false_negatives.report([0, 1], [0], [1, 1]),
      "1 clusters for 2 cl",
    ),
    (lambda: self_paced.outliers_alone([2**31 - 1]), "labels has the value 21"),
    (
      lambda: next(sampler.shuffled(np.random.default_rng(0), [-1], 4)),
      "no image has a label",
    ),
    (
      lambda: next(sampler.by_cluster(np.random.default_rng(0), [0], [], 4, 2)),
      r"camids has the shape \(0,\), but n is 1 in labels",
    ),
  ],
)
def test_mistakes(call, line):
  with pytest.raises(UserError, match=line) as raised:
    call()
  assert "\n" not in str(raised.value)


def test_a_part_that_is_none(monkeypatch):
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  with pytest.raises(UserError, match="parts is no list of results"):
    summarize(QueryRanks(*np.ones((3, 2))))


def test_as_floats_and_as_whole_numbers():
  for x in (np.float16, jnp.bfloat16, np.int16, bool, ">f4"):
    assert as_floats("x", np.ones(2).astype(x)).dtype == np.dtype("f4")
  for x in (np.float64, np.longdouble, np.int32, np.uint64):
    assert as_floats("x", np.ones(2, x)).dtype == np.float64
  assert as_floats("x", X) is X and as_whole_numbers("x", ROWS) is ROWS
  big = np.array([2**63 - 1, 0], np.uint64)
  assert as_whole_numbers("x", big).tolist() == [2**63 - 1, 0]
  for x in ([2.0**63], [1e300], [np.inf], np.array([2**63], np.uint64)):
    with pytest.raises(UserError, match="x has the value"):
      as_whole_numbers("x", x)


def test_distances_of_another_search():
  """With rounding at the image itself, and an image that comes second."""
  want = near().toarray()
  rounded = changed(NEAR, (0, 0), -2e-5)
  np.testing.assert_array_equal(near(rounded).toarray(), want)
  swap = [1, 0, 2]
  swapped = NEAR.astype("f8")[:, swap], ROWS.astype("u2")[:, swap]
  np.testing.assert_allclose(
    near(*swapped, k2=3).toarray(), near(k2=3).toarray()
  )


def test_an_asymmetry_by_rounding_is_none():
  distances = changed(np.where(X, 0, 0.5), (0, 1), 0.5 + 1e-7)
  assert dbscan(distances, 0.5, 2).tolist() == [0, 0, 0]


def test_nowhere_to_keep_what_numba_compiles(tmp_path):
  """As in a container with a read-only installation and no home.

  A file stands where each folder would be made, which stops root too.
  """
  package = pathlib.Path(unreid_jax.__file__).parent
  ignore = shutil.ignore_patterns("__pycache__")
  shutil.copytree(package, tmp_path / "unreid_jax", ignore=ignore)
  for folder in [x for x in (tmp_path / "unreid_jax").rglob("*") if x.is_dir()]:
    (folder / "__pycache__").touch()
  for place in ("unreid_jax/__pycache__", "home"):
    (tmp_path / place).touch()
  program = (
    "import unreid_jax.pseudo_labels.clustering, unreid_jax.ranking as r\n"
    "print(r.__file__, r._bucket(3.0, 1.0, 2.0))"
  )
  environment = os.environ | {"HOME": str(tmp_path / "home/user")}
  for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
    environment.pop(name, None)
  done = subprocess.run(
    [sys.executable, "-B", "-c", program],
    cwd=tmp_path, env=environment, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert done.stdout.split() == [str(tmp_path / "unreid_jax/ranking.py"), "4"]
  assert done.stderr.count("set NUMBA_CACHE_DIR") == 1
