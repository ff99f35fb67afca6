"""Loop nests over small contiguous maps with lanes across planes, for windows that are written out.

As ``across``, but a batch is transposed into a grid with margins of padding, so that every window lies inside: no edge, no loop over taps,
some 25 instructions a window where the nest of channels_last takes 80.  A job is a batch of ``group`` registers of planes.
"""

from numba import int64

from ..compile import specialised
from ..simd import convert, integers, load, number, numbers, phase, pointer, repeat, splat, stacked, store, unroll, with_phase
from .across import MOST_PLANES, ROOM, between, placed
from .number import jitable
from .reduction import arithmetic, has_nan, index, looks_for_nan


@specialised
def forward(kind, dtype, saved, saves, lanes, group, KH, KW):
    """Arguments: x, y, saved; tables: each element's place in the grid, and of each output where its window begins there, its count, its
    first tap inside; planes, C; x's strides of N and C; elements of a map, of its output and of the grid; the grid's width; two
    unused; the reduction's parameters."""
    A, P, L, real, tapped = arithmetic(kind), len(kind.parameters), lanes, number(dtype), index(dtype, saved)
    neutral, begin, finish, batch = A.neutral, A.begin, A.finish, group * lanes
    gather, _ = between(dtype, real, lanes)
    _, scatter = between(dtype, real, lanes)
    _, scatter_kept = between(saved, saved, lanes)
    kept_room, taps = ROOM if saves else 1, KH * KW

    @jitable
    def begun(states, i, tap):
        zero = splat(real(0), L)
        return with_phase(states, i, begin(zero, tap, zero, zero))

    def window_of(step):
        @jitable
        def stepped(states, i, args):
            grid, at, tap, p = args
            return with_phase(states, i, step(phase(states, i), load(grid, at + i * L, L), tap, p))

        @jitable
        def tap_of(states, k, args):
            grid, at, row, p = args
            return unroll(stepped, group, states, (grid, at + k // KW * row + k % KW * batch, splat(tapped(k), L), p))

        return jitable(lambda states, args: unroll(tap_of, taps, states, args))

    window, ordered_window = window_of(A.step), window_of(A.ordered or A.step)
    looks, holds_nan = looks_for_nan(A, dtype), has_nan(real, lanes)

    @jitable
    def ended(states, i, args):
        outputs, chosen, at, count, size, p = args
        value, choice = finish(phase(states, i), count, size, p)
        store(outputs, at + i * L, value)
        if saves:
            store(chosen, at + i * L, convert(choice, saved))
        return states

    def kernel(args, start, stop):
        x, y, kept = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved)
        places, corners = pointer(args, 3, int64), pointer(args, 4, int64)
        counts, firsts = pointer(args, 5, real), pointer(args, 6, tapped)
        planes, C, stride_n, stride_c, M, OM, cells, width = integers(args, 7, 8)
        p, size, zero = numbers(args, 17, P, real, L), splat(real(KH * KW), L), splat(real(0), L)
        grid, outputs, chosen = stacked(ROOM, real), stacked(ROOM, real), stacked(kept_room, saved)
        origins = stacked(MOST_PLANES, int64)
        for at in range(0, cells * batch, L):
            store(grid, at, neutral(zero))
        for job in range(start, stop):
            placed(origins, job * batch, batch, planes, C, stride_n, stride_c)
            gather(x, origins, grid, places, M, batch)
            ordered = looks and not holds_nan(grid, 0, cells * batch, ROOM)
            for o in range(OM):
                states = repeat(begin(zero, splat(tapped(0), L), zero, zero), group)
                states = unroll(begun, group, states, splat(firsts[o], L))
                at = grid, corners[o] * batch, width * batch, p
                if looks:
                    states = ordered_window(states, at) if ordered else window(states, at)
                else:
                    states = window(states, at)
                unroll(ended, group, states, (outputs, chosen, o * batch, splat(counts[o], L), size, p))
            placed(origins, job * batch, batch, planes, planes, 0, OM)
            scatter(outputs, origins, y, OM, batch)
            if saves:
                scatter_kept(chosen, origins, kept, OM, batch)

    return kernel
