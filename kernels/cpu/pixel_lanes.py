"""Convolution with lanes across pixels: a tile of channels x pixels in registers, one broadcast weight against registers of x.

For contiguous maps whose rows fill registers: results are stored as they lie, where channel_lanes.py transposes them, and with few output
channels no lane idles.  `fastpool bench conv`, one core, 1x1 of 56x56: 64 channels to 64 140 GFLOP/s (PyTorch's better layout 169), to
256 150 (165), 256 to 64 152 (177).
"""

from ..compile import specialised
from ..simd import number, prefetch_to_l2, repeat, splat, stacked
from ..tile import add_outer, add_put, add_tile, each, put_tile, store_tile, tile_of_each
from . import panel as panels
from .number import compiled, jitable


@specialised
def forward(dtype, lanes, rows, cols, turns, stride, in_place, runs, after, pixel):
    """Jobs: (band, group, ``turns`` blocks of ``rows`` output channels).  A tile is ``rows`` channels x ``cols`` registers of pixels of a
    row.  ``in_place``: x is read where it lies, as its rows need no padding.  ``runs``: rows are so many pixels of a map that is one row.
    ``pixel``: y's pixels are so far apart.

    Arguments: as channel_lanes.forward's; ``stride`` > 1: steps are offsets in a panel by phases."""
    real, R, C, L, wide, whole = number(dtype), rows, cols, lanes, cols * lanes, rows * cols
    area, room, per = whole * L, turns * whole * L, turns
    activates = after is not None
    value, count = (compiled(after.value), len(after.defaults)) if activates else (None, 0)

    @jitable
    def chain(tile, x, at, ahead, w, wo, steps, table, first, end):
        for i in range(first, end):
            if in_place:
                prefetch_to_l2(x, at + ahead + steps[table + i])
            tile = add_outer(tile, w, (wo,), i * R, 1, x, at + steps[table + i], C)
        return tile

    @jitable
    def work(memory, tables, sizes, place, p):
        x, w, y, panel = memory
        lines, outs, steps = tables
        IC, OC, blocks, T, together, _, OW, KP, _, RQ, xn, xc, _, yn, yc, _, width, rowstep = sizes
        g, block, n, out, band_rows, maps, source, line = place
        here, next_channel = (x, xc) if in_place else (panel, width)
        many, zeros, sums = min(per, blocks - block), repeat(splat(real(0), L), whole), stacked(room, real)
        size, single = (IC * T + 1) * R, together >= IC
        for row in range(maps * band_rows):
            image = row // band_rows if maps > 1 else 0
            r = row - image * band_rows
            start = source + image * xn + lines[line + r] if in_place else (image * KP * RQ + r) * rowstep
            result = 3 * (out + r)
            to, low, high = (n + image) * yn + (g * OC + block * R) * yc + outs[result], outs[result + 1], outs[result + 2]
            for column in range(0, OW, wide):
                ow = max(0, min(column, OW - wide))
                for c in range(0, max(1, IC), together):
                    channels = min(together, IC - c)
                    table = 0 if channels == together else together * T
                    for turn in range(many):
                        mine = (g * blocks + block + turn) * size
                        tile = tile_of_each(w, mine, R, C, L) if single else zeros
                        at, wo = start + ow + c * next_channel, mine + (1 + c * T) * R
                        # The next tile's x: a cache line of each register at each turn.
                        ahead = wide + turn % (C + 1) * L
                        tile = chain(tile, here, at, ahead, w, wo, steps, table, low * channels, high * channels)
                        if c > 0:
                            tile = add_put(tile, sums, turn * area)
                        if c + together < IC:
                            put_tile(sums, turn * area, tile)
                            continue
                        if not single:
                            tile = add_tile(tile, tile_of_each(w, mine, R, C, L))
                        if activates:
                            tile = each(tile, value, p)
                        left = OC - (block + turn) * R
                        store_tile(tile, C, y, (to + turn * R * yc,), ow * pixel, yc, pixel, left, OW)

    return panels.over_bands(dtype, L, count, None if in_place else panels.packing(dtype, lanes, stride, 0, runs), work, per)
