"""The lessons' networks, of random weights, for ``fastpool optimize fastpool.bench.models:NAME --input SHAPE``.

``divisor``: of the channels and features inside, for tests.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn

INPUTS = {
    "lenet5": (1, 28, 28),
    "alexnet": (3, 224, 224),
    "vgg16": (3, 224, 224),
    "simple_resnet": (3, 32, 32),
    "cifar10net": (3, 32, 32),
    "conv_net_with_dropout": (3, 32, 32),
    "adaptive_dropout_conv_net": (3, 32, 32),
    "conv_block": (3, 32, 32),
    "conv_block_without_norm": (3, 32, 32),
    "gelu_net": (3, 32, 32),
}
"""Network -> (C, H, W)"""


def _relu() -> nn.Module:
    return nn.ReLU(inplace=True)


def _normalised(inputs: int, outputs: int, kernel_size: int = 3, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2, bias=False), nn.BatchNorm2d(outputs)]


def lenet5() -> nn.Module:
    features = [nn.Conv2d(1, 6, 5), _relu(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), _relu(), nn.AvgPool2d(2)]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(256, 120), _relu(), nn.Linear(120, 84), _relu(), nn.Linear(84, 10))


def alexnet(divisor: int = 1, side: int = 6) -> nn.Module:
    """``side``: of the last map, 6 of an image of 224, 1 of one of 67."""
    sizes = [channels // divisor for channels in (96, 256, 384, 384, 256)]
    features: list[nn.Module] = [nn.Conv2d(3, sizes[0], 11, 4, 2), _relu(), nn.MaxPool2d(3, 2)]
    features += [nn.Conv2d(sizes[0], sizes[1], 5, padding=2), _relu(), nn.MaxPool2d(3, 2)]
    for inputs, outputs in itertools.pairwise(sizes[1:]):
        features += [nn.Conv2d(inputs, outputs, 3, padding=1), _relu()]
    return nn.Sequential(*features, nn.MaxPool2d(3, 2), nn.Flatten(), *_classifier(sizes[-1] * side**2, divisor))


def vgg16(divisor: int = 1, side: int = 7) -> nn.Module:
    """``side``: of the last map, a 32th of the image's."""
    features, inputs = list[nn.Module](), 3
    for channels, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(convolutions):
            features += [nn.Conv2d(inputs, channels // divisor, 3, padding=1), _relu()]
            inputs = channels // divisor
        features.append(nn.MaxPool2d(2))
    return nn.Sequential(*features, nn.Flatten(), *_classifier(inputs * side**2, divisor))


def _classifier(features: int, divisor: int) -> list[nn.Module]:
    hidden = 4096 // divisor
    return [nn.Dropout(), nn.Linear(features, hidden), _relu(), nn.Dropout(), nn.Linear(hidden, hidden), _relu(), nn.Linear(hidden, 1000)]


class BasicBlock(nn.Module):
    """He, Zhang, Ren & Sun, "Deep Residual Learning for Image Recognition" (2015), figure 5, left."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_normalised(inputs, outputs, 3, stride), _relu(), *_normalised(outputs, outputs))
        self.shortcut = nn.Sequential(*_normalised(inputs, outputs, 1, stride)) if (inputs, stride) != (outputs, 1) else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def simple_resnet() -> nn.Module:
    sizes = ((64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1))
    blocks = [BasicBlock(*size) for size in sizes]
    return nn.Sequential(*_normalised(3, 64), _relu(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


def cifar10net() -> nn.Module:
    layers, inputs = list[nn.Module](), 3
    for outputs, pools in ((64, True), (128, True), (256, False), (256, True), (512, False), (512, False)):
        layers += [*_normalised(inputs, outputs), _relu(), *([nn.MaxPool2d(2)] if pools else [])]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(512, 10))


def conv_net_with_dropout() -> nn.Module:
    """The lesson's Linear takes 32 * 8 * 8 features, as if there were poolings; 32 * 32 * 32 arrive."""
    layers = [nn.Conv2d(3, 16, 3, padding=1), _relu(), nn.Dropout2d(), nn.Conv2d(16, 32, 3, padding=1), _relu(), nn.Dropout2d()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 32 * 32, 10))


def adaptive_dropout_conv_net() -> nn.Module:
    """Each of three layers drops more than the one before; its Linear as that of ``conv_net_with_dropout``."""
    layers, inputs = list[nn.Module](), 3
    for i in range(3):
        layers += [nn.Conv2d(inputs, 16 * (i + 1), 3, padding=1), _relu(), nn.Dropout2d(min(0.5, 0.1 + 0.1 * i))]
        inputs = 16 * (i + 1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * 32 * 32, 10))


def conv_block() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), _relu())


def conv_block_without_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), _relu())


def gelu_net() -> nn.Module:
    """No lesson's: activations that fall before they rise."""
    layers = [*_normalised(3, 64), nn.GELU(), nn.MaxPool2d(2), *_normalised(64, 128), nn.SiLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8192, 10))
