"""The encoder in PyTorch, under the names of the references' own networks."""

import torch
from torch import nn
from torch.nn import functional as F

torch.set_num_threads(1)  # the cores are shared with other tests


class Block(nn.Module):
  """Two 3x3 convolutions and a shortcut."""

  def __init__(self, inside, out, stride):
    super().__init__()
    self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
    self.bn1 = nn.BatchNorm2d(out)
    self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
    self.bn2 = nn.BatchNorm2d(out)
    if stride > 1 or inside != out:
      conv = nn.Conv2d(inside, out, 1, stride, bias=False)
      self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out))

  def forward(self, x):
    shortcut = self.downsample(x) if hasattr(self, "downsample") else x
    x = F.relu(self.bn1(self.conv1(x)))
    return F.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet(nn.Sequential):
  """torchvision's names; the last of four stages keeps its resolution."""

  def __init__(self, depths, channels):
    super().__init__()
    self.conv1 = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
    self.bn1 = nn.BatchNorm2d(channels)
    self.relu = nn.ReLU()
    self.maxpool = nn.MaxPool2d(3, 2, 1)
    inside = channels
    for i, depth in enumerate(depths):
      out, blocks = channels * 2**i, []
      for j in range(depth):
        blocks.append(Block(inside, out, 2 if i in (1, 2) and not j else 1))
        inside = out
      setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
    self.channels = inside


class GeM(nn.Module):
  def __init__(self):
    super().__init__()
    self.p = nn.Parameter(torch.full((1,), 3.0))

  def forward(self, x):
    return x.clamp(min=1e-6).pow(self.p).mean((2, 3)).pow(1 / self.p)


class Neck(nn.Module):
  """As Cluster Contrast, SpCL and HHCL name it: base.0, gap, feat_bn."""

  def __init__(self, depths, channels, pooling):
    super().__init__()
    backbone = ResNet(depths, channels)
    self.base = nn.Sequential(*backbone.children())
    self.gap = GeM() if pooling == "gem" else nn.AdaptiveAvgPool2d(1)
    self.feat_bn = nn.BatchNorm1d(backbone.channels)
    self.feat_bn.bias.requires_grad_(False)

  def forward(self, x):
    return F.normalize(self.feat_bn(self.gap(self.base(x)).flatten(1)))


class Whole(nn.Module):
  def __init__(self, channels, dim):
    super().__init__()
    self.embeding = nn.Linear(channels, dim)
    self.embeding_bn = nn.BatchNorm1d(dim)


class Stripes(nn.Module):
  """As Unsup_ReID names it: CNN, avg_pooling, local_pooling."""

  def __init__(self, depths, channels, dim, num_stripes, stripe_dim):
    super().__init__()
    self.CNN = ResNet(depths, channels)
    out = self.CNN.channels
    self.avg_pooling = Whole(out, dim)
    self.local_pooling = nn.Module()
    self.local_pooling.local_conv_list = nn.ModuleList(
      nn.Sequential(nn.Linear(out, stripe_dim), nn.BatchNorm1d(stripe_dim))
      for _ in range(num_stripes)
    )

  def forward(self, x):
    x = self.CNN(x)
    whole = self.avg_pooling
    whole = whole.embeding_bn(whole.embeding(x.mean((2, 3))))
    layers = self.local_pooling.local_conv_list
    rows = x.shape[2] // len(layers)
    local = [
      layer(x[:, :, i * rows : (i + 1) * rows].mean((2, 3)))
      for i, layer in enumerate(layers)
    ]
    local = F.normalize(torch.stack(local, 1), dim=2)
    return {"global": F.normalize(whole), "local": local}


def randomize(net, seed=0):
  """Draws what a new network has at 0 or 1, too."""
  generator = torch.Generator().manual_seed(seed)
  draw = lambda x: torch.rand(x.shape, generator=generator, dtype=x.dtype)
  with torch.no_grad():
    for name, x in net.state_dict().items():
      if name.endswith("num_batches_tracked") or name == "gap.p":
        continue
      if x.ndim > 1:
        x.copy_((draw(x) - 0.5) * (3 * 4 / x[0].numel()) ** 0.5)
      elif name.endswith(("running_var", "weight")):
        x.copy_(0.5 + draw(x))
      else:
        x.copy_(draw(x) - 0.5)
  return net
