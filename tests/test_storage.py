"""What lies otherwise in memory than in registers: 16-bit floats, rows side by side, arrays on the stack."""

import numpy as np
import pytest
import torch
from fastpool.kernels.compile import specialised
from fastpool.kernels.simd import (
    between,
    bfloat16,
    float16,
    gather_between,
    integers,
    load,
    load_each,
    load_masked,
    load_one,
    load_phases,
    load_phases_between,
    load_rows,
    phase,
    pointer,
    scatter_between,
    splat,
    stacked,
    store,
    store_each,
    store_masked,
    store_phases,
    store_phases_between,
    store_rows,
)
from numba import float32, int32
from test_simd import run

HALVES = {"bfloat16": bfloat16, "float16": float16}
all_halves = pytest.mark.parametrize("name", HALVES)


@specialised
def every_access(dtype, lanes):
    """Jobs of one: out rows: load/store, masked, bounded phases, gathered and scattered, one by one, side by side."""
    L = lanes

    def kernel(args, start, stop):
        x, out = pointer(args, 0, dtype), pointer(args, 1, dtype)
        n, edge = integers(args, 2, 2)
        fill, everything = splat(float32(7), L), between(0, 1, 0, L, L)
        for at in range(0, n, 2 * L):
            store(out, at, load(x, at, L))
            store(out, at + L, load(x, at + L, L))
            store_masked(out, n + at, load_masked(x, at, everything, fill), everything)
            store(out, n + at + L, load_masked(x, at + L, between(0, 1, 0, edge, L), fill))
            store_phases(out, 2 * n + at, load_phases(x, at, 2, L))
            store_phases_between(out, 3 * n, at, 0, n, load_phases_between(x, 0, at, 0, n - edge, 2, fill))
            scatter_between(out, 4 * n, at, 2, 0, n, gather_between(x, 0, at, 2, 0, n, fill))
            scatter_between(out, 4 * n, at + 1, 2, 0, n, gather_between(x, 0, at + 1, 2, 0, n, fill))
            store_rows(out, 5 * n + at, L, 2, load_rows(x, at, L, 2, 1, L))
            for k in range(2 * L):
                store_masked(out, 6 * n + at + k, load_one(x, at + k, L), between(0, 1, 0, 1, L))

    return kernel


@all_halves
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_every_pattern_widens_and_narrows_to_itself(name, lanes):
    """By every way to memory; a NaN stays one."""
    x = torch.arange(2**16).to(torch.int32).to(torch.uint16)
    out, n, edge = torch.zeros(7, x.numel(), dtype=torch.uint16), x.numel(), 3
    run(every_access(HALVES[name], lanes), x.numpy(), out.numpy(), n, edge)
    kind = getattr(torch, name)
    expected = x.view(kind).repeat(7, 1)
    expected[1].view(-1, 2, lanes)[:, 1, edge:] = 7
    expected[3, n - edge :] = 7
    found = out.view(kind)
    assert torch.equal(found.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(out[numbers], expected.view(torch.uint16)[numbers])


@specialised
def narrowed(dtype, lanes):
    def kernel(args, start, stop):
        x, out, n = pointer(args, 0, float32), pointer(args, 1, dtype), args[2]
        for at in range(0, n, lanes):
            store(out, at, load(x, at, lanes))

    return kernel


@all_halves
def test_numbers_are_rounded_to_nearest_even(name):
    kind = getattr(torch, name)
    exact = torch.arange(2**16).to(torch.int32).to(torch.uint16).view(kind).float()
    bits = exact.view(torch.int32)
    # Half an ulp up, and a little to both sides of it; random bits; the largest floats.
    half = 1 << (15 if name == "bfloat16" else 12)
    x = torch.cat([(bits + half + d).view(torch.float32) for d in (-1, 0, 1)])
    x = torch.cat([exact, x, torch.randint(-(2**31), 2**31 - 1, (2**16,), dtype=torch.int32).view(torch.float32)])
    out = torch.zeros(x.numel(), dtype=torch.uint16)
    run(narrowed(HALVES[name], 8), x.numpy(), out.numpy(), x.numel())
    expected = x.to(kind)
    assert torch.equal(out.view(kind).isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(out[numbers], expected.view(torch.uint16)[numbers])


@specialised
def side_by_side(dtype, lanes, rows, stride):
    L = lanes

    def kernel(args, start, stop):
        x, out, back, step = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, dtype), args[3]
        phases = load_rows(x, 1, step, rows, stride, L)
        for p in range(stride):
            store(out, p * rows * L, phase(phases, p))
        store_rows(back, 1, step, rows, phases)

    return kernel


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("dtype", [float32, int32], ids=str)
def test_rows_side_by_side(dtype, rows, stride):
    lanes, step = 4, 17
    x = np.arange(100, 100 + rows * step + 1).astype(str(dtype))
    out, back = np.zeros((stride, rows * lanes), x.dtype), np.zeros_like(x)
    run(side_by_side(dtype, lanes, rows, stride), x, out, back, step)
    taken = [x[1 + r * step : 1 + r * step + stride * lanes] for r in range(rows)]
    for p in range(stride):
        assert out[p].tolist() == np.concatenate([row[p::stride] for row in taken]).tolist()
    expected = np.zeros_like(x)
    for r in range(rows):
        expected[1 + r * step : 1 + r * step + stride * lanes] = taken[r]
    assert back.tolist() == expected.tolist()


@specialised
def through_the_stack(lanes):
    L = lanes

    def kernel(args, start, stop):
        x, y, n = pointer(args, 0, float32), pointer(args, 1, int32), args[2]
        arrays = stacked(256, float32), stacked(256, int32)
        for at in range(0, n, L):
            store_each(arrays, at, (load(x, at, L), load(y, at, L)))
        for at in range(0, n, L):
            a, b = load_each(arrays, n - L - at, L)
            store(x, at, a)
            store(y, at, b)

    return kernel


def test_arrays_on_the_stack_keep_what_they_are_given():
    x, y = np.arange(64, dtype=np.float32), np.arange(64, dtype=np.int32) * -3
    expected = [a.reshape(8, 8)[::-1].reshape(-1).tolist() for a in (x, y)]
    run(through_the_stack(8), x, y, 64)
    assert [x.tolist(), y.tolist()] == expected
