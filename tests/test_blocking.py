"""The model that cuts a convolution up: it works for any shape, what it chooses fits, and it follows what it was measured by."""

import itertools

import numpy as np
import pytest
from fastpool.kernels.cpu import blocking, weights
from hypothesis import example, given, settings
from hypothesis import strategies as st

few, many = st.integers(1, 40), st.integers(1, 5000)
lanes = st.sampled_from([2, 4, 8, 16])


def tile(width, rows, channels, lanes, steps, share=lambda pieces: 1.0, kept=()):
    return blocking.tile(width, rows, channels, lanes, steps, share, kept)


@pytest.fixture(params=[16, 32])
def registers(request, monkeypatch):
    monkeypatch.setattr(blocking, "registers", lambda: request.param)
    return request.param


@pytest.mark.parametrize("count", [16, 32])
@settings(max_examples=60, deadline=None)
@given(few | many, few, few | many, lanes, many)
def test_a_tile_fits_the_registers_and_the_map(count, width, rows, channels, lanes, steps):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocking, "registers", lambda: count)
        cost, best = tile(width, rows, channels, lanes, steps)
        assert cost > 0
        assert min(best) >= 1
        # The tile, a row of weights, and what is broadcast.
        assert best.pieces * best.pixels * best.cols + best.cols + 1 <= count
        assert best.pixels <= width
        assert best.pieces <= rows
        assert best.pieces == 1 or width % best.pixels == 0
        assert best.cols <= max(1, -(-channels // lanes))
        cost, best = blocking.pixel_tile(width, rows, channels, lanes, steps, steps % 2 == 0)
        assert cost > 0
        assert best.channels * best.cols + best.cols + 1 <= count
        assert 1 <= best.cols <= max(1, -(-width // lanes))
        best = blocking.sum_tile(width, channels, lanes)
        assert best.pixels * best.cols + best.cols + 1 <= count
        assert 1 <= best.pixels <= width


def test_costs_grow_with_the_work(registers):
    for lanes in (8, 16):
        for width, rows, channels, steps in itertools.product((7, 56), (7, 56), (32, 100), (9, 576)):
            once = tile(width, rows, channels, lanes, steps)[0]
            assert tile(width, 2 * rows, channels, lanes, steps)[0] > once
            assert tile(width, rows, channels, lanes, 2 * steps)[0] > once
            assert tile(width, rows, 2 * channels, lanes, steps)[0] > once
            # No fewer cycles than the multiply-adds take.
            assert once >= width * rows * channels * steps / lanes / blocking.PER_CYCLE


def test_known_tiles(monkeypatch):
    """Those that are spoken of: 14 pixels by 32 channels of a 14 or 28 or 56 wide map, rows together where the map is 7 wide."""
    monkeypatch.setattr(blocking, "registers", lambda: 32)
    for width in (14, 28, 56):
        assert tile(width, width, 64, 16, 576)[1] == (1, 14, 2)
    assert tile(7, 8, 512, 16, 4608)[1] == (2, 7, 2)
    assert blocking.pixel_tile(224, 224, 64, 16, 27, True)[1] == (13, 2)


def test_taps_in_the_padding_cost_nothing(monkeypatch):
    """Rows of taps that a tile does not go through, and pixels that a tap does not take into the map: in tiles that are whole rows."""
    monkeypatch.setattr(blocking, "registers", lambda: 32)
    plain = tile(7, 7, 512, 16, 4608)[0]
    kept = 1, 7, 0, 7, 0, 6
    assert tile(7, 7, 512, 16, 4608, kept=kept)[0] < plain
    assert tile(7, 7, 512, 16, 4608, lambda pieces: 19 / 21)[0] < plain
    # Rows that follow each other go through the taps of all of them: then fewer of them are better.
    assert tile(7, 8, 512, 16, 4608, lambda pieces: 0.5 if pieces == 1 else 1.0, kept)[1].pieces == 1
    # A tile that is half a row takes some of every tap's pixels.
    wide = 1, 56, 0, 56, 0, 55
    assert tile(56, 56, 64, 16, 576, kept=wide) == tile(56, 56, 64, 16, 576)


@settings(max_examples=80, deadline=None)
@given(st.integers(4, 1 << 22), st.integers(0, 30), few | many, few, st.integers(1, 14), st.integers(1, 600))
@example(4, 0, 16, 16, 2, 1)
def test_bands_cover_all_rows_and_fit(row_bytes, extra, rows, images, pieces, others):
    bands = blocking.bands(row_bytes, extra, rows, images, pieces, others)
    assert 1 <= bands.rows <= rows
    assert 1 <= bands.images <= images
    assert bands.images == 1 or bands.rows == rows
    assert bands.images <= pieces or bands.images % pieces == 0
    budget = blocking.l2_bytes() // blocking.PART_OF_L2
    if bands.rows > pieces or bands.images > 1:
        assert bands.images * (bands.rows + extra) * row_bytes <= budget


@pytest.mark.parametrize(("rows", "images", "others"), [(55, 1, 3), (98, 1, 1), (8, 8, 2), (8, 8, 9), (28, 8, 1), (112, 1, 4), (7, 8, 16)])
def test_two_threads_get_about_the_same(rows, images, others):
    """Where there are several bands: the first half of the jobs is no more than 55% of the work."""
    for row_bytes in (1 << 12, 1 << 14, 1 << 15):
        bands = blocking.bands(row_bytes, 0, rows, images, 1, others)
        parts = [
            (min(bands.images, images - i), min(bands.rows, rows - r))
            for i in range(0, images, bands.images)
            for r in range(0, rows, bands.rows)
        ]
        jobs = [maps * along for maps, along in parts for _ in range(others)]
        assert len(parts) == 1 or sum(jobs[: -(-len(jobs) // 2)]) <= 0.55 * sum(jobs), (bands, jobs)


@settings(max_examples=80, deadline=None)
@given(many, st.integers(0, 200))
def test_chains_are_short_and_alike(channels, taps):
    together = blocking.chain(channels, taps)
    assert 1 <= together <= channels
    assert together * taps < blocking.CHUNK + max(1, taps)
    # No more of them than that takes.
    assert -(-channels // together) <= max(1, -(-channels * taps // blocking.CHUNK))


@settings(max_examples=60, deadline=None)
@given(many, st.integers(1, 25), st.integers(1, 5))
def test_rows_of_products_divide_all_rows(rows, taps, along):
    together = blocking.product_rows(rows, taps, along)
    assert 1 <= together <= blocking.DEPTHWISE
    assert rows % together == 0


def test_what_stays_in_the_nearest_cache(monkeypatch):
    monkeypatch.setattr(blocking, "l1_sets", lambda: (64, 12))
    assert blocking.stays(64, 56 * 56 * 4, 3)
    assert not blocking.stays(64, 4096, 1)  # one set for all
    assert blocking.stays(8, 4096, 1)


@settings(max_examples=80, deadline=None)
@given(many, st.integers(1, 64), st.sampled_from([4, 8]))
def test_padding_and_spreading(count, multiple, size):
    found = blocking.padded(count, multiple)
    assert count <= found < count + multiple
    assert found % multiple == 0
    pitch = blocking.pitch(count, size)
    assert count <= pitch <= count + 64 // size
    assert pitch * size % 128 != 0
    spread = blocking.spread(count, size)
    assert spread >= count
    assert spread * size % 256 != 0
    whole, narrow = (blocking.panel_columns(count, multiple, can) for can in (False, True))
    assert whole == found
    assert narrow in (count, whole)
    assert 3 * narrow <= 4 * count or narrow == whole  # at most a quarter of it is waste


@settings(max_examples=60, deadline=None)
@given(few, st.integers(1, 64))
def test_chunks_of_a_weight_gradient(blocks, groups):
    per = blocking.chunk(blocks, groups)
    assert 1 <= per <= blocks
    if groups == 1 and blocks > 1:
        assert -(-blocks // per) >= 2


def test_the_cache_and_the_registers_are_this_cpus(monkeypatch):
    assert blocking.registers() in (16, 32)
    assert 1 << 15 <= blocking.l2_bytes() <= 1 << 28

    class Missing:
        def __init__(self, *path):
            pass

        def read_text(self):
            raise FileNotFoundError

    monkeypatch.setattr(blocking, "Path", Missing)
    assert blocking.l2_bytes.__wrapped__() == 1 << 20
    assert blocking.l1_sets.__wrapped__() == (64, 8)
    Missing.read_text = lambda self: "12\n"
    assert blocking.l1_sets.__wrapped__() == (12, 12)
    Missing.read_text = lambda self: "2048K\n"
    assert blocking.l2_bytes.__wrapped__() == 2 << 20
    Missing.read_text = lambda self: "no size\n"
    assert blocking.l2_bytes.__wrapped__() == 1 << 20
    for width, triple, count in ((64, "x86_64-linux", 32), (32, "x86_64-linux", 16), (16, "aarch64-linux", 32)):
        monkeypatch.setattr(blocking, "register_bytes", lambda width=width: width)
        monkeypatch.setattr(blocking.llvm, "get_process_triple", lambda triple=triple: triple)
        assert blocking.registers.__wrapped__() == count


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_weights_are_packed_chain_by_chain_and_read_as_they_lie(inputs, together, along, rows, step, last):
    """Every weight once, each at its place; runs are of such that follow each other, and cover all."""
    taps = [t * (inputs if last else 1) * step for t in range(rows * along)]
    step_i = 1 if last else rows * along * step
    table, runs = weights.order(inputs, along, together, step_i, tuple(taps))
    place = 0
    places = {}
    for chain in range(0, inputs, together):
        for row in range(0, len(taps), along):
            for c in range(chain, min(inputs, chain + together)):
                for tap in taps[row : row + along]:
                    places[place], place = c * step_i + tap, place + 1
    assert {int(at): int(source) for source, at in table} == places
    assert (np.diff(table[:, 0]) >= 0).all()
    covered = [j for first, count in runs for j in range(first, first + count)]
    assert covered == list(range(len(table)))
    for first, count in runs:
        assert (np.diff(table[first : first + count, 0]) == 1).all()


def test_how_weights_are_read():
    assert weights.how(weights.order(64, 3, 14, 9, tuple(range(9)))[1], 512, 576, 16) == "columns"
    assert weights.how(weights.order(512, 3, 14, 4608, tuple(range(9)))[1], 64, 9, 16) == "columns"
    assert weights.how(weights.order(512, 1, 128, 64, (0,))[1], 64, 1, 16) == "load"
    assert weights.how(weights.order(512, 1, 128, 256, (0,))[1], 64, 2, 16) == "gather"
    assert weights.how(weights.order(64, 3, 14, 9, tuple(range(9)))[1], 9, 576, 16) == "gather"
    assert weights.how(weights.order(1, 3, 1, 1, tuple(range(9)))[1], 1, 9, 4) == "load"


@pytest.mark.parametrize(("pixels", "longest"), [(7 * 7, 32), (13 * 13, 56), (14 * 14, 65), (28 * 28, 128), (8 * 14 * 14, 128)])
def test_few_pixels_are_summed_in_several_chains(pixels, longest):
    """One of most of them rounds more than PyTorch's sums do."""
    assert blocking.near(pixels) == longest
