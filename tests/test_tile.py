"""Every word of kernels/tile.py against numpy, by dtype and number of lanes; and what a core can multiply."""

import math

import numpy as np
import pytest
from fastpool.kernels.compile import specialised
from fastpool.kernels.cpu import peak
from fastpool.kernels.cpu.number import jitable
from fastpool.kernels.number import fused
from fastpool.kernels.simd import (
    between,
    bfloat16,
    float16,
    load,
    load_one,
    pointer,
    repeat,
    splat,
    store,
    store_masked,
    unroll,
    with_phase,
)
from fastpool.kernels.simd import phase as of
from fastpool.kernels.tile import (
    add_dots,
    add_outer,
    add_pixel_products,
    add_pixels,
    add_products,
    add_taps,
    add_tile,
    add_window,
    columns,
    each,
    load_apart_masked,
    load_several,
    store_columns,
    store_tile,
    tile_of,
    tile_of_each,
    totals,
)
from numba import float32, float64, int64
from test_simd import run

FLOATS = {"f32": float32, "f64": float64}
all_lanes = pytest.mark.parametrize("lanes", [4, 8, 16])
floats = pytest.mark.parametrize("dtype", FLOATS)
NAN = float("nan")


def numbers(dtype, *shape):
    """Small integers, of which a product or sum is exact."""
    return np.random.default_rng(0).integers(-9, 10, shape).astype(str(dtype))


@specialised
def built(dtype, lanes, rows, cols):
    """Out rows: load_several, tile_of of it, tile_of_each, each of the last."""
    L, R, C = lanes, rows, cols
    whole = R * C

    @jitable
    def twice_and(vec, args):
        return vec + vec + args[0]

    @jitable
    def put(tile, i, args):
        out, at = args
        store(out, at + i * L, of(tile, i))
        return tile

    def kernel(args, start, stop):
        x, out = pointer(args, 0, dtype), pointer(args, 1, dtype)
        several = load_several(x, 3, L, C)
        unroll(put, C, several, (out, 0))
        unroll(put, whole, tile_of(R, several), (out, C * L))
        tile = tile_of_each(x, 5, R, C, L)
        unroll(put, whole, tile, (out, (C + whole) * L))
        unroll(put, whole, each(tile, twice_and, (splat(dtype(1), L),)), (out, (C + 2 * whole) * L))

    return kernel


@all_lanes
@floats
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 2)])
def test_tiles_are_built(dtype, lanes, rows, cols):
    x = numbers(FLOATS[dtype], 3 + 16 * 4)
    out = np.full((cols + 3 * rows * cols) * lanes, NAN, x.dtype)
    run(built(FLOATS[dtype], lanes, rows, cols), x, out)
    several = x[3 : 3 + cols * lanes]
    by_row = np.repeat(x[5 : 5 + rows], cols * lanes)
    assert out.tolist() == np.concatenate([several, np.tile(several, rows), by_row, 2 * by_row + 1]).tolist()


def putting(lanes):
    """(tile, i, (out,)): register i of a tile to out."""

    @jitable
    def put(tile, i, args):
        store(args[0], i * lanes, of(tile, i))
        return tile

    return put


@specialised
def multiplied(dtype, lanes, rows, cols, pieces, step):
    """Two steps of ``pieces`` times ``rows`` rows."""
    L, C, P, S = lanes, cols, pieces, step
    height, whole, put = rows * pieces, rows * cols * pieces, putting(lanes)

    @jitable
    def origin(found, i, args):
        return with_phase(found, i, args[0] + i * args[1])

    def kernel(args, start, stop):
        x, w, out, first, apart, w_at = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, dtype), args[3], args[4], args[5]
        origins = unroll(origin, P, repeat(first, P), (first, apart))
        tile = tile_of(height, load_several(w, 0, L, C))
        for at in range(2):
            tile = add_outer(tile, x, origins, 7 * at, S, w, w_at + at * C * L, C)
        unroll(put, whole, tile, (out,))

    return kernel


