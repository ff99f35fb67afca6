"""Convolution's CUDA kernels, by their PTX on a CPU (emulated.py): its tests of geometries, layouts and dtypes again, on that device."""

import functools
import re

import emulated
import pytest
import torch
from cases import LAYOUTS
from emulated import on_the_emulator  # noqa: F401
from fastpool.bench import cuda_model, ptx
from test_conv import DTYPES, agrees, assert_equal, convolved, integers, truth
from test_conv_pool import CASES as POOLED
from test_conv_pool import reference, tensors

import fastpool.functional as F

pytestmark = emulated.needs_toolchain


EXAMPLES = {
    "every tile of channels": ((1, 5, 9, 11), (70, 5, 3, 3), {"padding": 1}),
    "steps of 4 channels": ((2, 3, 14, 14), (17, 3, 5, 5), {"padding": 2, "stride": 2}),
    "128 bits": ((2, 16, 8, 8), (64, 16, 3, 3), {"padding": 1}),
    "groups": ((2, 24, 7, 6), (20, 12, 3, 2), {"groups": 2, "dilation": (1, 2)}),
    "depthwise": ((2, 33, 9, 8), (33, 1, 3, 3), {"groups": 33, "padding": 1}),
    "depthwise, two a channel": ((2, 5, 9, 8), (10, 1, 3, 3), {"groups": 5, "stride": 2}),
    "depthwise, many taps": ((1, 3, 13, 12), (3, 1, 9, 7), {"groups": 3, "padding": 4}),
    "several parts of a sum": ((2, 3, 40, 33), (4, 3, 3, 3), {}),
    "no taps": ((1, 2, 5, 5), (3, 2, 1, 1), {"stride": 3}),
}


