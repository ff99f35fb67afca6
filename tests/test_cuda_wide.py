"""CUDA's kernels of pooling four elements at a time (kernels/cuda/wide.py), where memory lies for them: pooling's tests again."""

import emulated
import pytest
import test_pooling
import torch
from cases import GEOMETRIES, LAYOUTS, adversarial, window
from emulated import names
from fastpool.kernels.pool import KINDS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pooling import SELECTING, SUMMING, leaf, op

import fastpool.functional as F
from fastpool.functional import _pooled, _with_indices

pytestmark = emulated.needs_toolchain

WIDE = {
    "2x2s2": ((2, 4, 6, 16), window((2, 2))),
    "3x3s2p1": ((1, 8, 7, 24), window((3, 3), (2, 2), (1, 1))),
    "3x3s1p1": ((2, 4, 5, 12), window((3, 3), (1, 1), (1, 1))),
    "2x5s1p2": ((1, 4, 4, 16), window((2, 5), (2, 1), (1, 2))),
    "1x1s2": ((1, 4, 4, 8), window((1, 1), (2, 2))),
    "2x3s2-dilated": ((1, 4, 9, 16), window((2, 3), (1, 2), (1, 1), (2, 2))),
    "4x4s4-ceil": ((1, 4, 10, 20), window((4, 4), (4, 4), (1, 1), ceil_mode=True)),
    "1d-3s2p1": ((2, 8, 32), window((3,), (2,), (1,))),
    "3d-3s2p1": ((1, 4, 5, 6, 8), window((3, 3, 3), (2, 2, 2), (1, 1, 1))),
}

EVERY_KIND = "2x5s1p2"
"""Windows that overlap: enough for what the kinds differ by."""


@pytest.fixture
def emulator(monkeypatch):
    for name, geometry in WIDE.items():
        monkeypatch.setitem(GEOMETRIES, f"wide {name}", geometry)
    with emulated.device() as found:
        yield found


@pytest.mark.parametrize(
    ("kind", "geometry", "dtype"),
    [(k, g, d) for k in SELECTING for g in WIDE for d in ("f32", "f64") if d == "f32" or g == EVERY_KIND],
)
def test_selecting(emulator, kind, geometry, dtype):
    test_pooling.test_selecting(kind, f"wide {geometry}", dtype)
    assert "wide.forward" in names(emulator)


@pytest.mark.parametrize(("kind", "geometry"), [(k, g) for k in SUMMING for g in WIDE if k == "avg" or g == EVERY_KIND])
def test_summing(emulator, kind, geometry):
    test_pooling.test_summing(kind, f"wide {geometry}", "f32")
    assert "wide.forward" in names(emulator)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_dtypes(layout, dtype):
    """Bit for bit the CPU's, values and indices."""
    shape, w = WIDE["3x3s2p1"]
    x = LAYOUTS[layout](adversarial(shape, dtype))
    expected, chosen = _with_indices(x, op("max", w))
    with emulated.device() as emulator:
        y, flat = _with_indices(x, op("max", w))
    assert names(emulator)[0] == "wide.forward"
    assert torch.equal(y.nan_to_num(77) if y.is_floating_point() else y, expected.nan_to_num(77) if y.is_floating_point() else expected)
    assert torch.equal(flat, chosen)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["2x2s2", "3x3s2p1", "3x3s1p1"])
def test_stochastic_draws_are_the_cpus(name, layout):
    shape, w = WIDE[name]
    x = LAYOUTS[layout](torch.randn(shape))

    def run():
        a = leaf(x)
        y = _pooled(a, op("stochastic", w), 7)
        return y.detach(), *torch.autograd.grad(y.sum(), a)

    expected = run()
    with emulated.device() as emulator:
        found = run()
    assert names(emulator) == ["wide.forward", "wide.backward"]
    assert all(map(torch.equal, found, expected))


ALONG = {1: (1, 2, 3, 5), 2: (1, 2, 3, 4), 4: (3, 4, 5)}
"""Stride along the width -> kernel sizes: each is compiled."""


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_window(data):
    """Of sizes that loads of four divide: max pooling and its gradient are torch's."""
    stride = data.draw(st.sampled_from(list(ALONG)))
    kernel, dilation = data.draw(st.sampled_from(ALONG[stride])), data.draw(st.integers(1, 2))
    rows, down = data.draw(st.sampled_from([(1, 1), (2, 1), (3, 2)]))
    arguments = (rows, kernel), (down, stride), (0, data.draw(st.integers(0, kernel // 2))), (1, dilation)
    shape = data.draw(st.integers(1, 2)), 4 * data.draw(st.integers(1, 2)), data.draw(st.integers(3, 9)), 4 * data.draw(st.integers(3, 6))
    x = LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))](torch.randint(-9, 9, shape).float())

    def run(pool):
        a = leaf(x)
        y = pool(a, *arguments)
        return y.detach(), *torch.autograd.grad(y, a, torch.arange(float(y.numel())).view(y.shape))

    with emulated.device():
        found = run(F.max_pool2d)
    assert all(map(torch.equal, found, run(torch.nn.functional.max_pool2d)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_elements_that_are_not_aligned_are_taken_one_by_one(layout):
    shape, w = WIDE["2x2s2"]
    memory = torch.randn(2 * 4 * 6 * 16 + 1)[1:].view(shape)
    x = memory if layout == "contiguous" else memory.reshape(2, 6, 16, 4).permute(0, 3, 1, 2)
    with emulated.device() as emulator:
        y = _pooled(x, op("max", w))
    assert names(emulator) == ["windows.forward"]
    assert torch.equal(y, torch.nn.functional.max_pool2d(x, 2))


def test_every_kind_runs_so():
    """Forward; backward too, but for those whose windows give nothing that can be added up."""
    shape, w = WIDE["2x2s2"]
    one_by_one = set()
    for kind in KINDS:
        a = leaf(torch.rand(shape))
        with emulated.device() as emulator:
            _pooled(a, op(kind, w)).sum().backward()
        assert names(emulator)[0] == "wide.forward"
        if names(emulator)[-1] != "wide.backward":
            one_by_one.add(kind)
    assert one_by_one == {kind for kind in KINDS if not KINDS[kind].selects and not KINDS[kind].gives}