@all_lanes
@floats
@pytest.mark.parametrize(("rows", "cols", "pieces", "step"), [(1, 1, 1, 1), (3, 2, 1, 2), (2, 1, 3, 1), (2, 2, 2, 3)])
def test_an_outer_product_is_added(dtype, lanes, rows, cols, pieces, step):
    """By rows of several origins, at a step; products are fused with their sums: 1 + tiny is kept where a product alone would lose it."""
    kind = np.dtype(str(FLOATS[dtype]))
    x, w = numbers(kind, 200), numbers(kind, 3 * cols * lanes + 5)
    x[11] = 1 + np.finfo(kind).eps
    w[5 + cols * lanes] = 1 - np.finfo(kind).eps
    out = np.full(pieces * rows * cols * lanes, NAN, kind)
    run(multiplied(FLOATS[dtype], lanes, rows, cols, pieces, step), x, w, out, 11, 29, 5)
    expected = np.tile(w[: cols * lanes], (pieces * rows, 1))
    for at in range(2):
        weights = w[5 + at * cols * lanes :][: cols * lanes]
        for piece in range(pieces):
            for r in range(rows):
                row, one = piece * rows + r, x[11 + piece * 29 + 7 * at + r * step]
                expected[row] = [fused(one, a, b) for a, b in zip(weights, expected[row], strict=True)]
    assert out.tolist() == expected.reshape(-1).tolist()


@specialised
def tapped(dtype, lanes, rows, cols, pieces, step, kept):
    """The taps of a row, twice; the sums are added to a first row of each."""
    L, C, P, S, K = lanes, cols, pieces, step, kept
    height, whole, put = rows * pieces, rows * cols * pieces, putting(lanes)

    @jitable
    def origin(found, i, args):
        return with_phase(found, i, args[0] + i * args[1])

    def kernel(args, start, stop):
        x, w, out, steps = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, dtype), pointer(args, 3, int64)
        origins = unroll(origin, P, repeat(args[4], P), (args[4], args[5]))
        begin = tile_of(height, load_several(w, 0, L, C))
        tile = repeat(splat(dtype(0), L), whole)
        for first in range(2):
            tile = add_taps(tile, x, origins, 7, steps, first, K, S, w, C * L, C)
        unroll(put, whole, add_tile(tile, begin), (out,))

    return kernel


@all_lanes
@floats
@pytest.mark.parametrize(("rows", "cols", "pieces", "step"), [(1, 1, 1, 1), (4, 2, 1, 2), (3, 1, 2, 3)])
def test_taps_of_a_row_are_added_where_they_are_kept(dtype, lanes, rows, cols, pieces, step):
    kind, steps = np.dtype(str(FLOATS[dtype])), np.array([0, 5, 1, 9])
    kept = (min(1, rows - 1), rows, 0, rows, 0, rows - 1)  # of one row the last tap takes nothing
    x, w = numbers(kind, 100), numbers(kind, 4 * cols * lanes)
    out = np.full(pieces * rows * cols * lanes, NAN, kind)
    run(tapped(FLOATS[dtype], lanes, rows, cols, pieces, step, kept), x, w, out, steps, 3, 29)
    begin, *weights = w.reshape(4, cols * lanes)
    expected = np.tile(begin, (pieces * rows, 1))
    for first in range(2):
        for k, (low, end) in enumerate(zip(kept[::2], kept[1::2], strict=True)):
            for piece in range(pieces):
                for r in range(low, end):
                    expected[piece * rows + r] += x[3 + piece * 29 + 7 + steps[first + k] + r * step] * weights[k]
    assert out.tolist() == expected.reshape(-1).tolist()


@specialised
def apart(dtype, lanes, count):
    L, N, put = lanes, count, putting(lanes)

    def kernel(args, start, stop):
        x, out = pointer(args, 0, dtype), pointer(args, 1, dtype)
        found = load_apart_masked(x, 2, args[2], N, between(0, 1, 0, args[3], L), splat(dtype(7), L))
        unroll(put, N, found, (out,))

    return kernel


@all_lanes
@floats
@pytest.mark.parametrize("some", [1, 3, 99])
def test_registers_apart_are_loaded_under_a_mask(dtype, lanes, some):
    x = numbers(FLOATS[dtype], 100)
    out = np.full(3 * lanes, NAN, x.dtype)
    run(apart(FLOATS[dtype], lanes, 3), x, out, 23, some)
    assert out.tolist() == [x[2 + 23 * i + lane] if lane < some else 7 for i in range(3) for lane in range(lanes)]


