"""Loop nests over contiguous maps, rows first: the windows of each row of the map, then of those that lie below each other the output's.

A row's windows are reduced once for all rows of outputs that they are a part of, and a block of rows of them waits in L1.  Where windows
do not overlap they never leave the registers.  Lanes run along a row; a job is a band of rows of one plane.

Each loop goes over rows and does one thing, so that little is to be done a row: one of 64x32x32 is a single register.  First come the
blocks of outputs whose columns lie inside, each row's last over its end into the next rows, which are written after it; then those at
the sides, by bounded loads filled with the reduction's neutral element, whose masks are the same for all rows.  Rows of states follow
each other without gaps, so that where all counts are the same the outputs of a block of rows are made as one long row.

us a call, one core (Zen 5), tap by tap and so: max 3x3 s1 p1 of 512x112x112 3,000 and 1,500, s2 1,100 and 750; 2x2 s2 of 2048x56x56
1,450 and 700; the gradient of 3x3 s1 p1 of 512x112x112 3,480 and 2,290.
"""

from numba import types

from ..compile import specialised
from ..simd import (
    any_lane,
    between,
    integers,
    load,
    load_each,
    load_masked,
    load_phases,
    load_phases_between,
    number,
    numbers,
    phase,
    pointer,
    repeat,
    settle,
    splat,
    stacked,
    store,
    store_each,
    store_past,
    store_phases,
    store_phases_between,
    store_phases_past,
    unroll,
    with_phase,
)
from . import ahead
from .number import jitable
from .reduction import all_finite, arithmetic, arrays, carried, has_nan, index, looks_for_nan, writing
from .small import copied_rows

CHUNK = 256
"""Outputs of a row that are worked on together: a multiple of every number of lanes."""

ROOM, NEAR = 4096, 1 << 14
"""Windows of rows that wait together, and bytes of the map that they are of, at most: they stay in L1."""

FEW = 2
"""Blocks of a row up to which each is worked out for all rows before the next, of maps that lie in L2: 64x56x56 max 3x3 s2 p1 23 us, row by
row 32.  Of 25 MB it takes 1.2 ms so and 0.85 row by row, as rows are what can be asked for ahead."""


