"""The executor of PTX: each operation against numpy, and that seeded bugs of kernels are caught."""

import math
import re
from pathlib import Path

import emulated
import numpy as np
import pytest
from fastpool.bench import ptx
from fastpool.bench.ptx.program import OPERATIONS

COUNT = 64


def run(body, *arrays, registers="", block=COUNT, grid=1, initialised=None, shared=""):
    """A kernel of these instructions, whose parameters are the arrays' addresses, in %rd0 and so on; %r0 is the thread's number."""
    memory = ptx.Memory()
    for i, array in enumerate(arrays):
        memory.add(array.ctypes.data, array.view(np.uint8).reshape(-1), initialised is None or i in initialised)
    loads = "\n".join(f"ld.param.u64 %rd{i}, [p{i}];" for i in range(len(arrays)))
    text = f"""
.version 8.0
.target sm_80
.visible .entry tested({", ".join(f".param .u64 p{i}" for i in range(len(arrays)))})
{{
    {shared}
    .reg .pred %p<9>;
    .reg .b16 %h<9>;
    .reg .b32 %r<20>;
    .reg .b64 %rd<40>;
    .reg .f32 %f<9>;
    .reg .f64 %fd<9>;
    {registers}
    {loads}
    mov.u32 %r0, %tid.x;
    mov.u32 %r18, %ctaid.x;
    mov.u32 %r19, %ntid.x;
    mad.lo.s32 %r0, %r18, %r19, %r0;
    {body}
    ret;
}}
"""
    return ptx.execute(ptx.Kernel(text), (grid,), (block,), [a.ctypes.data for a in arrays], memory)


REGISTER = {
    "f32": "%f",
    "f64": "%fd",
    "u32": "%r",
    "s32": "%r",
    "b32": "%r",
    "u64": "%rd",
    "s64": "%rd",
    "b64": "%rd",
    "b16": "%h",
    "u16": "%h",
}


def moved(kind, action, register, base):
    """Load or store one number of a thread."""
    size = ptx.TYPES[kind].itemsize
    address = f"mul.wide.u32 %rd30, %r0, {size};\nadd.s64 %rd30, %rd30, %rd{base};"
    return f"{address}\n{f'ld.global.{kind} {register}, [%rd30];' if action == 'ld' else f'st.global.{kind} [%rd30], {register};'}"


def applied(operation, of, to, *operands):
    """One instruction on the numbers of arrays: operands in registers 1, 2 .., the result in 8."""
    result = np.zeros(COUNT, ptx.TYPES[to])
    arrays = [np.ascontiguousarray(operand).astype(ptx.TYPES[of]) for operand in operands]
    names = [f"{REGISTER[of]}{i + 1}" for i in range(len(arrays))]
    lines = [moved(of, "ld", name, i) for i, name in enumerate(names)]
    lines += [operation.format(f"{REGISTER[to]}8", *names), moved(to, "st", f"{REGISTER[to]}8", len(arrays))]
    run("\n".join(lines), *arrays, result)
    return result


rng = np.random.default_rng(0)
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1, -1, 2.5, -2.5, 0.5, 1.5, 1e30, -1e30, 1e-40]
X = np.concatenate([SPECIAL, rng.normal(size=COUNT - len(SPECIAL)) * 10])
Y = np.concatenate([rng.normal(size=COUNT - len(SPECIAL)), SPECIAL])
WHOLE = np.concatenate([[0, 1, -1, 2**31 - 1, -(2**31), 7, -7], rng.integers(-(2**31), 2**31, COUNT - 7)])
J = np.concatenate([[3, -3, 5, 1, 2, -2, 9], rng.integers(1, 2**16, COUNT - 7)])

FLOATS = {
    "add.{0} {{0}}, {{1}}, {{2}};": np.add,
    "sub.{0} {{0}}, {{1}}, {{2}};": np.subtract,
    "mul.{0} {{0}}, {{1}}, {{2}};": np.multiply,
    "div.rn.{0} {{0}}, {{1}}, {{2}};": np.divide,
    "min.{0} {{0}}, {{1}}, {{2}};": np.fmin,
    "max.{0} {{0}}, {{1}}, {{2}};": np.fmax,
    "max.NaN.{0} {{0}}, {{1}}, {{2}};": np.maximum,
    "neg.{0} {{0}}, {{1}};": lambda x, y: -x,
    "abs.{0} {{0}}, {{1}};": lambda x, y: abs(x),
    "sqrt.rn.{0} {{0}}, {{1}};": lambda x, y: np.sqrt(x),
    "rcp.rn.{0} {{0}}, {{1}};": lambda x, y: 1 / x,
    "copysign.{0} {{0}}, {{1}}, {{2}};": lambda x, y: np.copysign(y, x),
    "cvt.rni.{0}.{0} {{0}}, {{1}};": lambda x, y: np.rint(x),
    "cvt.rzi.{0}.{0} {{0}}, {{1}};": lambda x, y: np.trunc(x),
    "setp.gt.{0} %p0, {{1}}, {{2}};\nselp.{0} {{0}}, {{1}}, {{2}}, %p0;": lambda x, y: np.where(x > y, x, y),
    "setp.gtu.{0} %p0, {{1}}, {{2}};\nselp.{0} {{0}}, {{1}}, {{2}}, %p0;": lambda x, y: np.where(~(x <= y), x, y),
    "setp.nan.{0} %p0, {{1}}, {{2}};\nselp.{0} {{0}}, {{1}}, {{2}}, %p0;": lambda x, y: np.where(np.isnan(x) | np.isnan(y), x, y),
    "setp.ne.{0} %p0, {{1}}, {{2}};\nselp.{0} {{0}}, {{1}}, {{2}}, %p0;": lambda x, y: np.where(
        (x != y) & ~np.isnan(x) & ~np.isnan(y), x, y
    ),
    "mov.{0} {{0}}, {{2}};\nsetp.lt.{0} %p0, {{1}}, {{2}};\n@%p0 mov.{0} {{0}}, {{1}};": lambda x, y: np.where(x < y, x, y),
}


