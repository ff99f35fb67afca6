"""The register block of a convolution: a tile of ``rows`` x ``cols`` Vecs that stays in registers, as a tuple in row-major order.

14 rows of 2 registers are 28 of AVX-512's 32, and leave two for weights and one for what is broadcast: 28 fused multiply-adds for 16
loads.  The words below write a whole step out, where a loop over the rows would have LLVM carry 28 phis through it.
"""

import functools

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .simd import (
    I1,
    I32,
    I64,
    Vec,
    _at,
    _broadcast,
    _call_llvm,
    _constant,
    _deinterleave,
    _in_fours,
    _inside,
    _intrinsic_suffix,
    _load_masked,
    _load_whole,
    _mask_ir,
    _store_masked,
    _store_whole,
    _transposed,
    _vec_ir,
    number,
)


@intrinsic(prefer_literal=True)
def load_several(tyctx, x, offset, lanes, count):
    """``count`` Vecs that lie side by side from x[offset]."""
    vec = Vec(number(x.dtype), lanes.literal_value)
    result = types.UniTuple(vec, count.literal_value)

    def codegen(ctx, b, sig, args):
        found = [
            _load_whole(b, _at(b, args[0], b.add(args[1], ir.Constant(I64, c * vec.lanes))), vec, x.dtype) for c in range(result.count)
        ]
        return ctx.make_tuple(b, result, found)

    return result(x, types.int64, lanes, count), codegen


@intrinsic(prefer_literal=True)
def load_apart(tyctx, x, offset, step, lanes):
    """As many Vecs as they have lanes, the first from x[offset], each ``step`` further."""
    vec = Vec(number(x.dtype), lanes.literal_value)
    result = types.UniTuple(vec, vec.lanes)

    def codegen(ctx, b, sig, args):
        starts = [b.add(args[1], b.mul(args[2], ir.Constant(I64, i))) for i in range(vec.lanes)]
        return ctx.make_tuple(b, result, [_load_whole(b, _at(b, args[0], start), vec, x.dtype) for start in starts])

    return result(x, types.int64, types.int64, lanes), codegen


@intrinsic(prefer_literal=True)
def load_apart_masked(tyctx, x, offset, step, count, mask, fill):
    """``count`` Vecs, the first from x[offset], each ``step`` further; lanes that ``mask`` leaves out are ``fill``'s, and not read."""
    result = types.UniTuple(fill, count.literal_value)

    def codegen(ctx, b, sig, args):
        pointer, offset, step, _, mask, fill_value = args
        starts = [_at(b, pointer, b.add(offset, b.mul(step, ir.Constant(I64, i)))) for i in range(result.count)]
        return ctx.make_tuple(b, result, [_load_masked(b, start, fill, x.dtype, mask, fill_value) for start in starts])

    if number(x.dtype) == fill.dtype:
        return result(x, types.int64, types.int64, count, mask, fill), codegen


@intrinsic
def store_apart(tyctx, y, offset, step, vecs):
    """The inverse of ``load_apart``."""
    vec = vecs.dtype

    def codegen(ctx, b, sig, args):
        for i in range(vecs.count):
            target = _at(b, args[0], b.add(args[1], b.mul(args[2], ir.Constant(I64, i))))
            _store_whole(b, target, vec, y.dtype, b.extract_value(args[3], i))
        return ctx.get_dummy_value()

    if number(y.dtype) == vec.dtype:
        return types.void(y, types.int64, types.int64, vecs), codegen


@intrinsic(prefer_literal=True)
def tile_of(tyctx, rows, vecs):
    """``rows`` rows, each the tuple ``vecs``."""
    result = types.UniTuple(vecs.dtype, rows.literal_value * vecs.count)

    def codegen(ctx, b, sig, args):
        row = [b.extract_value(args[1], c) for c in range(vecs.count)]
        return ctx.make_tuple(b, result, row * rows.literal_value)

    return result(rows, vecs), codegen


