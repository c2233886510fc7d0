"""Times pseudo labels and re-ranking beside faiss and dense matrices in numpy.

  python benchmarks/pseudo_labels.py [--sizes=2000,4000,8000,12936]
    [--search=12936x2048,32621x2048,100000x256] [--rounds=3]
    [--large=32621x2048,100000x256] [--rerank=3368x15913]

A part that is given no size is left out. The features are random, around a
centre for each of n / 17 identities and shifted by an offset for each of six
cameras. Each contender runs in a process of its own. numba has compiled before,
while the search compiles once for each size, about a second that is included.
Memory is the peak of a part beyond what the process held before it. The dense
contender builds V, its average and the distances as n x n matrices, one row at
a time, as the published code does, and is handed our neighbours.
"""

import argparse
import concurrent.futures
import ctypes
import math
import multiprocessing
import pathlib
import sys
import time

import numpy as np
from sklearn.cluster import DBSCAN

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from unreid_jax.pseudo_labels import dbscan, jaccard_from_neighbors, neighbors
from unreid_jax.pseudo_labels.neighbors import search
from unreid_jax.ranking import rerank

K1, K2, EPS, MIN_SAMPLES = 30, 6, 0.6, 4


def make_features(n: int, d: int) -> np.ndarray:
  rng = np.random.default_rng(0)
  rank = 64
  latent = rng.normal(size=(n // 17, rank))[rng.integers(0, n // 17, n)]
  latent += 0.5 * rng.normal(size=(6, rank))[rng.integers(0, 6, n)]
  latent += 0.8 * rng.normal(size=(n, rank))
  features = (latent @ rng.normal(size=(rank, d)) / 8).astype(np.float32)
  for row in features:
    row += 0.3 * rng.standard_normal(d, np.float32)
    row /= np.linalg.norm(row)
  return features


def memory_mb(field: str) -> float:
  status = pathlib.Path("/proc/self/status").read_text()
  return int(status.split(field + ":")[1].split()[0]) / 1024


def measured(function, *arguments) -> tuple:
  """Returns the result, the seconds and the peak of extra memory in MB."""
  ctypes.CDLL(None).malloc_trim(0)  # give freed memory back
  pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak
  before, start = memory_mb("VmRSS"), time.perf_counter()
  result = function(*arguments)
  seconds = time.perf_counter() - start
  return result, seconds, memory_mb("VmHWM") - before


def alone(function, *arguments) -> tuple:
  """Runs the function in a process of its own."""
  spawn = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
    return pool.submit(function, *arguments).result()


def search_ours(n, d) -> tuple:
  neighbors(make_features(300, d), K1)  # loads what numba has compiled
  found, *cost = measured(neighbors, make_features(n, d), K1)
  return cost, found, memory_mb("VmHWM")


def search_faiss(n, d) -> tuple:
  import faiss

  def nearest(x):
    index = faiss.IndexFlatL2(d)
    index.add(x)
    return index.search(x, K1)

  found, *cost = measured(nearest, make_features(n, d))
  return cost, found, memory_mb("VmHWM")


def products_alone(n, d) -> tuple:
  x = make_features(n, d)

  def multiply():
    for i in range(0, n, 1024):
      x[i : i + 1024] @ x.T

  _, *cost = measured(multiply)
  return cost, None, memory_mb("VmHWM")


def cluster_ours(n, d, distances, indices) -> tuple:
  small = make_features(300, d)
  jaccard_from_neighbors(small, *neighbors(small, K1), K2, EPS)  # compiles
  x, found = make_features(n, d), (distances, indices)
  jaccard, *jaccard_cost = measured(jaccard_from_neighbors, x, *found, K2, EPS)
  labels, *dbscan_cost = measured(dbscan, jaccard, EPS, MIN_SAMPLES)
  costs = jaccard_cost, dbscan_cost
  return costs, labels, jaccard.nnz / n, memory_mb("VmHWM")


def cluster_dense(n, d, distances, indices) -> tuple:
  x = make_features(n, d)
  jaccard, *jaccard_cost = measured(dense_jaccard, x, indices)
  model = DBSCAN(eps=EPS, min_samples=MIN_SAMPLES, metric="precomputed")
  labels, *dbscan_cost = measured(model.fit_predict, jaccard)
  return (jaccard_cost, dbscan_cost), labels, np.mean(jaccard < 1) * n


def reciprocal(rank, i, num) -> np.ndarray:
  near = rank[i, :num]
  return near[(rank[near, :num] == i).any(axis=1)]


def dense_encoding(rank, k1, weigh) -> np.ndarray:
  """V before the average; `weigh(i, members)` gives unscaled weights."""
  n = len(rank)
  half = round(k1 / 2) + 1
  nearer = [reciprocal(rank, i, half) for i in range(n)]
  encoding = np.zeros((n, n), np.float32)
  for i in range(n):
    near = reciprocal(rank, i, rank.shape[1])
    sets = [near]
    for j in near:
      shared = np.isin(nearer[j], near, assume_unique=True).sum()
      if shared > 2 / 3 * len(nearer[j]):
        sets.append(nearer[j])
    members = np.unique(np.concatenate(sets))
    weights = weigh(i, members)
    encoding[i, members] = weights / weights.sum()
  return encoding


def dense_distances(encoding, rank, num_rows) -> np.ndarray:
  average = np.zeros_like(encoding)
  for i, row in enumerate(rank):
    average[i] = encoding[row[:K2]].mean(axis=0)
  del encoding
  columns = [np.flatnonzero(column) for column in average.T]
  out = np.zeros((num_rows, len(rank)), np.float32)
  for i in range(num_rows):
    overlap = np.zeros(len(rank), np.float32)
    for c in np.flatnonzero(average[i]):
      rows = columns[c]
      overlap[rows] += np.minimum(average[i, c], average[rows, c])
    out[i] = 1 - overlap / (2 - overlap)
  return np.maximum(out, 0, out=out)


def dense_jaccard(x, rank) -> np.ndarray:
  weigh = lambda i, members: np.exp(2 * x[members] @ x[i] - 2)
  return dense_distances(dense_encoding(rank, K1, weigh), rank, len(x))


def rerank_ours(q, g, d) -> tuple:
  small = make_features(300, d)
  rerank(small[:50], small[50:])
  x = make_features(q + g, d)
  out, *cost = measured(rerank, x[:q], x[q:])
  _, search_seconds, _ = measured(search, x, 21)  # again, and compiled
  return cost, out[::97], search_seconds


def rerank_dense(q, g, d) -> tuple:
  x = make_features(q + g, d)
  products, *product_cost = measured(lambda: 2 - 2 * x @ x.T)
  out, *cost = measured(dense_rerank, products, q)
  cost = cost[0] + product_cost[0], product_cost[1] + cost[1]
  return cost, out[::97], product_cost[0]


def dense_rerank(squared, q, k1=20, weight=0.3) -> np.ndarray:
  original = np.square(squared)
  original = (original / original.max(axis=0)).T
  rank = np.argsort(original)[:, : k1 + 1].copy()
  weigh = lambda i, members: np.exp(-original[i, members])
  jaccard = dense_distances(dense_encoding(rank, k1, weigh), rank, q)
  return (1 - weight) * jaccard[:, q:] + weight * original[:q, q:]


def compare_clustering(sizes, d) -> None:
  print(f"k1={K1}, k2={K2}, eps={EPS}, d={d}; s and MB of extra memory")
  names = "jaccard", "dbscan"
  header = f"{'n':>7}{'search':>8}"
  for name in names:
    header += f"{name:>15}{'dense':>16}{'ratios':>14}"
  print(header + f"{'J<=eps':>8}{'J<1':>6}  labels")
  seconds = []
  for n in sizes:
    search_cost, found, _ = alone(search_ours, n, d)
    ours, labels, entries, _ = alone(cluster_ours, n, d, *found)
    dense, want, dense_entries = alone(cluster_dense, n, d, *found)
    line = f"{n:7}{search_cost[0]:8.2f}"
    for (s, mb), (dense_s, dense_mb) in zip(ours, dense, strict=True):
      line += f"{s:8.3f}{mb:7.1f}{dense_s:9.2f}{dense_mb:7.0f}"
      line += f"{dense_s / s:6.0f}x{dense_mb / max(mb, 1):6.0f}x"
    wrong = np.sum(labels != want)
    same = "equal" if wrong == 0 else f"{wrong} differ"
    print(line + f"{entries:8.1f}{dense_entries:6.0f}  {same}", flush=True)
    seconds.append((ours[0][0], dense[0][0]))
  if len(sizes) > 1:
    growth = math.log(sizes[-1] / sizes[0])
    ours, dense = (
      math.log(last / first) / growth
      for first, last in zip(seconds[0], seconds[-1], strict=True)
    )
    print(f"Jaccard grows as n^{ours:.2f}, the dense one as n^{dense:.2f}")


def compare_search(n, d, rounds) -> None:
  contenders = {
    "unreid_jax": search_ours,
    "faiss-cpu": search_faiss,
    "products": products_alone,
  }
  costs, found = {name: [] for name in contenders}, {}
  for _ in range(rounds):
    for name, run in contenders.items():
      cost, found[name], _ = alone(run, n, d)
      costs[name].append(cost)
  ours, other = (found[name][1] for name in ("unreid_jax", "faiss-cpu"))
  both = zip(ours, other, strict=True)
  shared = np.mean([np.isin(*rows).mean() for rows in both])
  print(f"the {K1} nearest of {n} x {d}; {100 * shared:.3f} % are the same")
  fastest = {name: min(cost)[0] for name, cost in costs.items()}
  for name, seconds in fastest.items():
    spread = " ".join(f"{cost[0]:.2f}" for cost in costs[name])
    print(
      f"  {name:<11}{seconds:7.2f} s ({spread}), {min(costs[name])[1]:5.0f} MB"
      f", {seconds / fastest['unreid_jax']:.2f}",
      flush=True,
    )


def large_alone(n, d) -> None:
  search_cost, found, search_peak = alone(search_ours, n, d)
  costs, labels, entries, peak = alone(cluster_ours, n, d, *found)
  costs = search_cost, *costs
  line = f"n={n}, d={d}:"
  for name, cost in zip(("search", "jaccard", "dbscan"), costs, strict=True):
    line += f" {name} {cost[0]:.2f} s {cost[1]:.0f} MB,"
  print(
    f"{line} {entries:.1f} entries a row, {labels.max() + 1} clusters, whole "
    f"processes {search_peak / 1024:.2f} and {peak / 1024:.2f} GB",
    flush=True,
  )


def compare_reranking(q, g, d) -> None:
  cost, out, search_seconds = alone(rerank_ours, q, g, d)
  dense, want, products = alone(rerank_dense, q, g, d)
  print(f"re-ranking {q} x {g}, d={d}")
  print(
    f"  ours  {cost[0]:7.2f} s, of which the search {search_seconds:.2f} s; "
    f"{cost[1]:6.0f} MB\n"
    f"  dense {dense[0]:7.2f} s, of which the products {products:.2f} s; "
    f"{dense[1]:6.0f} MB\n"
    f"  ratios: all {dense[0] / cost[0]:.1f}x, after search or products "
    f"{(dense[0] - products) / (cost[0] - search_seconds):.1f}x, memory "
    f"{dense[1] / cost[1]:.1f}x; largest difference "
    f"{np.abs(out - want).max():.1e}"
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--sizes", default="2000,4000,8000,12936")
  parser.add_argument("--search", default="12936x2048,32621x2048,100000x256")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--large", default="32621x2048,100000x256")
  parser.add_argument("--rerank", default="3368x15913")
  parser.add_argument("--dim", type=int, default=2048)
  flags = parser.parse_args()
  if flags.sizes:
    compare_clustering([int(n) for n in flags.sizes.split(",")], flags.dim)
  for size in filter(None, flags.search.split(",")):
    compare_search(*map(int, size.split("x")), flags.rounds)
  for size in filter(None, flags.large.split(",")):
    large_alone(*map(int, size.split("x")))
  if flags.rerank:
    compare_reranking(*map(int, flags.rerank.split("x")), flags.dim)


if __name__ == "__main__":
  main()
