"""The lessons' networks, of random weights, for ``fastpool optimize fastpool.bench.models:NAME --input SHAPE``."""

from __future__ import annotations

import torch
from torch import nn

INPUTS = {
    "lenet5": (1, 28, 28),
    "alexnet": (3, 224, 224),
    "vgg16": (3, 224, 224),
    "simple_resnet": (3, 32, 32),
    "cifar10net": (3, 32, 32),
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


def alexnet() -> nn.Module:
    features: list[nn.Module] = [nn.Conv2d(3, 96, 11, 4, 2), _relu(), nn.MaxPool2d(3, 2)]
    features += [nn.Conv2d(96, 256, 5, padding=2), _relu(), nn.MaxPool2d(3, 2)]
    for inputs, outputs in ((256, 384), (384, 384), (384, 256)):
        features += [nn.Conv2d(inputs, outputs, 3, padding=1), _relu()]
    return nn.Sequential(*features, nn.MaxPool2d(3, 2), nn.Flatten(), *_classifier(9216))


def vgg16() -> nn.Module:
    features, inputs = list[nn.Module](), 3
    for outputs, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(convolutions):
            features += [nn.Conv2d(inputs, outputs, 3, padding=1), _relu()]
            inputs = outputs
        features.append(nn.MaxPool2d(2))
    return nn.Sequential(*features, nn.Flatten(), *_classifier(25088))


def _classifier(features: int) -> list[nn.Module]:
    return [nn.Dropout(), nn.Linear(features, 4096), _relu(), nn.Dropout(), nn.Linear(4096, 4096), _relu(), nn.Linear(4096, 1000)]


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


def gelu_net() -> nn.Module:
    """No lesson's: activations that fall before they rise."""
    layers = [*_normalised(3, 64), nn.GELU(), nn.MaxPool2d(2), *_normalised(64, 128), nn.SiLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8192, 10))
