"""Explicit SIMD values inside Numba CPU kernels.

Two Numba types that live in LLVM registers:

* ``Vec(dtype, lanes)`` - ``lanes`` numbers of one dtype (LLVM ``<16 x float>``)
* ``Mask(lanes)``       - ``lanes`` booleans (LLVM ``<16 x i1>``)

``+ - * / & | ^ << >> ~ -`` and the six comparisons work lane by lane on two of a kind; ``where`` selects.  Memory is a flat
pointer (``types.CPointer``) and an int64 element offset.  Lanes and strides that shape the generated code are literal
integers: constants of the factory around the kernel.  Any number of lanes compiles on any CPU (LLVM splits what is wider
than a register and pads what is narrower); ``native_lanes`` says what fits one register here.

A stride-s access is s whole loads and s shuffles that give all s *phases* at once (phase p: elements p, p + s, ...), so that
every element is loaded once however many taps of a window read it: a strided 31-element load ran at half the speed.

A bounded access (``*_between``) touches only elements whose position lies in [low, high); masked-off lanes do not
fault, so an edge needs no scalar loop.
"""

import functools
import operator
import os

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.typing import signature
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, models, register_model

LINE = 64
"""Bytes of a cache line."""

I1, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 16, 32, 64))


class Storage(types.Number):
    """A 16-bit float in memory; in registers it is a float32 (``number``)."""

    bitwidth = 16


float16, bfloat16 = Storage("float16"), Storage("bfloat16")


def number(dtype):
    """The dtype that numbers stored as ``dtype`` are computed in."""
    return types.float32 if isinstance(dtype, Storage) else dtype


class Vec(types.Type):
    """``lanes`` numbers of ``dtype`` in a register."""

    def __init__(self, dtype, lanes):
        self.dtype, self.lanes = dtype, lanes
        super().__init__(name=f"Vec({dtype},{lanes})")


class Mask(types.Type):
    """``lanes`` booleans: what comparing two Vecs gives."""

    def __init__(self, lanes):
        self.lanes = lanes
        super().__init__(name=f"Mask({lanes})")


@functools.cache
def register_bytes():
    """Bytes of one SIMD register of this CPU: 64 (AVX-512), 32 (AVX2) or 16 (NEON, SSE).

    ``FASTPOOL_REGISTER_BYTES`` overrides it, for tests of narrower code on a wider machine.
    """
    forced = os.environ.get("FASTPOOL_REGISTER_BYTES")
    if forced:
        return int(forced)
    features = llvm.get_host_cpu_features()
    if all(features.get(name) for name in ("avx512f", "avx512bw", "avx512dq", "avx512vl")):
        return 64
    return 32 if features.get("avx2") else 16


def native_lanes(dtype):
    """How many numbers stored as a Numba dtype fit one register of this CPU once they are loaded."""
    return register_bytes() * 8 // number(dtype).bitwidth


_X86 = llvm.get_process_triple().startswith("x86_64")


# Types in LLVM


def _scalar_ir(dtype):
    if dtype == types.float32:
        return ir.FloatType()
    if dtype == types.float64:
        return ir.DoubleType()
    return ir.IntType(dtype.bitwidth)


def _vec_ir(vec):
    return ir.VectorType(_scalar_ir(vec.dtype), vec.lanes)


def _mask_ir(lanes):
    return ir.VectorType(I1, lanes)


@register_model(Storage)
class _StorageModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, I16)


@register_model(Vec)
class _VecModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _vec_ir(fe_type))


@register_model(Mask)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _mask_ir(fe_type.lanes))


# Pieces of generated code


def _is_float(vec):
    return isinstance(vec.dtype, types.Float)


def _bytes(vec):
    return vec.dtype.bitwidth // 8


def _intrinsic_suffix(vec):
    return f"v{vec.lanes}{'f' if _is_float(vec) else 'i'}{vec.dtype.bitwidth}"


def _constant(lanes, kind, values):
    return ir.Constant(ir.VectorType(kind, lanes), list(values))


def _broadcast(b, scalar, lanes):
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    return b.shuffle_vector(b.insert_element(undefined, scalar, ir.Constant(I32, 0)), undefined, _constant(lanes, I32, [0] * lanes))


def _call_llvm(b, name, result, args):
    function = b.module.globals.get(name)
    if function is None:
        function = ir.Function(b.module, ir.FunctionType(result, [a.type for a in args]), name)
    return b.call(function, args)


def _at(b, pointer, offset):
    return b.gep(pointer, [offset])


def _stored(vec, storage):
    """The Vec as it lies in memory: of 16-bit integers for 16-bit floats."""
    return Vec(types.uint16, vec.lanes) if isinstance(storage, Storage) else vec


def _widened(b, value, storage, vec):
    """What was loaded, as numbers."""
    if storage == bfloat16:
        wide = b.zext(value, ir.VectorType(I32, vec.lanes))
        return b.bitcast(b.shl(wide, _constant(vec.lanes, I32, [16] * vec.lanes)), _vec_ir(vec))
    if storage == float16:
        return b.fpext(b.bitcast(value, ir.VectorType(ir.HalfType(), vec.lanes)), _vec_ir(vec))
    return value


def _narrowed(b, value, storage, vec):
    """Numbers as they are stored: rounded to nearest even; a NaN stays one."""
    raw = ir.VectorType(I16, vec.lanes)
    if storage == bfloat16:

        def every(bits):
            return _constant(vec.lanes, I32, [bits] * vec.lanes)

        bits = b.bitcast(value, ir.VectorType(I32, vec.lanes))
        odd = b.and_(b.lshr(bits, every(16)), every(1))
        rounded = b.add(bits, b.add(odd, every(0x7FFF)))
        quiet = b.or_(bits, every(0x400000))
        # Upper halves by a shuffle: of a truncation LLVM makes a store of 32 bits where a constant mask leaves one lane.
        found = b.bitcast(b.select(b.fcmp_unordered("uno", value, value), quiet, rounded), ir.VectorType(I16, 2 * vec.lanes))
        return b.shuffle_vector(found, found, _constant(vec.lanes, I32, range(1, 2 * vec.lanes, 2)))
    if storage == float16:
        return b.bitcast(b.fptrunc(value, ir.VectorType(ir.HalfType(), vec.lanes)), raw)
    return value


