"""Any arrays to the public functions: the slow twin's answer, or one line.

PROPERTY_EXAMPLES=5000 draws that many new ones for each instead.
"""

import collections
import functools
import os
import warnings

import hypothesis
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.sparse
from hypothesis import strategies as st
from sklearn.cluster import DBSCAN
from test_jaccard import to_dense
from test_jaccard import twin as slow_jaccard
from test_neighbors import twin as slow_neighbors
from test_ranking import twin as slow_ranks
from test_rerank import random_features
from test_rerank import twin as slow_rerank
from test_spcl import slow_refine

from unreid_jax import UserError
from unreid_jax.data import sampler
from unreid_jax.pseudo_labels import (
  clustering,
  dbscan,
  false_negatives,
  infomap,
  jaccard_from_neighbors,
  neighbors,
  self_paced,
)
from unreid_jax.ranking import evaluate_rank, rank_queries, rerank

EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", 0))
DTYPES = "?", "i1", "u1", "i4", ">i8", "u8", "f2", "f4", ">f4", "f8", "g"
ODD = np.nan, np.inf, -np.inf, -1, 0.5, 3, 1e30
ODD_NUMBERS = (
  *(0, -1, 1, 2, 7, 10**30, 2.0, 0.5, 1.5, np.nan, np.inf, True, None, "3"),
  *(1j, [3], (), np.ones(2), np.int8(3), np.uint8(255), np.float32(0.25)),
  *(jnp.int32(2), jnp.float32(0.5), np.array(3), np.datetime64("2020"), object),
)


