"""The executor of PTX: each operation against numpy, and that seeded bugs of kernels are caught."""

import math
import re

import emulated
import numpy as np
import ptx
import pytest

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
    shared = ".shared .align 4 .b8 place[8192];"
    for step, conflicts in ((4, 0), (8, 2), (128, 62)):  # bytes from thread to thread; of two warps
        body = f"mov.u32 %r1, place;\nmad.lo.s32 %r2, %r0, {step}, %r1;\nst.shared.u32 [%r2], %r0;"
        assert run(body, shared=shared).bank_conflicts == conflicts


GLOBAL = np.zeros(COUNT, np.float32)
WRONG = {
    "out of bounds": (moved("f32", "ld", "%f1", 0).replace("%r0", "%r3").join(["add.u32 %r3, %r0, 1;\n", ""]), {}),
    "misaligned": ("add.s64 %rd1, %rd0, 4;\nld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd1];", {}),
    "nobody has written": (moved("f32", "ld", "%f1", 0), {"initialised": ()}),
    "race": ("st.global.u32 [%rd0], %r0;", {}),
    "not all threads": ("setp.lt.u32 %p0, %r0, 32;\n@%p0 bar.sync 0;", {}),
    "no such operation": ("wmma.load;", {}),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said(what):
    body, more = WRONG[what]
    if what == "not all threads":
        body = "setp.ge.u32 %p0, %r0, 32;\n@%p0 bra $OUT;\nbar.sync 0;\n$OUT:\nmov.u32 %r1, 0;"
    with pytest.raises(ptx.PTXError, match=what):
        run(body, GLOBAL.copy(), **more)


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


# Bugs seeded in Numba's kernels


def mutant(function, signature, *arrays, block=64, grid=2, initialised=None):
    """The counters of a kernel of Numba's; an int among the arrays is passed as it is."""
    from fastpool.kernels.cuda.compile import _for
    from numba import cuda

    with _for((8, 0)):
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

    def doubled(x, y):
        t = uint32(cuda.blockIdx.x * 64 + cuda.threadIdx.x)
        y[t] = x[t] * 0.1

    assert re.search(r"\.f64", mutant(doubled, (pointer, pointer), x, y)[1])

    def transposed(x, y):
        t = uint32(cuda.blockIdx.x * 64 + cuda.threadIdx.x)
        y[t] = x[uint32(uint32(uint32(t & uint32(7)) << uint32(4)) + uint32(t >> uint32(3)))]

    loads = [a for a in mutant(transposed, (pointer, pointer), x, y)[0].accesses.values() if a.kind == "ld"]
    assert loads[0].sectors / loads[0].requests > 4  # what follows each other is 4
