"""How a convolution is cut up: the register tile, the band of rows whose input fits a cache, all from the layer's shape and the CPU.

A small model of what limits one core, in cycles; each number says where it was measured.
"""

import functools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from llvmlite import binding as llvm

from ..simd import LINE, register_bytes

PER_CYCLE = 2
"""Multiply-adds of registers, and loads, that a core starts in a cycle: of every x86 server core since 2017, and of Neoverse V1."""

LATENCY = 4
"""Cycles of a multiply-add: fewer than PER_CYCLE * LATENCY accumulators leave some idle."""

TRANSPOSED, STORED = 5, 2
"""Cycles a register of a channel's pixels takes to be transposed and stored, and one to be stored as it is: 1x1 of 64 channels of 56x56 to
64 ran at 135 GFLOP/s of 215 so and so at 200."""

CHANNELS = (1, 2, 4, 6, *range(8, 15))
"""Heights of a tile with lanes across pixels."""

SHIFTED = 1.1
"""What registers of x cost that lie in two cache lines: 3x3 of 64 channels of 224x224, 150 GFLOP/s with lanes across pixels, 165 across
channels."""

ACCUMULATORS = 14
"""Registers at most of a tile of depthwise convolution with lanes across pixels: a register of x is loaded for each product anyway."""

CHUNK = 128
"""Products that are summed one after the other; such sums are then added, and biases last.  One chain of 3x3 of 512 channels, 4608
products, is off by 2.1e-6 of the largest result.  Of VGG-16's, AlexNet's and ResNet-50's 3x3 and larger, the error beside PyTorch's, in the
geometric mean and at worst: chains of 64 0.75 and 1.18, of 128 0.80 and 1.18, of 256 1.08 and 1.57; with biases first, of 64, 2.87 at
worst.  Chains of 128 take 1% less time than of 64, and 1 to 2% more than one."""

TURNS = 8
"""Tiles, or blocks of output channels where lanes run across pixels, that take turns at a chain's products: what they share stays in L1.
3x3 of 256 channels of 56x56: 202 GFLOP/s became 213; 1x1 of 1024 of 14x14 to 256, 150 and 180.  Blocks whose products are one chain do
without where x is packed: each turn would write other planes."""

BESIDE = 1.5
"""Cycles of a step beside what its multiply-adds take: 14 x 2 registers ran at 220 GFLOP/s of 247, 4 x 4 at 188."""

ASKED = 3
"""Loads of a step beside those of the tile: its offsets, and what is asked for ahead.  5x5 of 96 channels of 27x27: 27 pixels x 1 register
ran at 165 GFLOP/s, 14 x 2 at 206."""

PIECE = 0.75
"""Cycles of a step for each row of a tile but the first: its address takes a register.  14 rows of 1 pixel are half as fast as 1 of 14."""

DEPTHWISE = 8
"""Pixels of a tile of depthwise convolution with lanes across channels, and rows of one with lanes across pixels that reads maps as they
lie, at most: they share each register of weights, or of x."""

WINDOW = 25
"""Taps up to which depthwise convolution of contiguous maps reads them as they lie: each is an instruction for every row of a tile."""

NEAREST = 1 << 14
"""Bytes of a panel that is read by one channel alone, in L1."""

FEW_WEIGHTS, SLICES = 1 << 18, 4
"""Bytes of weights up to which the jobs of their gradient are so many slices of the maps: x and gy are packed once, where jobs of output
channels each pack all of x.  Four times as many where each slice has an image: 1x1 of 576 channels of 7x7 to 160, a batch of 8, on two
threads 231 us so and 204; of one image 63 us so, and 76, as it is one slice."""

NEAREST_SUM, NEAR = 32, 128
"""Pixels that a tile of a weight gradient sums before the next takes its turn: so many of gy, 128 bytes each, stay in L1 for all tiles.
Fewer where there are few in all, as a chain of most of them rounds more than PyTorch's: 3x3 of 256 channels of one map of 13x13 to 384 was
off by 2.5 times as much so, by a third of them 1.9 times."""