@specialised
def turned(dtype, lanes):
    L, put = lanes, putting(lanes)

    @jitable
    def take(tile, i, args):
        return with_phase(tile, i, load(args[0], i * L, L))

    def kernel(args, start, stop):
        x, out = pointer(args, 0, dtype), pointer(args, 1, dtype)
        unroll(put, L, columns(unroll(take, L, repeat(splat(dtype(0), L), L), (x,))), (out,))

    return kernel


@pytest.mark.parametrize("lanes", [2, 4, 8, 16])
@floats
def test_columns_of_a_matrix(dtype, lanes):
    x = np.arange(lanes * lanes, dtype=str(FLOATS[dtype])).reshape(lanes, lanes)
    out = np.full_like(x, NAN)
    run(turned(FLOATS[dtype], lanes), x, out)
    assert out.tolist() == x.T.tolist()


@specialised
def stored(dtype, lanes, rows, cols, pieces, pixel, by_columns, kind):
    """The tile whose numbers are x's in order, to y of dtype ``kind``; columns ``step`` apart, or rows."""
    L, C, P, X, whole = lanes, cols, pieces, pixel, rows * cols * pieces

    @jitable
    def take(tile, i, args):
        return with_phase(tile, i, load(args[0], i * L, L))

    @jitable
    def origin(found, i, args):
        return with_phase(found, i, args[0] + i * args[1])

    def kernel(args, start, stop):
        x, y, first, apart, at, step, count, height = (
            pointer(args, 0, dtype), pointer(args, 1, kind), args[2], args[3], args[4], args[5], args[6], args[7],
        )  # fmt: skip
        tile = unroll(take, whole, repeat(splat(dtype(0), L), whole), (x,))
        origins = unroll(origin, P, repeat(first, P), (first, apart))
        if by_columns:
            store_columns(tile, C, y, origins, at, step, X, count)
        else:
            store_tile(tile, C, y, origins, at, step, X, height, count)

    return kernel


# lanes, dtype, rows a piece, registers a row, pieces, between pixels
STORED = [
    (4, "f32", 1, 1, 1, 1),
    (4, "f64", 5, 2, 1, 2),
    (8, "f32", 3, 1, 3, 1),
    (8, "f64", 4, 2, 2, 3),
    (16, "f32", 14, 2, 1, 1),
    (16, "f32", 7, 1, 3, 2),
    (16, "f64", 17, 1, 1, 1),
    (16, "f32", 1, 1, 2, 4),
]


