"""Loop nests over contiguous maps that follow each other in memory, as if they were one long row: lanes run on over the ends of rows and of
maps.

Forward, small maps.  What a window has in each of its rows is reduced at every position first, then what lies below each other.  Elements
that belong to another row or map are left out by masks, made of a table of bits: batches of whole registers of whole maps all look the
same.  (In C, ns a register of a row's three taps, Zen 5: 0.61 without masks, 0.74 so, 1.23 with masks that are loaded.)  Where fewer rows
or columns have windows, those of a register are moved together at the end.  So a register of the map costs some 20 instructions, however
narrow its rows.

A job is a batch.  The last one ends where the maps do, and what it shares with the one before is made twice.

Backward, of what was selected at stride 1, maps of any size (``backward``).  An output says itself which of the elements around it it
chose, so that nothing needs to be left out.  Of other windows, small maps (``spread``): a register's elements take each its own of a
register of outputs.
"""

import numpy as np
from numba import int32, int64, types

from ..compile import specialised
from ..simd import (
    any_lane,
    between,
    convert,
    integers,
    load,
    load_each,
    load_masked,
    load_phases,
    number,
    numbers,
    permuted_each,
    phase,
    pointer,
    repeat,
    settle,
    splat,
    stacked,
    store,
    store_each,
    store_masked,
    store_past,
    unroll,
    where,
    where_each,
    with_phase,
)
from . import ahead
from .number import jitable
from .reduction import all_finite, arithmetic, arrays, carried, has_nan, index, looks_for_nan, writing

ROOM, NEAR = 4096, 1024
"""Elements of a batch: at most, and where there is a choice.  All that is read and written of it stays in L1."""

MARGIN = 256
"""Elements before and after a batch that its windows reach, at most."""