SEGMENT = 512
"""Pixels of planes, at most, whose products are summed in registers, and of planes that are multiplied as they lie at least: the lanes are
added up once for each.  1x1 of 64 channels of 56x56 to 256, a batch of 8, by 256, 384 and 512: 4.6, 4.5 and 4.2 ms; where it is 14x14,
maps together, packing is quicker: 384 channels to 64 430 us so and 530."""

WEIGHTS = 4
"""Registers of weights that a step may hold: with more, tiles are so flat that x is loaded as often as multiplied."""

PART_OF_L2 = 2
"""A panel is this part of L2: weights stream through the rest."""

JOBS = 8
"""Jobs that a map is cut into if it is large enough, so that threads get equal parts."""


UNPACKED_OUTPUTS, UNPACKED_BYTES = 256, 2048
"""Output channels up to which pixels of so many bytes are read in place: with more the packing is a small part, and with larger pixels a
tile's lie in one set of L1."""


class Tile(NamedTuple):
    """``pieces`` rows of ``pixels`` outputs, by ``cols`` registers of output channels."""

    pieces: int
    pixels: int
    cols: int


@functools.cache
def registers():
    """SIMD registers of this CPU: AVX-512's and ARM's 32, else 16."""
    return 32 if register_bytes() == 64 or not llvm.get_process_triple().startswith("x86_64") else 16


