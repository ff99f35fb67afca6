"""Convolution with lanes across output channels: a tile of pixels x channels in registers, one broadcast element of x against registers
of weights.

`fastpool bench conv`, one core, channels_last, 3x3: 64 channels of 56x56 174 GFLOP/s (PyTorch 190), 128 of 28x28 175 (185), 256 of 14x14
173 (176).
"""

from numba import int64

from ..compile import specialised
from ..simd import number, prefetch, repeat, splat, stacked, unroll, with_phase
from ..tile import add_outer, add_put, add_taps, add_tile, each, load_several, put_tile, store_columns, store_tile, tile_of
from . import panel as panels
from .ahead import asking
from .blocking import TURNS
from .number import compiled, jitable

AHEAD = 48
"""Products ahead for which weights are asked for.  Where other work has had the caches, as in the benchmark: 3x3 of 512 channels of 28x28
158 GFLOP/s without and 177 by 16 ahead, of 14x14 151 and 171; where they are warm no difference.  By 16, 48 and 96, of 7x7: 2.40, 2.23 and
2.05 ms on Zen 4, 1.00, 0.92 and 0.90 on Zen 5, of 14x14 there 4.0, 3.8 and 3.8."""


@specialised
def forward(dtype, lanes, pieces, rows, cols, step, pitch, runs, pixel, after, in_place, kept, beside):
    """Jobs: (band, group, block of cols * lanes output channels).  A tile is ``pieces`` output rows of ``rows`` pixels each, ``step``
    elements apart where they are read.  ``pitch``: from pixel to pixel of a panel of channels_last maps, else 0, and y's pixels are
    ``pixel`` apart.  ``runs``: rows are so many pixels of a map that is one row.  ``in_place``: one tap reads x where it lies.
    ``kept``: of each tap of a row the pixels of a tile, first and end, that it does not take into the padding, where a tile is a whole row
    and some do, else ().  ``beside``: a tile's rows are the same of several maps, not such that follow each other.

    Arguments: x, packed weights, y, panels, jobs a thread; addresses of lines, outs, steps; sizes, see parts.py; the activation's
    parameters."""
    real, P, G, C, L, S, height = number(dtype), rows, pieces, cols, lanes, step, pieces * rows
    B, area, count = C * L, height * C * L, len(after.defaults) if after else 0
    room, places = TURNS * area, TURNS * pieces
    along = max(1, len(kept) // 2)  # taps of a step
    ask = asking(real)
    activates = after is not None
    value = compiled(after.value) if activates else None

    @jitable
    def picked(found, g, args):
        offsets, at = args
        return with_phase(found, g, offsets[at + g])

    if kept:

        @jitable
        def add(tile, x, origins, at, steps, i, w, wo):
            return add_taps(tile, x, origins, at, steps, i, kept, S, w, wo, C)

    else:

        @jitable
        def add(tile, x, origins, at, steps, i, w, wo):
            return add_outer(tile, x, origins, at + steps[i], S, w, wo, C)

    @jitable
    def chain(tile, x, origins, at, w, wo, steps, table, asked, first, end):
        for i in range(first, end, along):
            for k in range(along):
                prefetch(x, origins[0] + at + steps[asked + i + k])
                ask(w, wo + (AHEAD + i + k) * B, B)
            tile = add(tile, x, origins, at, steps, table + i, w, wo + i * B)
        return tile

    @jitable
    def work(memory, tables, sizes, place, p):
        x, w, y, panel = memory
        lines, outs, steps = tables
        IC, OC, blocks, T, together, _, OW, KP, _, RQ, xn, _, _, yn, yc, yw, width, rowstep = sizes
        g, block, n, out, band_rows, maps, source, line = place
        here, next_image, next_channel = (x, xn, 1) if in_place else (panel, KP * RQ * rowstep, 1 if pitch else width)
        weights, all_rows, results = (g * blocks + block) * (IC * T + 1) * B, maps * band_rows, n * yn + (g * OC + block * B) * yc
        left = OC - block * B
        single = together >= IC
        biases, zeros = tile_of(height, load_several(w, weights, L, C)), tile_of(height, repeat(splat(real(0), L), C))
        starts, ends, sums = stacked(places, int64), stacked(places, int64), stacked(room, real)
        lows, highs = stacked(TURNS, int64), stacked(TURNS, int64)
        across, abreast = (OW + P - 1) // P, (maps + G - 1) // G
        tiles = (band_rows * abreast if beside else (all_rows + G - 1) // G) * across
        group = column = 0
        for first in range(0, tiles, TURNS):
            turns = min(TURNS, tiles - first)
            for turn in range(turns):
                ow, low, high = min(column * P, OW - P), T, 0
                for piece in range(G):
                    if beside:
                        row = group // abreast
                        image = min(max(0, min(group % abreast * G, maps - G)) + piece, maps - 1)
                    else:
                        row = min(max(0, min(group * G, all_rows - G)) + piece, all_rows - 1)
                        image = row // band_rows if maps > 1 else 0
                        row -= image * band_rows
                    start, result = source + lines[line + row] if in_place else row * rowstep, 3 * (out + row)
                    starts[turn * G + piece] = image * next_image + start + ow * S
                    ends[turn * G + piece] = results + image * yn + outs[result] + ow * yw
                    low, high = min(low, outs[result + 1]), max(high, outs[result + 2])
                lows[turn], highs[turn] = low, high
                column += 1
                if column == across:
                    group, column = group + 1, 0
            for c in range(0, max(1, IC), together):
                many, wo = min(together, IC - c), weights + (1 + c * T) * B
                # Of the last chain, if it is shorter, behind the others'.
                table = 0 if many == together else 2 * together * T
                for turn in range(turns):
                    origins = unroll(picked, G, repeat(int64(0), G), (starts, turn * G))
                    tile = biases if single else zeros
                    begin, end = lows[turn] * many, highs[turn] * many
                    # Behind the panel's last tile lies another thread's: that one asks for what it reads itself.
                    asked = table + (many * T if first + turn + 1 < tiles else 0)
                    tile = chain(tile, here, origins, c * next_channel, w, wo, steps, table, asked, begin, end)
                    if c > 0:
                        tile = add_put(tile, sums, turn * area)
                    if c + together < IC:
                        put_tile(sums, turn * area, tile)
                        continue
                    if not single:  # of a chain that begins at a bias all sums are rounded as if they were as large
                        tile = add_tile(tile, biases)
                    if activates:
                        tile = each(tile, value, p)
                    to = unroll(picked, G, repeat(int64(0), G), (ends, turn * G))
                    if pitch:
                        store_tile(tile, C, y, to, 0, yw, 1, height, left)
                    else:
                        store_columns(tile, C, y, to, 0, yc, pixel, left)

    return panels.over_bands(dtype, L, count, None if in_place else panels.packing(dtype, lanes, 1, pitch, runs), work)