def _load_whole(b, pointer, vec, storage):
    raw = _stored(vec, storage)
    value = b.load(b.bitcast(pointer, _vec_ir(raw).as_pointer()))
    value.align = _bytes(raw)
    return _widened(b, value, storage, vec)


def _load_masked(b, pointer, vec, storage, mask, fill):
    raw = _stored(vec, storage)
    pointer = b.bitcast(pointer, _vec_ir(raw).as_pointer())
    # Zeros, then a select: a fill of its own would have to be narrowed first.  LLVM folds the two where the CPU can.
    zeros = ir.Constant(_vec_ir(raw), None)
    name = f"llvm.masked.load.{_intrinsic_suffix(raw)}.p0"
    value = _call_llvm(b, name, _vec_ir(raw), [pointer, ir.Constant(I32, _bytes(raw)), mask, fill if raw == vec else zeros])
    return value if raw == vec else b.select(mask, _widened(b, value, storage, vec), fill)


def _store_whole(b, pointer, vec, storage, value):
    raw = _stored(vec, storage)
    b.store(_narrowed(b, value, storage, vec), b.bitcast(pointer, _vec_ir(raw).as_pointer())).align = _bytes(raw)


def _store_past(b, pointer, vec, storage, value):
    """A store that leaves the caches alone; the address is a multiple of the vector's bytes."""
    raw = _stored(vec, storage)
    stored = b.store(_narrowed(b, value, storage, vec), b.bitcast(pointer, _vec_ir(raw).as_pointer()))
    stored.align = raw.lanes * _bytes(raw)
    stored.set_metadata("nontemporal", b.module.add_metadata([ir.Constant(I32, 1)]))


def _store_masked(b, pointer, vec, storage, mask, value):
    raw = _stored(vec, storage)
    pointer = b.bitcast(pointer, _vec_ir(raw).as_pointer())
    arguments = [_narrowed(b, value, storage, vec), pointer, ir.Constant(I32, _bytes(raw)), mask]
    _call_llvm(b, f"llvm.masked.store.{_intrinsic_suffix(raw)}.p0", ir.VoidType(), arguments)


def _positions(b, first, lanes, step=1):
    """first, first + step, ... as int64 lanes.  int64 throughout: a channels_last row may pass 2**31."""
    steps = _constant(lanes, I64, [i * step for i in range(lanes)]) if isinstance(step, int) else None
    if steps is None:
        steps = b.mul(_broadcast(b, step, lanes), _constant(lanes, I64, range(lanes)))
    return b.add(_broadcast(b, first, lanes), steps)


def _inside(b, first, low, high, lanes, step=1):
    """Mask of the lanes i with low <= first + i * step < high; step > 0, low <= high.

    One 32-bit addition and one unsigned comparison, so distances must stay below 2**31: a row is shorter than that.
    """
    lane = _constant(lanes, I32, [i * step for i in range(lanes)])
    from_low = b.add(lane, _broadcast(b, b.trunc(b.sub(first, low), I32), lanes))
    return b.icmp_unsigned("<", from_low, _broadcast(b, b.trunc(b.sub(high, low), I32), lanes))


