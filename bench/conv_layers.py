"""The convolution layers of known networks, each geometry once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

Sizes = tuple[int, int, int, int]


class Layer(NamedTuple):
    """A convolution of one image, (in_channels, height, width), by a square kernel."""

    network: str
    in_channels: int
    height: int
    width: int
    out_channels: int
    kernel_size: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    bias: bool = True
    first: bool = False
    """Whether its input is the image: nobody wants that one's gradient."""
    count: int = 1
    """Times the network has it."""

    @property
    def name(self) -> str:
        """'64x56x56 to 256, 1x1', '96x112x112 dw, 3x3 s2 p1': without a stride of 1 and padding of 0."""
        to = "dw" if self.depthwise else f"to {self.out_channels}"
        groups = f" g{self.groups}" if self.groups > 1 and not self.depthwise else ""
        window = f"{self.kernel_size}x{self.kernel_size}{f' s{self.stride}' if self.stride > 1 else ''}"
        return f"{self.in_channels}x{self.height}x{self.width} {to}, {window}{f' p{self.padding}' if self.padding else ''}{groups}"

    @property
    def geometry(self) -> tuple[int, ...]:
        return self[1:9]

    @property
    def depthwise(self) -> bool:
        return 1 < self.groups == self.in_channels == self.out_channels

    @property
    def weight_shape(self) -> Sizes:
        return self.out_channels, self.in_channels // self.groups, self.kernel_size, self.kernel_size

    @property
    def output_size(self) -> tuple[int, int]:
        height, width = (_size(size, self.kernel_size, self.stride, self.padding) for size in (self.height, self.width))
        return height, width


def _size(size: int, kernel_size: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - kernel_size) // stride + 1


_Step = tuple[int | None, int, int, int]
"""Output channels (None: pooling), kernel size, stride, padding."""

_HALVE: _Step = (None, 2, 2, 0)


def _chain(network: str, channels: int, size: int, steps: Iterable[_Step], bias: bool = True) -> Iterator[Layer]:
    """A network without branches, from an image of so many channels and rows."""
    for i, (out_channels, kernel_size, stride, padding) in enumerate(steps):
        if out_channels is not None:
            yield Layer(network, channels, size, size, out_channels, kernel_size, stride, padding, bias=bias, first=i == 0)
            channels = out_channels
        size = _size(size, kernel_size, stride, padding)


def _lenet() -> Iterator[Layer]:
    """LeCun et al. 1998, on 28x28 images; with as many inputs a map as there are maps."""
    return _chain("LeNet-5", 1, 28, [(6, 5, 1, 0), _HALVE, (16, 5, 1, 0)])


def _cifar() -> Iterator[Layer]:
    steps: list[_Step] = [
        (64, 3, 1, 1),
        _HALVE,
        (128, 3, 1, 1),
        _HALVE,
        (256, 3, 1, 1),
        (256, 3, 1, 1),
        _HALVE,
        (512, 3, 1, 1),
        (512, 3, 1, 1),
    ]
    return _chain("CIFAR10Net", 3, 32, steps, bias=False)


def _alexnet() -> Iterator[Layer]:
    """Krizhevsky et al. 2012, on one device: without groups."""
    pool: _Step = (None, 3, 2, 0)
    return _chain("AlexNet", 3, 224, [(96, 11, 4, 2), pool, (256, 5, 1, 2), pool, (384, 3, 1, 1), (384, 3, 1, 1), (256, 3, 1, 1)])


def _vgg() -> Iterator[Layer]:
    """Simonyan & Zisserman 2014, configuration D."""
    blocks = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
    steps = chain.from_iterable([*[(channels, 3, 1, 1)] * depth, _HALVE] for channels, depth in blocks)
    return _chain("VGG-16", 3, 224, steps)


def _resnet() -> Iterator[Layer]:
    """He et al. 2015, with the stride in the 3x3 layer as torchvision has it."""
    network, channels, size = "ResNet-50", 64, 56
    yield Layer(network, 3, 224, 224, 64, 7, 2, 3, bias=False, first=True)
    for width, depth, first_stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for stride in (first_stride, *[1] * (depth - 1)):
            inner = size // stride
            yield Layer(network, channels, size, size, width, 1, bias=False)
            yield Layer(network, width, size, size, width, 3, stride, 1, bias=False)
            yield Layer(network, width, inner, inner, 4 * width, 1, bias=False)
            if channels != 4 * width:
                yield Layer(network, channels, size, size, 4 * width, 1, stride, bias=False)
            channels, size = 4 * width, inner


def _mobilenet() -> Iterator[Layer]:
    """Sandler et al. 2018: the depthwise and pointwise layers, without the stem."""
    network, channels, size = "MobileNetV2", 32, 112
    blocks = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for factor, out_channels, depth, first_stride in blocks:
        for stride in (first_stride, *[1] * (depth - 1)):
            wide, inner = factor * channels, size // stride
            if factor > 1:
                yield Layer(network, channels, size, size, wide, 1, bias=False)
            yield Layer(network, wide, size, size, wide, 3, stride, 1, wide, bias=False)
            yield Layer(network, wide, inner, inner, out_channels, 1, bias=False)
            channels, size = out_channels, inner
    yield Layer(network, channels, size, size, 1280, 1, bias=False)


def _distinct(layers: Iterable[Layer]) -> tuple[Layer, ...]:
    """Each geometry once, where it first occurs; counted within its network."""
    found: dict[tuple[int, ...], Layer] = {}
    for layer in layers:
        known = found.setdefault(layer.geometry, layer._replace(count=0))
        if known.network == layer.network:
            found[layer.geometry] = known._replace(count=known.count + 1)
    return tuple(found.values())


LAYERS = _distinct(chain(_lenet(), _cifar(), _alexnet(), _vgg(), _resnet(), _mobilenet()))

NETWORKS = tuple(dict.fromkeys(layer.network for layer in LAYERS))

BATCHES = {network: (32,) if network in ("LeNet-5", "CIFAR10Net") else (1, 8) for network in NETWORKS}
"""Images a batch."""

QUICK = (
    "6x12x12 to 16, 5x5",
    "64x16x16 to 128, 3x3 p1",
    "3x224x224 to 96, 11x11 s4 p2",
    "256x13x13 to 384, 3x3 p1",
    "256x28x28 to 512, 3x3 p1",
    "3x224x224 to 64, 7x7 s2 p3",
    "256x56x56 to 64, 1x1",
    "144x56x56 dw, 3x3 s2 p1",
    "96x14x14 to 576, 1x1",
)
"""A few layers of every network."""