@pytest.mark.parametrize(("lanes", "dtype", "rows", "cols", "pieces", "pixel"), STORED)
def test_columns_are_stored(lanes, dtype, rows, cols, pieces, pixel):
    """Any number of columns; what lies between and beside stays."""
    x = np.arange(1.0, 1 + pieces * rows * cols * lanes).astype(str(FLOATS[dtype]))
    matrix, apart, step = x.reshape(pieces * rows, cols * lanes), rows * pixel + 3, pieces * (rows * pixel + 3) + 5
    for count in (0, 1, lanes - 1, cols * lanes - 1, cols * lanes, cols * lanes + 9):
        y, expected = (np.full(7 + step * cols * lanes, NAN, x.dtype) for _ in range(2))
        run(stored(FLOATS[dtype], lanes, rows, cols, pieces, pixel, True, FLOATS[dtype]), x, y, 3, apart, 4, step, count, 0)
        for row in range(pieces * rows):
            for column in range(min(count, cols * lanes)):
                expected[3 + row // rows * apart + 4 + column * step + row % rows * pixel] = matrix[row, column]
        np.testing.assert_array_equal(y, expected, str(count))


@pytest.mark.parametrize(("lanes", "dtype", "rows", "cols", "pieces", "pixel"), STORED)
def test_a_tile_is_stored(lanes, dtype, rows, cols, pieces, pixel):
    """The first rows, the first columns; what lies between and beside stays."""
    x = np.arange(1.0, 1 + pieces * rows * cols * lanes).astype(str(FLOATS[dtype]))
    matrix, step = x.reshape(pieces * rows, cols * lanes), cols * lanes * pixel + 3
    apart, worker = rows * step + 2, stored(FLOATS[dtype], lanes, rows, cols, pieces, pixel, False, FLOATS[dtype])
    for height in (0, 1, pieces * rows - 1, pieces * rows, pieces * rows + 4):
        for count in (0, 1, lanes - 1, cols * lanes - 1, cols * lanes, cols * lanes + 9):
            y, expected = (np.full(7 + pieces * apart, NAN, x.dtype) for _ in range(2))
            run(worker, x, y, 3, apart, 4, step, count, height)
            for row in range(min(height, pieces * rows)):
                for column in range(min(count, cols * lanes)):
                    expected[3 + row // rows * apart + 4 + row % rows * step + column * pixel] = matrix[row, column]
            np.testing.assert_array_equal(y, expected, f"{height} {count}")


@pytest.mark.parametrize("kind", [bfloat16, float16], ids=str)
@pytest.mark.parametrize(("rows", "pieces", "pixel"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (16, 1, 1)])
def test_sixteen_bits_are_stored_and_none_beside(kind, rows, pieces, pixel):
    """One row alone too: of a truncation and a mask of one lane LLVM makes a store of 32 bits."""
    x = np.arange(1.0, 1 + pieces * rows * 16).astype(np.float32)
    y = np.full(16 * 40, 77, np.uint16)
    run(stored(float32, 16, rows, 1, pieces, pixel, True, kind), x, y, 0, 20, 0, 40, 16, 0)
    found = (y.astype(np.uint32) << 16).view(np.float32) if kind == bfloat16 else y.view(np.float16).astype(np.float32)
    untouched = np.ones(y.size, bool)
    for row in range(pieces * rows):
        at = row // rows * 20 + row % rows * pixel + 40 * np.arange(16)
        assert found[at].tolist() == x.reshape(-1, 16)[row].tolist()
        untouched[at] = False
    assert (y[untouched] == 77).all()


@specialised
def one_lane(dtype, lane):
    i = lane

    def kernel(args, start, stop):
        store_masked(pointer(args, 1, dtype), 0, load(pointer(args, 0, float32), 0, 16), between(0, 1, i, i + 1, 16))

    return kernel


@pytest.mark.parametrize("kind", [bfloat16, float16], ids=str)
@pytest.mark.parametrize("lane", [0, 7, 15])
def test_one_lane_of_sixteen_bits(kind, lane):
    y = np.full(17, 77, np.uint16)
    run(one_lane(kind, lane), np.full(16, 2.0, np.float32), y)
    assert [i for i, value in enumerate(y) if value != 77] == [lane]


# The peak


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_core_multiplies_and_adds(dtype):
    """A hundred MFLOP/s at least, and no more than 2 FMA of 64 bytes at 8 GHz."""
    found = peak.gflops(dtype=FLOATS[dtype], samples=3)
    assert 0.1 < found < 2 * 2 * 16 * 8


def test_two_threads_do_twice_the_work(monkeypatch):
    """As is counted: jobs are as many as threads, each of all rounds."""
    asked = []
    monkeypatch.setattr(peak, "launch", lambda worker, jobs, args, threads: asked.append((jobs, threads)))
    peak.gflops(2, samples=1)
    assert asked == [(2, 2), (2, 2)]


@specialised
def windows(dtype, lanes, rows, high, along, down, across, edges):
    """A tile of ones, and the products of a window whose first tap is at x[first]; ``edges``: args 5 .. 8 say where that lies in a map."""
    L, G, taps, steps, put = lanes, rows, high * along, (down, across), putting(lanes)

    @jitable
    def weight(found, k, args):
        return with_phase(found, k, load_one(args[0], k, L))

    def kernel(args, start, stop):
        x, w, out = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, dtype)
        first, apart = args[3], args[4]
        one = splat(dtype(1), L)
        weights = unroll(weight, taps, repeat(one, taps), (w,))
        if edges:
            tile = add_window(repeat(one, G), x, first, apart, weights, along, steps, (args[5], args[6], args[7], args[8]))
        else:
            tile = add_window(repeat(one, G), x, first, apart, weights, along, steps, ())
        unroll(put, G, tile, (out,))

    return kernel


@all_lanes
@floats
@pytest.mark.parametrize(("rows", "high", "along", "down", "across"), [(1, 1, 1, 1, 1), (3, 3, 3, 1, 1), (2, 2, 3, 2, 2), (4, 1, 2, 3, 1)])
def test_a_window_is_added(dtype, lanes, rows, high, along, down, across):
    """Inside a map, and over each of its edges, beyond which is NaN."""
    kind = np.dtype(str(FLOATS[dtype]))
    H, W = 14, 70
    memory = np.full((H + 16, W + 80), NAN, kind)
    memory[8:-8, 40:-40] = numbers(kind, H, W)
    zeros = np.nan_to_num(memory)
    w = numbers(kind, high * along)
    for top, left in ((0, 0), (-1, 0), (0, -2), (3, W - 5), (H - 2, 3), (-8, 1), (-1, -1)):
        for edges in (False, True):
            inside = top >= 0 and left >= 0 and top + (rows - 1) * down + high <= H and left + (lanes + along) * across <= W
            if not edges and not inside:
                continue
            out, first = np.full(rows * lanes, NAN, kind), (8 + top) * memory.shape[1] + 40 + left
            kernel, place = windows(FLOATS[dtype], lanes, rows, high, along, down, across, edges), (top, H, left, W)
            run(kernel, memory, w, out, first, memory.shape[1], *place)
            expected = [
                1 + sum(
                    zeros[8 + top + r * down + h, 40 + left + i * across + k] * w[h * along + k] for h in range(high) for k in range(along)
                )
                for r in range(rows)
                for i in range(lanes)
            ]  # fmt: skip
            assert out.tolist() == expected


@specialised
def products(dtype, lanes, rows, high, along, down, across, edges):
    L, G, taps, steps, put = lanes, rows, high * along, (down, across), putting(lanes)

    @jitable
    def row(found, r, args):
        return with_phase(found, r, load(args[0], r * L, L))

    def kernel(args, start, stop):
        x, g, out, first, apart = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, dtype), args[3], args[4]
        one = splat(dtype(1), L)
        given = unroll(row, G, repeat(one, G), (g,))
        if edges:
            place = args[5], args[6], args[7], args[8], args[9]
            sums = add_products(repeat(one, taps), x, first, apart, given, along, steps, place)
        else:
            sums = add_products(repeat(one, taps), x, first, apart, given, along, steps, ())
        unroll(put, taps, sums, (out,))

    return kernel