def _cache(file, otherwise):
    """What Linux says of a cache of the first core."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache", file).read_text().strip()
        return int(text.removesuffix("K")) * (1024 if text.endswith("K") else 1)
    except (OSError, ValueError):
        return otherwise


@functools.cache
def l2_bytes():
    """Of one core, 1 MiB where the system does not say."""
    return _cache("index2/size", 1 << 20)


@functools.cache
def l3_bytes():
    """Of what the cores of one share, 32 MiB where the system does not say."""
    return _cache("index3/size", 32 << 20)


@functools.cache
def l1_sets():
    """(sets of L1, lines that one holds), those of 32 KiB where the system does not say."""
    return _cache("index0/number_of_sets", 64), _cache("index0/ways_of_associativity", 8)


class PixelTile(NamedTuple):
    """``channels`` output channels by ``cols`` registers of pixels of a row."""

    channels: int
    cols: int


def tile(width, rows, channels, lanes, steps, share, kept):
    """(cycles, the tile of least cost) for ``rows`` output rows of ``width`` and ``channels`` output channels; ``steps``: products an
    output, of which a tile of so many rows takes ``share(pieces)``, as the others are in the padding; ``kept``: of each tap of a row the
    outputs, first and end, that it does not take there, or ()."""
    shares = [share(pieces) for pieces in range(1, registers())]
    candidates = []
    for cols in range(1, min(WEIGHTS, -(-channels // lanes)) + 1):
        room = (registers() - cols - 1) // cols
        for pixels in range(1, min(width, room) + 1):
            most = min(rows, room // pixels) if width % pixels == 0 else 1
            candidates += [Tile(pieces, pixels, cols) for pieces in range(1, most + 1)]

    def cost(t):
        return _cycles(t, width, rows, channels, lanes, steps * shares[t.pieces - 1], kept)

    best = min(candidates, key=lambda t: (cost(t), -t.pixels * t.pieces))
    return cost(best), best


def _cycles(t, width, rows, channels, lanes, steps, kept):
    pixels = t.pieces * t.pixels
    whole = t.pixels == width and kept
    taken = [t.pieces * (end - first) for first, end in zip(kept[::2], kept[1::2], strict=True)] if whole else [pixels]
    step = sum(max(n * t.cols / PER_CYCLE, (n + t.cols + ASKED) / PER_CYCLE, LATENCY) for n in taken) / len(taken)
    step += BESIDE + PIECE * (t.pieces - 1)
    tiles = -(-rows // t.pieces) * -(-width // t.pixels) * -(-channels // (t.cols * lanes))
    return tiles * (steps * step + TRANSPOSED * -(-pixels // lanes) * t.cols * lanes)


def pixel_tile(width, rows, channels, lanes, steps, shifted):
    """The same with lanes across pixels; ``shifted``: registers of x lie in two cache lines mostly, as taps along a row move them."""
    candidates = [
        PixelTile(height, cols)
        for height in CHANNELS
        for cols in range(1, min(WEIGHTS * (2 if height == 1 else 1), -(-width // lanes)) + 1)
        if (height + 1) * cols + 1 <= registers()
    ]

    def cost(t):
        step = max(t.channels * t.cols / PER_CYCLE, (t.channels + t.cols + ASKED) / PER_CYCLE, LATENCY) + BESIDE
        step *= SHIFTED if shifted else 1
        tiles = rows * -(-width // (t.cols * lanes)) * -(-channels // t.channels)
        return tiles * (steps * step + STORED * t.channels * t.cols)

    best = min(candidates, key=lambda t: (cost(t), -t.channels * t.cols))
    return cost(best), best


def sum_tile(length, channels, lanes):
    """The tile of a weight gradient whose runs are so long: the one that wastes least, then the largest."""
    candidates = [
        Tile(1, rows, cols)
        for cols in range(1, min(WEIGHTS, -(-channels // lanes)) + 1)
        for rows in range(1, min(length, (registers() - cols - 1) // cols) + 1)
    ]

    def cost(t):
        step = max(t.pixels * t.cols / PER_CYCLE, (t.pixels + t.cols) / PER_CYCLE, LATENCY)
        return -(-length // t.pixels) * -(-channels // (t.cols * lanes)) * (step + 0.5)

    return min(candidates, key=lambda t: (cost(t), -t.pixels * t.cols))


def plane_tile(width, rows, lanes):
    """(rows, registers of pixels of each) of a tile of depthwise convolution of contiguous maps: what wastes least, then the largest."""
    most = min(ACCUMULATORS, registers() - 3)
    cols = min(range(1, min(most, -(-width // lanes)) + 1), key=lambda n: (-(-width // (n * lanes)) * n, -n))
    return -(-rows // -(-rows // max(1, most // cols))), cols


def window_rows(rows, taps, step):
    """Output rows of a tile of depthwise convolution that reads contiguous maps as they lie: each row of x is loaded once for all.  With
    steps of 2 there are twice as many rows, whose registers would not be enough: 96x112x112 160 us by 8 rows and 132 by 4."""
    most = min(DEPTHWISE // step, max(4, registers() - taps - 4))
    return -(-rows // -(-rows // most))


def plane_bands(planes, rows, together):
    """(rows of a band, bands of a plane) of depthwise convolution of so many planes: where these are few each is several jobs, of whole
    tiles of ``together`` rows."""
    band = padded(-(-rows // max(1, min(JOBS // max(1, planes), rows // together))), together)
    return band, -(-rows // band)


def product_rows(rows, taps, along):
    """Output rows whose gradients a tile of a depthwise weight gradient holds beside the sums of ``taps``: such as divide them."""
    most = max(1, min(DEPTHWISE, registers() - taps - along - 2))
    return max(n for n in range(1, most + 1) if rows % n == 0)


def pixels_together(count, few=False):
    """Of so many outputs in a row, how many a tile of depthwise convolution has; ``few``: where each reads or writes many lines that are in
    no cache.  us, a batch of 8 with steps of 2, by so many and by few: gradient by the input of 144x56x56 620 and 470, 192x28x28 255 and
    185, by the weights 176 and 114; forward 96x112x112, 38 MB, 1,850 and 1,650, but 144x56x56, 14 MB, 360 and 430."""
    most = DEPTHWISE // 2 if few else DEPTHWISE
    return -(-count // -(-count // most))


def near(pixels):
    """How many pixels, of so many in all, a tile of a weight gradient sums before the next takes its turn."""
    return min(NEAR, max(NEAREST_SUM, pixels // 3))


def few_weights(bytes_, images):
    """Whether the jobs of such a gradient are slices of the maps."""
    return bytes_ <= FEW_WEIGHTS * (4 if images >= SLICES else 1)


def chunk(blocks, groups):
    """How many blocks of output channels a job of a weight gradient has: x is packed once for them.  As many jobs as JOBS would leave each
    little to do with what it packs, so a quarter of that."""
    return -(-blocks // (JOBS // 4)) if groups == 1 else blocks


def chain(channels, taps):
    """How many channels are summed one after the other: about CHUNK products."""
    return max(1, -(-channels // max(1, -(-channels * taps // CHUNK))))


def stays(channels, step, lines):
    """Whether so many cache lines of each of a chain's channels, so many bytes apart, stay in L1 together."""
    sets, ways = l1_sets()
    first = np.arange(chain(channels, 1)) * step // LINE
    return bool(np.bincount((first[:, None] + np.arange(lines)).ravel() % sets).max() <= ways)