@intrinsic(prefer_literal=True)
def tile_of_each(tyctx, x, offset, rows, cols, lanes):
    """Every lane of row r is x[offset + r]."""
    vec = Vec(number(x.dtype), lanes.literal_value)
    result = types.UniTuple(vec, rows.literal_value * cols.literal_value)

    def codegen(ctx, b, sig, args):
        found = []
        for r in range(rows.literal_value):
            one = b.load(_at(b, args[0], b.add(args[1], ir.Constant(I64, r))))
            found += [_broadcast(b, one, vec.lanes)] * cols.literal_value
        return ctx.make_tuple(b, result, found)

    return result(x, types.int64, rows, cols, lanes), codegen


@intrinsic(prefer_literal=True)
def add_outer(tyctx, tile, x, origins, at, step, w, w_offset, cols):
    """tile[r, c] += x_r * w[w_offset + c * lanes : w_offset + (c + 1) * lanes], each product fused with its sum.

    x_r is x[origin + at + i * step] for the i-th row of an origin: ``origins``, a tuple of offsets, share the rows evenly.
    """
    vec, n, stride = tile.dtype, cols.literal_value, step.literal_value
    rows = tile.count // n // origins.count

    def codegen(ctx, b, sig, args):
        value, x_pointer, starts, at, _, w_pointer, w_offset, _ = args
        bases = [_at(b, _at(b, x_pointer, b.extract_value(starts, piece)), at) for piece in range(origins.count)]
        return _outer(b, vec, value, bases, rows, range(rows), stride, _at(b, w_pointer, w_offset), n)

    if x.dtype == w.dtype == vec.dtype:
        return tile(tile, x, origins, types.int64, step, w, types.int64, cols), codegen


def _outer(b, vec, value, bases, rows, among, stride, w, cols):
    """A tile, ``rows`` for each of ``bases``, with the products of the rows ``among`` them."""
    fma = functools.partial(_call_llvm, b, f"llvm.fma.{_intrinsic_suffix(vec)}", _vec_ir(vec))
    weights = [_load_whole(b, _at(b, w, ir.Constant(I64, c * vec.lanes)), vec, vec.dtype) for c in range(cols)]
    for piece, base in enumerate(bases):
        for r in among:
            one = _broadcast(b, b.load(_at(b, base, ir.Constant(I64, r * stride))), vec.lanes)
            for c, weight in enumerate(weights):
                k = (piece * rows + r) * cols + c
                value = b.insert_value(value, fma([one, weight, b.extract_value(value, k)]), k)
    return value


@intrinsic(prefer_literal=True)
def add_taps(tyctx, tile, x, origins, at, steps, first, kept, step, w, w_offset, cols):
    """``add_outer`` of several taps whose weights follow each other: the k-th reads x from ``at + steps[first + k]`` on, and of each
    origin's rows those from kept[2 * k] to before kept[2 * k + 1] are added to, which are literal: the others' are in the padding."""
    vec, n, stride = tile.dtype, cols.literal_value, step.literal_value
    rows = tile.count // n // origins.count
    spans = [span.literal_value for span in kept]

    def codegen(ctx, b, sig, args):
        value, x_pointer, starts, at, steps, first, _, _, w_pointer, w_offset, _ = args
        origin = [_at(b, _at(b, x_pointer, b.extract_value(starts, piece)), at) for piece in range(origins.count)]
        steps, w_pointer = _at(b, steps, first), _at(b, w_pointer, w_offset)
        for k, among in enumerate(map(range, spans[::2], spans[1::2])):
            tap = b.load(_at(b, steps, ir.Constant(I64, k)))
            weights = _at(b, w_pointer, ir.Constant(I64, k * n * vec.lanes))
            value = _outer(b, vec, value, [_at(b, base, tap) for base in origin], rows, among, stride, weights, n)
        return value

    if x.dtype == w.dtype == vec.dtype and steps.dtype == types.int64:
        return tile(tile, x, origins, types.int64, steps, types.int64, kept, step, w, types.int64, cols), codegen