def _deinterleave(b, wholes, lanes):
    """Consecutive registers -> phases.  Log-depth shuffles for powers of two would not help: LLVM merges these chains."""
    stride = len(wholes)
    if stride == 1:
        return list(wholes)
    phases = []
    for p in range(stride):
        value = ir.Constant(wholes[0].type, ir.Undefined)
        for r, whole in enumerate(wholes):
            picks = [i if (i * stride + p) // lanes != r else lanes + (i * stride + p) % lanes for i in range(lanes)]
            value = b.shuffle_vector(value, whole, _constant(lanes, I32, picks))
        phases.append(value)
    return phases


def _interleave(b, phases, lanes):
    """Phases -> consecutive registers: the inverse of ``_deinterleave``."""
    stride = len(phases)
    if stride == 1:
        return list(phases)
    wholes = []
    for r in range(stride):
        value = ir.Constant(phases[0].type, ir.Undefined)
        for p, phase in enumerate(phases):
            picks = [i if (r * lanes + i) % stride != p else lanes + (r * lanes + i) // stride for i in range(lanes)]
            value = b.shuffle_vector(value, phase, _constant(lanes, I32, picks))
        wholes.append(value)
    return wholes


# Making Vecs


@intrinsic(prefer_literal=True)
def splat(tyctx, scalar, lanes):
    """All lanes = scalar."""
    vec = Vec(types.unliteral(scalar), lanes.literal_value)

    def codegen(ctx, b, sig, args):
        return _broadcast(b, ctx.cast(b, args[0], sig.args[0], vec.dtype), vec.lanes)

    return vec(scalar, lanes), codegen


@intrinsic(prefer_literal=True)
def lane_index(tyctx, dtype, lanes):
    """0, 1, 2, ... of an integer dtype."""
    vec = Vec(dtype.dtype, lanes.literal_value)
    return vec(dtype, lanes), lambda ctx, b, sig, args: _constant(vec.lanes, _scalar_ir(vec.dtype), range(vec.lanes))


@intrinsic
def convert(tyctx, x, dtype):
    """Each lane as a number of dtype: integers widen, narrow (wrapping) or become floats; floats widen or narrow."""
    source, target = x, Vec(dtype.dtype, x.lanes)

    def codegen(ctx, b, sig, args):
        value, kind = args[0], _vec_ir(target)
        if source.dtype == target.dtype:
            return value
        if _is_float(source) and _is_float(target):
            return (b.fpext if target.dtype.bitwidth > source.dtype.bitwidth else b.fptrunc)(value, kind)
        if _is_float(target):
            return (b.sitofp if source.dtype.signed else b.uitofp)(value, kind)
        if _is_float(source):
            return (b.fptosi if target.dtype.signed else b.fptoui)(value, kind)
        if target.dtype.bitwidth == source.dtype.bitwidth:
            return value
        if target.dtype.bitwidth < source.dtype.bitwidth:
            return b.trunc(value, kind)
        return (b.sext if source.dtype.signed else b.zext)(value, kind)

    return target(x, dtype), codegen


@intrinsic(prefer_literal=True)
def exchange(tyctx, x, y, distance):
    """Two of a kind (Vecs, or tuples of Vecs): lane i of the first is lane i, and of the second lane i ^ distance, of x where
    i & distance is 0 and of y elsewhere.  A combination of the two holds x's lanes in its lanes of the one sort, y's in the other."""
    d, vecs = distance.literal_value, (x,) if isinstance(x, Vec) else tuple(x)
    result = types.UniTuple(x, 2)

    def codegen(ctx, b, sig, args):
        halves = []
        for flip in (0, d):
            found = []
            for i, vec in enumerate(vecs):
                pair = args[:2] if isinstance(x, Vec) else [b.extract_value(value, i) for value in args[:2]]
                picks = [(lane ^ flip) + (vec.lanes if lane & d else 0) for lane in range(vec.lanes)]
                found.append(b.shuffle_vector(*pair, _constant(vec.lanes, I32, picks)))
            halves.append(found[0] if isinstance(x, Vec) else ctx.make_tuple(b, x, found))
        return ctx.make_tuple(b, result, halves)

    if x == y:
        return result(x, y, distance), codegen


_PERMUTES = {
    (32, "f32x8"): "avx2.permps",
    (32, "i32x8"): "avx2.permd",
    (64, "f32x16"): "avx512.permvar.sf.512",
    (64, "i32x16"): "avx512.permvar.si.512",
    (64, "f64x8"): "avx512.permvar.df.512",
    (64, "i64x8"): "avx512.permvar.di.512",
}
"""(bytes of a register, what it holds) -> LLVM's name of the one instruction."""


def _permuted(b, value, lane, vec):
    """value[lane[i]] in lane i."""
    holds = f"{'f' if _is_float(vec) else 'i'}{vec.dtype.bitwidth}x{vec.lanes}"
    name = next((name for (size, held), name in _PERMUTES.items() if held == holds and size <= register_bytes()), None)
    if _X86 and name:
        if vec.dtype.bitwidth == 64:
            lane = b.zext(lane, ir.VectorType(I64, vec.lanes))
        return _call_llvm(b, f"llvm.x86.{name}", value.type, [value, lane])
    result = ir.Constant(value.type, ir.Undefined)
    for i in range(vec.lanes):
        here = ir.Constant(I32, i)
        result = b.insert_element(result, b.extract_element(value, b.extract_element(lane, here)), here)
    return result


@intrinsic
def permuted_each(tyctx, xs, lanes):
    """Of each of a tuple x[lanes[i]] in lane i; lanes are int32."""

    def codegen(ctx, b, sig, args):
        found = [_permuted(b, b.extract_value(args[0], i), args[1], vec) for i, vec in enumerate(xs)]
        return ctx.make_tuple(b, xs, found)

    if all(lanes == Vec(types.int32, vec.lanes) for vec in xs):
        return xs(xs, lanes), codegen


@intrinsic
def total(tyctx, x):
    """The sum of a float Vec's lanes, by halves."""

    def codegen(ctx, b, sig, args):
        value, lanes = args[0], x.lanes
        while lanes > 1:
            lanes //= 2
            low, high = (_part(b, value, first, lanes) for first in (0, lanes))
            value = b.fadd(low, high)
        return b.extract_element(value, ir.Constant(I32, 0))

    return x.dtype(x), codegen


@intrinsic
def like(tyctx, x, value):
    """The scalar ``value`` in every lane of a Vec like x."""

    def codegen(ctx, b, sig, args):
        return _broadcast(b, ctx.cast(b, args[1], value, x.dtype), x.lanes)

    return x(x, value), codegen


def _limit(pick):
    @intrinsic
    def word(tyctx, x):
        limit = pick(np.dtype(x.dtype.name))
        return x(x), lambda ctx, b, sig, args: _constant(x.lanes, _scalar_ir(x.dtype), [limit] * x.lanes)

    return word


lowest = _limit(lambda dtype: -np.inf if dtype.kind == "f" else np.iinfo(dtype).min)
highest = _limit(lambda dtype: np.inf if dtype.kind == "f" else np.iinfo(dtype).max)


@intrinsic
def unit(tyctx, bits, x):
    """32 random bits a lane, the low ones, as numbers of x's dtype in [0, 1): the top 24 for float32, all 32 for float64."""
    kept = 32 if x.dtype == types.float64 else 24

    def codegen(ctx, b, sig, args):
        word = b.trunc(args[0], ir.VectorType(I32, bits.lanes)) if bits.dtype.bitwidth == 64 else args[0]
        shifted = b.lshr(word, _constant(bits.lanes, I32, [32 - kept] * bits.lanes))
        # 24 bits have no sign; to convert an unsigned number takes several instructions without AVX-512.
        found = (b.uitofp if kept == 32 else b.sitofp)(shifted, _vec_ir(x))
        return b.fmul(found, _constant(x.lanes, _scalar_ir(x.dtype), [2.0**-kept] * x.lanes))

    return x(bits, x), codegen


# Memory


@intrinsic(prefer_literal=True)
def load(tyctx, x, offset, lanes):
    """x[offset : offset + lanes]."""
    vec = Vec(number(x.dtype), lanes.literal_value)
    return vec(x, types.int64, lanes), lambda ctx, b, sig, args: _load_whole(b, _at(b, args[0], args[1]), vec, x.dtype)


@intrinsic
def load_masked(tyctx, x, offset, mask, fill):
    """x[offset : offset + lanes] where mask holds; the other lanes read nothing and are those of ``fill``."""

    def codegen(ctx, b, sig, args):
        return _load_masked(b, _at(b, args[0], args[1]), fill, x.dtype, args[2], args[3])

    if number(x.dtype) == fill.dtype and mask.lanes == fill.lanes:
        return fill(x, types.int64, mask, fill), codegen


def _asking(writes, locality=3):
    @intrinsic
    def ask(tyctx, x, offset):
        def codegen(ctx, b, sig, args):
            address = b.bitcast(_at(b, args[0], args[1]), ir.IntType(8).as_pointer())
            function = b.module.globals.get("llvm.prefetch.p0")
            if function is None:
                kind = ir.FunctionType(ir.VoidType(), [address.type, I32, I32, I32])
                function = ir.Function(b.module, kind, "llvm.prefetch.p0")
            b.call(function, [address, ir.Constant(I32, writes), ir.Constant(I32, locality), ir.Constant(I32, 1)])
            return ctx.get_dummy_value()

        return types.void(x, types.int64), codegen

    return ask


prefetch = _asking(0)
"""(x, offset): ask for the cache line of x[offset]; any offset, read or not, mapped or not."""
prefetch_to_l2 = _asking(0, 2)
"""The same, no nearer than L2."""
prefetch_to_write = _asking(1)
"""The same, to write to it."""


@intrinsic
def store(tyctx, y, offset, x):
    """y[offset : offset + lanes] = x."""

    def codegen(ctx, b, sig, args):
        _store_whole(b, _at(b, args[0], args[1]), x, y.dtype, args[2])
        return ctx.get_dummy_value()

    if number(y.dtype) == x.dtype:
        return types.void(y, types.int64, x), codegen


@intrinsic
def store_past(tyctx, y, offset, x):
    """``store`` past the caches, for what is too large to stay in them: a line that is written need not be read first.  The address must be
    a multiple of x's bytes; ``settle`` must follow before another thread reads.

    Gradients of 100 MB took 14.4 ms with ``store`` and 5.7 so; but those of 25 MB, which the last level of cache holds, 1.4 and 2.8.
    """

    def codegen(ctx, b, sig, args):
        _store_past(b, _at(b, args[0], args[1]), x, y.dtype, args[2])
        return ctx.get_dummy_value()

    if number(y.dtype) == x.dtype:
        return types.void(y, types.int64, x), codegen


@intrinsic
def settle(tyctx):
    """Wait for ``store_past``: the other threads see what it wrote."""

    def codegen(ctx, b, sig, args):
        if _X86:
            _call_llvm(b, "llvm.x86.sse.sfence", ir.VoidType(), [])
        return ctx.get_dummy_value()

    return types.void(), codegen


@intrinsic
def store_masked(tyctx, y, offset, x, mask):
    """y[offset + i] = x[i] where mask holds; nothing else is written.

    Not for what a loop reads back: LLVM 22.1 moved a load of the same place out of such a loop.  There ``where`` and ``store``.
    """

    def codegen(ctx, b, sig, args):
        _store_masked(b, _at(b, args[0], args[1]), x, y.dtype, args[3], args[2])
        return ctx.get_dummy_value()

    if number(y.dtype) == x.dtype and mask.lanes == x.lanes:
        return types.void(y, types.int64, x, mask), codegen


@intrinsic(prefer_literal=True)
def load_one(tyctx, x, offset, lanes):
    """x[offset] in every lane."""
    vec, one = Vec(number(x.dtype), lanes.literal_value), Vec(number(x.dtype), 1)

    def codegen(ctx, b, sig, args):
        value = _load_whole(b, _at(b, args[0], args[1]), one, x.dtype)
        return _broadcast(b, b.extract_element(value, ir.Constant(I32, 0)), vec.lanes)

    return vec(x, types.int64, lanes), codegen


@intrinsic(prefer_literal=True)
def load_phases(tyctx, x, offset, stride, lanes):
    """``stride`` Vecs; lane i of phase p is x[offset + i * stride + p].  Reads stride * lanes elements, each once."""
    vec, s = Vec(number(x.dtype), lanes.literal_value), stride.literal_value
    result = types.UniTuple(vec, s)

    def codegen(ctx, b, sig, args):
        wholes = [_load_whole(b, _at(b, args[0], b.add(args[1], ir.Constant(I64, r * vec.lanes))), vec, x.dtype) for r in range(s)]
        return ctx.make_tuple(b, result, _deinterleave(b, wholes, vec.lanes))

    return result(x, types.int64, stride, lanes), codegen


@intrinsic(prefer_literal=True)
def load_phases_between(tyctx, x, base, first, low, high, stride, fill):
    """``load_phases`` of x[base + first ...]; only positions (from base) in [low, high) are read, others are ``fill``, a splat."""
    s, lanes = stride.literal_value, fill.lanes
    result = types.UniTuple(fill, s)

    def codegen(ctx, b, sig, args):
        pointer, base, first, low, high, _, fill_value = args
        wholes = []
        for r in range(s):
            position = b.add(first, ir.Constant(I64, r * lanes))
            mask = _inside(b, position, low, high, lanes)
            wholes.append(_load_masked(b, _at(b, pointer, b.add(base, position)), fill, x.dtype, mask, fill_value))
        return ctx.make_tuple(b, result, _deinterleave(b, wholes, lanes))

    if number(x.dtype) == fill.dtype:
        return result(x, *[types.int64] * 4, stride, fill), codegen


def _storing_phases(put):
    @intrinsic
    def storing(tyctx, y, offset, phases):
        vec = phases.dtype

        def codegen(ctx, b, sig, args):
            values = [b.extract_value(args[2], p) for p in range(phases.count)]
            for r, whole in enumerate(_interleave(b, values, vec.lanes)):
                put(b, _at(b, args[0], b.add(args[1], ir.Constant(I64, r * vec.lanes))), vec, y.dtype, whole)
            return ctx.get_dummy_value()

        if number(y.dtype) == vec.dtype:
            return types.void(y, types.int64, phases), codegen

    return storing


store_phases = _storing_phases(_store_whole)
"""(y, offset, phases): y[offset + i * stride + p] = lane i of phase p."""
store_phases_past = _storing_phases(_store_past)
"""The same by ``store_past``."""


@intrinsic
def store_phases_between(tyctx, y, base, first, low, high, phases):
    """``store_phases`` to y[base + first ...]; only positions (counted from base) in [low, high) are written."""
    vec = phases.dtype

    def codegen(ctx, b, sig, args):
        pointer, base, first, low, high, value = args
        values = [b.extract_value(value, p) for p in range(phases.count)]
        for r, whole in enumerate(_interleave(b, values, vec.lanes)):
            position = b.add(first, ir.Constant(I64, r * vec.lanes))
            mask = _inside(b, position, low, high, vec.lanes)
            _store_masked(b, _at(b, pointer, b.add(base, position)), vec, y.dtype, mask, whole)
        return ctx.get_dummy_value()

    if number(y.dtype) == vec.dtype:
        return types.void(y, *[types.int64] * 4, phases), codegen


@intrinsic
def phase(tyctx, phases, p):
    """phases[p]; p folds to a constant once the loop around it is unrolled, and the selects with it."""

    def codegen(ctx, b, sig, args):
        value = b.extract_value(args[0], 0)
        for q in range(1, phases.count):
            value = b.select(b.icmp_signed("==", args[1], ir.Constant(I64, q)), b.extract_value(args[0], q), value)
        return value

    return phases.dtype(phases, types.int64), codegen


@intrinsic
def with_phase(tyctx, phases, p, x):
    """A copy of phases in which phase p is x."""

    def codegen(ctx, b, sig, args):
        tup, p, value = args
        for q in range(phases.count):
            kept = b.select(b.icmp_signed("==", p, ir.Constant(I64, q)), value, b.extract_value(tup, q))
            tup = b.insert_value(tup, kept, q)
        return tup

    return phases(phases, types.int64, x), codegen


@intrinsic(prefer_literal=True)
def repeat(tyctx, x, count):
    """(x, x, ...): ``count`` times."""
    result = types.UniTuple(x, count.literal_value)
    return result(x, count), lambda ctx, b, sig, args: ctx.make_tuple(b, result, [args[0]] * result.count)


@intrinsic(prefer_literal=True)
def stacked(tyctx, count, dtype):
    """An array of ``count`` numbers on the stack of the worker that asks, uninitialised."""
    result = types.CPointer(dtype.dtype)

    def codegen(ctx, b, sig, args):
        with b.goto_entry_block():
            array = b.alloca(_scalar_ir(dtype.dtype), ir.Constant(I64, count.literal_value))
            array.align = LINE  # a register that lies in two cache lines takes twice as long
            return array

    return result(count, dtype), codegen


@intrinsic(prefer_literal=True)
def load_each(tyctx, arrays, offset, lanes):
    """``load`` from each of a tuple of arrays."""
    vecs = [Vec(array.dtype, lanes.literal_value) for array in arrays]
    result = types.Tuple(vecs)

    def codegen(ctx, b, sig, args):
        found = [_load_whole(b, _at(b, b.extract_value(args[0], i), args[1]), vec, vec.dtype) for i, vec in enumerate(vecs)]
        return ctx.make_tuple(b, result, found)

    return result(arrays, types.int64, lanes), codegen


@intrinsic
def store_each(tyctx, arrays, offset, values):
    """``store`` to each of a tuple of arrays."""

    def codegen(ctx, b, sig, args):
        for i, vec in enumerate(values):
            _store_whole(b, _at(b, b.extract_value(args[0], i), args[1]), vec, vec.dtype, b.extract_value(args[2], i))
        return ctx.get_dummy_value()

    if [array.dtype for array in arrays] == [vec.dtype for vec in values]:
        return types.void(arrays, types.int64, values), codegen


def _joined(b, parts, lanes):
    """Vectors of ``lanes`` side by side in one."""
    while len(parts) > 1:
        picks = _constant(2 * lanes, I32, range(2 * lanes))
        parts = [b.shuffle_vector(low, high, picks) for low, high in zip(parts[::2], parts[1::2], strict=True)]
        lanes *= 2
    return parts[0]


def _part(b, value, first, lanes):
    return b.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), _constant(lanes, I32, range(first, first + lanes)))


