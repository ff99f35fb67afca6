"""Small contiguous maps, pooled with lanes across planes: a batch of them is transposed into the cache, where it is one channels_last
image, pooled there by the nests of that layout, and transposed back.

A row of 7 or 14 pixels fills no register, and its edges are most of it; of 16 planes side by side every lane stands at the same pixel.  A
job is a batch.  The last batch is filled up with its last plane, over and over; what comes of those is the same, in the same place.
"""

from numba import int64

from ..compile import specialised
from ..simd import address, integers, load, load_across, number, phase, pointer, stacked, store, store_across
from . import ahead
from .number import inlined, jitable
from .reduction import arithmetic

ROOM = 16384
"""Elements of a batch of maps, at most."""

CACHED = 48 << 10
"""Bytes of a batch of maps and of its outputs that are worked on in L1."""

ALIAS = 4096
"""Bytes: the lines of maps of a multiple of these share a set of L1, which holds fewer than 16.  The gradient of avg of 32x64x32x32 to 7x7
took 6.8 ms with 16 planes written at once, 1.7 with 8; of 31x31 1.55 and 1.64."""

MOST_PLANES, MOST_ARGUMENTS = 64, 64


def between(dtype, real, lanes):
    """(gather, scatter): ``planes`` maps of ``length`` elements into an array (pixel, plane), and back; ``origins`` say where each begins,
    ``places`` (None: one after the other) to which pixel of the array each element goes.

    What the next batch will touch is asked for: it lies in so many places that the hardware does not foresee it (64x512x7x7, avg 2x2 s2
    0.55 ms without, 0.43 with).
    """
    ask = ahead.asking(dtype)

    @jitable
    def place(places, m):
        return m if places is None else places[m]

    @jitable
    def gather(x, origins, array, places, length, planes):
        for first in range(0, planes, lanes):
            for at in range(0, length, 4):
                begin = min(at, length - 4)
                ask(x, origins[first] + planes * length + at * lanes, 4 * lanes)
                if begin >= 0:
                    pixels = load_across(x, origins, first, begin, lanes)
                    for k in range(4):
                        store(array, place(places, begin + k) * planes + first, phase(pixels, k))
                else:
                    for m in range(length):
                        for i in range(first, first + lanes):
                            store(array, place(places, m) * planes + i, load(x, origins[i] + m, 1))

    @jitable
    def scatter(array, origins, y, length, planes):
        for first in range(planes - lanes, -1, -lanes):  # so that of a plane that fills up a batch its own lane is last
            for at in range(0, length, 4):
                begin = min(at, length - 4)
                ask(y, origins[first] + planes * length + at * lanes, 4 * lanes)
                if begin >= 0:
                    base = begin * planes + first
                    pixels = (
                        load(array, base, lanes), load(array, base + planes, lanes), load(array, base + 2 * planes, lanes),
                        load(array, base + 3 * planes, lanes),
                    )  # fmt: skip
                    store_across(y, origins, first, begin, pixels)
                else:
                    for m in range(length):
                        for i in range(first + lanes - 1, first - 1, -1):
                            store(y, origins[i] + m, load(array, m * planes + i, 1))

    return gather, scatter


@jitable
def placed(origins, first, batch, planes, C, stride_n, stride_c):
    """Where each plane of a batch begins."""
    n, c = first // C, first % C
    for i in range(batch):
        origins[i] = n * stride_n + c * stride_c
        if first + i + 1 < planes:
            c += 1
            if c == C:
                n, c = n + 1, 0


@specialised
def forward(dtype, saved, saves, lanes, nest, *constants):
    """Arguments: x, y, saved; planes, C; x's strides of N and C; elements of a map and of its output; planes of a batch; the nest's jobs
    for one; how many of its arguments follow, all but x, y and saved.

    The nest is told that an image begins where the last did (a stride of N of 0), and that its outputs follow each other.
    """
    real, run = number(dtype), inlined(nest, *constants)
    gather, scatter = between(dtype, real, lanes)
    _, scatter_kept = between(saved, saved, lanes)
    width, kept_width, kept_room = real.bitwidth // 8, saved.bitwidth // 8, ROOM if saves else 1

    def kernel(args, start, stop):
        x, y, kept = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved)
        planes, C, stride_n, stride_c, M, OM, batch, jobs, count = integers(args, 3, 9)
        maps, outputs, chosen = stacked(ROOM, real), stacked(ROOM, real), stacked(kept_room, saved)
        origins, arguments = stacked(MOST_PLANES, int64), stacked(MOST_ARGUMENTS, int64)
        for i in range(count):
            arguments[3 + i] = args[12 + i]
        arguments[0] = address(maps)
        for job in range(start, stop):
            placed(origins, job * batch, batch, planes, C, stride_n, stride_c)
            gather(x, origins, maps, None, M, batch)
            before = job * OM * batch
            arguments[1], arguments[2] = address(outputs) - before * width, address(chosen) - before * kept_width
            run(arguments, job * jobs, (job + 1) * jobs)
            placed(origins, job * batch, batch, planes, planes, 0, OM)
            scatter(outputs, origins, y, OM, batch)
            if saves:
                scatter_kept(chosen, origins, kept, OM, batch)

    return kernel


@specialised
def backward(kind, dtype, saved, lanes, together, nest, *constants):
    """Arguments: gx, gy, saved, x, y; the rest as ``forward``.  x and y are read only by a reduction whose gradient needs them.
    ``together``: planes of gx that are written at once."""
    A, real, residue, run = arithmetic(kind), number(dtype), number(saved), inlined(nest, *constants)
    (gather, _), (_, scatter) = between(dtype, real, lanes), between(dtype, real, together)
    gather_kept, _ = between(saved, residue, lanes)
    reads_values, reads_saved = A.reads_values, A.reads_saved
    width, kept_width = real.bitwidth // 8, residue.bitwidth // 8
    values_room, kept_room = ROOM if reads_values else 1, ROOM if reads_saved else 1

    def kernel(args, start, stop):
        gx, gy, kept, x, y = (
            pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved), pointer(args, 3, dtype), pointer(args, 4, dtype),
        )  # fmt: skip
        planes, C, stride_n, stride_c, M, OM, batch, jobs, count = integers(args, 5, 9)
        gradients, given, chosen = stacked(ROOM, real), stacked(ROOM, real), stacked(kept_room, residue)
        maps, outputs = stacked(values_room, real), stacked(values_room, real)
        origins, arguments = stacked(MOST_PLANES, int64), stacked(MOST_ARGUMENTS, int64)
        for i in range(count):
            arguments[5 + i] = args[14 + i]
        arguments[3] = address(maps)
        for job in range(start, stop):
            if reads_values:
                placed(origins, job * batch, batch, planes, C, stride_n, stride_c)
                gather(x, origins, maps, None, M, batch)
            placed(origins, job * batch, batch, planes, planes, 0, OM)
            gather(gy, origins, given, None, OM, batch)
            if reads_saved:
                gather_kept(kept, origins, chosen, None, OM, batch)
            if reads_values:
                gather(y, origins, outputs, None, OM, batch)
            before = job * OM * batch
            arguments[0] = address(gradients) - job * M * batch * width
            arguments[1], arguments[4] = address(given) - before * width, address(outputs) - before * width
            arguments[2] = address(chosen) - before * kept_width
            run(arguments, job * jobs, (job + 1) * jobs)
            placed(origins, job * batch, batch, planes, planes, 0, M)
            scatter(gradients, origins, gx, M, batch)

    return kernel