@pytest.mark.parametrize("operation", FLOATS)
@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_floats(operation, kind):
    x, y = X.astype(ptx.TYPES[kind]), Y.astype(ptx.TYPES[kind])
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(applied(operation.format(kind), kind, kind, x, y), FLOATS[operation](x, y).astype(x.dtype))


APPROXIMATE = {
    "ex2.approx.{0} {{0}}, {{1}};": np.exp2,
    "lg2.approx.{0} {{0}}, {{1}};": np.log2,
    "sin.approx.{0} {{0}}, {{1}};": np.sin,
    "cos.approx.{0} {{0}}, {{1}};": np.cos,
    "tanh.approx.{0} {{0}}, {{1}};": np.tanh,
    "rsqrt.approx.{0} {{0}}, {{1}};": lambda x: 1 / np.sqrt(x),
}


@pytest.mark.parametrize(
    ("operation", "kind"), [*((operation, "f32") for operation in APPROXIMATE), ("rsqrt.approx.{0} {{0}}, {{1}};", "f64")]
)
def test_approximations(operation, kind):
    """To two steps of the dtype, and what they are of infinities, negative numbers and NaN."""
    x = X.astype(ptx.TYPES[kind])
    with np.errstate(all="ignore"):
        truth = APPROXIMATE[operation](x.astype(np.longdouble)).astype(x.dtype)
    np.testing.assert_allclose(applied(operation.format(kind), kind, kind, x), truth, rtol=2 * np.finfo(x.dtype).eps, atol=0)


def test_approximations_flush_what_is_subnormal():
    small = np.full(COUNT, 1e-40, np.float32)
    assert (applied("lg2.approx.ftz.f32 {0}, {1};", "f32", "f32", small) == -math.inf).all()
    assert np.isfinite(applied("lg2.approx.f32 {0}, {1};", "f32", "f32", small)).all()
    assert (applied("ex2.approx.ftz.f32 {0}, {1};", "f32", "f32", np.full(COUNT, -130.0)) == 0).all()
    assert (applied("ex2.approx.f32 {0}, {1};", "f32", "f32", np.full(COUNT, -130.0)) > 0).all()


def test_a_fused_product_is_rounded_once():
    x, y = (1 + rng.integers(0, 2**23, COUNT) * 2.0**-23 for _ in range(2))
    z = -(x.astype(np.float32).astype(np.float64) * y).astype(np.float32)
    truth = (x * y + z.astype(np.float64)).astype(np.float32)  # exact in float64
    np.testing.assert_array_equal(applied("fma.rn.f32 {0}, {1}, {2}, {3};", "f32", "f32", x, y, z), truth)
    # A float64 sum alone would be rounded twice: half an ulp, and a little.
    one, tiny = np.full(COUNT, 1 + 2.0**-12), np.full(COUNT, 2.0**-60)
    expected = np.float32(1 + 2.0**-11 + 2.0**-23)
    np.testing.assert_array_equal(applied("fma.rn.f32 {0}, {1}, {2}, {3};", "f32", "f32", one, one, tiny), expected)


def test_saturation_and_flushing():
    np.testing.assert_array_equal(
        applied("add.sat.f32 {0}, {1}, {2};", "f32", "f32", X, np.zeros(COUNT)), np.nan_to_num(np.clip(X.astype("f4"), 0, 1))
    )
    small = np.full(COUNT, 1e-40, np.float32)
    assert (applied("add.ftz.f32 {0}, {1}, {2};", "f32", "f32", small, small) == 0).all()
    assert (applied("mul.ftz.f32 {0}, {1}, {2};", "f32", "f32", small, np.full(COUNT, 1e30)) == 0).all()


def test_results_are_rounded_as_said():
    """One step of float32 beyond 1, and where a sum, a product, or a float64 is between two."""
    one, below, above = (np.float32(v) for v in (1, np.nextafter(np.float32(1), np.float32(0)), np.nextafter(np.float32(1), np.float32(2))))
    tiny, ones = np.full(COUNT, 1e-12), np.ones(COUNT)
    for sign, expected in ((1, {"rn": one, "rz": one, "rm": one, "rp": above}), (-1, {"rn": one, "rz": below, "rm": below, "rp": one})):
        for direction, value in expected.items():
            for of, kind, operation, operands in (
                ("f32", "f32", "add.{0}.f32 {{0}}, {{1}}, {{2}};", (ones, sign * tiny)),
                ("f32", "f32", "sub.{0}.f32 {{0}}, {{1}}, {{2}};", (ones, -sign * tiny)),
                ("f32", "f32", "fma.{0}.f32 {{0}}, {{1}}, {{1}}, {{2}};", (ones, sign * tiny)),
                ("f64", "f32", "cvt.{0}.f32.f64 {{0}}, {{1}};", (ones + sign * tiny,)),
            ):
                assert (applied(operation.format(direction), of, kind, *operands) == value).all(), (operation, direction, sign)
    exact = X.astype(np.float32).astype(np.float64) * Y.astype(np.float32)
    down, up = (applied(f"mul.{d}.f32 {{0}}, {{1}}, {{2}};", "f32", "f32", X, Y).astype(np.float64) for d in ("rm", "rp"))
    known = np.isfinite(exact)
    assert ((down <= exact) & (exact <= up))[known].all()
    assert (down < up).sum() > COUNT // 2
    np.testing.assert_array_equal(down[~known], exact[~known])