class Bands(NamedTuple):
    """``rows`` output rows of each of ``images`` maps."""

    rows: int
    images: int


def bands(row_bytes, extra, rows, images, pieces, others, budget=None):
    """How many output rows share a panel, of how many maps.  ``row_bytes``: of a panel's row; ``extra``: rows beside those; ``others``:
    jobs a band."""
    budget = budget or l2_bytes() // PART_OF_L2
    fitting = min(rows, max(pieces, budget // row_bytes - extra))
    together = max(1, min(images, budget // (row_bytes * (rows + extra)))) if fitting == rows else 1
    count = -(-rows // fitting)
    wanted = -(-JOBS // (others * max(1, images // together)))
    if together > 1 and wanted > 1:
        together = max(1, min(together, images * others // JOBS))
    elif count < wanted:
        count = max(count, min(wanted, rows // (4 * pieces * max(1, extra))))
    if together > pieces:  # whose rows are one tile's
        together -= together % pieces
    if together > 1:
        even = -(-images // _balanced(-(-images // together), images, others))
        return Bands(rows, min(together, padded(even, pieces)) if even > pieces else even)
    return Bands(-(-rows // _balanced(max(1, count), rows, images * others)), 1)


def _balanced(parts, length, others):
    """So many parts of a length, or up to twice as many, of ``others`` jobs each: two threads share the jobs, and the last part is what is
    left.  On two threads, us: 1x1 of 96 channels of 14x14 to 576, 8 maps by 3 550, by 2 374."""

    def cost(count):
        size = -(-length // count)
        jobs = -(-length // size) * others
        return min(1, -(-jobs // 2) * size / (others * length)) + 0.02 * (count - parts) / parts

    return min(range(parts, min(2 * parts, length) + 1), key=cost) if parts > 1 else parts


def pairs():
    """(channels of the side with more, and of the other) of a tile of dot products.  The other's planes come from L2: 1x1 of 64 channels of
    56x56 to 256 5.1 ms by 4 x 4, 4.3 by 8 x 2."""
    return (8, 2) if registers() == 32 else (4, 2)


def segment(length, lanes, size):
    """(pixels of a segment of a plane so long, channels of which such segments fit a part of L2)."""
    part = padded(-(-length // -(-length // SEGMENT)), lanes)
    return part, l2_bytes() // 4 // (part * size)


def padded(count, multiple):
    return math.ceil(count / multiple) * multiple


def panel_columns(count, lanes, narrow):
    """Columns of a panel of contiguous maps for so many that are read: whole registers, which are whole cache lines to store, or as many as
    there are where the nest can do with that, ``narrow``, and a quarter would be waste: so several small maps, and more rows, fit L2."""
    whole = padded(count, lanes)
    return count if narrow and 4 * count <= 3 * whole else whole


def spread(count, itemsize):
    """So many numbers, or a cache line more: rows that are 4 lines or a multiple of that share few sets of L1.  1x1 of 256 channels, runs
    of 256 pixels: 122 GFLOP/s, of 192 160."""
    return count + LINE // itemsize if count * itemsize % (4 * LINE) == 0 else count


def pitch(channels, itemsize):
    """From pixel to pixel of a panel of channels_last maps: an odd number of cache lines, or pixels would share few sets of L1."""
    lines, rest = divmod(channels * itemsize, LINE)
    return (lines | 1) * LINE // itemsize if rest == 0 else channels


__all__ = [
    "UNPACKED_BYTES",
    "UNPACKED_OUTPUTS",
    "Bands",
    "PixelTile",
    "Tile",
    "bands",
    "l2_bytes",
    "l3_bytes",
    "padded",
    "pitch",
    "pixel_tile",
    "registers",
    "tile",
]
