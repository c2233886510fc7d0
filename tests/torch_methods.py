"""The methods' losses and memories in PyTorch, row by row, as slow as it gets.

Each has `step(features, indices, labels, camids)`, which returns the loss,
leaves its gradient in the network, and then writes to the memory.
"""

import torch
from torch.nn import functional as F


def unit(x):
  return F.normalize(x, dim=-1)


def move(rows, at, x, momentum):
  rows[at] = unit(momentum * rows[at] + (1 - momentum) * x)


def means(features, labels):
  num = int(labels.max()) + 1
  return unit(torch.stack([features[labels == y].mean(0) for y in range(num)]))


class ClusterContrast:
  """CM and, with `hardest`, CM_Hard."""

  def __init__(self, features, labels, hardest=False):
    self.rows, self.hardest = means(features, labels), hardest

  def step(self, f, indices, labels, camids):
    loss = F.cross_entropy(f @ self.rows.T / 0.05, labels)
    loss.backward()
    f = f.detach()
    for y in labels.unique() if self.hardest else []:
      own = f[labels == y]
      move(self.rows, y, own[(own @ self.rows[y]).argmin()], 0.1)
    for x, y in [] if self.hardest else zip(f, labels, strict=True):
      move(self.rows, y, x, 0.1)
    return loss

  def banks(self):
    return {"centroids": self.rows}


class TwoRows:
  """CMhybrid: a hard row and a mean row a cluster, w and w (1 - w) of it."""

  def __init__(self, features, labels, weight):
    self.mean, self.weight = means(features, labels), weight
    self.hard = self.mean.clone()

  def step(self, f, indices, labels, camids):
    hard, mean = (
      F.cross_entropy(f @ rows.T / 0.05, labels)
      for rows in (self.hard, self.mean)
    )
    loss = self.weight * (hard + (1 - self.weight) * mean)
    loss.backward()
    f = f.detach()
    for y in labels.unique():
      own = f[labels == y]
      move(self.hard, y, own[(own @ self.hard[y]).argmin()], 0.1)
      move(self.mean, y, own.mean(0), 0.1)
    return loss

  def banks(self):
    return {"centroids": self.mean, "hard": self.hard}


class Instances:
  """CMhybrid_v2: a centroid, w of the loss, and some features a cluster."""

  def __init__(self, features, labels, weight, instances):
    self.mean, self.weight = means(features, labels), weight
    self.instances = instances

  def step(self, f, indices, labels, camids):
    hard = f.new_zeros(len(f), len(self.mean))
    for i, y in enumerate(labels):
      for k, rows in enumerate(self.instances):
        each = rows @ f[i]
        hard[i, k] = each.min() if k == y else each.max()
    mean = F.cross_entropy(f @ self.mean.T / 0.05, labels)
    hard = F.cross_entropy(hard / 0.05, labels)
    loss = self.weight * mean + (1 - self.weight) * hard
    loss.backward()
    f = f.detach()
    for y in labels.unique():
      own = f[labels == y]
      move(self.mean, y, own.mean(0), 0.1)
      self.instances[y, : len(own)] = own
    return loss

  def banks(self):
    return {"centroids": self.mean, "hard": self.instances}


class SpCL:
  """A row an image; a class's logit is the mean over its rows."""

  def __init__(self, features, labels):
    self.rows, self.labels = features.clone(), labels

  def step(self, f, indices, labels, camids):
    each = torch.exp(
      torch.stack(
        [
          f @ self.rows[self.labels == y].mean(0) / 0.05
          for y in range(int(self.labels.max()) + 1)
        ],
        1,
      )
    )
    p = each / (each.sum(1, keepdim=True) + 1e-6)
    loss = F.nll_loss(torch.log(p + 1e-6), labels)
    loss.backward()
    for x, i in zip(f.detach(), indices, strict=True):
      move(self.rows, i, x, 0.2)
    return loss

  def banks(self):
    return {"bank": self.rows}


class Selective:
  """The global, the local and the mixture bank; each term sees the last's."""

  def __init__(
    self, features, camids, *, num_positives, num_negatives, self_weight,
    global_weight, bank_momentum, mixture_momentum,
  ):  # fmt: skip
    self.whole, self.local = features["global"], features["local"]
    self.mixture = torch.zeros_like(self.whole)
    self.camids, self.num = camids, (num_positives, num_negatives)
    self.own, self.whole_weight = self_weight, global_weight
    self.momentum = {"banks": bank_momentum, "mixture": mixture_momentum}

  def choose(self, f, indices, camids):
    """Own row, positives and negatives of each anchor."""
    rows, count = [], sum(self.num)
    for g, s, i, camera in zip(
      f["global"], f["local"], indices, camids, strict=True
    ):
      far = self.whole_weight * ((self.whole - g) ** 2).sum(1)
      local = ((self.local - s) ** 2).sum(2).mean(1)
      far += (1 - self.whole_weight) * local
      far += 0.05 * (self.camids == camera)
      order = [j for j in far.argsort().tolist() if j != i]
      rows.append([int(i), *order[:count]])
    return torch.tensor(rows)

  def step(self, f, indices, labels, camids):
    rows = self.choose({k: x.detach() for k, x in f.items()}, indices, camids)
    num = self.num[0]
    weights = [self.own] + [1.75 * (1 - self.own) / num] * num
    branches = [(0.3, f["local"].flatten(1)), (0.7, f["global"])]

    target = lambda k: torch.full((len(rows),), k)
    loss, slopes = 0, []
    for weight, x in branches:
      z = 10 * torch.einsum("bd,bmd->bm", x, self.mixture[rows])
      terms = [
        weight * weights[k] * F.cross_entropy(z, target(k))
        for k in range(num + 1)
      ]
      loss = loss + sum(terms)
      errors = [torch.autograd.grad(t, z, retain_graph=True)[0] for t in terms]
      slopes.append((x, errors))
    gradients = []
    for x, errors in slopes:
      slope = 0
      for k in reversed(range(num + 1)):
        bank = self.mixture[rows]  # as the terms before have left it
        slope += 10 * torch.einsum("bm,bmd->bd", errors[k], bank)
        for row, one in zip(rows[:, k], x.detach(), strict=True):
          move(self.mixture, row, one, self.momentum["mixture"])
      gradients.append(slope)
    torch.autograd.backward([x for x, _ in slopes], gradients)
    for i, g, s in zip(
      indices, f["global"].detach(), f["local"].detach(), strict=True
    ):
      move(self.whole, i, g, self.momentum["banks"])
      move(self.local, i, s, self.momentum["banks"])
    return loss

  def banks(self):
    return {
      "global_bank": self.whole, "local_bank": self.local,
      "mixture": self.mixture,
    }  # fmt: skip