def property_of(**strategies):
  """As `hypothesis.given`, with our number of examples."""
  settings = hypothesis.settings(
    max_examples=EXAMPLES or 60,
    phases=(hypothesis.Phase.generate,),
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  given = hypothesis.given(data=st.data(), **strategies)
  return lambda function: settings(given(function))


def others(draw, x, writable):
  """The same numbers in another type, order of memory or library."""
  dtypes = [np.dtype(name) for name in DTYPES] + [ml_dtypes.bfloat16]
  dtype = draw(st.sampled_from(dtypes))
  with np.errstate(all="ignore"):
    other = x.astype(dtype)
  if np.array_equal(other.astype("f8"), x.astype("f8"), equal_nan=True):
    x = other
  forms = [
    *(np.asarray, np.asfortranarray, np.ndarray.tolist),
    *(lambda x: np.repeat(x, 2, -1)[..., ::2], lambda x: x[::-1].copy()[::-1]),
    *(lambda x: np.ma.array(x), memoryview if x.dtype.num < 24 else np.array),
  ]
  if not writable and x.dtype.isnative and x.dtype.itemsize < 16:
    forms.append(jnp.asarray)
  return draw(st.sampled_from(forms))(x)


def spoil(draw, x):
  """Something that may be no right argument any more."""
  if not isinstance(x, np.ndarray):
    return draw(st.sampled_from(ODD_NUMBERS))
  kinds = [
    *(x[:-1], x[:0], x[..., :0], x[None], x[..., None], np.append(x, x, 0)),
    *(x.astype(object), x.astype(str), x.astype(complex), x.T),
    *(None, 3, "abc", [[1], [2, 3]], [None], {}, scipy.sparse.eye_array(3)),
    *(np.ma.array(x, mask=True), np.zeros(x.shape, "M8[s]")),
  ]
  if draw(st.booleans()) or not x.size:
    return draw(st.sampled_from(kinds))
  is_whole = x.dtype.kind == "i"
  values = (*ODD, 2**40, 2.0**63, -5) if is_whole else ODD
  value = draw(st.sampled_from(values))
  x = x.astype("i8" if is_whole and value in (2**40, -1, 3) else "f8")
  x.flat[draw(st.integers(0, x.size - 1))] = value
  return x


def is_plain(value):
  """Whether it is a real array, which may take other forms."""
  return type(value) is np.ndarray and value.ndim and value.dtype.kind in "if"


def as_numbers(value):
  """What a twin reads."""
  if getattr(value, "ndim", 1) == 0:
    return value.item()
  if isinstance(value, np.ndarray | list | memoryview | jnp.ndarray):
    return np.asarray(value).astype("f8")
  return value


def try_it(data, check, function, writable=(), spoiled=False, **arguments):
  """Calls with the arguments as they are, or spoiled, in any form.

  What it returns is handed to `check` with the arguments as numbers. It may
  refuse what is spoiled, in one line that names an argument.
  """
  names = st.sampled_from(sorted(arguments))
  bad = data.draw(st.sets(names, max_size=2))
  given = {}
  for name, value in arguments.items():
    if name in bad:
      value = spoil(data.draw, value)
    if is_plain(value):
      value = others(data.draw, value, name in writable)
    given[name] = value
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      out = function(**given)
  except UserError as error:
    assert bad or spoiled, f"refused: {error}"
    text = str(error)
    assert "\n" not in text and len(text) < 160
    assert text.startswith((*arguments, "row ", "the features", "no "))
    return
  check(out, **{name: as_numbers(value) for name, value in given.items()})


def draw_ints(data, low, high, *shape):
  seed = data.draw(st.integers(0, 2**32 - 1))
  return np.random.default_rng(seed).integers(low, high, shape)


def draw_features(data, sizes=(1, 2, 9), d=(1, 3)):
  n, d = (data.draw(st.sampled_from(x)) for x in (sizes, d))
  return draw_ints(data, -2, 3, n, d).astype("f4")


@property_of(k=st.sampled_from([1, 3, 30]))
def test_neighbors(data, k):
  def check(got, features, k):
    want = slow_neighbors(features, int(k))[:2]
    for x, y in zip(got, want, strict=True):
      np.testing.assert_array_equal(x, y)

  try_it(data, check, neighbors, features=draw_features(data), k=k)


@property_of(
  k=st.sampled_from([1, 2, 4, 40]),
  k2=st.sampled_from([1, 2, 6, 50]),
  max_distance=st.sampled_from([None, 0.0, 0.3, 0.9]),
)
def test_jaccard_from_neighbors(data, k, k2, max_distance):
  def check(got, features, distances, indices, k2, max_distance):
    indices = indices.astype(int)
    own = indices == np.arange(len(indices))[:, None]
    distances = np.where(own, 0, np.maximum(distances, 0))
    want = slow_jaccard(
      features, indices, int(k2), near_distances=distances
    ).astype("f4")
    got = to_dense(got)
    np.testing.assert_array_equal(got, got.T)
    if max_distance is not None:
      limit = np.float32(max_distance)
      sure = np.abs(want - limit) > 1e-5
      got, want = np.where(sure, got, 0), np.where(want > limit, 1, want)
      want = np.where(sure, want, 0)
    np.testing.assert_allclose(got, want, 0, 2e-6)

  features = draw_features(data, (1, 2, 9, 40))
  found = slow_neighbors(features, k)[:2]
  found = dict(zip(("distances", "indices"), found, strict=True))
  if len(features) > 1 and data.draw(st.booleans()):  # another list
    row, column = (data.draw(st.integers(0, x - 1)) for x in (2, min(k, 2)))
    found["indices"][row, column] = data.draw(st.integers(-1, len(features)))
  options = {"k2": k2, "max_distance": max_distance}
  try_it(
    data, check, jaccard_from_neighbors, ("features",), True, features=features,
    **found, **options,
  )  # fmt: skip


@property_of(
  n=st.sampled_from([1, 2, 7, 15]),
  eps=st.sampled_from([0.125, 0.3, 0.5, 1.0]),
  min_samples=st.sampled_from([1, 3]),
  form=st.sampled_from(
    ["csr", "csc", "coo", "lil", "dok", "bsr", "dia", "dense"]
  ),
  change=st.sampled_from(["", "", "", "entry", "damage", "shape", "dtype"]),
)
def test_dbscan(data, n, eps, min_samples, form, change):
  dense = np.triu(draw_ints(data, 0, 9, n, n) / np.float32(8), 1)
  dense += dense.T
  absent = np.triu(draw_ints(data, 0, 2, n, n), 1).astype(bool)
  dense[absent | absent.T] = 50
  spoiled = bool(change)
  if change == "entry":
    value = data.draw(st.sampled_from([*ODD, 0, -1e-9]))
    dense[tuple(draw_ints(data, 0, n, 2))] = value
  row, column = np.nonzero(dense != 50)
  keep = slice(None)
  if change == "shape":
    dense = dense[:, :-1]
    keep = column < n - 1
  entries = dense[row[keep], column[keep]], (row[keep], column[keep])
  if change == "dtype":
    kind = data.draw(st.sampled_from([complex, "i8", "?", "f8", "g"]))
    entries = entries[0].astype(kind), entries[1]
    dense[row, column] = entries[0].real
  matrix = scipy.sparse.coo_array(entries, dense.shape)
  if form != "dense":
    dense = np.where(dense == 50, 1e9, dense)
    kind = data.draw(st.sampled_from(["array", "matrix"]))
    matrix = getattr(scipy.sparse, f"{form}_{kind}")(matrix)
    if form in ("lil", "dok", "dia"):  # these drop zeros
      kept = matrix.tocoo()
      dense = np.full(dense.shape, 1e9)
      dense[kept.row, kept.col] = kept.data.real
    if form in ("csr", "csc") and change == "damage" and matrix.nnz:
      part = data.draw(st.sampled_from(["indices", "indptr"]))
      getattr(matrix, part)[-1] = data.draw(st.sampled_from([-1, n, 10**6]))
    elif form == "csr" and data.draw(st.booleans()):  # unsorted
      for begin, end in zip(matrix.indptr, matrix.indptr[1:], strict=False):
        for part in (matrix.indices, matrix.data):
          part[begin:end] = part[begin:end][::-1].copy()
      matrix.has_sorted_indices = False

  def check(got, distances, eps, min_samples):
    want = distances if form == "dense" else dense
    if scipy.sparse.issparse(want) or not len(got):  # not what was drawn
      return
    want = np.minimum(np.array(want, "f8"), 1e9)  # sklearn has no infinity
    np.fill_diagonal(want, 0)
    model = DBSCAN(
      eps=float(eps), min_samples=int(min_samples), metric="precomputed"
    )
    np.testing.assert_array_equal(got, model.fit_predict(want))
    assert got.dtype == np.int32

  options = {"eps": eps, "min_samples": min_samples}
  given = dense if form == "dense" else matrix
  try_it(data, check, dbscan, (), spoiled, distances=given, **options)


@property_of(
  q=st.sampled_from([1, 4]),
  g=st.sampled_from([1, 8, 30]),
  max_rank=st.sampled_from([1, 5, 50]),
)
def test_ranks(data, q, g, max_rank):
  ids = [draw_ints(data, 0, high, n) for high in (4, 2) for n in (q, g)]
  q_pids, g_pids, q_camids, g_camids = ids
  q_pids[0] = g_pids[0]
  q_camids[0] = 1 - g_camids[0]

  def check(got, max_rank, **case):
    ranks, result = got
    want = np.array(list(slow_ranks(*case.values())))
    np.testing.assert_allclose(np.stack(ranks, axis=1), want)
    ap, first_match, inp = want[want[:, 1] > 0].T
    np.testing.assert_allclose(
      (result.mAP, result.mINP), (ap.mean(), inp.mean())
    )
    cmc = [np.mean(first_match <= k + 1) for k in range(int(max_rank))]
    np.testing.assert_allclose(result.cmc, cmc)

  def run(max_rank, **case):
    return rank_queries(**case), evaluate_rank(**case, max_rank=max_rank)

  try_it(
    data, check, run, ("distances",),
    distances=draw_ints(data, 0, 6, q, g).astype("f4"),
    query_pids=q_pids, gallery_pids=g_pids,
    query_camids=q_camids, gallery_camids=g_camids,
    max_rank=max_rank,
  )  # fmt: skip


@property_of(
  q=st.sampled_from([1, 3]),
  g=st.sampled_from([1, 6]),
  k1=st.sampled_from([1, 20]),
  k2=st.sampled_from([1, 2, 6]),
  lambda_value=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_rerank(data, q, g, k1, k2, lambda_value):
  def check(got, query, gallery, k1, k2, lambda_value):
    assert got.shape == (len(query), len(gallery))
    if not got.size:
      return
    want = slow_rerank(query, gallery, int(k1), int(k2), lambda_value)
    np.testing.assert_allclose(got, want, 0, 3e-6)

  seed = data.draw(st.integers(0, 99))
  query, gallery = np.split(random_features(q + g, 2, seed), [q])
  options = {"k1": k1, "k2": k2, "lambda_value": lambda_value}
  try_it(
    data, check, rerank, ("query", "gallery"), query=query, gallery=gallery,
    **options,
  )  # fmt: skip


@property_of(n=st.sampled_from([1, 5, 30]))
def test_refine(data, n):
  def check(got, **trio):
    trio = [x.astype("i4") for x in trio.values()]
    want, threshold = slow_refine(*trio, np.nan)
    np.testing.assert_array_equal(got[0], want)
    np.testing.assert_equal(got[1], threshold)

  names = "labels", "tight", "loose"
  trio = {name: draw_ints(data, -1, n // 3 + 1, n) for name in names}
  try_it(data, check, self_paced.refine, **trio)


@property_of(n=st.sampled_from([1, 6, 30]))
def test_merged_into(data, n):
  def check(got, labels, loose):
    for c in range(int(labels.max(initial=-1)) + 1):
      counts = collections.Counter(loose[labels == c])
      assert counts[got[c]] == max(counts.values())

  classes = draw_ints(data, 0, n // 2 + 1, n)
  classes = np.unique(classes, return_inverse=True)[1]
  loose = draw_ints(data, -1, 3, n)
  merged = false_negatives.merged_into
  try_it(data, check, merged, labels=classes, loose=loose)


@property_of(n=st.sampled_from([1, 12]))
def test_report(data, n):
  """Against a loop over all anchors and proxies."""

  def check(got, labels, loose, pids):
    if pids is None or (pids < 0).any():
      return
    labels = labels.astype(int)
    whose = false_negatives.merged_into(labels, pids)
    pairs = [(i, c) for i in range(len(labels)) for c in range(len(loose))]
    pairs = [(i, c) for i, c in pairs if c != labels[i]]
    false = [whose[c] == pids[i] for i, c in pairs]
    masked = [loose[c] == loose[labels[i]] >= 0 for i, c in pairs]
    both = np.sum(np.logical_and(false, masked))
    counts = {
      "false_negatives": (np.sum(false), len(pairs)),
      "mask_precision": (both, np.sum(masked)),
      "mask_missed": (np.sum(false) - both, np.sum(false)),
    }
    want = {name: a / b for name, (a, b) in counts.items() if b}
    assert got == pytest.approx(want)

  classes = draw_ints(data, 0, n // 2 + 1, n)
  classes = np.unique(classes, return_inverse=True)[1]
  loose = draw_ints(data, -1, 3, classes.max() + 1)
  pids = draw_ints(data, -1 if n == 1 else 0, 4, n)
  report = false_negatives.report
  try_it(data, check, report, labels=classes, loose=loose, pids=pids)


@property_of(most=st.sampled_from([0, 1, 2, 9]))
def test_keep_largest_and_describe(data, most):
  def check(got, labels, most, pids):
    (kept, notes), figures = got
    counts = collections.Counter(labels[labels >= 0])
    largest = sorted(counts, key=lambda x: (-counts[x], x))[: int(most)]
    if len(counts) > most:
      number = {x: i for i, x in enumerate(sorted(largest))}
      labels_kept = [number.get(x, -1) for x in labels]
      np.testing.assert_array_equal(kept, labels_kept)
      assert len(notes) == 1
    else:
      np.testing.assert_array_equal(kept, labels)
    large = [x for x in counts if counts[x] > 1]
    assert figures["clusters"] == len(large)
    assert figures["outliers"] == np.sum(~np.isin(labels, large))
    if pids is None:
      return
    n = range(len(labels))
    pairs = [(i, j) for i in n for j in range(i)]
    near = [labels[i] == labels[j] >= 0 for i, j in pairs]
    true = [pids[i] == pids[j] for i, j in pairs]
    both = np.sum(np.logical_and(near, true))
    shares = [both / np.sum(x) if np.sum(x) else 0 for x in (near, true)]
    got = figures["precision"], figures["recall"]
    np.testing.assert_allclose(got, shares)

  def run(labels, most, pids):
    kept = clustering.keep_largest(labels, most)
    return kept, clustering.describe(labels, pids)

  labels, pids = draw_ints(data, -1, 6, 20), draw_ints(data, 0, 5, 20)
  try_it(data, check, run, labels=labels, most=most, pids=pids)


@property_of(num_instances=st.sampled_from([0, 1, 4]))
def test_plan(data, num_instances):
  plan = functools.partial(
    sampler.plan, batch_size=8, steps=2, num_instances=num_instances
  )

  def check(got, labels, camids, epoch, seed, other_camera):
    assert got.shape == (2, 8) and (labels[got] >= 0).all()
    ids = labels.astype(int), camids.astype(int)
    options = {"seed": int(seed), "other_camera": bool(other_camera)}
    np.testing.assert_array_equal(got, plan(*ids, int(epoch), **options))

  labels, camids = (
    np.append(0, draw_ints(data, -1, 5, 11)),
    draw_ints(data, 0, 2, 12),
  )
  options = {"epoch": 3, "seed": 0, "other_camera": data.draw(st.booleans())}
  try_it(data, check, plan, labels=labels, camids=camids, **options)


@property_of(name=st.sampled_from(["dbscan", "infomap"]))
def test_cluster(data, name):
  """What plain arrays give."""
  if name == "infomap":
    pytest.importorskip("infomap")
  hp = clustering.Clustering(
    clustering=name, k1=3, k2=1, min_samples=2, center_cameras=True
  )
  run = lambda **given: clustering.cluster(hp, **given)

  def check(got, features, camids):
    want = run(features=features.astype("f4"), camids=camids.astype(int))
    np.testing.assert_array_equal(got.labels, want.labels)

  features = draw_features(data, (9,), (3,)) + 0.25
  camids = draw_ints(data, 0, 2, 9)
  try_it(data, check, run, ("features",), features=features, camids=camids)


@property_of()
def test_infomap(data):
  pytest.importorskip("infomap")

  def check(got, features, k, min_similarity, min_size):
    want = infomap(features.astype("f4"), int(k), min_similarity, int(min_size))
    np.testing.assert_array_equal(got, want)

  features = draw_features(data, (9,), (3,))
  features = np.sign(features + 0.25) / 2
  options = {"k": 3, "min_similarity": 0.5, "min_size": 2}
  try_it(data, check, infomap, features=features, **options)