@all_lanes
@floats
@pytest.mark.parametrize(("rows", "high", "along", "down", "across"), [(1, 1, 1, 1, 1), (3, 3, 3, 1, 1), (2, 2, 3, 2, 2)])
def test_products_with_the_rows_of_a_window_are_added(dtype, lanes, rows, high, along, down, across):
    """Inside a map, and over each of its edges, beyond which is NaN; of so many lanes."""
    kind = np.dtype(str(FLOATS[dtype]))
    H, W = 14, 70
    memory = np.full((H + 16, W + 80), NAN, kind)
    memory[8:-8, 40:-40] = numbers(kind, H, W)
    zeros, g = np.nan_to_num(memory), numbers(kind, rows * lanes)
    for top, left, count in ((0, 0, 99), (-1, 0, 3), (0, -2, lanes), (3, W - 5, lanes), (H - 2, 3, 1), (-8, 1, lanes), (-1, -1, lanes - 1)):
        for edges in (False, True):
            inside = top >= 0 and left >= 0 and top + (rows - 1) * down + high <= H and left + (lanes + along) * across <= W
            if not edges and (not inside or count < lanes):
                continue
            out, first = np.full(high * along * lanes, NAN, kind), (8 + top) * memory.shape[1] + 40 + left
            kernel, place = products(FLOATS[dtype], lanes, rows, high, along, down, across, edges), (top, H, left, W, count)
            # What lies under lanes that are not added to may be infinite.
            given = np.where(np.arange(rows * lanes) % lanes < count, g, math.inf)
            run(kernel, memory, given.astype(kind), out, first, memory.shape[1], *place)
            expected = [
                1 + sum(zeros[8 + top + r * down + h, 40 + left + i * across + k] * g[r * lanes + i] for r in range(rows) if i < count)
                for h in range(high)
                for k in range(along)
                for i in range(lanes)
            ]
            assert out.tolist() == expected