@intrinsic
def put_tile(tyctx, memory, offset, tile):
    """A tile to memory[offset], as it lies in registers."""

    def codegen(ctx, b, sig, args):
        start = _at(b, *args[:2])
        for k in range(tile.count):
            target = _at(b, start, ir.Constant(I64, k * tile.dtype.lanes))
            _store_whole(b, target, tile.dtype, tile.dtype.dtype, b.extract_value(args[2], k))
        return ctx.get_dummy_value()

    if memory.dtype == tile.dtype.dtype:
        return types.void(memory, types.int64, tile), codegen


@intrinsic
def add_put(tyctx, tile, memory, offset):
    """tile + what ``put_tile`` put there."""
    vec = tile.dtype

    def codegen(ctx, b, sig, args):
        start = _at(b, *args[1:])
        there = (_load_whole(b, _at(b, start, ir.Constant(I64, k * vec.lanes)), vec, vec.dtype) for k in range(tile.count))
        return ctx.make_tuple(b, tile, [b.fadd(b.extract_value(args[0], k), found) for k, found in enumerate(there)])

    if memory.dtype == vec.dtype:
        return tile(tile, memory, types.int64), codegen


@intrinsic
def add_tile(tyctx, tile, other):
    def codegen(ctx, b, sig, args):
        pairs = ([b.extract_value(value, k) for value in args] for k in range(tile.count))
        return ctx.make_tuple(b, tile, [b.fadd(*pair) for pair in pairs])

    if tile == other:
        return tile(tile, other), codegen