# What of 16 bits and of float64 depends on a geometry, test_cuda_geometry.py asks; here they go by other loads, stores and tiles.
OF_ANY_DTYPE = "128 bits", "depthwise, two a channel"


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name in EXAMPLES for dtype in DTYPES if dtype == "f32" or name in OF_ANY_DTYPE]
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_kernel(name, dtype, layout):
    agrees(EXAMPLES[name], layout, "contiguous", dtype, True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sums_are_no_worse_than_torchs(layout):
    """2304 products: the error against float64 is at most twice PyTorch's."""
    x, w = LAYOUTS[layout](torch.randn(2, 256, 9, 9)), torch.randn(32, 256, 3, 3)
    gy = torch.randn(2, 32, 9, 9)
    exact = convolved(*(t.double() for t in (x, w)), None, gy.double(), torch.nn.functional.conv2d, padding=1)
    theirs, ours = (convolved(x, w, None, gy, function, padding=1) for function in (torch.nn.functional.conv2d, F.conv2d))
    for expected, one, other in zip(exact, theirs, ours, strict=True):
        if expected is not None:
            error, allowed = ((found.double() - expected).abs() for found in (other, one))
            assert error.mean() <= 2 * allowed.mean()
            assert error.max() <= 2 * allowed.max()


@pytest.mark.parametrize(
    ("after", "dtype"),
    [
        (after, dtype)
        for after in ("relu", "gelu", "sigmoid", torch.nn.LeakyReLU(0.3))
        for dtype in DTYPES
        if dtype == "f32" or after == "gelu"
    ],
    ids=str,
)
def test_activation_and_scale(after, dtype):
    dtype = DTYPES[dtype]
    x, w, b = (t.to(dtype) for t in (torch.randn(2, 5, 8, 9), torch.randn(6, 5, 3, 3) / 7, torch.randn(6)))
    scale, shift = torch.rand(6).to(dtype) + 0.5, torch.randn(6).to(dtype)
    y = F.conv2d(x, w, b, affine=(scale, shift), after=after)
    act = getattr(torch.nn.functional, after) if isinstance(after, str) else after
    plain = torch.nn.functional.conv2d(*(t.double() for t in (x, w, b))) * scale.double()[:, None, None] + shift.double()[:, None, None]
    torch.testing.assert_close(
        y.double(), act(plain), **({"rtol": 2e-2, "atol": 2e-2} if dtype.itemsize == 2 else {"rtol": 1e-5, "atol": 1e-5})
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("case", "pool"),
    [(case, "max") for case in ("2x2", "odd", "groups", "wide window", "1x1", "padded")] + [("2x2", "avg"), ("odd", "min")],
)
def test_with_pooling(emulator, case, pool, layout):
    shape, weight, conv, (kernel, stride, padding) = POOLED[case]
    x, w, b = tensors(shape, weight, layout=layout)
    with torch.no_grad():
        y = F.conv_pool2d(x, w, b, **conv, activation="relu", pool=pool, kernel_size=kernel, pool_stride=stride, pool_padding=padding)
    # Packing and one launch; windows that overlap, or of 8 results, are another.
    assert len(emulator.launches) == (2 if case not in ("wide window", "padded") else 3)
    torch.testing.assert_close(y, reference(x, w, b, conv, pool, (kernel, stride, padding)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("tile", "outputs", "pool"), [("WIDE", 70, "max"), ("NARROW", 20, "avg")])
def test_pooling_by_the_tiles_of_large_maps(emulator, monkeypatch, tile, outputs, pool, layout):
    """As on a device that one block keeps busy (test_cuda_tiles.py, of convolution by itself): no worse than torch, no bank conflicts."""
    from fastpool.kernels.cuda import conv_pool, convolution

    device, wanted = conv_pool.Device(0), getattr(convolution, tile)
    monkeypatch.setattr(conv_pool, "Convolution", functools.partial(convolution.Convolution, filled=1))
    monkeypatch.setattr(conv_pool, "on", lambda index: device)
    x, w, b = tensors((2, 5, 14, 13), (outputs, 5, 3, 3), layout=layout)
    with torch.no_grad():
        y = F.conv_pool2d(x, w, b, activation="gelu", pool=pool, kernel_size=2)
    act, window = torch.nn.functional.gelu, (2, 2, 0)
    exact, theirs = (
        reference(*(t.to(dtype) for t in (x, w, b)), {}, pool, window, act).double() for dtype in (torch.float64, torch.float32)
    )
    assert (y.double() - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    _, (kernel, counters) = emulator.launches
    assert [found[:4] for found in kernel.constants if isinstance(found, type(wanted))] == [wanted[:4]]
    assert counters is None or counters.bank_conflicts == 0  # None: on a GPU


def test_elements_that_are_not_aligned():
    """128 bits at once only where every address is a multiple: here none is."""
    whole = integers(2 * 8 * 8 * 16 + 1)
    x = whole[1:].view(2, 8, 8, 16).permute(0, 3, 1, 2)
    w = integers(32, 16, 1, 1)
    assert torch.equal(F.conv2d(x, w), torch.nn.functional.conv2d(x, w))


def test_parts_of_a_batch(monkeypatch, emulator):
    from fastpool.kernels.cuda import convolution, pooling

    x, w, gy = integers(5, 4, 7, 6), integers(8, 4, 1, 1), integers(5, 8, 7, 6)
    monkeypatch.setattr(pooling, "MOST", 2 * 8 * 7 * 6)
    convolution.on.cache_clear()
    assert_equal(convolved(x, w, None, gy), truth(x, w, None, gy), "3 launches each")
    assert len(emulator.launches) == 3 + 1 + 3 + 1 + 3 + 1
    convolution.on.cache_clear()


# Bugs seeded in what runs


def agreed(x=None):
    """Whether a convolution is torch's."""
    x = integers(1, 16, 6, 8).contiguous(memory_format=torch.channels_last) if x is None else x
    w = integers(32, 16, 3, 3)
    return torch.equal(F.conv2d(x, w, padding=1), torch.nn.functional.conv2d(x, w, padding=1))


def test_a_missing_barrier_is_caught(monkeypatch):
    from fastpool.kernels.cuda.compile import Kernel

    plain = Kernel.ptx
    monkeypatch.setattr(Kernel, "ptx", lambda kernel, cc: re.sub(r"bar\.sync\s+0;", "", plain(kernel, cc)))
    cuda_model._parsed.cache_clear()
    with pytest.raises(ptx.PTXError, match=r"race|nobody has written"):
        agreed()
    cuda_model._parsed.cache_clear()


@pytest.fixture
def launched_with(monkeypatch, emulator):
    """``launched_with(name, more)``: an argument of the convolution, or "blocks", is so much larger than it was to be."""
    plain = emulator.launch

    def change(name, more):
        def launch(kernel, blocks, threads, arguments, device):
            if kernel.name == "correlate.forward":
                names, arguments = kernel.made[0].__code__.co_varnames, list(arguments)
                if name == "blocks":
                    blocks += more
                else:
                    arguments[names.index(name)] = int(arguments[names.index(name)]) + more
            plain(kernel, blocks, threads, arguments, device)

        monkeypatch.setattr(emulator, "launch", launch)

    return change


@pytest.mark.parametrize("name", ["blocks", "steps", "W"])
def test_a_wrong_launch_is_caught_by_its_result(name, launched_with):
    launched_with(name, -1)
    assert not agreed(integers(2, 16, 6, 8))


def test_a_launch_that_reads_behind_the_map_is_caught(launched_with):
    launched_with("H", 1)
    with pytest.raises(ptx.PTXError, match="out of bounds"):
        agreed()


def test_a_misaligned_load_is_caught(monkeypatch):
    from fastpool.kernels.cuda import convolution

    monkeypatch.setattr(convolution._Product, "plan", lambda part, *addresses: part._planned(True, True))
    x = integers(6 * 8 * 16 + 1)[1:].view(1, 6, 8, 16).permute(0, 3, 1, 2)
    with pytest.raises(ptx.PTXError, match="misaligned"):
        agreed(x)