def masking_of(dtype, lanes, masked):
    """(count) -> the ``masking`` of add_pixels that reads so many lanes, or all of them."""
    if masked:

        @jitable
        def masking(count):
            return between(0, 1, 0, count, lanes), splat(dtype(0), lanes)

    else:

        @jitable
        def masking(count):
            return ()

    return masking


@specialised
def pixels(dtype, lanes, rows, along, stride, apart, kept, masked):
    L, G, K, S, D, put, masking = lanes, rows, along, stride, apart, putting(lanes), masking_of(dtype, lanes, masked)

    def kernel(args, start, stop):
        x, w, out = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, dtype)
        tile = add_pixels(repeat(splat(dtype(1), L), G), x, args[3], args[4], w, args[5], K, S, D, kept, masking(args[6]))
        unroll(put, G, tile, (out,))

    return kernel


@all_lanes
@floats
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("rows", "along", "stride", "apart", "kept"),
    [(1, 1, 1, 1, (0, 1)), (3, 3, 1, 1, (1, 5)), (2, 3, 2, 2, (0, 7)), (4, 2, 3, 1, (2, 9)), (8, 3, 1, 1, (0, 9)), (2, 2, 1, 1, (0, 0))],
)
def test_pixels_of_a_row_are_added(dtype, lanes, rows, along, stride, apart, kept, masked):
    kind, count = np.dtype(str(FLOATS[dtype])), lanes - 1 if masked else lanes
    x, w = numbers(kind, 400), numbers(kind, 3 + along * lanes)
    columns, lane = np.arange((rows - 1) * stride + (along - 1) * apart + 1), np.arange(lanes)
    read = np.zeros_like(x)
    inside = 7 + columns[slice(*kept)][:, None] * 21 + lane[:count]
    read[inside] = x[inside]
    if not masked:  # what is not read may be anything
        x = np.where(np.isin(np.arange(x.size), inside), x, np.nan).astype(kind)
    out = np.full(rows * lanes, NAN, kind)
    run(pixels(FLOATS[dtype], lanes, rows, along, stride, apart, kept, masked), x, w, out, 7, 21, 3, count)
    weights = w[3:].reshape(along, lanes)
    expected = [1 + sum(read[7 + (r * stride + k * apart) * 21 + lane] * weights[k] for k in range(along)) for r in range(rows)]
    assert out.tolist() == np.concatenate(expected).tolist()


@specialised
def pixel_products(dtype, lanes, rows, high, along, stride, apart, kept, masked):
    L, G, K, S, D, sums = lanes, rows, along, stride, apart, high * along
    put, masking = putting(lanes), masking_of(dtype, lanes, masked)

    @jitable
    def read(found, r, args):
        return with_phase(found, r, load(args[0], r * L, L))

    def kernel(args, start, stop):
        x, g, out = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, dtype)
        given = unroll(read, G, repeat(splat(dtype(0), L), G), (g,))
        one, down, pixel, top, by, height = repeat(splat(dtype(1), L), sums), args[4], args[5], args[6], args[7], args[8]
        found = add_pixel_products(one, x, args[3], down, pixel, given, K, S, D, kept, top, by, height, masking(args[9]))
        unroll(put, sums, found, (out,))

    return kernel