@intrinsic(prefer_literal=True)
def add_scaled(tyctx, tile, x, at, step, weight, cols):
    """tile[r, c] += x[at + r * step + c * lanes : at + r * step + (c + 1) * lanes] * weight, each product fused with its sum."""
    vec, n = tile.dtype, cols.literal_value

    def codegen(ctx, b, sig, args):
        value, pointer, at, step, weight, _ = args
        for k in range(tile.count):
            offset = b.add(at, b.add(b.mul(step, ir.Constant(I64, k // n)), ir.Constant(I64, k % n * vec.lanes)))
            here = _load_whole(b, _at(b, pointer, offset), vec, x.dtype)
            found = _call_llvm(b, f"llvm.fma.{_intrinsic_suffix(vec)}", _vec_ir(vec), [here, weight, b.extract_value(value, k)])
            value = b.insert_value(value, found, k)
        return value

    if number(x.dtype) == vec.dtype == weight.dtype:
        return tile(tile, x, types.int64, types.int64, weight, cols), codegen


NEAR = 8
"""Pixels that one address reaches: x86 multiplies what it adds to it by 1, 2, 4 and 8."""


def _opaque(b, pointer):
    """The same pointer, of which LLVM does not know what it was made of: where it does, it keeps each sum of the parts that a loop does not
    change, more than there are registers (us, a batch of 8, depthwise 3x3 with steps of 2: 144x56x56 1,070 and so 400, 192x28x28 150 and
    105)."""
    return b.asm(ir.FunctionType(pointer.type, [pointer.type]), "", "=r,0", [pointer], False)


@intrinsic(prefer_literal=True)
def add_pixels(tyctx, tile, x, at, pixel, w, w_at, along, stride, apart, kept, masking):
    """tile[r] += x[at + (r * stride + k * apart) * pixel + lane] * w[w_at + k * lanes + lane] for each k below ``along``, each product
    fused with its sum; ``along``, ``stride`` and ``apart`` are literal.  A register of x, ``pixel`` elements from the one before, is loaded
    once.  ``kept``: the first and the end of those that are in the map, literal: the others are left out.  ``masking``: (), or
    (mask, fill): lanes that ``mask`` leaves out are ``fill``'s, and not read."""
    vec = tile.dtype
    K, step, dilation = (s.literal_value for s in (along, stride, apart))
    among = range(*(place.literal_value for place in kept))

    def codegen(ctx, b, sig, args):
        value, pointer, at, pixel, w_pointer, w_at, *_, given = args
        weights = _at(b, w_pointer, w_at)
        fma = functools.partial(_call_llvm, b, f"llvm.fma.{_intrinsic_suffix(vec)}", _vec_ir(vec))
        taps = [_load_whole(b, _at(b, weights, ir.Constant(I64, k * vec.lanes)), vec, w.dtype) for k in range(K)]
        found = [b.extract_value(value, r) for r in range(tile.count)]
        masks = [b.extract_value(given, i) for i in range(len(masking))]
        for here, uses in _pixels(b, vec, x.dtype, _at(b, pointer, at), pixel, tile.count, K, step, dilation, among, masks):
            for r, k in uses:
                found[r] = fma([here, taps[k], found[r]])
        return ctx.make_tuple(b, tile, found)

    if number(x.dtype) == vec.dtype == w.dtype:
        return tile(tile, x, types.int64, types.int64, w, types.int64, along, stride, apart, kept, masking), codegen


def _pixels(b, vec, storage, base, pixel, rows, along, stride, apart, among, masks):
    """(a register, the (row, tap) pairs that read it) of each of those ``among`` the ones that ``rows`` of a tile read."""
    for i in among:
        if i % NEAR == 0 or i == among[0]:
            near = _opaque(b, _at(b, base, b.mul(pixel, ir.Constant(I64, i // NEAR * NEAR))))
        uses = [(r, k) for k in range(along) for r in range(rows) if r * stride + k * apart == i]
        if uses:
            place = _at(b, near, b.mul(pixel, ir.Constant(I64, i % NEAR)))
            yield _load_masked(b, place, vec, storage, *masks) if masks else _load_whole(b, place, vec, storage), uses


@intrinsic(prefer_literal=True)
def add_pixel_products(tyctx, sums, x, at, down, pixel, given, along, stride, apart, kept, top, by, height, masking):
    """sums[h * along + k] += x[at + h * down + (r * stride + k * apart) * pixel + lane] * given[r] for each r: ``add_pixels``'s gradient by
    the weights, of several rows, each in the map where 0 <= top + h * by < height."""
    vec = sums.dtype
    K, step, dilation = (s.literal_value for s in (along, stride, apart))
    among = range(*(column.literal_value for column in kept))

    def codegen(ctx, b, sig, args):
        value, pointer, at, down, pixel, given, *_, top, by, height, masking_ = args
        masks = [b.extract_value(masking_, i) for i in range(len(masking))]
        fma = functools.partial(_call_llvm, b, f"llvm.fma.{_intrinsic_suffix(vec)}", _vec_ir(vec))
        rows = sig.args[5].count
        totals = [b.extract_value(value, k) for k in range(sums.count)]
        for h in range(sums.count // K):
            found, before = list(totals), b.block
            # As an unsigned number a row above the map is far below it.
            with b.if_then(b.icmp_unsigned("<", b.add(top, b.mul(by, ir.Constant(I64, h))), height), likely=True):
                base = _at(b, pointer, b.add(at, b.mul(down, ir.Constant(I64, h))))
                for here, uses in _pixels(b, vec, x.dtype, base, pixel, rows, K, step, dilation, among, masks):
                    for r, k in uses:
                        found[h * K + k] = fma([here, b.extract_value(given, r), found[h * K + k]])
                there = b.block
            totals = [_either(b, (old, before), (new, there)) for old, new in zip(totals, found, strict=True)]
        return ctx.make_tuple(b, sums, totals)

    if number(x.dtype) == vec.dtype and given.dtype == vec:
        place = [types.int64] * 3
        return sums(sums, x, *place, given, along, stride, apart, kept, *place, masking), codegen


def _either(b, *cases):
    """The value of the block that control came from, of (value, block) pairs; at the start of a block."""
    if len({id(value) for value, _ in cases}) == 1:
        return cases[0][0]
    found = b.phi(cases[0][0].type)
    for case in cases:
        found.add_incoming(*case)
    return found


@intrinsic(prefer_literal=True)
def add_window(tyctx, tile, x, at, apart, weights, along, stride, between):
    """tile[r] += x[at + (stride[0] * r + h) * apart + stride[1] * lane + w] * weights[h * along + w] for each h and w, each product fused
    with its sum; ``along`` and ``stride`` are literal.  Each row of x, ``apart`` elements from the last, is loaded once for all rows of the
    tile.  ``between``: () or (top, H, left, W), where x[at] lies in a map, outside of which x is zero and rows are left out."""
    vec, K, (down, across) = tile.dtype, along.literal_value, (s.literal_value for s in stride)
    high = weights.count // K

    def codegen(ctx, b, sig, args):
        value, pointer, at, apart, weight, _, _, place = args

        def added(totals, row, taps):
            for r in range(tile.count):
                h = row - r * down
                for w in range(K if 0 <= h < high else 0):
                    product = [taps[w], b.extract_value(weight, h * K + w), totals[r]]
                    totals[r] = _call_llvm(b, f"llvm.fma.{_intrinsic_suffix(vec)}", _vec_ir(vec), product)

        totals = [b.extract_value(value, r) for r in range(tile.count)]
        inside = [b.extract_value(place, i) for i in range(len(between))]
        rows = (tile.count - 1) * down + high
        return ctx.make_tuple(b, tile, _over_rows(b, totals, rows, added, vec, x.dtype, pointer, at, apart, K, across, inside))

    if number(x.dtype) == vec.dtype == weights.dtype.dtype:
        return tile(tile, x, types.int64, types.int64, weights, along, stride, between), codegen


def _over_rows(b, totals, rows, added, vec, storage, pointer, at, apart, along, across, inside):
    """``totals`` after ``added(totals, row, taps)`` of each row of x: the taps of a row are ``along`` registers, the w-th of x[across *
    lane + w].  ``inside``: (top, H, left, W) or none, as in ``add_window``."""
    zero, zeros = ir.Constant(I64, 0), ir.Constant(_vec_ir(vec), None)
    # Every register that a row needs, the phases of a step side by side.
    firsts = [i * across + k * vec.lanes for i in range(-(-along // across)) for k in range(across)]
    if inside:
        top, height, left, width = inside
        masks = [_inside(b, b.add(left, ir.Constant(I64, first)), zero, width, vec.lanes) for first in firsts]

    def after(row):
        base = _at(b, pointer, b.add(at, b.mul(apart, ir.Constant(I64, row))))
        wholes = [_at(b, base, ir.Constant(I64, first)) for first in firsts]
        if inside:
            wholes = [_load_masked(b, whole, vec, storage, mask, zeros) for whole, mask in zip(wholes, masks, strict=True)]
        else:
            wholes = [_load_whole(b, whole, vec, storage) for whole in wholes]
        found = list(totals)
        added(found, row, [tap for i in range(0, len(wholes), across) for tap in _deinterleave(b, wholes[i : i + across], vec.lanes)])
        return found

    for row in range(rows):
        if not inside:
            totals = after(row)
            continue
        before = b.block
        # As an unsigned number a line above the map is far below it.
        with b.if_then(b.icmp_unsigned("<", b.add(top, ir.Constant(I64, row)), height), likely=True):
            found, there = after(row), b.block
        totals = [_either(b, (old, before), (new, there)) for old, new in zip(totals, found, strict=True)]
    return totals


@intrinsic(prefer_literal=True)
def add_products(tyctx, sums, x, at, apart, rows, along, stride, between):
    """sums[h * along + w] += x[at + (stride[0] * r + h) * apart + stride[1] * lane + w] * rows[r] for each r: ``add_window``'s gradient by
    the weights, by lanes.  ``between``: () or (top, H, left, W, count), of which lanes below ``count`` are added to."""
    vec, K, (down, across) = sums.dtype, along.literal_value, (s.literal_value for s in stride)
    high = sums.count // K

    def codegen(ctx, b, sig, args):
        value, pointer, at, apart, given, _, _, place = args
        inside = [b.extract_value(place, i) for i in range(len(between))]
        if inside:
            *inside, count = inside
            some = _inside(b, ir.Constant(I64, 0), ir.Constant(I64, 0), count, vec.lanes)

        def added(totals, row, taps):
            for r in range(rows.count):
                h = row - r * down
                for k, tap in enumerate(taps[:K] if 0 <= h < high else (), h * K):
                    product = [tap, b.extract_value(given, r), totals[k]]
                    total = _call_llvm(b, f"llvm.fma.{_intrinsic_suffix(vec)}", _vec_ir(vec), product)
                    # Not zero times what x may have there, which may be infinite.
                    totals[k] = b.select(some, total, totals[k]) if inside else total

        totals, lines = [b.extract_value(value, k) for k in range(sums.count)], (rows.count - 1) * down + high
        return ctx.make_tuple(b, sums, _over_rows(b, totals, lines, added, vec, x.dtype, pointer, at, apart, K, across, inside))

    if number(x.dtype) == vec.dtype == rows.dtype.dtype:
        return sums(sums, x, types.int64, types.int64, rows, along, stride, between), codegen


@intrinsic
def add_dots(tyctx, tile, w, rows, w_at, x, cols, x_at, inside):
    """tile[r, c] += w[rows[r] + w_at + lane] * x[cols[c] + x_at + lane], each product fused with its sum; ``rows`` and ``cols`` are tuples
    of offsets.  ``inside``: (), or (mask, zero): other lanes are not read."""
    vec, n = tile.dtype, cols.count

    def codegen(ctx, b, sig, args):
        value, w_pointer, rows_, w_at, x_pointer, cols_, x_at, masking = args

        def vecs(pointer, storage, starts, count, at):
            for k in range(count):
                start = _at(b, _at(b, pointer, b.extract_value(starts, k)), at)
                if len(inside):
                    yield _load_masked(b, start, vec, storage, *(b.extract_value(masking, i) for i in range(2)))
                else:
                    yield _load_whole(b, start, vec, storage)

        across = list(vecs(x_pointer, x.dtype, cols_, n, x_at))
        for r, down in enumerate(vecs(w_pointer, w.dtype, rows_, rows.count, w_at)):
            for c, found in enumerate(across):
                k = r * n + c
                product = [down, found, b.extract_value(value, k)]
                value = b.insert_value(value, _call_llvm(b, f"llvm.fma.{_intrinsic_suffix(vec)}", _vec_ir(vec), product), k)
        return value

    if number(x.dtype) == number(w.dtype) == vec.dtype and tile.count == rows.count * n:
        return tile(tile, w, rows, types.int64, x, cols, types.int64, inside), codegen


def _totals(b, vecs, lanes):
    """Lane i: the sum of the lanes of the i-th of ``lanes`` vectors.  30 shuffles and 15 additions for 16, where one after the other would
    take 64 of each."""
    if lanes == 2:
        return b.fadd(*(b.shuffle_vector(*vecs, _constant(2, I32, picks)) for picks in ((0, 2), (1, 3))))

    def added(pick, pairs, first, second):
        return [b.fadd(pick(b, *pair, first, lanes), pick(b, *pair, second, lanes)) for pair in zip(pairs[::2], pairs[1::2], strict=True)]

    vecs = added(_in_fours, vecs, (0, 4, 1, 5), (2, 6, 3, 7))
    vecs = added(_in_fours, vecs, (0, 1, 4, 5), (2, 3, 6, 7))
    while len(vecs) > 1:  # each has what is left of four sums in each of its blocks
        vecs = added(_blocks, vecs, range(0, lanes // 2, 2), range(1, lanes // 2, 2))
    return vecs[0]


@intrinsic
def totals(tyctx, tile):
    """The sums of the lanes of each Vec of a tile: as many to a Vec as it has lanes."""
    vec = tile.dtype
    result = types.UniTuple(vec, tile.count // vec.lanes)

    def codegen(ctx, b, sig, args):
        vecs = [b.extract_value(args[0], k) for k in range(tile.count)]
        return ctx.make_tuple(b, result, [_totals(b, vecs[k : k + vec.lanes], vec.lanes) for k in range(0, tile.count, vec.lanes)])

    if tile.count % vec.lanes == 0:
        return result(tile), codegen


@intrinsic
def each(tyctx, tile, body, args):
    """``body(vec, args)`` of each Vec of a tile."""
    call = body.get_call_type(tyctx, (tile.dtype, args), {})

    def codegen(ctx, b, sig, values):
        function = ctx.get_function(body, call)
        found = [function(b, (b.extract_value(values[0], k), values[2])) for k in range(tile.count)]
        return ctx.make_tuple(b, tile, found)

    return tile(tile, body, args), codegen


def _blocks(b, x, y, picks, lanes):
    """Blocks of four lanes of two vectors; ``picks`` counts on from x's into y's."""
    return b.shuffle_vector(x, y, _constant(lanes, I32, [4 * p + i for p in picks for i in range(4)]))


def _columns(b, rows, lanes):
    """``lanes`` vectors -> the columns of the matrix of which they are the rows.

    First within blocks of four lanes, then the blocks, by instructions that take two from either register: 64 for 16 x 16.
    """
    if lanes == 2:
        return [b.shuffle_vector(*rows, _constant(2, I32, picks)) for picks in ((0, 2), (1, 3))]
    groups = [_transposed(b, rows[i : i + 4], lanes) for i in range(0, lanes, 4)]
    if lanes == 4:
        return groups[0]
    if lanes == 8:
        return [_blocks(b, *pair, picks, 8) for picks in ((0, 2), (1, 3)) for pair in zip(*groups, strict=True)]
    found = []
    for half in ((0, 1, 4, 5), (2, 3, 6, 7)):
        low, high = ([_blocks(b, *pair, half, 16) for pair in zip(*groups[i : i + 2], strict=True)] for i in (0, 2))
        for picks in ((0, 2, 4, 6), (1, 3, 5, 7)):
            found += [_blocks(b, *pair, picks, 16) for pair in zip(low, high, strict=True)]
    return found


@intrinsic
def columns(tyctx, vecs):
    """As many Vecs as they have lanes, the rows of a matrix -> its columns."""

    def codegen(ctx, b, sig, args):
        return ctx.make_tuple(b, vecs, _columns(b, [b.extract_value(args[0], r) for r in range(vecs.count)], vecs.dtype.lanes))

    if vecs.count == vecs.dtype.lanes:
        return vecs(vecs), codegen


def _store_apart(b, pointer, stride, vec, storage, mask, value):
    """Lane i to pointer[i * stride] where mask holds: registers of lanes so far apart, stored under masks, as a scatter takes a cycle and
    more a lane: the gradient by the input of 3x3 of 512 channels of 14x14 with steps of 2, a batch of 8, 11.0 ms so and 12.6."""
    lanes, nothing = vec.lanes, ir.Constant(_mask_ir(vec.lanes), None)
    for first in sorted({lane * stride // lanes * lanes for lane in range(lanes)}):
        picks = _constant(lanes, I32, [at // stride if at % stride == 0 else lanes for at in range(first, first + lanes)])
        apart, here = b.shuffle_vector(value, value, picks), b.shuffle_vector(mask, nothing, picks)
        _store_masked(b, _at(b, pointer, ir.Constant(I64, first)), vec, storage, here, apart)


@intrinsic(prefer_literal=True)
def store_columns(tyctx, tile, cols, y, origins, at, step, pixel, count):
    """y[origin + at + column * step + i * pixel] = lane of tile[r, c], where column = c * lanes + lane is below ``count`` and r is the i-th
    row of its origin, which share the rows as in ``add_outer``; pixel is literal."""
    vec, n, p = tile.dtype, cols.literal_value, pixel.literal_value
    lanes, rows, total = vec.lanes, tile.count // n // origins.count, tile.count // n

    def put(b, pointer, first, height, column):
        """Lanes 0 .. height - 1 are rows first .. of the tile."""
        for piece, start in enumerate(pointer):
            low, high = max(first, piece * rows), min(first + height, (piece + 1) * rows)
            if low >= high:
                continue
            target = _at(b, start, ir.Constant(I64, (first - piece * rows) * p))
            mask = ir.Constant(ir.VectorType(I1, lanes), [low - first <= lane < high - first for lane in range(lanes)])
            if p == 1 and high - low == lanes:
                _store_whole(b, target, vec, y.dtype, column)
            elif p == 1:
                _store_masked(b, target, vec, y.dtype, mask, column)
            else:
                _store_apart(b, target, p, vec, y.dtype, mask, column)

    def codegen(ctx, b, sig, args):
        value, _, y_pointer, starts, at, step, _, count = args
        pieces = [_at(b, _at(b, y_pointer, b.extract_value(starts, i)), at) for i in range(origins.count)]
        undefined = ir.Constant(_vec_ir(vec), ir.Undefined)
        for c in range(n):
            for first in range(0, total, lanes):
                height = min(lanes, total - first)
                part = [b.extract_value(value, (first + r) * n + c) for r in range(height)]
                for lane, column in enumerate(_columns(b, part + [undefined] * (lanes - height), lanes)):
                    k = ir.Constant(I64, c * lanes + lane)
                    with b.if_then(b.icmp_signed("<", k, count), likely=True):
                        put(b, [_at(b, piece, b.mul(step, k)) for piece in pieces], first, height, column)
        return ctx.get_dummy_value()

    if number(y.dtype) == vec.dtype:
        return types.void(tile, cols, y, origins, types.int64, types.int64, pixel, types.int64), codegen


@intrinsic(prefer_literal=True)
def store_tile(tyctx, tile, cols, y, origins, at, step, pixel, height, count):
    """y[origin + at + i * step + column * pixel] = lane of tile[r, c], where column = c * lanes + lane is below ``count`` and r is the i-th
    row of its origin; of the first ``height`` rows; pixel is literal."""
    vec, n, p = tile.dtype, cols.literal_value, pixel.literal_value
    lanes, total = vec.lanes, tile.count // n
    rows = total // origins.count

    def codegen(ctx, b, sig, args):
        value, _, y_pointer, starts, at, step, _, height, count = args
        masks = [_inside(b, ir.Constant(I64, c * lanes), ir.Constant(I64, 0), count, lanes) for c in range(n)]

        def put(r, whole):
            with b.if_then(b.icmp_signed("<", ir.Constant(I64, r), height), likely=True):
                start = _at(b, _at(b, y_pointer, b.extract_value(starts, r // rows)), at)
                start = _at(b, start, b.mul(step, ir.Constant(I64, r % rows)))
                for c in range(n):
                    target, found = _at(b, start, ir.Constant(I64, c * lanes * p)), b.extract_value(value, r * n + c)
                    if p > 1:
                        _store_apart(b, target, p, vec, y.dtype, masks[c], found)
                    elif whole:
                        _store_whole(b, target, vec, y.dtype, found)
                    else:
                        _store_masked(b, target, vec, y.dtype, masks[c], found)

        with b.if_else(b.icmp_signed(">=", count, ir.Constant(I64, n * lanes)), likely=True) as cases:
            for case, whole in zip(cases, (True, False), strict=True):
                with case:
                    for r in range(total):
                        put(r, whole)
        return ctx.get_dummy_value()

    if number(y.dtype) == vec.dtype:
        return types.void(tile, cols, y, origins, types.int64, types.int64, pixel, types.int64, types.int64), codegen
