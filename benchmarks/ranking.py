"""Times the evaluation beside an argsort and beside the usual per-query loop.

  python benchmarks/ranking.py [--queries=3368] [--gallery=19732]

The default size is Market-1501's. The features are random, around a centre for
each identity and shifted by an offset for each camera. Each figure is the best
of three runs, and the three functions take turns.
"""

import argparse
import pathlib
import resource
import sys
import time

import numba
import numpy as np
from sklearn.metrics import average_precision_score

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from unreid_jax.ranking import evaluate_rank

MAX_RANK = 50


def make_case(num_queries: int, num_gallery: int) -> tuple[np.ndarray, ...]:
  """Distances, pids and camids; a sixth of the gallery are distractors."""
  rng = np.random.default_rng(0)
  pids = rng.integers(1, max(num_gallery // 26, 2), num_gallery + num_queries)
  pids[: num_gallery // 6] = 0
  camids = rng.integers(0, 6, len(pids))
  centres = rng.normal(size=(pids.max() + 1, 64))
  features = centres[pids] + 0.8 * rng.normal(size=(6, 64))[camids]
  features += 0.9 * rng.normal(size=features.shape)
  features[pids == 0] = rng.normal(size=(np.sum(pids == 0), 64))
  features /= np.linalg.norm(features, axis=1, keepdims=True)
  g, q = np.split(features.astype(np.float32), [num_gallery])
  g_pids, q_pids = np.split(pids, [num_gallery])
  g_camids, q_camids = np.split(camids, [num_gallery])
  return 2 - 2 * q @ g.T, q_pids, g_pids, q_camids, g_camids


def ours(*case: np.ndarray) -> np.ndarray:
  result = evaluate_rank(*case, max_rank=MAX_RANK)
  return np.append(result.cmc, result.mAP)


def argsort_alone(distances: np.ndarray, *_: np.ndarray) -> None:
  np.argsort(distances, axis=1)


def straightforward(
  distances, q_pids, g_pids, q_camids, g_camids
) -> np.ndarray:
  """Sorts all rows, then scores one query after the other."""
  order = np.argsort(distances, axis=1)
  precisions, first = [], []
  for i, row in enumerate(order):
    match = g_pids[row] == q_pids[i]
    keep = ~match | (g_camids[row] != q_camids[i])
    match, scores = match[keep], -distances[i, row[keep]]
    if match.any():
      precisions.append(average_precision_score(match, scores))
      first.append(np.argmax(match))
  cmc = np.mean(np.array(first)[:, None] <= np.arange(MAX_RANK), axis=0)
  return np.append(cmc, np.mean(precisions))


def timed(function, case) -> tuple[float, np.ndarray | None]:
  start = time.perf_counter()
  result = function(*case)
  return time.perf_counter() - start, result


def peak_gb() -> float:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--queries", type=int, default=3368)
  parser.add_argument("--gallery", type=int, default=19732)
  flags = parser.parse_args()
  case = make_case(flags.queries, flags.gallery)
  distances, q_pids, g_pids, q_camids, g_camids = case
  few = distances[:8], q_pids[:8], g_pids, q_camids[:8], g_camids
  first_call, again = (timed(ours, few)[0] for _ in range(2))
  before = peak_gb()
  timed(ours, case)
  extra = peak_gb() - before
  functions = (ours, argsort_alone, straightforward)
  runs = [[timed(f, case) for f in functions] for _ in range(3)]
  seconds = [min(run[i][0] for run in runs) for i in range(3)]
  difference = np.abs(runs[0][0][1] - runs[0][2][1]).max()
  *cmc, mean_ap = runs[0][0][1]
  print(f"{distances.shape} distances, {numba.get_num_threads()} threads")
  print(f"{'':18}{'seconds':>9}{'ratio':>10}")
  for function, value in zip(functions, seconds, strict=True):
    print(f"{function.__name__:18}{value:9.3f}{value / seconds[0]:9.1f}x")
  print(f"mAP {mean_ap:.6f}, R1 {cmc[0]:.6f}; the straightforward mAP and")
  print(f"R1 to R{MAX_RANK} differ by at most {difference:.1e}")
  print(f"compilation (0 where numba has it cached) {first_call - again:.2f} s")
  print(
    f"peak memory beyond the matrix ({distances.nbytes / 2**30:.2f} GB): ours "
    f"{extra:.2f} GB, with the others {peak_gb() - before:.2f} GB"
  )


if __name__ == "__main__":
  main()
