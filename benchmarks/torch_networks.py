"""The networks of benchmarks/train_step.py in plain PyTorch."""

import torch
from torch import nn
from torch.nn import functional as F

_RESNETS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
# Of EfficientNet-Lite0: blocks, kernel, stride, expansion, channels. The last
# stride is 1, as in re-ID.
_LITE0 = [
  (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
  (3, 5, 1, 6, 112), (4, 5, 1, 6, 192), (1, 3, 1, 6, 320),
]  # fmt: skip


def make(arch: str, width: float, size: tuple[int, int]) -> nn.Module:
  """An encoder from images of that size to features, with a BN neck."""
  if arch.startswith("resnet"):
    body, channels = _resnet(int(arch.removeprefix("resnet")), width)
  elif arch == "efficientnet_lite0":
    body, channels = _lite0()
  else:
    body, channels = VisionTransformer(size), 384
  neck = nn.BatchNorm1d(channels)
  neck.bias.requires_grad_(False)
  return nn.Sequential(body, neck)


def _conv(inputs, outputs, size, stride=1, relu=True):
  layers = [
    nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False),
    nn.BatchNorm2d(outputs),
  ]
  return [*layers, nn.ReLU(inplace=True)] if relu else layers


class _Block(nn.Module):
  def __init__(self, inputs, channels, stride, expansion):
    super().__init__()
    outputs = channels * expansion
    if expansion == 4:
      body = _conv(inputs, channels, 1) + _conv(channels, channels, 3, stride)
      body += _conv(channels, outputs, 1, relu=False)
    else:
      body = _conv(inputs, channels, 3, stride)
      body += _conv(channels, outputs, 3, relu=False)
    self.body = nn.Sequential(*body)
    self.shortcut = nn.Identity()
    if inputs != outputs or stride != 1:
      self.shortcut = nn.Sequential(
        *_conv(inputs, outputs, 1, stride, relu=False)
      )

  def forward(self, x):
    return F.relu(self.body(x) + self.shortcut(x))


def _resnet(depth, width):
  expansion, inputs = 4 if depth >= 50 else 1, int(64 * width)
  layers = [*_conv(3, inputs, 7, 2), nn.MaxPool2d(3, 2, 1)]
  for stage, blocks in enumerate(_RESNETS[depth]):
    channels = int(64 * 2**stage * width)
    for i in range(blocks):
      stride = 2 if i == 0 and stage in (1, 2) else 1
      layers.append(_Block(inputs, channels, stride, expansion))
      inputs = channels * expansion
  return nn.Sequential(*layers, *_pool()), inputs


def _pool():
  return nn.AdaptiveAvgPool2d(1), nn.Flatten()


class _Same(nn.Module):
  """TensorFlow's padding."""

  def __init__(self, kernel, stride):
    super().__init__()
    self.kernel, self.stride = kernel, stride

  def forward(self, x):
    pads = []
    for size in x.shape[:1:-1]:
      out = -(-size // self.stride)
      missing = max((out - 1) * self.stride + self.kernel - size, 0)
      pads += [missing // 2, missing - missing // 2]
    return F.pad(x, pads)


def _lite_conv(inputs, outputs, kernel, stride=1, groups=1, relu=True):
  # PyTorch pads by itself where both sides are alike.
  own = kernel // 2 if stride == 1 else 0
  layers = [_Same(kernel, stride)] if stride > 1 else []
  layers += [
    nn.Conv2d(inputs, outputs, kernel, stride, own, 1, groups, bias=False),
    nn.BatchNorm2d(outputs, 1e-3, 0.01),
  ]
  return [*layers, nn.ReLU6(inplace=True)] if relu else layers


class _Residual(nn.Sequential):
  def forward(self, x):
    return x + super().forward(x)


def _lite0():
  layers, inputs = _lite_conv(3, 32, 3, 2), 32
  for blocks, kernel, stride, expansion, outputs in _LITE0:
    for i in range(blocks):
      inner, step = inputs * expansion, stride if i == 0 else 1
      body = _lite_conv(inputs, inner, 1) if expansion > 1 else []
      body += _lite_conv(inner, inner, kernel, step, inner)
      body += _lite_conv(inner, outputs, 1, relu=False)
      is_residual = step == 1 and inputs == outputs
      layers.append((_Residual if is_residual else nn.Sequential)(*body))
      inputs = outputs
  layers += _lite_conv(inputs, 1280, 1)
  return nn.Sequential(*layers, *_pool()), 1280


class VisionTransformer(nn.Module):
  """ViT-S/16; its feature is the class token."""

  def __init__(self, size, width=384, heads=6, depth=12):
    super().__init__()
    self.patches = nn.Conv2d(3, width, 16, 16)
    num = 1 + (size[0] // 16) * (size[1] // 16)
    self.token = nn.Parameter(torch.zeros(1, 1, width))
    self.places = nn.Parameter(0.02 * torch.randn(1, num, width))
    layer = nn.TransformerEncoderLayer(
      width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
    )
    norm = nn.LayerNorm(width)
    self.blocks = nn.TransformerEncoder(
      layer, depth, norm, enable_nested_tensor=False
    )

  def forward(self, x):
    x = self.patches(x).flatten(2).transpose(1, 2)
    x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
    return self.blocks(x + self.places)[:, 0]
