"""CUDA convolutions of so few outputs that blocks divide each one's sum among them, on the emulator (emulated.py)."""

import emulated
import pytest
import torch
from cases import LAYOUTS
from emulated import names
from test_conv import agrees, convolved

import fastpool.functional as F
from fastpool import convolution

pytestmark = emulated.needs_toolchain

EXAMPLES = {
    "a part begins within a tap": ((1, 72, 5, 4), (20, 72, 3, 3), {"padding": 1}),
    "strides, and channels beside a tile": ((2, 70, 5, 6), (33, 70, 3, 3), {"padding": 1, "stride": 2}),
    "groups": ((1, 140, 4, 5), (12, 70, 3, 2), {"groups": 2, "dilation": (1, 2)}),
    "1x1": ((1, 300, 3, 3), (8, 300, 1, 1), {}),
    "3-d": ((1, 40, 3, 3, 3), (9, 40, 2, 3, 3), {"padding": 1}),
}


@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_values_and_gradients(name, layout, dtype):
    with emulated.device() as emulator:
        agrees(EXAMPLES[name], layout if name != "3-d" else "contiguous", "contiguous", dtype, True)
    assert "correlate.summed" in names(emulator)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sums_are_no_worse_than_torchs(layout):
    x, w, gy = LAYOUTS[layout](torch.randn(1, 256, 6, 6)), torch.randn(128, 256, 3, 3), torch.randn(1, 128, 6, 6)
    exact = convolved(*(t.double() for t in (x, w)), None, gy.double(), torch.nn.functional.conv2d, padding=1)
    theirs = convolved(x, w, None, gy, torch.nn.functional.conv2d, padding=1)
    with emulated.device() as emulator:
        ours = convolved(x, w, None, gy, F.conv2d, padding=1)
    assert names(emulator).count("correlate.summed") == 2
    for expected, one, other in zip(exact[:2], theirs[:2], ours[:2], strict=True):
        error, allowed = ((found.double() - expected).abs() for found in (other, one))
        assert error.mean() <= 2 * allowed.mean()
        assert error.max() <= 2 * allowed.max()


def test_affine_and_activation_come_last_and_once():
    x, w, b = torch.randn(1, 64, 5, 5), torch.randn(24, 64, 3, 3) / 24, torch.randn(24)
    scale, shift = torch.rand(24) + 0.5, torch.randn(24)
    plain = torch.nn.functional.conv2d(x, w, b) * scale[:, None, None] + shift[:, None, None]
    for after in ("relu", torch.nn.LeakyReLU(0.3)):
        with emulated.device() as emulator:
            y = F.conv2d(x, w, b, affine=(scale, shift), after=after)
        expected = plain.relu() if after == "relu" else after(plain)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert names(emulator) == ["correlate.pack", "correlate.forward", "correlate.summed"]


def test_several_launches_have_sums_of_their_own(monkeypatch):
    from fastpool.kernels.cuda import convolution as kernels
    from fastpool.kernels.cuda import pooling

    x, w = torch.randn(3, 64, 5, 5), torch.randn(16, 64, 3, 3) / 24
    monkeypatch.setattr(pooling, "MOST", 64 * 25 * 2)
    kernels.on.cache_clear()
    with emulated.device() as emulator:
        y = F.conv2d(x, w)
    kernels.on.cache_clear()
    assert names(emulator)[1:] == ["correlate.forward"] * 2 + ["correlate.summed"] * 2
    torch.testing.assert_close(y, torch.nn.functional.conv2d(x, w), rtol=1e-5, atol=1e-5)


def test_with_pooling_they_are_launches_of_their_own():
    x, w = torch.randn(1, 128, 6, 6), torch.randn(32, 128, 3, 3) / 34
    with emulated.device() as emulator, torch.no_grad():
        y = F.conv_pool2d(x, w, padding=1, activation="relu", kernel_size=2)
    assert names(emulator) == ["correlate.pack", "correlate.forward", "correlate.summed", "windows.forward"]
    torch.testing.assert_close(y, torch.nn.functional.max_pool2d(torch.nn.functional.conv2d(x, w, padding=1).relu(), 2))


@pytest.mark.parametrize("shape", [(512, 7, 7), (256, 14, 14), (128, 28, 28), (64, 56, 56)], ids=str)
def test_one_image_of_a_resnet_fills_a_device(shape):
    """3x3 layers: of 16, 32, 52 and 98 tiles as many blocks as keep an A100's or H100's multiprocessors busy, or nearly."""
    from fastpool.kernels.cuda.convolution import FILLED

    channels = shape[0]
    op = convolution.asked("conv2d", 2, 1, 1, 1, 1)
    x, w = torch.empty(1, *shape), torch.empty(channels, channels, 3, 3)
    with emulated.device():
        here = convolution.call(op, x.shape, x.stride(), w.shape, w.stride(), x.dtype, x.device)
        for plan in (here.forward(None), here.input_gradient):
            (part,) = plan.parts
            ((blocks, *_),) = part._plan(False, False).launches
            assert 0.75 * FILLED <= blocks <= 1.1 * FILLED


def test_the_same_bits_again():
    x, w = torch.randn(1, 64, 5, 5), torch.randn(16, 64, 3, 3)
    with emulated.device():
        assert torch.equal(F.conv2d(x, w), F.conv2d(x, w))