def batch(lanes, positions, elements, maps):
    """How many of so many maps go together, of so many positions where windows may begin and elements, so that no register has some of two
    batches; 0: there are too few maps, or they are too large."""
    least = lanes // np.gcd(lanes, positions)
    group = max(least, min(maps, NEAR // elements) // least * least)
    return int(group) if group <= min(maps, ROOM // elements) else 0


@specialised
def forward(kind, dtype, saved, saves, lanes, KH, KW, S, PH, PW, inside, everywhere, even):
    """Arguments: x, y, saved; the tables of ``Tables.by_positions``; x's stride between runs of maps that follow each other, maps and
    batches of a run, maps of a batch, elements of a map and of its rows, outputs of a map, the end of x; the seed's halves; the reduction's
    parameters.  y and saved are dense.

    S: elements of a row from a position to the next, a divisor of its length and of the windows' stride.  ``inside``: all windows lie
    inside. ``everywhere``: one begins at each position.  ``even``: every output's count is the same, or of no account.
    """
    A, P, L, real, tapped = arithmetic(kind), len(kind.parameters), lanes, number(dtype), index(dtype, saved)
    neutral, looks, checks = A.neutral, looks_for_nan(A, dtype), not kind.selects and isinstance(real, types.Float)
    made, plain = carried(kind, real, tapped, L, saves, looks), carried(kind, real, tapped, L, saves)
    tells = kind.selects and saves and not inside
    start_of, lift, more, merge, moved, finish = made.start, made.lift, made.more, made.merge, made.moved, made.finish
    ask, ask_y, ask_kept = ahead.asking(dtype), ahead.asking(dtype, True), ahead.asking(saved, True)
    step, holds_nan, finite = plain.more, has_nan(dtype, L), all_finite(len(made.parts))
    states_of, outputs_of = arrays(made.parts, ROOM + 2 * MARGIN), arrays(made.parts, ROOM + L)
    write, others_w, others_h = writing(saved, saves, store), KW - 1, KH - 1
    room, before, after = ROOM + 2 * MARGIN, -(-PW // S) * S, (KW - 1 - PW) // S * S

    @jitable
    def is_there(word, bit):
        return (word & splat(int32(2 << bit), L)) != splat(int32(0), L)

    @jitable
    def element(x, at, word, kw, fill):
        v = phase(load_phases(x, at + (kw - PW) // S * S, S, L), (kw - PW) % S)
        return v if inside or kw == PW else where(is_there(word, kw), v, fill)

    @jitable
    def column_of(state, kw, args):
        x, at, word, fill, p = args
        return more(state, element(x, at, word, kw, fill), splat(tapped(kw), L), p)

    @jitable
    def next_column_of(state, i, args):
        return column_of(state, i + 1, args)

    @jitable
    def row_of_window(x, at, word, firsts, here, fill, p):
        if tells:
            return unroll(column_of, KW, start_of(splat(real(0), L), load(firsts, here, L)), (x, at, word, fill, p))
        first = lift(element(x, at, word, 0, fill), splat(tapped(0), L), p)
        return unroll(next_column_of, others_w, first, (x, at, word, fill, p))

    @jitable
    def row_of(state, kh, args):
        states, at, word, pitch, p = args
        joined = merge(state, moved(load_each(states, at + (kh - PH) * pitch, L), kh * KW), p)
        if inside or kh == PH:
            return joined
        return where_each(is_there(word, KW + kh), joined, state)

    @jitable
    def next_row_of(state, i, args):
        return row_of(state, i + 1, args)

    @jitable
    def window(states, at, word, firsts, here, pitch, p):
        args = states, at, word, pitch, p
        if tells:
            return unroll(row_of, KH, start_of(splat(real(0), L), load(firsts, here, L)), args)
        first = load_each(states, at - PH * pitch, L)
        if not inside and PH > 0:
            first = where_each(is_there(word, KW), first, start_of(splat(real(0), L), splat(tapped(0), L)))
        return unroll(next_row_of, others_h, first, args)

    @jitable
    def tap_of(state, kw, args):
        x, at, kh, word, there, fill, p = args
        v = phase(load_phases(x, at + (kw - PW) // S * S, S, L), (kw - PW) % S)
        return step(state, where(there & is_there(word, kw), v, fill), splat(tapped(kh * KW + kw), L), p)

    @jitable
    def in_order(x, at, word, firsts, here, W, fill, p):
        """A window tap by tap: where there is a NaN to be found, or sums that are not finite may be so for their order alone."""
        state = start_of(splat(real(0), L), load(firsts, here, L) if tells else splat(tapped(0), L))
        for kh in range(KH):
            args = x, at + (kh - PH) * W, kh, word, is_there(word, KW + kh), fill, p
            state = unroll(tap_of, KW, state, args)
        return state

    @jitable
    def copied(spare, x, source, elements):
        """A batch between margins, of whatever lies there, that may be read."""
        for at in range(0, elements, L):
            store(spare, MARGIN + at, load(x, source + at, L))
        return spare

    @jitable
    def put(y, kept, out, at, end, state, counts, size, p):
        value, choice = finish(state, splat(counts[0], L) if even else load(counts, at, L), size, p)
        write(y, kept, out + at, between(at, 1, 0, end, L), at + L <= end, value, choice)

    @jitable
    def written(outputs, y, kept, out, end, counts, size, p):
        """The outputs of windows that were moved together; -> whether all sums are finite."""
        odd = between(0, 1, 0, 0, L)
        for at in range(0, end, L):
            state = load_each(outputs, at, L)
            if checks:
                odd = odd | (between(at, 1, 0, end, L) & ~finite(state))
            put(y, kept, out, at, end, state, counts, size, p)
        return not any_lane(odd)

    @jitable
    def done(state, at, tables, outputs, y, kept, out, end, size, p):
        """With the windows of a register: written, or moved together."""
        begins, lanes_of, counts = tables
        if everywhere:
            put(y, kept, out, at, end, state, counts, size, p)
        else:
            store_each(outputs, begins[at // L], permuted_each(state, load(lanes_of, at, L)))

    def kernel(args, start, stop):
        x, y, kept, words = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved), pointer(args, 3, int32)
        firsts_w, firsts, counts = pointer(args, 6, tapped), pointer(args, 7, tapped), pointer(args, 8, real)
        tables = pointer(args, 5, int64), pointer(args, 4, int32), counts
        stride, planes, batches, group, M, W, OM, x_end = integers(args, 9, 8)
        p, size, fill = numbers(args, 19, P, real, L), splat(real(KH * KW), L), neutral(splat(real(0), L))
        states, outputs, spare = states_of(), outputs_of(), stacked(room, dtype)
        elements, positions, end, pitch = group * M, group * M // S, group * OM, W // S
        for job in range(start, stop):
            first = min(job % batches * group, planes - group)
            array, source, out = x, job // batches * stride + first * M, (job // batches * planes + first) * OM
            read = source
            if source < before or source + elements + after > x_end:
                array, read = copied(spare, x, source, elements), MARGIN
            quick = True
            if looks:
                quick = not holds_nan(x, source, elements, source + elements)
            if quick:
                for at in range(0, positions, L):
                    if everywhere:
                        ask_y(y, out + at, L)
                        if saves:
                            ask_kept(kept, out + at, L)
                    state = row_of_window(array, read + at * S, load(words, at, L), firsts_w, at, fill, p)
                    store_each(states, MARGIN + at, state)
                odd = between(0, 1, 0, 0, L)
                for at in range(0, positions, L):
                    ask(x, source + elements + at * S, S * L)
                    state = window(states, MARGIN + at, load(words, at, L), firsts, at, pitch, p)
                    if checks and everywhere:
                        odd = odd | ~finite(state)
                    done(state, at, tables, outputs, y, kept, out, end, size, p)
                quick = not any_lane(odd) if everywhere else written(outputs, y, kept, out, end, counts, size, p)
            if (looks or checks) and not quick:
                array = copied(spare, x, source, elements)
                for at in range(0, positions, L):
                    state = in_order(array, MARGIN + at * S, load(words, at, L), firsts, at, W, fill, p)
                    done(state, at, tables, outputs, y, kept, out, end, size, p)
                if not everywhere:
                    written(outputs, y, kept, out, end, counts, size, p)

    return kernel


TOGETHER, WIDE = 4, 11
"""Rows of a gradient that are made together, and columns from which on: what is loaded for one serves those above and below.  us a call,
one core (Zen 5), by ``narrow``, ``rows`` or ``separable`` and so: 3x3 of 64x512x7x7 800 and 490, 8x512x14x14 365 and 240, 8x256x56x56 3,340
and 1,820; 5x5 2,360 and 1,200, 840 and 430, 6,580 and 3,410.  7x7 is as quick by ``separable``.
"""

REACHED = 8192
"""Elements of a block and of all that its windows reach, at most."""


def _copying(dtype, saved, lanes, selects):
    """(given, chosen, gy, kept, first, count, total): outputs first .. first + count - 1 to arrays that may be read beyond either end of
    the ``total`` that there are."""
    real, residue = number(dtype), number(saved)

    @jitable
    def copied(given, chosen, gy, kept, first, count, total):
        for i in range(0, count, lanes):
            inside = between(first + i, 1, 0, total, lanes)
            store(given, i, load_masked(gy, first + i, inside, splat(real(0), lanes)))
            if selects:
                store(chosen, i, load_masked(kept, first + i, inside, splat(residue(0), lanes)))

    return copied


@specialised
def backward(kind, dtype, saved, lanes, KH, KW, PH, PW, together, past):
    """The gradient of a selecting reduction whose windows begin at every position.

    Arguments: gx, gy, saved, two unused; elements of all maps, of their rows, and of a run, of which ``together`` make a block: rows, if
    several; blocks of a job; how far ahead to ask.  The last block ends where the maps do.  Blocks that reach beyond the ends work on
    copies. ``past``: gx, whose rows are whole cache lines, is written past the caches.
    """
    A, L, R, real, residue = arithmetic(kind), lanes, together, number(dtype), number(saved)
    share, ask, ask_saved, ask_gx = A.share, ahead.asking(dtype), ahead.asking(saved), ahead.asking(dtype, True)
    put, room, lines, above, right = store_past if past else store, REACHED + L, R + KH - 1, KH - 1 - PH, KW - 1 - PW
    copied = _copying(dtype, saved, L, True)

    @jitable
    def given(acc, j, args):
        g, k, kh_of_first, kw = args
        kh = kh_of_first + j
        if 0 <= kh < KH:
            zero = splat(real(0), L)
            acc = with_phase(acc, j, phase(acc, j) + share(g, zero, zero, k, splat(residue(kh * KW + kw), L), zero, zero, ()))
        return acc

    @jitable
    def column(acc, kw, args):
        gy, kept, at, kh_of_first = args
        here = at + PW - kw
        return unroll(given, R, acc, (load(gy, here, L), load(kept, here, L), kh_of_first, kw))

    @jitable
    def line(acc, q, args):
        gy, kept, at, W = args
        return unroll(column, KW, acc, (gy, kept, at + (q - above) * W, above - q + PH))

    @jitable
    def written(acc, j, args):
        gx, at, run = args
        put(gx, at + j * run, phase(acc, j))
        return acc

    def kernel(args, start, stop):
        gx, gy, kept = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved)
        total, W, run, several, far = integers(args, 5, 5)
        block, before, after = R * run, above * W + right, PH * W + PW + L
        spare, given_spare, chosen_spare = stacked(room, dtype), stacked(room, dtype), stacked(room, saved)
        for b in range(start * several, min(stop * several, (total + block - 1) // block)):
            at = min(b * block, total - block)
            target, place, gradients, chosen, source = gx, at, gy, kept, at
            ends = at < before or at + block + after > total
            if ends:
                copied(given_spare, chosen_spare, gy, kept, at - before, before + block + after, total)
                target, place, gradients, chosen, source = spare, 0, given_spare, chosen_spare, before
            elif far > 0:
                for j in range(R):
                    ask(gy, at + j * run + far, run)
                    ask_saved(kept, at + j * run + far, run)
                    if not past:
                        ask_gx(gx, at + j * run + far, run)
            for i in range(0, run, L):
                acc = unroll(line, lines, repeat(splat(real(0), L), R), (gradients, chosen, source + i, W))
                unroll(written, R, acc, (target, place + i, run))
            if ends:
                for i in range(0, block, L):
                    store_masked(gx, at + i, load(spare, i, L), between(i, 1, 0, block, L))
        if past:
            settle()

    return kernel


@specialised
def spread(kind, dtype, saved, lanes, across, down, even):
    """The gradient of a selecting or linear reduction over small maps: the outputs whose windows hold a register's elements lie in one
    register, of which each element takes its own, of ``across`` windows beside each other and ``down`` below.

    Arguments: gx, gy, saved, two unused; the tables of ``Tables.by_elements``; maps, maps of a batch; elements and outputs of a map,
    outputs of its row.  Batches that reach beyond the ends work on copies.  ``even``: every output's count is the same, or of no account.
    """
    A, L, real, residue, room = arithmetic(kind), lanes, number(dtype), number(saved), ROOM + 2 * MARGIN
    share, selects, several = A.share, A.reads_saved, across * down
    copied = _copying(dtype, saved, L, selects)

    @jitable
    def window_of(acc, i, args):
        gy, kept, counts, at, output, order, taps, row = args
        back, zero, none = i // across * row + i % across, splat(real(0), L), splat(residue(0), L)
        g, tap = load(gy, at - back, L), load(taps[0], i * taps[1] + taps[2], L)
        if selects:
            g, k = permuted_each((g, convert(load(kept, at - back, L), int32)), order)
            return acc + where(k == tap, g, zero)
        if not even:
            g = share(g, zero, zero, none, none, load(counts, MARGIN + output - back, L), zero, ())
        (g,) = permuted_each((g,), order)
        return acc + where(tap >= splat(int32(0), L), g, zero)

    def kernel(args, start, stop):
        gx, gy, kept = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved)
        orders, firsts, taps, counts = pointer(args, 5, int32), pointer(args, 6, int64), pointer(args, 7, int32), pointer(args, 8, real)
        planes, group, M, OM, row = integers(args, 9, 5)
        positions, outputs, total, before = group * M, group * OM, planes * OM, (down - 1) * row + across - 1
        given, chosen, zero, nothing = stacked(room, dtype), stacked(room, saved), splat(real(0), L), splat(residue(0), L)
        for job in range(start, stop):
            first = min(job * group, planes - group)
            source = first * OM
            gradients, picked, at = gy, kept, source
            if source < before or source + outputs + row + L > total:
                copied(given, chosen, gy, kept, source - before, before + outputs + row + L, total)
                gradients, picked, at = given, chosen, before
            for i in range(0, positions, L):
                output = firsts[i // L]
                windows = gradients, picked, counts, at + output, output, load(orders, i, L), (taps, positions, i), row
                acc = unroll(window_of, several, zero, windows)
                if even and not selects:
                    acc = share(acc, zero, zero, nothing, nothing, splat(counts[MARGIN], L), zero, ())
                store(gx, first * M + i, acc)

    return kernel