def together(rows, width, KH, SH, column_bytes):
    """How many of ``rows`` of so many outputs, each of so many bytes of a row of the map, are worked on together."""
    columns = min(width, CHUNK)
    lines = min(ROOM // SH // columns * SH, max(NEAR // (columns * column_bytes), 2 * KH))
    return -(-rows // -(-rows // ((lines - KH) // SH + 1)))


def part(height, pitch, KH, SH):
    """How many rows of a map, of rows of so many outputs between margins, are worked on together in its gradient; 0: not even as many as
    a window has."""
    lines = ROOM // pitch - (KH - 1) // SH - 1
    together = lines * SH
    return -(-height // -(-height // together)) if together > 0 else 0


def _row(made, tapped, lanes, KW, S, bounded):
    """(state, x, row, left, tap, W, fill, p) -> the state of each lane's window with its part of one row of the map, whose columns begin at
    ``left`` and whose taps at ``tap``; ``bounded``: columns outside are ``fill``."""
    more = made.more

    @jitable
    def tap_of(state, kw, args):
        x, row, left, tap, W, fill, p = args
        if bounded:
            phases = load_phases_between(x, row, left + kw // S * S, 0, W, S, fill)
        else:
            phases = load_phases(x, row + left + kw // S * S, S, lanes)
        return more(state, phase(phases, kw % S), splat(tapped(tap + kw), lanes), p)

    return jitable(lambda state, x, row, left, tap, W, fill, p: unroll(tap_of, KW, state, (x, row, left, tap, W, fill, p)))


def _first_row(made, tapped, lanes, KW, S):
    """(x, row, left, p) -> the state of each lane's window of one row of the map, all of whose columns lie inside."""
    lift, more, others = made.lift, made.more, KW - 1

    @jitable
    def tap_of(state, i, args):
        x, row, left, p = args
        kw = i + 1
        return more(state, phase(load_phases(x, row + left + kw // S * S, S, lanes), kw % S), splat(tapped(kw), lanes), p)

    @jitable
    def window(x, row, left, p):
        first = lift(phase(load_phases(x, row + left, S, lanes), 0), splat(tapped(0), lanes), p)
        return unroll(tap_of, others, first, (x, row, left, p))

    return window


def _arguments(dtype, saved, tapped, lanes, count):
    """(args) -> what ``forward`` lists: arrays, the first taps, counts, sizes, the reduction's ``count`` parameters."""
    real = number(dtype)

    @jitable
    def given(args):
        arrays = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved)
        counts = pointer(args, 4, real), pointer(args, 5, real), pointer(args, 6, real)
        return arrays, pointer(args, 3, tapped), counts, integers(args, 7, 16), numbers(args, 25, count, real, lanes)

    return given


def _place(SH, room):
    """(line, pitch) -> where a line's states wait: those of lines SH apart follow each other."""
    return jitable(lambda line, pitch: line % SH * room + line // SH * pitch)


def _places(place, count):
    """(line, pitch) -> the places of so many lines from that one."""
    if count == 1:
        return jitable(lambda line, pitch: (place(line, pitch),))
    before = _places(place, count - 1)
    last = count - 1
    return jitable(lambda line, pitch: (*before(line, pitch), place(line + last, pitch)))


def _blocks(lanes, KW, S):
    """(W, OW, PW) -> (near, far_end, reach): blocks of outputs near .. far_end - lanes have all the columns of their windows inside, and
    read so many elements from the row's first on."""

    @jitable
    def inside(W, OW, PW):
        near, blocks, ends = (PW + S * lanes - 1) // (S * lanes) * lanes, (OW + lanes - 1) // lanes * lanes, (W - KW + PW) // S + 1
        far_end = (blocks if ends >= OW else ends // lanes * lanes) if W + PW >= KW else 0
        return near, far_end, (far_end - lanes) * S + (KW - 1) // S * S + S * lanes - PW

    return inside


@jitable
def _next(part, plane, n, c, bands, C):
    """The next job's place."""
    if part + 1 < bands:
        return part + 1, plane, n, c
    if c + 1 < C:
        return 0, plane + 1, n, c + 1
    return 0, plane + 1, n + 1, 0


@specialised
def forward(kind, dtype, saved, saves, lanes, KH, KW, SH, S, even, past):
    """Arguments: x, y, saved; the first tap inside of each column; counts of slices, rows and columns; C, H, W, OH, OW; x's strides of N,
    C and H, and its end; SH, PH, PW; bands of a plane, rows of a band, and of those how many are worked on together; how far
    ahead to ask, 0: not at all; the seed's halves; the reduction's parameters.  y and saved are dense.

    ``even``: every output's count is the same, or of no account.  ``past``: y, whose rows are whole cache lines, is written past the
    caches.
    """
    A, L, real, tapped = arithmetic(kind), lanes, number(dtype), index(dtype, saved)
    neutral, others = A.neutral, KH - 1
    place, blocks_inside = _place(SH, ROOM // SH + L), _blocks(L, KW, S)
    places_of, given = _places(place, KH), _arguments(dtype, saved, tapped, L, len(kind.parameters))
    looks, holds_nan = looks_for_nan(A, dtype) and S == 1, has_nan(dtype, L)
    checks = not kind.selects and isinstance(real, types.Float)
    doubts = looks or checks
    made, plain = carried(kind, real, tapped, L, saves, looks), carried(kind, real, tapped, L, saves)
    merge, moved, finish, start_of = made.merge, made.moved, made.finish, made.start
    finite, scratch = all_finite(len(made.parts)), arrays(made.parts, ROOM + (SH + 1) * L)
    inside, bounded, in_order = _first_row(made, tapped, L, KW, S), _row(made, tapped, L, KW, S, True), _row(plain, tapped, L, KW, S, True)
    ask, ask_y, ask_kept = ahead.asking(dtype), ahead.asking(dtype, True), ahead.asking(saved, True)
    write = writing(saved, saves, store_past if past else store)

    @jitable
    def windows_inside(states, x, y, kept, places, sizes, numbers):
        """Of rows of the map, the windows of the blocks that lie inside."""
        (source, far, out, share, rows, begin, start, stop), (W, PW, stride_h, pitch), p = places, sizes, numbers[3]
        if far == 0 and stop - start <= FEW * L:
            for ow in range(stop - L, start - 1, -L):
                left = ow * S - PW
                for r in range(rows):
                    store_each(states, place(r, pitch) - begin + ow, inside(x, source + r * stride_h, left, p))
        else:
            for r in range(rows):
                row, line = source + r * stride_h, place(r, pitch) - begin
                if not looks:
                    ask(x, row + far, W if far > 0 else 0)
                ask_y(y, out + r * share, share)
                if saves:
                    ask_kept(kept, out + r * share, share)
                for ow in range(start, stop, L):
                    store_each(states, line + ow, inside(x, row, ow * S - PW, p))

    @jitable
    def windows_at_sides(states, x, first_w, places, sizes, numbers):
        """The other blocks, and those of rows from ``safe`` on."""
        (source, rows, safe, begin, start, stop, end), (W, PW, stride_h, pitch), (_, _, fill, p) = places, sizes, numbers
        for ow in range(begin + (end - 1 - begin) // L * L, begin - 1, -L):
            left, tap = ow * S - PW, load(first_w, ow, L)
            for r in range(safe if start <= ow < stop else 0, rows):
                state = bounded(start_of(splat(real(0), L), tap), x, source + r * stride_h, left, 0, W, fill, p)
                store_each(states, place(r, pitch) - begin + ow, state)

    @jitable
    def joined(state, i, args):
        """With the window's next row."""
        states, at, places, p = args
        return merge(state, moved(load_each(states, places[i + 1] + at, L), (i + 1) * KW), p)

    @jitable
    def outputs(states, x, y, kept, counts_h, counts_w, places, line, sizes, numbers):
        """Of the windows of rows, the outputs: as one row where rows follow each other; -> whether all sums are finite."""
        (row, next_x, wide, out, rows, begin, length), (OW, pitch), (count, size, _, p) = places, sizes, numbers
        odd = between(0, 1, 0, 0, L)
        for i in range(rows):
            lines, per_row = places_of(line + i * SH, pitch), count if even else count * splat(counts_h[row + i], L)
            here = out + i * OW + begin
            for at in range(0, length, L):
                if wide > 0:
                    ask(x, next_x + (i * OW + at) * wide, L * wide)
                state = unroll(joined, others, load_each(states, lines[0] + at, L), (states, at, lines, p))
                tail = between(at, 1, 0, length, L)
                if checks:
                    odd = odd | (tail & ~finite(state))
                value, choice = finish(state, per_row if even else per_row * load(counts_w, begin + at, L), size, p)
                write(y, kept, here + at, tail, at + L <= length, value, choice)
        return not any_lane(odd)

    @jitable
    def rim(states, pitch, y, kept, counts_h, counts_w, places, numbers):
        """A row of outputs whose windows lie in padding with some of their rows; -> whether all sums are finite."""
        (row, out, begin, end, top, first, last), (count, size, _, p) = places, numbers
        odd, per_row = between(0, 1, 0, 0, L), count if even else count * splat(counts_h[row], L)
        for ow in range(begin, end, L):
            state = moved(load_each(states, place(first, pitch) + ow - begin, L), (first - top) * KW)
            for r in range(first + 1, last):
                state = merge(state, moved(load_each(states, place(r, pitch) + ow - begin, L), (r - top) * KW), p)
            tail = between(ow, 1, 0, end, L)
            if checks:
                odd = odd | (tail & ~finite(state))
            value, choice = finish(state, per_row if even else per_row * load(counts_w, ow, L), size, p)
            write(y, kept, out + ow, tail, False, value, choice)
        return not any_lane(odd)

    @jitable
    def outputs_in_order(x, y, kept, first_w, counts_h, counts_w, places, sizes, numbers):
        """The outputs, tap by tap: where there is a NaN to be found, or sums that are not finite may be so for their order alone."""
        (source, row0, out, rows, top, lines, begin, end), (W, PW, stride_h, OW), (count, size, fill, p) = places, sizes, numbers
        for i in range(rows):
            per_row, first = count if even else count * splat(counts_h[row0 + i], L), top + i * SH
            for ow in range(begin, end, L):
                state = start_of(splat(real(0), L), load(first_w, ow, L) + splat(tapped(max(-first, 0) * KW), L))
                for r in range(max(first, 0), min(first + KH, lines)):
                    state = in_order(state, x, source + r * stride_h, ow * S - PW, (r - first) * KW, W, fill, p)
                value, choice = finish(state, per_row if even else per_row * load(counts_w, ow, L), size, p)
                write(y, kept, out + i * OW + ow, between(ow, 1, 0, end, L), False, value, choice)

    def kernel(args, start, stop):
        (x, y, kept), first_w, (counts_d, counts_h, counts_w), integers_of, p = given(args)
        C, H, W, OH, OW, stride_n, stride_c, stride_h, x_end, _, PH, PW, bands, band, block, far = integers_of
        states = scratch()
        count = splat(real(counts_d[0] * counts_h[0] * counts_w[0] if even else counts_d[0]), L)
        constants = count, splat(real(KH * KW), L), neutral(splat(real(0), L)), p
        near, far_end, reach = blocks_inside(W, OW, PW)
        plane, part = start // bands, start % bands
        n, c = plane // C, plane % C
        for _ in range(start, stop):
            source, last = n * stride_n + c * stride_c, min(OH, (part + 1) * band)
            for begin in range(0, OW, CHUNK):
                end = min(OW, begin + CHUNK)
                pitch, ends_at = end - begin, begin + (end - begin + L - 1) // L * L
                left_end = min(ends_at, max(begin, near))
                right = max(left_end, min(ends_at, far_end))
                for row in range(part * band, last, block):
                    rows, out = min(block, last - row), (plane * OH + row) * OW
                    low, high = max(0, row * SH - PH), min(H, (row + rows - 1) * SH - PH + KH)
                    here, lines, top = source + low * stride_h, high - low, row * SH - PH - low
                    safe = lines
                    if left_end == begin and right < ends_at:  # blocks at the right end run over the first ones
                        safe = 0
                    while safe > 0 and here + (safe - 1) * stride_h + reach > x_end:
                        safe -= 1
                    quick = True
                    if looks:
                        # Of rows far apart the gaps would be looked through too.
                        quick = stride_h <= 2 * W and not holds_nan(x, here, (lines - 1) * stride_h + W, x_end)
                    if quick:
                        asked = 0 if looks and left_end == right else far
                        share = 0 if asked == 0 or past else (rows * OW + lines - 1) // lines
                        places = here, asked, out, share, safe, begin, left_end, right
                        at_sides, sizes = (here, lines, safe, begin, left_end, right, end), (W, PW, stride_h, pitch)
                        windows_inside(states, x, y, kept, places, sizes, constants)
                        windows_at_sides(states, x, first_w, at_sides, sizes, constants)
                        # Rows of outputs all of whose windows' rows are there.
                        first, whole = 0, rows
                        while first < rows and top + first * SH < 0:
                            first += 1
                        while whole > first and top + (whole - 1) * SH + KH > lines:
                            whole -= 1
                        count_rows, length, wide = whole - first, pitch, SH * S if looks and asked > 0 else 0
                        if even and pitch == OW:
                            length, count_rows = count_rows * OW, 1
                        at_rows = row + first, here + lines * stride_h, wide, out + first * OW, count_rows, begin, length
                        quick = outputs(states, x, y, kept, counts_h, counts_w, at_rows, top + first * SH, (OW, pitch), constants)
                        for rest in range(first + rows - whole):
                            i = rest if rest < first else whole + rest - first
                            at = top + i * SH
                            here_y = row + i, out + i * OW, begin, end, at, max(at, 0), min(at + KH, lines)
                            quick = rim(states, pitch, y, kept, counts_h, counts_w, here_y, constants) and quick
                    if doubts and not quick:
                        block_of = here, row, out, rows, top, lines, begin, end
                        outputs_in_order(x, y, kept, first_w, counts_h, counts_w, block_of, (W, PW, stride_h, OW), constants)
            part, plane, n, c = _next(part, plane, n, c, bands, C)
        if past:
            settle()

    return kernel


@specialised
def forward_apart(kind, dtype, saved, saves, lanes, KH, KW, stride, past):
    """The same where no row of the map is a part of two rows of outputs, and all of a window's are there: the rows of a window are reduced
    one after the other.  PH is 0, and no rows wait."""
    A, L, S, real, tapped = arithmetic(kind), lanes, stride, number(dtype), index(dtype, saved)
    neutral, others, given = A.neutral, KH - 1, _arguments(dtype, saved, tapped, lanes, len(kind.parameters))
    made, ask, blocks_inside = carried(kind, real, tapped, L, saves), ahead.asking(dtype), _blocks(L, KW, S)
    finish, start_of, write = made.finish, made.start, writing(saved, saves, store_past if past else store)
    first_row, inside, bounded = _first_row(made, tapped, L, KW, S), _row(made, tapped, L, KW, S, False), _row(made, tapped, L, KW, S, True)

    @jitable
    def below(state, i, args):
        x, row, stride_h, left, W, fill, p = args
        kh = i + 1
        return inside(state, x, row + kh * stride_h, left, kh * KW, W, fill, p)

    @jitable
    def below_bounded(state, kh, args):
        x, row, stride_h, left, W, fill, p = args
        return bounded(state, x, row + kh * stride_h, left, kh * KW, W, fill, p)

    def kernel(args, start, stop):
        (x, y, kept), first_w, (counts_d, counts_h, counts_w), integers_of, p = given(args)
        C, _, W, OH, OW, stride_n, stride_c, stride_h, x_end, SH, _, PW, bands, band, _, far = integers_of
        fill, size, whole = neutral(splat(real(0), L)), splat(real(KH * KW), L), between(0, 1, 0, L, L)
        near, far_end, reach = blocks_inside(W, OW, PW)
        reach += (KH - 1) * stride_h
        masked = ((OW + L - 1) // L * L - 1) // OW  # rows at a job's end that must not be written over their ends
        plane, part = start // bands, start % bands
        n, c = plane // C, plane % C
        for _ in range(start, stop):
            first, last = part * band, min(OH, (part + 1) * band)
            source, out = n * stride_n + c * stride_c, plane * OH * OW
            safe = max(first, last - masked)
            while safe > first and source + (safe - 1) * SH * stride_h + reach > x_end:
                safe -= 1
            for oh in range(first, safe):
                row, count = source + oh * SH * stride_h, splat(real(counts_d[0] * counts_h[oh]), L)
                if far > 0:
                    for kh in range(KH):
                        ask(x, row + kh * stride_h + far, W)
                for ow in range(near, far_end, L):
                    left = ow * S - PW
                    state = unroll(below, others, first_row(x, row, left, p), (x, row, stride_h, left, W, fill, p))
                    value, choice = finish(state, count * load(counts_w, ow, L), size, p)
                    write(y, kept, out + oh * OW + ow, whole, True, value, choice)
            for ow in range(0, OW, L):
                left, tap, tail = ow * S - PW, load(first_w, ow, L), between(ow, 1, 0, OW, L)
                for oh in range(safe if near <= ow < far_end else first, last):
                    row = source + oh * SH * stride_h
                    state = unroll(below_bounded, KH, start_of(splat(real(0), L), tap), (x, row, stride_h, left, W, fill, p))
                    count = splat(real(counts_d[0] * counts_h[oh]), L) * load(counts_w, ow, L)
                    value, choice = finish(state, count, size, p)
                    write(y, kept, out + oh * OW + ow, tail, False, value, choice)
            part, plane, n, c = _next(part, plane, n, c, bands, C)
        if past:
            settle()

    return kernel


@specialised
def backward(kind, dtype, saved, lanes, KH, KW, SH, S, above, left, past):
    """The gradient of a selecting or linear reduction, gathered: a few rows of gx at a time, of the outputs whose windows reach them, which
    are copied between margins of zeros.

    Arguments: gx, gy, saved, two unused; counts of rows and columns; H, W, OH, OW, PH, PW; parts of a map, rows of one (a multiple of SH);
    the row stride between margins and the columns of the left one; the end of gy; how far ahead to ask.  An input's windows are known
    from (row + PH) % SH, and so are its column's: ``above`` and ``left`` are PH % SH and PW % S.
    """
    A, L, taps, real, residue = arithmetic(kind), lanes, KH * KW, number(dtype), number(saved)
    share, selects, copied, ask = A.share, A.reads_saved, copied_rows(lanes), ahead.asking(dtype)
    ask_saved = ahead.asking(saved)
    put, room = store_phases_past if past else store_phases, ROOM + lanes

    @jitable
    def tap_of(acc, k, args):
        array, chosen, at, pitch, remainder = args
        kh, kw = k // KW, k % KW
        if kh % SH == remainder:
            slot = (kw - left) % S
            here = at + (slot + left - kw) // S - (kh - remainder) // SH * pitch
            g = load(array, here, L)
            if selects:
                zero = splat(real(0), L)
                g = share(g, zero, zero, load(chosen, here, L), splat(residue(k), L), zero, zero, ())
            acc = with_phase(acc, slot, phase(acc, slot) + g)
        return acc

    @jitable
    def row_of(none, i, args):
        """The gradient of the row ``i`` rows below one whose number is a multiple of SH."""
        array, chosen, gx, line, end, target, W, at, pitch = args
        remainder = (i + above) % SH
        if line + i < end:
            row, corner = target + i * W, at + (i + above) // SH * pitch
            whole = W // (S * L) * L
            for q in range(0, whole, L):
                acc = unroll(tap_of, taps, repeat(splat(real(0), L), S), (array, chosen, corner + q, pitch, remainder))
                put(gx, row + q * S, acc)
            if whole * S < W:
                acc = unroll(tap_of, taps, repeat(splat(real(0), L), S), (array, chosen, corner + whole, pitch, remainder))
                store_phases_between(gx, row, whole * S, 0, W, acc)
        return none

    def kernel(args, start, stop):
        gx, gy, kept = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved)
        counts_h, counts_w = pointer(args, 5, real), pointer(args, 6, real)
        H, W, OH, OW, PH, PW, parts, rows, pitch, margin, y_end, far = integers(args, 7, 12)
        zero, nothing = splat(real(0), L), splat(residue(0), L)
        array, chosen = stacked(room, real), stacked(room, residue)
        for at in range(0, ROOM, L):
            store(array, at, zero)
            store(chosen, at, nothing)
        plane, part = start // parts, start % parts
        for _ in range(start, stop):
            first, end = part * rows, min(H, (part + 1) * rows)
            # Rows of outputs low .. high - 1 wait, those of them that there are: low may lie above the map, high below.
            low, high = (first + PH) // SH - (KH - 1) // SH, (end - 1 + PH) // SH + 1
            inside, below = max(low, 0), min(high, OH)
            for oh in range(low, high):
                if not inside <= oh < below:
                    for at in range(0, OW, L):
                        store(array, (oh - low) * pitch + margin + at, zero)
            source, corner, count = plane * OH + inside, (inside - low) * pitch + margin, below - inside
            copied(gy, source * OW, OW, y_end, array, corner, pitch, count, OW, zero)
            if selects:
                copied(kept, source * OW, OW, y_end, chosen, corner, pitch, count, OW, nothing)
            else:
                for i in range(count):
                    for ow in range(0, OW, L):
                        at, share_of = corner + i * pitch + ow, splat(counts_h[inside + i], L) * load(counts_w, ow, L)
                        store(array, at, share(load(array, at, L), zero, zero, zero, nothing, share_of, zero, ()))
            for line in range(first, end, SH):
                at = ((line + PH) // SH - low) * pitch + margin + PW // S
                if far > 0:
                    # What the next rows need.
                    ask(gy, (source + count + (line - first) // SH) * OW, OW)
                    if selects:
                        ask_saved(kept, (source + count + (line - first) // SH) * OW, OW)
                unroll(row_of, SH, 0, (array, chosen, gx, line, end, (plane * H + line) * W, W, at, pitch))
            part += 1
            if part == parts:
                part, plane = 0, plane + 1
        if past:
            settle()

    return kernel


@specialised
def backward_apart(kind, dtype, saved, lanes, KH, KW, SH, S, even, past):
    """The same of windows that share no element, without padding: what an output gives is written to its window, and nothing waits.

    us a call, one core (Zen 5), gathered and so: 2x2 s2 of 8x64x112x112 1,310 and 700, of 8x256x56x56 1,590 and 710.

    Arguments: gx, gy, saved, two unused; counts of slices, rows and columns; H, W, OH, OW; bands of a map, rows of windows of one, the last
    of which may have no window; how far ahead to ask.  ``even``, ``past``: as for ``forward``.
    """
    A, L, real, residue = arithmetic(kind), lanes, number(dtype), number(saved)
    share, selects, put = A.share, A.reads_saved, store_phases_past if past else store_phases
    ask, ask_saved, ask_gx = ahead.asking(dtype), ahead.asking(saved), ahead.asking(dtype, True)

    @jitable
    def column(acc, s, args):
        g, k, tap = args
        if s < KW:
            zero = splat(real(0), L)
            if selects:
                acc = with_phase(acc, s, share(g, zero, zero, k, splat(residue(tap + s), L), zero, zero, ()))
            else:
                acc = with_phase(acc, s, g)
        return acc

    @jitable
    def line(none, kh, args):
        g, k, gx, row, H, target, W, at, whole = args
        if row + kh < H:
            acc = repeat(splat(real(0), L), S)
            if kh < KH:
                acc = unroll(column, S, acc, (g, k, kh * KW))
            if whole:
                put(gx, target + kh * W + at * S, acc)
            else:
                store_phases_between(gx, target + kh * W, at * S, 0, W, acc)
        return none

    def kernel(args, start, stop):
        gx, gy, kept = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved)
        counts_d, counts_h, counts_w = pointer(args, 5, real), pointer(args, 6, real), pointer(args, 7, real)
        H, W, OH, OW, bands, band, far = integers(args, 8, 7)
        zero, nothing, lines, full = splat(real(0), L), splat(residue(0), L), (H + SH - 1) // SH, OW * S == W
        for job in range(start, stop):
            plane, part = job // bands, job % bands
            for oh in range(part * band, min(lines, (part + 1) * band)):
                out, target, inside = (plane * OH + oh) * OW, (plane * H + oh * SH) * W, OW if oh < OH else 0
                if far > 0:
                    ask(gy, out + far, OW)
                    if selects:
                        ask_saved(kept, out + far, OW)
                    if not past:
                        ask_gx(gx, target + far, SH * W)
                for q in range(0, W, S * L):
                    at = q // S
                    if full and inside >= L:
                        at = min(at, OW - L)  # some are written twice
                    whole, g, k = at + L <= inside and (at + L) * S <= W, zero, nothing
                    if whole:
                        g = load(gy, out + at, L)
                        if selects:
                            k = load(kept, out + at, L)
                    else:
                        there = between(at, 1, 0, max(inside, at), L)
                        g = load_masked(gy, out + at, there, zero)
                        if selects:
                            k = load_masked(kept, out + at, there, nothing)
                    if not selects:
                        count = counts_d[0] * counts_h[min(oh, OH - 1)]
                        here = splat(count * counts_w[0], L) if even else splat(count, L) * load(counts_w, at, L)
                        g = share(g, zero, zero, nothing, nothing, here, zero, ())
                    unroll(line, SH, 0, (g, k, gx, oh * SH, H, target, W, at, whole))
        if past:
            settle()

    return kernel
