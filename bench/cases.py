"""What is compared: activations, poolings, and the places in known networks where the two meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
}

POOLINGS = ("max", "avg", "min", "l2", "stochastic", "global_max", "global_avg")


class Window(NamedTuple):
    """A square pooling window; unpacks as the arguments of a pooling function."""

    kernel_size: int
    stride: int
    padding: int = 0

    def __str__(self) -> str:
        return f"{self.kernel_size}x{self.kernel_size} s{self.stride} p{self.padding}"


class Site(NamedTuple):
    """A layer whose output, (N, channels, height, width), its network pools with ``window``."""

    network: str
    channels: int
    height: int
    width: int
    window: Window

    def __str__(self) -> str:
        return f"{self.network} {self.channels}x{self.height}x{self.width}"


SITES = (
    Site("LeNet-5", 6, 24, 24, Window(2, 2)),
    Site("LeNet-5", 16, 8, 8, Window(2, 2)),
    Site("AlexNet", 96, 55, 55, Window(3, 2)),
    Site("AlexNet", 256, 27, 27, Window(3, 2)),
    Site("AlexNet", 256, 13, 13, Window(3, 2)),
    Site("ResNet", 64, 112, 112, Window(3, 2, 1)),
    Site("VGG-16", 512, 14, 14, Window(2, 2)),
    Site("VGG-16", 512, 28, 28, Window(2, 2)),
    Site("VGG-16", 256, 56, 56, Window(2, 2)),
    Site("VGG-16", 128, 112, 112, Window(2, 2)),
    Site("VGG-16", 64, 224, 224, Window(2, 2)),
)

QUICK_SITES = tuple(s for s in SITES if s[:3] in {("LeNet-5", 6, 24), ("AlexNet", 256, 27), ("ResNet", 64, 112), ("VGG-16", 512, 28)})
"""One site of each network, of the size that one image costs milliseconds at most."""

NETWORKS = tuple(dict.fromkeys(site.network for site in SITES))