@intrinsic(prefer_literal=True)
def load_rows(tyctx, x, offset, step, rows, stride, lanes):
    """``load_phases`` of ``rows`` rows, ``step`` elements apart, side by side in Vecs of rows * lanes."""
    n, s = rows.literal_value, stride.literal_value
    part, vec = (Vec(number(x.dtype), lanes.literal_value * k) for k in (1, n))
    result = types.UniTuple(vec, s)

    def codegen(ctx, b, sig, args):
        phases = []
        for i in range(n):
            start = b.add(args[1], b.mul(args[2], ir.Constant(I64, i)))
            wholes = [_load_whole(b, _at(b, args[0], b.add(start, ir.Constant(I64, r * part.lanes))), part, x.dtype) for r in range(s)]
            phases.append(_deinterleave(b, wholes, part.lanes))
        return ctx.make_tuple(b, result, [_joined(b, [row[p] for row in phases], part.lanes) for p in range(s)])

    return result(x, types.int64, types.int64, rows, stride, lanes), codegen


@intrinsic(prefer_literal=True)
def store_rows(tyctx, y, offset, step, rows, phases):
    """``store_phases`` to ``rows`` rows, ``step`` elements apart: the inverse of ``load_rows``."""
    vec, n = phases.dtype, rows.literal_value
    part = Vec(vec.dtype, vec.lanes // n)

    def codegen(ctx, b, sig, args):
        values = [b.extract_value(args[4], p) for p in range(phases.count)]
        for i in range(n):
            start = b.add(args[1], b.mul(args[2], ir.Constant(I64, i)))
            row = [_part(b, value, i * part.lanes, part.lanes) for value in values]
            for r, whole in enumerate(_interleave(b, row, part.lanes)):
                _store_whole(b, _at(b, args[0], b.add(start, ir.Constant(I64, r * part.lanes))), part, y.dtype, whole)
        return ctx.get_dummy_value()

    if number(y.dtype) == vec.dtype:
        return types.void(y, types.int64, types.int64, rows, phases), codegen


def _in_fours(b, x, y, picks, lanes):
    """In each group of four lanes of two vectors the lanes that ``picks`` names, which count on from x's into y's."""
    mask = [s + (p if p < 4 else p - 4 + lanes) for s in range(0, lanes, 4) for p in picks]
    return b.shuffle_vector(x, y, _constant(lanes, I32, mask))


def _transposed(b, rows, lanes):
    """Four vectors -> four: in each group of four lanes, the 4x4 matrix of which they are the rows, transposed."""
    low = [_in_fours(b, *rows[i : i + 2], (0, 4, 1, 5), lanes) for i in (0, 2)]
    high = [_in_fours(b, *rows[i : i + 2], (2, 6, 3, 7), lanes) for i in (0, 2)]
    return [_in_fours(b, *pair, picks, lanes) for pair in (low, high) for picks in ((0, 1, 4, 5), (2, 3, 6, 7))]


@intrinsic(prefer_literal=True)
def load_across(tyctx, x, origins, first, at, lanes):
    """Four Vecs; lane i of the k-th is x[origins[first + i] + at + k]: lanes run across rows that lie anywhere.

    Rows are read four elements at a time and four lanes transposed together, within a quarter of a register: 5 shuffles a Vec where
    a transposition of whole registers takes 16 for 16 lanes.
    """
    vec = Vec(number(x.dtype), lanes.literal_value)
    result = types.UniTuple(vec, 4)

    def codegen(ctx, b, sig, args):
        pointer, origins, first, at, _ = args
        raw, piece = _stored(vec, x.dtype), _stored(Vec(vec.dtype, 4), x.dtype)
        rows = []
        for j in range(4):
            parts = []
            for i in range(j, vec.lanes, 4):
                origin = b.load(_at(b, origins, b.add(first, ir.Constant(I64, i))))
                parts.append(_load_whole(b, _at(b, pointer, b.add(origin, at)), piece, piece.dtype))
            rows.append(_joined(b, parts, 4))
        found = [_widened(b, value, x.dtype, vec) for value in _transposed(b, rows, raw.lanes)]
        return ctx.make_tuple(b, result, found)

    return result(x, origins, types.int64, types.int64, lanes), codegen


@intrinsic
def store_across(tyctx, y, origins, first, at, vecs):
    """y[origins[first + i] + at + k] = lane i of the k-th of four Vecs; lane 0 last: where rows are one, its elements stay."""
    vec = vecs.dtype

    def codegen(ctx, b, sig, args):
        pointer, origins, first, at, values = args
        raw, piece = _stored(vec, y.dtype), _stored(Vec(vec.dtype, 4), y.dtype)
        rows = _transposed(b, [_narrowed(b, b.extract_value(values, k), y.dtype, vec) for k in range(4)], raw.lanes)
        for i in reversed(range(vec.lanes)):
            origin = b.load(_at(b, origins, b.add(first, ir.Constant(I64, i))))
            part = _part(b, rows[i % 4], i // 4 * 4, 4)
            _store_whole(b, _at(b, pointer, b.add(origin, at)), piece, piece.dtype, part)
        return ctx.get_dummy_value()

    if number(y.dtype) == vec.dtype and vecs.count == 4:
        return types.void(y, origins, types.int64, types.int64, vecs), codegen


@intrinsic
def gather_between(tyctx, x, base, first, stride, low, high, fill):
    """Lane i is x[base + first + i * stride] where low <= first + i * stride < high, else fill's; any stride, known at run time."""

    def codegen(ctx, b, sig, args):
        pointer, base, first, stride, low, high, fill_value = args
        raw = _stored(fill, x.dtype)
        mask, addresses = _strided_lanes(b, pointer, base, first, stride, low, high, raw)
        name = f"llvm.masked.gather.{_intrinsic_suffix(raw)}.v{raw.lanes}p0"
        value = _call_llvm(b, name, _vec_ir(raw), [addresses, ir.Constant(I32, _bytes(raw)), mask, ir.Constant(_vec_ir(raw), None)])
        return b.select(mask, _widened(b, value, x.dtype, fill), fill_value)

    if number(x.dtype) == fill.dtype:
        return fill(x, *[types.int64] * 5, fill), codegen


@intrinsic
def scatter_between(tyctx, y, base, first, stride, low, high, x):
    """y[base + first + i * stride] = lane i where low <= first + i * stride < high."""

    def codegen(ctx, b, sig, args):
        pointer, base, first, stride, low, high, value = args
        raw = _stored(x, y.dtype)
        mask, addresses = _strided_lanes(b, pointer, base, first, stride, low, high, raw)
        name = f"llvm.masked.scatter.{_intrinsic_suffix(raw)}.v{raw.lanes}p0"
        _call_llvm(b, name, ir.VoidType(), [_narrowed(b, value, y.dtype, x), addresses, ir.Constant(I32, _bytes(raw)), mask])
        return ctx.get_dummy_value()

    if number(y.dtype) == x.dtype:
        return types.void(y, *[types.int64] * 5, x), codegen


def _strided_lanes(b, pointer, base, first, stride, low, high, vec):
    positions = _positions(b, first, vec.lanes, stride)
    mask = b.and_(
        b.icmp_signed(">=", positions, _broadcast(b, low, vec.lanes)), b.icmp_signed("<", positions, _broadcast(b, high, vec.lanes))
    )
    origin = b.ptrtoint(_at(b, pointer, base), I64)
    size = _broadcast(b, ir.Constant(I64, _bytes(vec)), vec.lanes)
    addresses = b.add(_broadcast(b, origin, vec.lanes), b.mul(positions, size))
    return mask, b.inttoptr(addresses, ir.VectorType(pointer.type, vec.lanes))


# Masks


@intrinsic(prefer_literal=True)
def between(tyctx, first, stride, low, high, lanes):
    """Mask of the lanes i with low <= first + i * stride < high; stride is literal and positive, low <= high."""
    mask, s = Mask(lanes.literal_value), stride.literal_value

    def codegen(ctx, b, sig, args):
        return _inside(b, args[0], args[2], args[3], mask.lanes, s)

    return mask(types.int64, stride, types.int64, types.int64, lanes), codegen


@intrinsic
def any_lane(tyctx, mask):
    """Whether a Mask holds anywhere."""

    def codegen(ctx, b, sig, args):
        bits = ir.IntType(mask.lanes)
        return b.icmp_unsigned("!=", b.bitcast(args[0], bits), ir.Constant(bits, 0))

    return types.boolean(mask), codegen


@intrinsic
def where(tyctx, condition, x, y):
    """x where condition holds, else y; both are computed.  Lane by lane under a Mask, whole under a boolean."""
    fits = isinstance(condition, types.Boolean) or (isinstance(condition, Mask) and condition.lanes == x.lanes)
    if fits and x == y:
        return x(condition, x, y), lambda ctx, b, sig, args: b.select(*args)


@intrinsic
def where_each(tyctx, mask, xs, ys):
    """``where`` of each of two tuples."""

    def codegen(ctx, b, sig, args):
        found = [b.select(args[0], *(b.extract_value(values, i) for values in args[1:])) for i in range(len(xs))]
        return ctx.make_tuple(b, xs, found)

    if xs == ys and all(vec.lanes == mask.lanes for vec in xs):
        return xs(mask, xs, ys), codegen


# Arithmetic


def _operator(op, arity, instruction, result=lambda x: x):
    """``op`` on ``arity`` equal Vecs or Masks; ``instruction(x)`` is a function (builder, *values), or None where there is none."""

    class Template(AbstractTemplate):
        def generic(self, args, kws):
            x = args[0]
            if isinstance(x, (Vec, Mask)) and all(a == x for a in args) and instruction(x):
                return signature(result(x), *args)

    infer_global(op)(Template)
    for kind in (Vec, Mask):
        lower_builtin(op, *[kind] * arity)(lambda ctx, b, sig, args: instruction(sig.args[0])(b, *args))


def _by_dtype(on_float, on_signed, on_unsigned, on_mask=None):
    """The builder's method for a Vec's dtype or a Mask, by name.  / of integers truncates, as torch's average of integers does."""

    def instruction(x):
        if isinstance(x, Mask):
            name = on_mask
        elif _is_float(x):
            name = on_float
        else:
            name = on_signed if x.dtype.signed else on_unsigned
        return name and (lambda b, *values: getattr(b, name)(*values))

    return instruction


for _op, _names in {
    operator.add: ("fadd", "add", "add"),
    operator.sub: ("fsub", "sub", "sub"),
    operator.mul: ("fmul", "mul", "mul"),
    operator.truediv: ("fdiv", "sdiv", "udiv"),
    operator.and_: (None, "and_", "and_", "and_"),
    operator.or_: (None, "or_", "or_", "or_"),
    operator.xor: (None, "xor", "xor", "xor"),
    operator.lshift: (None, "shl", "shl"),
    operator.rshift: (None, "ashr", "lshr"),
}.items():
    _operator(_op, 2, _by_dtype(*_names))
_operator(operator.neg, 1, _by_dtype("fneg", "neg", "neg"))
_operator(operator.invert, 1, _by_dtype(None, "not_", "not_", "not_"))


def _compare(symbol):
    """Ordered on floats (false with NaN), except != (true with NaN): IEEE 754, as in Python."""

    def instruction(x):
        if isinstance(x, Mask):
            return None
        if _is_float(x):
            return lambda b, *values: (b.fcmp_unordered if symbol == "!=" else b.fcmp_ordered)(symbol, *values)
        return lambda b, *values: (b.icmp_signed if x.dtype.signed else b.icmp_unsigned)(symbol, *values)

    return instruction


for _op, _symbol in {
    operator.gt: ">",
    operator.ge: ">=",
    operator.lt: "<",
    operator.le: "<=",
    operator.eq: "==",
    operator.ne: "!=",
}.items():
    _operator(_op, 2, _compare(_symbol), result=lambda x: Mask(x.lanes))


def _llvm_function(name, operands):
    """An LLVM floating-point intrinsic, lane by lane."""

    def codegen(ctx, b, sig, args):
        vec = sig.return_type
        return _call_llvm(b, f"llvm.{name}.{_intrinsic_suffix(vec)}", _vec_ir(vec), list(args))

    if operands == 1:
        return intrinsic(lambda tyctx, x: (x(x), codegen))
    return intrinsic(lambda tyctx, x, y, z: (x(x, y, z), codegen))


sqrt = _llvm_function("sqrt", 1)
absolute = _llvm_function("fabs", 1)
fused = _llvm_function("fma", 3)  # an instruction of AVX2 and NEON; an older CPU calls libm's, lane by lane


@intrinsic
def quotient(tyctx, x, count):
    """x / count, where 1 / count is the same for many x: of floats by that, and mended to the nearest (Markstein, "IA-64 and Elementary
    Functions", 2000, theorem 8.3), so that bits are a division's but where the result is subnormal.

    Five instructions where a division of 16 floats takes 16 cycles: avg 3x3 s1 of 64 planes of 7x7 had 49 such for 4 registers each.
    """
    vec = x

    def codegen(ctx, b, sig, args):
        number, count = args
        if not _is_float(vec):
            return (b.sdiv if vec.dtype.signed else b.udiv)(number, count)
        fma = functools.partial(_call_llvm, b, f"llvm.fma.{_intrinsic_suffix(vec)}", _vec_ir(vec))
        one, zero = (_constant(vec.lanes, _scalar_ir(vec.dtype), [value] * vec.lanes) for value in (1.0, 0.0))
        inverse = b.fdiv(one, count)
        near = b.fmul(number, inverse)
        rest = fma([b.fneg(near), count, number])
        # Exact, and with x's sign, where nothing is left; where that is NaN, x is not finite, or the count 0.
        return b.select(b.fcmp_ordered("!=", rest, zero), fma([rest, inverse, near]), near)

    if x == count:
        return x(x, count), codegen


_EXTREMES = {
    (512, 32): "llvm.x86.avx512.{}.ps.512",
    (512, 64): "llvm.x86.avx512.{}.pd.512",
    (256, 32): "llvm.x86.avx.{}.ps.256",
    (256, 64): "llvm.x86.avx.{}.pd.256",
    (128, 32): "llvm.x86.sse.{}.ps",
    (128, 64): "llvm.x86.sse2.{}.pd",
}


def _extreme(name, symbol):
    """One of two numbers, the second where they cannot be compared.

    It is what an x86 instruction does, which LLVM would find in the comparison and select, had it not merged that select with those
    around it: by its name it stays.  Then a maximum takes 2 cycles from one element to the next, where a comparison, a mask's
    arithmetic and a select take 8.
    """

    def codegen(ctx, b, sig, args):
        x = sig.return_type
        bits = x.lanes * x.dtype.bitwidth
        if _is_float(x) and _X86 and bits <= 8 * register_bytes() and (bits, x.dtype.bitwidth) in _EXTREMES:
            rounding = [ir.Constant(I32, 4)] if bits == 512 else []  # as it is set
            return _call_llvm(b, _EXTREMES[bits, x.dtype.bitwidth].format(name), _vec_ir(x), [*args, *rounding])
        compare = b.fcmp_ordered if _is_float(x) else b.icmp_signed if x.dtype.signed else b.icmp_unsigned
        return b.select(compare(symbol, *args), *args)

    return intrinsic(lambda tyctx, x, y: (x(x, y), codegen) if x == y else None)


larger = _extreme("max", ">")
smaller = _extreme("min", "<")


@intrinsic
def multiply_wide(tyctx, x, y):
    """The 64-bit products of two Vecs of uint32 as (high, low) Vecs of uint32.

    Vecs of uint64 whose low halves are meant stay so, with anything in the high halves: an instruction multiplies such a pair as it
    lies, and nothing is moved between 32 and 64 bits from one product to the next.
    """
    result, lanes = types.UniTuple(x, 2), x.lanes

    def codegen(ctx, b, sig, args):
        wide, shift = ir.VectorType(I64, lanes), _constant(lanes, I64, [32] * lanes)
        if x.dtype.bitwidth == 64:
            low = _constant(lanes, I64, [0xFFFFFFFF] * lanes)
            product = b.mul(b.and_(args[0], low), b.and_(args[1], low))
            return ctx.make_tuple(b, result, [b.lshr(product, shift), product])
        product = b.mul(b.zext(args[0], wide), b.zext(args[1], wide))
        return ctx.make_tuple(b, result, [b.trunc(b.lshr(product, shift), _vec_ir(x)), b.trunc(product, _vec_ir(x))])

    return result(x, y), codegen


@intrinsic
def by_width(tyctx, x, single, double):
    """One of two scalars in every lane of a Vec like x: ``single`` where its numbers are of 32 bits, ``double`` where of 64."""
    wide = x.dtype.bitwidth == 64

    def codegen(ctx, b, sig, args):
        return _broadcast(b, ctx.cast(b, args[1 + wide], sig.args[1 + wide], x.dtype), x.lanes)

    return x(x, single, double), codegen


@intrinsic
def polynomial(tyctx, x, single, double):
    """The polynomial in x by Horner's rule, each step fused; the coefficients, constant term first, are one of two tuples of scalars."""

    def codegen(ctx, b, sig, args):
        wide = x.dtype.bitwidth == 64
        kinds, values = sig.args[1 + wide].types, args[1 + wide]
        *rest, value = (_broadcast(b, ctx.cast(b, b.extract_value(values, i), kind, x.dtype), x.lanes) for i, kind in enumerate(kinds))
        for c in reversed(rest):
            value = _call_llvm(b, f"llvm.fma.{_intrinsic_suffix(x)}", _vec_ir(x), [value, args[0], c])
        return value

    return x(x, single, double), codegen


@intrinsic
def bits_of(tyctx, x):
    """The bit patterns of a Vec of floats, as unsigned integers of their width."""
    bits = Vec(types.uint64 if x.dtype.bitwidth == 64 else types.uint32, x.lanes)
    return bits(x), lambda ctx, b, sig, args: b.bitcast(args[0], _vec_ir(bits))


@intrinsic
def from_bits(tyctx, bits, x):
    """The numbers of x's dtype that have these bit patterns."""
    return x(bits, x), lambda ctx, b, sig, args: b.bitcast(args[0], _vec_ir(x))


@intrinsic(prefer_literal=True)
def unroll(tyctx, body, count, carry, args):
    """carry = body(carry, k, args) for k = 0 .. count - 1, written out: k is a constant wherever body's code uses it.

    LLVM leaves a loop over three taps rolled, with a branch on each tap's phase: on 8x64x112x112, 3x3 s2 p1, average pooling took 1.45
    ms so and 1.16 unrolled, the backward of max 4.1 and 1.7.
    """
    call = body.get_call_type(tyctx, (carry, types.int64, args), {})

    def codegen(ctx, b, sig, values):
        function, state = ctx.get_function(body, call), values[2]
        for k in range(count.literal_value):
            state = function(b, (state, ir.Constant(I64, k), values[3]))
        return state

    return carry(body, count, carry, args), codegen


# A worker's arguments: a flat int64 array of addresses, sizes and the bit patterns of numbers


@intrinsic
def pointer(tyctx, args, k, dtype):
    """args[k], an address, as a typed pointer: ``pointer(args, 0, float32)``."""
    result = types.CPointer(dtype.dtype)

    def codegen(ctx, b, sig, values):
        return b.inttoptr(b.load(_at(b, values[0], values[1])), ctx.get_value_type(result))

    return result(args, types.int64, dtype), codegen


@intrinsic
def pointer_at(tyctx, address, dtype):
    """An address as a typed pointer."""
    result = types.CPointer(dtype.dtype)
    return result(types.int64, dtype), lambda ctx, b, sig, args: b.inttoptr(args[0], ctx.get_value_type(result))


@intrinsic
def address(tyctx, x):
    """A pointer as an int64: the inverse of ``pointer``."""
    return types.int64(x), lambda ctx, b, sig, args: b.ptrtoint(args[0], I64)


@intrinsic(prefer_literal=True)
def integers(tyctx, args, k, count):
    """args[k], args[k + 1], ...: ``count`` of them as a tuple."""
    result = types.UniTuple(types.int64, count.literal_value)

    def codegen(ctx, b, sig, values):
        slots = [b.add(values[1], ir.Constant(I64, i)) for i in range(result.count)]
        return ctx.make_tuple(b, result, [b.load(_at(b, values[0], slot)) for slot in slots])

    return result(args, types.int64, count), codegen


@intrinsic(prefer_literal=True)
def numbers(tyctx, args, k, count, dtype, lanes):
    """args[k], args[k + 1], ...: ``count`` bit patterns of dtype as a tuple of Vecs, every lane the same."""
    vec = Vec(dtype.dtype, lanes.literal_value)
    result = types.UniTuple(vec, count.literal_value) if count.literal_value else types.Tuple(())

    def codegen(ctx, b, sig, values):
        found = []
        for i in range(count.literal_value):
            slot = _at(b, values[0], b.add(values[1], ir.Constant(I64, i)))
            value = b.load(b.bitcast(slot, _scalar_ir(vec.dtype).as_pointer()))
            found.append(_broadcast(b, value, vec.lanes))
        return ctx.make_tuple(b, result, found)

    return result(args, types.int64, count, dtype, lanes), codegen