@all_lanes
@floats
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("rows", "high", "along", "stride", "apart", "kept", "top"),
    [
        (1, 1, 1, 1, 1, (0, 1), 0),
        (4, 3, 3, 1, 1, (1, 5), 0),
        (2, 2, 3, 2, 2, (0, 7), -1),
        (3, 3, 2, 3, 1, (2, 8), 4),
        (2, 1, 2, 1, 1, (0, 0), 0),
    ],
)
def test_products_of_pixels_are_added(dtype, lanes, rows, high, along, stride, apart, kept, top, masked):
    kind, count, by, height, down, pixel = np.dtype(str(FLOATS[dtype])), lanes - 1 if masked else lanes, 2, 6, 190, 21
    x, g = numbers(kind, 3 * down + 50), numbers(kind, rows * lanes)
    h, column, lane = np.ogrid[:high, : (rows - 1) * stride + (along - 1) * apart + 1, :count]
    inside = (top + h * by >= 0) & (top + h * by < height) & (column >= kept[0]) & (column < kept[1])
    read, places = np.zeros_like(x), (7 + h * down + column * pixel + lane)[inside & (lane >= 0)]
    read[places] = x[places]
    if not masked:  # what is not read may be anything
        x = np.where(np.isin(np.arange(x.size), places), x, np.nan).astype(kind)
    out = np.full(high * along * lanes, NAN, kind)
    run(
        pixel_products(FLOATS[dtype], lanes, rows, high, along, stride, apart, kept, masked),
        x,
        g,
        out,
        7,
        down,
        pixel,
        top,
        by,
        height,
        count,
    )
    lane = np.arange(lanes)
    expected = [
        1 + sum(read[7 + h * down + (r * stride + k * apart) * pixel + lane] * g[r * lanes + lane] for r in range(rows))
        for h in range(high)
        for k in range(along)
    ]
    assert out.tolist() == np.concatenate(expected).tolist()


@specialised
def dots(dtype, lanes, rows, cols, masked):
    L, R, C, area, put = lanes, rows, cols, rows * cols, putting(lanes)

    @jitable
    def place(found, i, args):
        return with_phase(found, i, args[i])

    def kernel(args, start, stop):
        w, x, out = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, dtype)
        downs = unroll(place, R, repeat(int64(0), R), (args[6], args[7], args[8]))
        across = unroll(place, C, repeat(int64(0), C), (args[9], args[10]))
        tile = repeat(splat(dtype(1), L), area)
        if masked:
            inside = between(0, 1, 0, args[3], L), splat(dtype(0), L)
            tile = add_dots(tile, w, downs, args[4], x, across, args[5], inside)
        else:
            tile = add_dots(tile, w, downs, args[4], x, across, args[5], ())
        unroll(put, area, tile, (out,))

    return kernel


@all_lanes
@floats
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 2), (2, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_products_of_planes_are_added(dtype, lanes, rows, cols, masked):
    """Of lanes that a mask leaves out nothing is read: they may be infinite."""
    kind = np.dtype(str(FLOATS[dtype]))
    w, x, out = numbers(kind, 90), numbers(kind, 90), np.full(rows * cols * lanes, NAN, kind)
    downs, across, at, count = (5, 0, 41), (17, 2), (3, 7), lanes - 1 if masked else lanes
    if masked:
        w[at[0] + 5 + count] = x[at[1] + 17 + count] = math.inf
    run(dots(FLOATS[dtype], lanes, rows, cols, masked), w, x, out, count, *at, *downs, *across)
    expected = [
        1 + (w[at[0] + r + i] * x[at[1] + c + i] if i < count else 0) for r in downs[:rows] for c in across[:cols] for i in range(lanes)
    ]
    assert out.tolist() == expected


@specialised
def sums(dtype, lanes, groups):
    L, count, G, put = lanes, groups * lanes, groups, putting(lanes)

    @jitable
    def row(found, r, args):
        return with_phase(found, r, load(args[0], r * L, L))

    def kernel(args, start, stop):
        x, out = pointer(args, 0, dtype), pointer(args, 1, dtype)
        unroll(put, G, totals(unroll(row, count, repeat(splat(dtype(0), L), count), (x,))), (out,))

    return kernel


@pytest.mark.parametrize("lanes", [2, 4, 8, 16])
@floats
@pytest.mark.parametrize("groups", [1, 2])
def test_lanes_of_each_register_are_added_up(dtype, lanes, groups):
    kind = np.dtype(str(FLOATS[dtype]))
    x, out = numbers(kind, groups * lanes, lanes), np.full(groups * lanes, NAN, kind)
    run(sums(FLOATS[dtype], lanes, groups), x, out)
    assert out.tolist() == x.sum(1).tolist()
