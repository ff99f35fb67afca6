"""CUDA convolutions by the tiles of large maps, on small ones, on the emulator (emulated.py): a device that one block keeps busy."""

import emulated
import pytest
import torch
from cases import LAYOUTS
from test_conv import agrees, convolved
from test_conv_pool import reference, tensors

import fastpool.functional as F

pytestmark = emulated.needs_toolchain

EXAMPLES = {
    "channels of two tiles": ((1, 5, 12, 13), (70, 5, 3, 3), {"padding": 1}),
    "steps of 4 channels": ((2, 3, 14, 14), (80, 3, 5, 5), {"padding": 2, "stride": 2}),
    "128 bits": ((2, 16, 8, 8), (64, 16, 3, 3), {"padding": 1}),
    "few channels": ((2, 9, 11, 12), (17, 9, 3, 3), {"padding": 1}),
    "few channels of few": ((1, 3, 13, 12), (20, 3, 3, 3), {"stride": 2, "padding": 1}),
    "groups": ((2, 24, 12, 11), (80, 12, 3, 2), {"groups": 2, "dilation": (1, 2)}),
}
TILES = {"channels of two tiles": "WIDE", "steps of 4 channels": "WIDE", "128 bits": "WIDE", "few channels": "NARROW"}
TILES |= {"few channels of few": "NARROW", "groups": "WIDE"}
"""Of the forward pass."""


@pytest.fixture(autouse=True)
def filled_by_a_block(monkeypatch):
    """Where shared memory has no bank conflicts."""
    from fastpool.kernels.cuda import convolution as kernels

    monkeypatch.setattr(kernels, "on", lambda index: kernels.Device(index, filled=1))
    with emulated.device() as emulator:
        yield
    assert sum(counters.bank_conflicts for kernel, counters in emulator.launches if kernel.name == "correlate.forward") == 0


@pytest.fixture
def forward_tile(monkeypatch):
    """Of the convolutions that were planned, in their order."""
    from fastpool.kernels.cuda import convolution as kernels

    plain, found = kernels._tile, []
    monkeypatch.setattr(kernels, "_tile", lambda *args: found.append(plain(*args)) or found[-1])
    return found


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_values_and_gradients(name, layout, dtype, forward_tile):
    from fastpool.kernels.cuda import convolution as kernels

    agrees(EXAMPLES[name], layout, "contiguous", dtype, True)
    wanted, (pixels, channels, *_) = getattr(kernels, TILES[name]), forward_tile[0]
    assert (pixels, channels) == (wanted.pixels, wanted.channels)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sums_are_no_worse_than_torchs(layout):
    x, w, gy = LAYOUTS[layout](torch.randn(1, 128, 9, 9)), torch.randn(64, 128, 3, 3), torch.randn(1, 64, 9, 9)
    exact = convolved(*(t.double() for t in (x, w)), None, gy.double(), torch.nn.functional.conv2d, padding=1)
    theirs = convolved(x, w, None, gy, torch.nn.functional.conv2d, padding=1)
    ours = convolved(x, w, None, gy, F.conv2d, padding=1)
    for expected, one, other in zip(exact, theirs, ours, strict=True):
        if expected is not None:
            error, allowed = ((found.double() - expected).abs() for found in (other, one))
            assert error.mean() <= 2 * allowed.mean()
            assert error.max() <= 2 * allowed.max()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("outputs", [20, 70])
def test_with_scale_activation_and_pooling(outputs, layout):
    x, w, b = tensors((1, 8, 12, 14), (outputs, 8, 3, 3), layout=layout)
    with torch.no_grad():
        y = F.conv_pool2d(x, w, b, padding=1, activation="relu", kernel_size=2)
    torch.testing.assert_close(y, reference(x, w, b, {"padding": 1}, "max", (2, 2, 0)))
    scale, shift = torch.rand(outputs) + 0.5, torch.randn(outputs)
    plain = torch.nn.functional.conv2d(x, w, b) * scale[:, None, None] + shift[:, None, None]
    torch.testing.assert_close(F.conv2d(x, w, b, affine=(scale, shift), after="gelu"), torch.nn.functional.gelu(plain))