def test_of_zeros_the_negative_is_less():
    zeros, others = np.array([0.0, -0.0, 0.0, -0.0] * (COUNT // 4)), np.array([0.0, 0.0, -0.0, -0.0] * (COUNT // 4))
    for kind in ("f32", "f64"):
        for part in ("", ".NaN") if kind == "f32" else ("",):
            for name, expected in (("min", [False, True, True, True]), ("max", [False, False, False, True])):
                found = applied(f"{name}{part}.{kind} {{0}}, {{1}}, {{2}};", kind, kind, zeros, others)
                assert np.signbit(found)[:4].tolist() == expected


def test_selecting_and_testing():
    floats = X.astype(np.float32), Y.astype(np.float32)
    by = np.where(np.arange(COUNT) % 2 == 0, 1, -1)
    found = applied("and.b32 %r1, %r0, 1;\nneg.s32 %r1, %r1;\nslct.f32.s32 {0}, {1}, {2}, %r1;", "f32", "f32", *floats)
    np.testing.assert_array_equal(found, np.where(by > 0, *floats))
    less = floats[0] < floats[1]
    assert applied("set.lt.s32.f32 {0}, {1}, {2};", "f32", "s32", *floats).tolist() == np.where(less, -1, 0).tolist()
    assert applied("set.lt.f32.f32 {0}, {1}, {2};", "f32", "f32", *floats).tolist() == less.astype(float).tolist()
    odd = np.arange(COUNT) % 2 == 1
    joined = "and.b32 %r1, %r0, 1;\nsetp.ne.u32 %p1, %r1, 0;\nset.lt.and.u32.f32 {0}, {1}, {2}, %p1;"
    assert applied(joined, "f32", "u32", *floats).tolist() == np.where(less & odd, 0xFFFFFFFF, 0).tolist()
    for name, truth in {"finite": np.isfinite, "infinite": np.isinf, "notanumber": np.isnan}.items():
        found = applied(f"testp.{name}.f32 %p0, {{1}};\nselp.f32 {{0}}, 0f3F800000, 0f00000000, %p0;", "f32", "f32", X)
        np.testing.assert_array_equal(found, truth(floats[0]))


def test_fields_and_bytes_by_registers():
    whole = rng.integers(0, 2**32, COUNT)
    begins, lengths = rng.integers(0, 40, COUNT), rng.integers(0, 40, COUNT)

    def field(value, begin, length, signed):
        sign = -1 if signed and length and value >> min(begin + length - 1, 31) & 1 else 0
        end = min(begin + length, 32)
        extended = value & (1 << end) - 1 | sign << end
        return (extended >> begin if signed else value >> begin & (1 << length) - 1) & 0xFFFFFFFF if length else 0

    for kind, signed in (("u32", False), ("s32", True)):
        found = applied(f"bfe.{kind} {{0}}, {{1}}, {{2}}, {{3}};", "u32", "u32", whole, begins, lengths)
        assert found.tolist() == [field(int(v), int(b), int(n), signed) for v, b, n in zip(whole, begins, lengths, strict=True)]
    found = applied("bfi.b32 {0}, {1}, 0, {2}, {3};", "u32", "u32", whole, begins, lengths)
    triples = list(zip(whole.tolist(), begins.tolist(), lengths.tolist(), strict=True))
    assert found.tolist() == [(v & (1 << n) - 1) << b & 0xFFFFFFFF for v, b, n in triples]
    found = applied("prmt.b32 {0}, {1}, {2}, {3};", "u32", "u32", whole, ~whole & 0xFFFFFFFF, begins | 0x8000)
    parts = [(v | (~v & 0xFFFFFFFF) << 32, b | 0x8000) for v, b, _ in triples]
    expected = []
    for both, selector in parts:
        which = [selector >> 4 * k & 15 for k in range(4)]
        taken = [both >> 8 * (w & 7) & 255 for w in which]
        taken = [(255 if v & 128 else 0) if w & 8 else v for v, w in zip(taken, which, strict=True)]  # 8: the sign alone
        expected.append(int.from_bytes(bytes(taken), "little"))
    assert found.tolist() == expected


UNSIGNED_32, SIGNED = WHOLE.astype(np.int64) & 0xFFFFFFFF, WHOLE.astype(np.int64)
INTEGERS = {
    "add.s32 {0}, {1}, {2};": ("s32", lambda a, b: a + b),
    "sub.s32 {0}, {1}, {2};": ("s32", lambda a, b: a - b),
    "mul.lo.s32 {0}, {1}, {2};": ("s32", lambda a, b: a * b),
    "mul.hi.s32 {0}, {1}, {2};": ("s32", lambda a, b: (a * b) >> 32),
    "mul.hi.u32 {0}, {1}, {2};": ("u32", lambda a, b: (a * b) >> 32),
    "div.s32 {0}, {1}, {2};": ("s32", lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)),
    "div.u32 {0}, {1}, {2};": ("u32", lambda a, b: a // b),
    "rem.s32 {0}, {1}, {2};": ("s32", lambda a, b: math.fmod(a, b)),
    "rem.u32 {0}, {1}, {2};": ("u32", lambda a, b: a % b),
    "min.s32 {0}, {1}, {2};": ("s32", min),
    "max.u32 {0}, {1}, {2};": ("u32", max),
    "and.b32 {0}, {1}, {2};": ("u32", lambda a, b: a & b),
    "or.b32 {0}, {1}, {2};": ("u32", lambda a, b: a | b),
    "xor.b32 {0}, {1}, {2};": ("u32", lambda a, b: a ^ b),
    "not.b32 {0}, {1};": ("u32", lambda a, b: ~a),
    "shl.b32 {0}, {1}, 5;": ("u32", lambda a, b: a << 5),
    "shr.u32 {0}, {1}, 5;": ("u32", lambda a, b: a >> 5),
    "shr.s32 {0}, {1}, 5;": ("s32", lambda a, b: a >> 5),
    "shr.u32 {0}, {1}, 32;": ("u32", lambda a, b: 0),
    "shr.s32 {0}, {1}, 99;": ("s32", lambda a, b: -1 if a < 0 else 0),
    "popc.b32 {0}, {1};": ("u32", lambda a, b: a.bit_count()),
    "clz.b32 {0}, {1};": ("u32", lambda a, b: 32 - a.bit_length()),
    "brev.b32 {0}, {1};": ("u32", lambda a, b: int(f"{a:032b}"[::-1], 2)),
    "bfe.u32 {0}, {1}, 7, 9;": ("u32", lambda a, b: a >> 7 & 511),
    "bfe.s32 {0}, {1}, 7, 9;": ("s32", lambda a, b: ((a >> 7 & 511) ^ 256) - 256),
    "bfi.b32 {0}, {1}, {2}, 4, 8;": ("u32", lambda a, b: (b & ~0xFF0) | (a & 0xFF) << 4),
    "prmt.b32 {0}, {1}, {2}, 0x7210;": ("u32", lambda a, b: (a & 0xFFFFFF) | (b & 0xFF000000)),
    "shf.l.wrap.b32 {0}, {1}, {2}, 9;": ("u32", lambda a, b: b << 9 | a >> 23),
    "lop3.b32 {0}, {1}, {2}, {1}, 0x3c;": ("u32", lambda a, b: a ^ b),
    "mad.lo.s32 {0}, {1}, {2}, {1};": ("s32", lambda a, b: a * b + a),
}


@pytest.mark.parametrize("operation", INTEGERS)
def test_integers(operation):
    kind, truth = INTEGERS[operation]
    x, y = (v.astype(np.int64) & (0xFFFFFFFF if kind == "u32" else -1) for v in (WHOLE, J))
    expected = np.array([int(truth(int(a), int(b))) & 0xFFFFFFFF for a, b in zip(x, y, strict=True)], np.uint32)
    np.testing.assert_array_equal(applied(operation, kind, kind, x, y).view(np.uint32), expected)


def test_wide_products():
    x, y = WHOLE & 0xFFFFFFFF, J & 0xFFFFFFFF
    low = applied("mul.wide.u32 %rd20, {1}, {2};\ncvt.u32.u64 {0}, %rd20;", "u32", "u32", x, y)
    high = applied("mul.wide.u32 %rd20, {1}, {2};\nshr.u64 %rd20, %rd20, 32;\ncvt.u32.u64 {0}, %rd20;", "u32", "u32", x, y)
    products = [int(a) * int(b) for a, b in zip(x, y, strict=True)]
    assert [int(h) << 32 | int(v) for h, v in zip(high, low, strict=True)] == products


def test_conversions():
    assert applied("cvt.rzi.s32.f32 {0}, {1};", "f32", "s32", X)[:9].tolist() == [0, 0, 2**31 - 1, -(2**31), 0, 1, -1, 2, -2]
    np.testing.assert_array_equal(applied("cvt.rn.f32.s32 {0}, {1};", "s32", "f32", WHOLE), WHOLE.astype(np.float32))
    np.testing.assert_array_equal(applied("cvt.rn.f32.f64 {0}, {1};", "f64", "f32", X), X.astype(np.float32))
    halves = applied("cvt.rn.f16.f32 %h1, {1};\nmov.b16 {0}, %h1;", "f32", "b16", X)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(halves.view(np.float16), X.astype(np.float32).astype(np.float16))
    np.testing.assert_array_equal(
        applied("mov.b32 {{%h1, %h2}}, {1};\nmov.b32 {0}, {{%h2, %h1}};", "b32", "b32", WHOLE & 0xFFFFFFFF),
        np.array([(v >> 16 | v << 16) & 0xFFFFFFFF for v in (WHOLE & 0xFFFFFFFF).tolist()], np.uint32),
    )


def test_bfloat16_is_rounded_to_nearest_even():
    import torch

    x = np.concatenate([X, 1 + np.arange(COUNT) * 2.0**-9])[::2].astype(np.float32)
    bits = applied("cvt.rn.bf16.f32 {0}, {1};", "f32", "b16", x)
    truth = torch.tensor(x).bfloat16()
    number = np.isfinite(x)
    np.testing.assert_array_equal(bits[number], truth.view(torch.int16).numpy().view(np.uint16)[number])
    back = applied("cvt.f32.bf16 {0}, {1};", "b16", "f32", bits)
    np.testing.assert_array_equal(back, truth.float().numpy())


def test_vectors_and_narrow_numbers_of_memory():
    """Two and four at once; bytes and halves, with their signs."""
    x, result = np.arange(4 * COUNT, dtype=np.int32), np.zeros(4 * COUNT, np.int32)
    place = "mul.wide.u32 %rd20, %r0, 16;\nadd.s64 %rd21, %rd20, %rd0;\nadd.s64 %rd22, %rd20, %rd1;\n"
    load = "ld.global.nc.v4.u32 {%r1, %r2, %r3, %r4}, [%rd21];\n"
    counters = run(place + load + "st.global.v2.u32 [%rd22], {%r4, %r3};\nst.volatile.global.v2.u32 [%rd22+8], {%r2, %r1};", x, result)
    assert result.reshape(-1, 4).tolist() == x.reshape(-1, 4)[:, ::-1].tolist()
    # 16 bytes of a lane are 16 sectors a warp; 8 of every 16 touch as many.
    assert [(a.kind, a.bytes, a.requests, a.lanes, a.sectors) for a in counters.accesses.values()] == [
        ("ld", 16, 2, COUNT, 32),
        ("st", 8, 2, COUNT, 32),
        ("st", 8, 2, COUNT, 32),
    ]
    for kind in ("s8", "u8", "s16", "u16"):
        of = ptx.TYPES[kind]
        narrow, wide = rng.integers(-100, 100, COUNT).astype(of), np.zeros(COUNT, np.int32)
        run(moved(kind, "ld", "%h1", 0) + f"cvt.s32.{kind} %r1, %h1;" + moved("s32", "st", "%r1", 1), narrow, wide)
        assert wide.tolist() == narrow.tolist()


def test_braces_have_their_own_registers():
    """As inline assembly has: the same names, of other types, hide those outside."""
    result = np.zeros(COUNT, np.int64)
    body = """
    .loc 1 2 3
    mov.u32 %r1, 5;
    { .reg .b64 %r1; mov.u64 %r1, 0x100000002; { .reg .pred %r1; setp.eq.u32 %r1, 0, 0; } mov.b64 %rd20, %r1; }
    {   .reg .b32 t; mov.u32 t, %r1; cvt.u64.u32 %rd21, t; }
    add.s64 %rd20, %rd20, %rd21;
    """
    run(body + moved("s64", "st", "%rd20", 0), result)
    assert (result == 0x100000007).all()


def test_variables_of_a_program():
    """Initialised or zero, in global and constant memory; what the launch gives of shared memory is behind the rest."""
    text = """
.const .align 4 .f32 ones[3] = {0f3F800000, 0f40000000};
.global .align 4 .b8 bytes[8] = {1, 2, 3, 4};
.global .align 4 .u32 seven = 7;
.extern .shared .align 16 .b8 dynamic[];
.shared .align 4 .b8 place[20];
.entry other(.param .u64 q) { ret; }
.entry tested(.param .u64 p0, .param .b32 scale) { ret; }
"""
    kernel = ptx.Kernel(text, "tested")
    assert (kernel.name, kernel.parameters) == ("tested", [("u64", "p0"), ("b32", "scale")])
    assert {name: values.tolist() for name, values in kernel.constants.items()} == {
        "ones": [1, 2, 0],
        "bytes": [1, 2, 3, 4, 0, 0, 0, 0],
        "seven": [7],
    }
    assert (kernel.shared, kernel.shared_bytes) == ({"place": 0, "dynamic": 32}, 32)
    with pytest.raises(ptx.PTXError, match="more than a number"):
        ptx.Kernel(".entry k(.param .align 8 .b8 p[16]) { ret; }")


def test_a_float_for_bits_is_its_bits():
    text = """
.entry tested(.param .u64 p0, .param .b32 scale)
{
    .reg .b64 %rd<2>;
    .reg .b32 %f<2>;
    ld.param.u64 %rd1, [p0];
    ld.param.b32 %f1, [scale];
    st.global.b32 [%rd1], %f1;
    ret;
}
"""
    x, memory = np.zeros(1, np.float32), ptx.Memory()
    memory.add(x.ctypes.data, x.view(np.uint8))
    for value in (1.5, np.float32(2.5)):
        ptx.execute(ptx.Kernel(text), (1,), (1,), [x.ctypes.data, value], memory)
        assert x[0] == value


def test_views_are_of_one_memory():
    """Inside, overlapping or around what is known; a new allocation at an old one's address is new."""
    whole = np.zeros(400, np.uint8)
    begin = whole.ctypes.data

    def known(*views):
        memory = ptx.Memory()
        for start, stop, initialised in views:
            memory.add(begin + start, whole[start:stop], initialised)
        return [(a.address - begin, a.array.size, int(a.written.sum())) for a in memory.allocations.values()]

    assert known((0, 400, False), (40, 80, True)) == [(0, 400, 0)]
    assert known((0, 400, False), (0, 100, True)) == [(0, 400, 0)]
    assert known((0, 100, True), (0, 100, False)) == [(0, 100, 0)]
    assert known((100, 200, False), (0, 400, True)) == [(0, 400, 400)]
    assert known((0, 100, True), (60, 160, False)) == [(0, 160, 60)]
    assert known((0, 100, False), (200, 300, False), (50, 250, True)) == [(0, 300, 200)]
    assert known((0, 100, True), (100, 200, True)) == [(0, 100, 100), (100, 100, 100)]


def test_divergence_meets_again():
    """Even threads add 1 three times, odd ones not at all; all store after."""
    result = np.zeros(COUNT, np.int32)
    body = """
    and.b32 %r1, %r0, 1;
    mov.u32 %r2, 0;
    setp.eq.s32 %p0, %r1, 1;
    @%p0 bra $END;
    mov.u32 %r3, 0;
$AGAIN:
    add.s32 %r2, %r2, 1;
    add.s32 %r3, %r3, 1;
    setp.lt.s32 %p1, %r3, 3;
    @%p1 bra $AGAIN;
$END:
    """
    counters = run(body + moved("s32", "st", "%r2", 0), result)
    assert result.tolist() == [3, 0] * (COUNT // 2)
    assert counters.by_opcode["st.global.s32"] == 2  # two warps, together again


def test_a_called_function():
    text = """
.func (.param .b32 back) twice(.param .b32 given)
{
    .reg .f32 %f<3>;
    ld.param.f32 %f1, [given];
    add.f32 %f2, %f1, %f1;
    st.param.f32 [back+0], %f2;
    ret;
}
.visible .entry tested(.param .u64 p0)
{
    .reg .b64 %rd<4>;
    .reg .b32 %r<2>;
    .reg .f32 %f<3>;
    .reg .pred %p<2>;
    ld.param.u64 %rd1, [p0];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
    ld.global.f32 %f1, [%rd3];
    setp.gt.f32 %p1, %f1, 0f00000000;
    @!%p1 bra $DONE;
    { // callseq 0, 0
    .param .b32 param0;
    st.param.f32 [param0+0], %f1;
    .param .b32 retval0;
    call.uni (retval0),
    twice,
    (
    param0
    );
    ld.param.f32 %f1, [retval0+0];
    }
$DONE:
    st.global.f32 [%rd3], %f1;
    ret;
}
"""
    x, memory = np.linspace(-2, 2, COUNT, dtype=np.float32), ptx.Memory()
    expected = np.where(x > 0, 2 * x, x)
    memory.add(x.ctypes.data, x.view(np.uint8))
    ptx.execute(ptx.Kernel(text), (1,), (COUNT,), [x.ctypes.data], memory)
    np.testing.assert_array_equal(x, expected)


def test_warps_together():
    x, result = np.arange(COUNT, dtype=np.int32), np.zeros(COUNT, np.int32)
    shuffle = moved("s32", "ld", "%r1", 0) + "shfl.sync.{} %r2|%p0, %r1, {}, {}, -1;" + moved("s32", "st", "%r2", 1)
    run(shuffle.format("down.b32", 3, 31), x, result)
    assert result.tolist() == [v + 3 if v % 32 < 29 else v for v in range(COUNT)]
    run(shuffle.format("bfly.b32", 1, 31), x, result)
    assert result.tolist() == [v ^ 1 for v in range(COUNT)]
    run("setp.lt.u32 %p1, %r0, 3;\nvote.sync.ballot.b32 %r2, %p1, -1;" + moved("s32", "st", "%r2", 0), result)
    assert result.tolist() == [7] * 32 + [0] * 32
    run(shuffle.format("up.b32", 3, 0), x, result)
    assert result.tolist() == [v - 3 if v % 32 >= 3 else v for v in range(COUNT)]
    run(shuffle.format("idx.b32", 5, "0x181f"), x, result)  # segments of 8 lanes
    assert result.tolist() == [v // 8 * 8 + 5 for v in range(COUNT)]


@pytest.mark.parametrize(("mode", "first", "second"), [("any", 1, 0), ("all", 0, 0), ("uni", 0, 1)])
def test_votes(mode, first, second):
    """Of two warps: three of the first say yes, nobody of the second."""
    result = np.zeros(COUNT, np.int32)
    run(f"setp.lt.u32 %p1, %r0, 3;\nvote.sync.{mode}.pred %p2, %p1, -1;\nselp.s32 %r2, 1, 0, %p2;" + moved("s32", "st", "%r2", 0), result)
    assert result.tolist() == [first] * 32 + [second] * 32


def test_who_is_active():
    """Of a warp that has parted, each half knows of its own."""
    result = np.zeros(COUNT, np.uint32)
    body = """
    and.b32 %r1, %r0, 1;
    setp.eq.s32 %p0, %r1, 1;
    @%p0 bra $ODD;
    activemask.b32 %r2;
    bra $END;
$ODD:
    activemask.b32 %r2;
$END:
    """
    run(body + moved("u32", "st", "%r2", 0), result)
    assert result.tolist() == [0x55555555, 0xAAAAAAAA] * (COUNT // 2)
    run("activemask.b32 %r2;" + moved("u32", "st", "%r2", 0), result)
    assert (result == 0xFFFFFFFF).all()


def test_lanes_and_those_beside_them():
    found = {}
    for name in ("laneid", "warpid", "lanemask_eq", "lanemask_lt", "lanemask_le", "lanemask_gt", "lanemask_ge"):
        found[name] = np.zeros(COUNT, np.uint32)
        run(f"mov.u32 %r2, %{name};" + moved("u32", "st", "%r2", 0), found[name])
    lanes, every = [t % 32 for t in range(COUNT)], 2**32 - 1
    assert found["laneid"].tolist() == lanes
    assert found["warpid"].tolist() == [t // 32 for t in range(COUNT)]
    masks = {"eq": lambda i: 1 << i, "lt": lambda i: (1 << i) - 1, "le": lambda i: (2 << i) - 1}
    masks |= {"gt": lambda i: every ^ masks["le"](i), "ge": lambda i: every ^ masks["lt"](i)}
    for name, mask in masks.items():
        assert found[f"lanemask_{name}"].tolist() == [mask(i) for i in lanes]


def test_kinds_of_atomics():
    """Threads one after the other, which the numbers they get say."""
    total, before = np.zeros(1, np.uint32), np.zeros(COUNT, np.uint32)
    body = "atom.global.{} %r1, [%rd0], %r2;" + moved("u32", "st", "%r1", 1)
    run("mov.u32 %r2, 4;\n" + body.format("inc.u32"), total, before)
    assert before.tolist() == [t % 5 for t in range(COUNT)]
    total[:] = 3
    run("mov.u32 %r2, 9;\n" + body.format("dec.u32"), total, before)
    assert before.tolist() == [(3 - t) % 10 for t in range(COUNT)]
    run("mov.u32 %r2, %r0;\n" + body.format("exch.b32"), total, before)
    assert before[1:].tolist() == list(range(COUNT - 1))
    numbers = np.arange(7, 7 + COUNT, dtype=np.uint32)
    of_all = {"min.u32": np.minimum, "max.u32": np.maximum, "and.b32": np.bitwise_and, "or.b32": np.bitwise_or, "xor.b32": np.bitwise_xor}
    for name, both in of_all.items():
        total[:] = 40
        run("add.u32 %r2, %r0, 7;\n" + body.format(name), total, before)
        assert before.tolist() == [40, *both.accumulate(np.append(np.uint32(40), numbers))[1:-1]], name
        assert total[0] == both.reduce(numbers, initial=np.uint32(40)), name
    total[:] = 3
    # Who finds its own number puts the next there.
    run("add.u32 %r3, %r0, 1;\natom.global.cas.b32 %r1, [%rd0], %r0, %r3;" + moved("u32", "st", "%r1", 1), total, before)
    assert before.tolist() == [3, 3, 3, *range(3, COUNT)]
    assert total[0] == COUNT


def test_atomics_add_up():
    total = np.zeros(1, np.int32)
    run("mov.u32 %r1, 1;\natom.global.add.s32 %r2, [%rd0], %r1;", total)
    assert total[0] == COUNT


def test_sectors_and_bank_conflicts():
    x, result = np.zeros(COUNT * 32, np.float32), np.zeros(COUNT, np.float32)
    counters = run(moved("f32", "ld", "%f1", 0) + moved("f32", "st", "%f1", 1), x, result)
    assert (counters.sectors_loaded, counters.sectors_stored, counters.sectors) == (8, 8, 16)
    strided = "mul.wide.u32 %rd31, %r0, 128;\nadd.s64 %rd31, %rd31, %rd0;\nld.global.f32 %f1, [%rd31];"
    assert run(strided + moved("f32", "st", "%f1", 1), x, result).sectors_loaded == COUNT
    # Each warp's own request of the one sector, however many warps ask.
    assert run("ld.global.f32 %f1, [%rd0];", x, block=32, grid=200).sectors == 200
    shared = ".shared .align 4 .b8 place[8192];"
    for step, conflicts in ((4, 0), (8, 2), (128, 62)):  # bytes from thread to thread; of two warps
        body = f"mov.u32 %r1, place;\nmad.lo.s32 %r2, %r0, {step}, %r1;\nst.shared.u32 [%r2], %r0;"
        assert run(body, shared=shared).bank_conflicts == conflicts
    for step, conflicts in ((16, 0), (32, 8)):  # of 128 bits: a quarter of a warp at a time
        body = f"mov.u32 %r1, place;\nmad.lo.s32 %r2, %r0, {step}, %r1;\nst.shared.v4.u32 [%r2], {{%r0, %r0, %r0, %r0}};"
        assert run(body, shared=shared).bank_conflicts == conflicts


GLOBAL = np.zeros(COUNT, np.float32)
WRONG = {
    "out of bounds": (moved("f32", "ld", "%f1", 0).replace("%r0", "%r3").join(["add.u32 %r3, %r0, 1;\n", ""]), {}),
    "misaligned": ("add.s64 %rd1, %rd0, 4;\nld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd1];", {}),
    "nobody has written": (moved("f32", "ld", "%f1", 0), {"initialised": ()}),
    "race": ("st.global.u32 [%rd0], %r0;", {}),
    "not all threads": ("setp.lt.u32 %p0, %r0, 32;\n@%p0 bar.sync 0;", {}),
    "nobody has written: red": ("red.global.add.u32 [%rd0], %r0;", {"initialised": ()}),
    "nobody has written: ld.shared": ("mov.u32 %r1, place;\nld.shared.u32 %r2, [%r1];", {"shared": ".shared .align 4 .b8 place[4];"}),
    "race: .*st.global.u8": ("cvt.u64.u32 %rd1, %r0;\nshr.u64 %rd1, %rd1, 1;\nadd.s64 %rd1, %rd1, %rd0;\nst.global.u8 [%rd1], %r0;", {}),
    "race: .*p0 st": ("ld.global.u32 %r1, [%rd0];\nsetp.eq.u32 %p0, %r0, 63;\n@%p0 st.global.u32 [%rd0], %r0;", {}),
    "race: .*st.global.u32": ("red.global.add.u32 [%rd0], %r0;\nsetp.eq.u32 %p0, %r0, 5;\n@%p0 st.global.u32 [%rd0], %r0;", {}),
    # A byte of what another thread wrote four of.
    "race: .*ld.global.u8": (
        moved("u32", "st", "%r0", 0)
        + "xor.b32 %r1, %r0, 1;\nmul.wide.u32 %rd1, %r1, 4;\nadd.s64 %rd1, %rd1, %rd0;\nld.global.u8 %h1, [%rd1+3];",
        {},
    ),
    "no such operation": ("wmma.load;", {}),
    "no such operation here: bar.warp": ("bar.warp.sync -1;", {}),
    "no such operation here: add.cc": ("add.cc.u32 %r1, %r0, %r0;", {}),
    "no such operation here: atom": ("atom.global.other.u32 %r1, [%rd0], %r0;", {}),
    "no such rounding": ("div.rz.f32 %f1, %f2, %f3;", {}),
    "no such type": ("add.f16x2 %r1, %r0, %r0;", {}),
    "no such operand": ("mov.u32 %r1, %clock;", {}),
    "a label twice": ("$A:\n$A:\nmov.u32 %r1, 0;", {}),
    "no GPU has such a launch": ("mov.u32 %r1, 0;", {"block": 1025}),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said(what):
    body, more = WRONG[what]
    with pytest.raises(ptx.PTXError, match=what):
        run(body, GLOBAL.copy(), **more)


def test_what_no_argument_is_in_is_out_of_bounds():
    """Though it is known: a kernel that goes past one array's end into the next reads what it was not given."""
    both = np.zeros(2 * COUNT, np.float32)
    memory = ptx.Memory()
    for half in (both[:COUNT], both[COUNT:]):
        memory.add(half.ctypes.data, half.view(np.uint8))

    def load(offset):
        text = f"""
        .version 8.0
        .target sm_80
        .visible .entry past(.param .u64 p)
        {{
            .reg .b64 %rd<2>;
            .reg .f32 %f<1>;
            ld.param.u64 %rd0, [p];
            ld.global.f32 %f0, [%rd0+{offset}];
            ret;
        }}"""
        ptx.execute(ptx.Kernel(text), (1,), (32,), [both.ctypes.data], memory)

    load(4 * COUNT - 4)
    with pytest.raises(ptx.PTXError, match="out of bounds"):
        load(4 * COUNT)


def test_a_barrier_orders_a_block_and_no_other():
    """Global memory: a neighbour's number, which is of the same block, or of the next."""
    result = np.zeros(2 * COUNT, np.int32)
    body = moved("s32", "st", "%r0", 0) + "bar.sync 0;\nxor.b32 %r0, %r0, {};" + moved("s32", "ld", "%r1", 0)
    run(body.format(1), result, grid=2)
    assert result.tolist() == list(range(2 * COUNT))
    with pytest.raises(ptx.PTXError, match="race"):
        run(body.format(COUNT), result, grid=2)


def test_reads_by_all_blocks_then_a_write_is_a_race_of_any_later_one():
    """What several threads read is not forgotten when one of them reads again."""
    body = "ld.global.u32 %r1, [%rd0];\n" * 2 + "bar.sync 0;\nsetp.eq.u32 %p0, %r0, {};\n@%p0 st.global.u32 [%rd0], %r0;"
    result = np.zeros(1, np.int32)
    run(body.format(COUNT - 1), result)
    assert result[0] == COUNT - 1
    with pytest.raises(ptx.PTXError, match="race"):
        run(body.format(0), result, grid=2)


def test_generic_addresses():
    """A place of shared memory that instructions reach without being told the space, and back."""
    result = np.zeros(COUNT, np.int32)
    body = """
    shl.b32 %r1, %r0, 2;
    mov.u64 %rd20, place;
    cvt.u64.u32 %rd21, %r1;
    add.s64 %rd21, %rd21, %rd20;
    cvta.shared.u64 %rd22, %rd21;
    st.u32 [%rd22], %r0;
    bar.sync 0;
    cvta.to.shared.u64 %rd23, %rd22;
    ld.shared.u32 %r2, [%rd23];
    cvta.to.global.u64 %rd1, %rd0;
    """
    run(body + moved("s32", "st", "%r2", 1), result, shared=".shared .align 4 .b8 place[256];")
    assert result.tolist() == list(range(COUNT))


def test_what_a_gpu_orders_or_fetches_moves_no_number():
    x, result = np.arange(COUNT, dtype=np.float32), np.zeros(COUNT, np.float32)
    load, store = moved("f32", "ld", "%f1", 0).replace("ld.", "ldu."), moved("f32", "st", "%f1", 1)
    between = ("membar.gl", "fence.acq_rel.gpu", "nanosleep.u32 20", "prefetch.global.L2 [%rd0]", "prefetchu.L1 [%rd0]")
    counters = run(load + "".join(f"{one};\n" for one in between) + store, x, result)
    assert result.tolist() == x.tolist()
    assert [counters.by_opcode[name] for name in ("ldu.global.f32", *(one.split()[0] for one in between))] == [2] * 6
    assert counters.sectors == counters.sectors_loaded + counters.sectors_stored == 16  # a prefetch is no request


def test_a_fence_is_no_barrier():
    """It orders one thread's writes: a neighbour may read before them all the same."""
    body = moved("s32", "st", "%r0", 0) + "{}\nxor.b32 %r0, %r0, 1;" + moved("s32", "ld", "%r1", 0)
    run(body.format("bar.sync 0;"), np.zeros(COUNT, np.int32))
    for fence in ("membar.cta;", "fence.acq_rel.cta;"):
        with pytest.raises(ptx.PTXError, match="race"):
            run(body.format(fence), np.zeros(COUNT, np.int32))


def test_a_barrier_parts_who_writes_from_who_reads():
    shared = ".shared .align 4 .b8 place[256];"
    body = """
    shl.b32 %r1, %r0, 2;
    mov.u32 %r2, place;
    add.s32 %r3, %r2, %r1;
    st.shared.u32 [%r3], %r0;
    {barrier}
    xor.b32 %r4, %r1, 252;
    add.s32 %r4, %r2, %r4;
    ld.shared.u32 %r5, [%r4];
    """
    result = np.zeros(COUNT, np.int32)
    run(body.replace("{barrier}", "bar.sync 0;") + moved("s32", "st", "%r5", 0), result, shared=shared)
    assert result.tolist() == list(range(COUNT))[::-1]
    with pytest.raises(ptx.PTXError, match="race"):
        run(body.replace("{barrier}", "") + moved("s32", "st", "%r5", 0), result, shared=shared)


def test_every_operation_is_in_a_test():
    """By the opcodes that the programs above are made of."""
    written = Path(__file__).read_text()
    assert [name for name in OPERATIONS if not re.search(rf"(?:\\n|[^\w.%]){name}\.[\w{{]", written)] == []


# Bugs seeded in Numba's kernels


def mutant(function, signature, *arrays, block=64, grid=2, initialised=None):
    """The counters of a kernel of Numba's; an int among the arrays is passed as it is."""
    from fastpool.kernels.cuda.compile import compiling
    from numba import cuda

    with compiling():
        text, _ = cuda.compile_ptx(function, signature, cc=(8, 0))
    memory = ptx.Memory()
    for i, array in enumerate(arrays):
        if isinstance(array, np.ndarray):
            memory.add(array.ctypes.data, array.view(np.uint8), initialised is None or i in initialised)
    given = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in arrays]
    return ptx.execute(ptx.Kernel(text), (grid,), (block,), given, memory), text


@emulated.needs_toolchain
def test_seeded_bugs_are_caught():
    from numba import cuda, float32, types, uint32

    pointer, x, y = types.CPointer(types.float32), rng.normal(size=128).astype(np.float32), np.zeros(128, np.float32)

    def summed(barrier):
        def kernel(x, y):
            held, t = cuda.shared.array(64, float32), uint32(cuda.threadIdx.x)
            held[t] = x[uint32(uint32(cuda.blockIdx.x * 64) + t)]
            half = uint32(32)
            cuda.syncthreads()
            while half > uint32(0):
                if t < half:
                    held[t] += held[uint32(t + half)]
                if barrier:
                    cuda.syncthreads()
                half = uint32(half >> uint32(1))
            if t == uint32(0):
                y[cuda.blockIdx.x] = held[0]

        return kernel

    mutant(summed(True), (pointer, pointer), x, y)
    np.testing.assert_allclose(y[:2], x.reshape(2, 64).sum(1), rtol=1e-5)
    with pytest.raises(ptx.PTXError, match="race"):
        mutant(summed(False), (pointer, pointer), x, y)

    def unguarded(x, y):
        t = uint32(cuda.blockIdx.x * 64 + cuda.threadIdx.x)
        y[t] = x[t]

    with pytest.raises(ptx.PTXError, match="out of bounds"):
        mutant(unguarded, (pointer, pointer), x[:100].copy(), y[:100].copy())

    def accumulates(x, y):
        t = uint32(cuda.blockIdx.x * 64 + cuda.threadIdx.x)
        y[t] += x[t]

    with pytest.raises(ptx.PTXError, match="nobody has written"):
        mutant(accumulates, (pointer, pointer), x, y.copy(), initialised=(0,))

    def not_atomic(x, y):
        y[0] += x[uint32(cuda.threadIdx.x)]

    with pytest.raises(ptx.PTXError, match="race"):
        mutant(not_atomic, (pointer, pointer), x, y.copy())

    def divergent(x, y):
        t = uint32(cuda.threadIdx.x)
        if t < uint32(32):
            cuda.syncthreads()
            y[t] = x[t]
        else:
            y[t] = x[t]
            cuda.syncthreads()
            y[t] = x[t] + x[t]

    with pytest.raises(ptx.PTXError, match="not all threads"):
        mutant(divergent, (pointer, pointer), x, y.copy(), grid=1)

    def doubled(x, y):
        t = uint32(cuda.blockIdx.x * 64 + cuda.threadIdx.x)
        y[t] = x[t] * 0.1

    assert re.search(r"\.f64", mutant(doubled, (pointer, pointer), x, y)[1])

    def transposed(x, y):
        t = uint32(cuda.blockIdx.x * 64 + cuda.threadIdx.x)
        y[t] = x[uint32(uint32(uint32(t & uint32(7)) << uint32(4)) + uint32(t >> uint32(3)))]

    loads = [a for a in mutant(transposed, (pointer, pointer), x, y)[0].accesses.values() if a.kind == "ld"]
    assert loads[0].sectors / loads[0].requests > 4  # what follows each other is 4
