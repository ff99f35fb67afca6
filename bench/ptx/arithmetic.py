"""What computes: conversions, arithmetic, comparisons and bits."""

import numpy as np

from .program import UNSIGNED, PTXError, operation

TINY = float(np.finfo(np.float32).tiny)
"""The least float32 that is not subnormal."""
_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _flushed(value, i):
    """Subnormal float32 as zero, where an opcode says so."""
    if i.flushes and value.dtype == np.float32:
        value = np.where(np.abs(value) < np.float32(TINY), np.copysign(np.float32(0), value), value)
    return value


def _given(m, i, name, dtype=None):
    """An operand of arithmetic."""
    return _flushed(m.read(name, dtype or i.type), i)


def _rounded(value, i, dtype):
    """Float64, or what rounds like the exact value, in a float type by an opcode's direction."""
    found = value.astype(dtype)
    if i.towards is None:
        return found
    past = found > value if i.towards < 0 else found < value if i.towards > 0 else np.abs(found) > np.abs(value)
    return np.where(past, np.nextafter(found, dtype.type(i.towards)), found)


def _finished(value, i):
    """With what an opcode's modifiers do to a result."""
    value = np.asarray(value)
    if i.saturates and value.dtype.kind == "f":
        value = np.where(np.isnan(value), 0, np.clip(value, 0, 1)).astype(value.dtype)
    return _flushed(value, i)


@operation("cvt")
def _convert(m, i):
    to, of = i.opcode[-2:]
    if "bf16" in (to, of):
        return _convert_bfloat16(m, i, to, of)
    to, of = i.type_of(to), i.type
    value = _given(m, i, i.operands[1], of)
    rounding = next((_ROUND[part] for part in i.opcode if part in _ROUND), None)
    if of.kind == "f" and rounding:
        value = rounding(value)
    if of.kind == "f" and to.kind != "f":
        limits = np.iinfo(to)
        inside = np.where(np.isnan(value), 0, value).astype(np.longdouble)
        value = np.clip(inside, limits.min, limits.max)
    elif to.kind == "f":
        value = _rounded(value if of.kind == "f" else value.astype(np.longdouble), i, to)
    elif "sat" in i.opcode:
        limits = np.iinfo(to)
        value = np.array([min(max(int(v), limits.min), limits.max) for v in value], to)
    return m.write(i.operands[0], _finished(value.astype(to), i))


def _convert_bfloat16(m, i, to, of):
    """From or to the upper half of a float32, rounded to nearest even."""
    target, source = i.operands
    if (of, to) == ("bf16", "f32"):
        return m.write(target, m.read(source, "b16").astype(np.uint32) << np.uint32(16))
    if (of, to) != ("f32", "bf16") or "rn" not in i.opcode:
        raise PTXError(f"no such operation here: {i.text}")
    bits = m.read(source, "b32")
    nearest = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return m.write(target, np.where(np.isnan(bits.view(np.float32)), 0x7FFF, nearest).astype(np.uint16))


# Arithmetic


def _fused(x, y, z, i):
    """x * y + z with one rounding: of narrower floats in float64, rounded to odd there (Boldo and Melquiond, 2008)."""
    if x.dtype == np.float64:
        if i.towards is not None:
            raise PTXError(f"no such rounding here: {i.text}")
        return (x.astype(np.longdouble) * y + z).astype(np.float64)
    product, dtype = np.multiply(x, y, dtype=np.float64), x.dtype
    total = product + z
    if dtype == np.float32 and i.towards is None:
        # Rounded twice is not rounded once only where the first ends half way between two numbers; subnormal ones lie elsewhere.
        half_way, size = total.view(np.int64) & 0x1FFFFFFF == 0x10000000, np.abs(total)
        if not half_way.any() and not (size.min() < TINY and ((size < TINY) & (size > 0)).any()):
            return total.astype(np.float32)
    part = total - product
    lost = (product - (total - part)) + (z - part)
    if not lost.any():
        return _rounded(total, i, dtype)
    bits = np.ascontiguousarray(total).view(np.int64)
    odd = np.isfinite(total) & (lost != 0) & (bits & 1 == 0)
    total = np.where(odd, bits + np.where((lost > 0) == (total > 0), 1, -1), bits).view(np.float64)
    return _rounded(total, i, dtype)


def _quotient(x, y):
    if x.dtype.kind == "f":
        return x / y
    if x.dtype.kind == "u":
        return x // y
    floor = x // y
    return floor + ((floor * y != x) & ((x < 0) != (y < 0))).astype(x.dtype)


def _high(x, y):
    """The upper half of a product."""
    if x.itemsize < 8:
        wide = np.dtype(f"{x.dtype.kind}{2 * x.itemsize}")
        return ((x.astype(wide) * y.astype(wide)) >> wide.type(8 * x.itemsize)).astype(x.dtype)
    return np.array([(int(a) * int(b)) >> 64 for a, b in np.broadcast(x, y)]).astype(x.dtype)


def _wide(x):
    return x.astype(f"{x.dtype.kind}{2 * x.itemsize}")


def _product(x, y, i):
    if "wide" in i.opcode:
        return _wide(x) * _wide(y)
    return _high(x, y) if "hi" in i.opcode else x * y


def _directed(plain, fused):
    """An operation that rounds as its opcode says; ``fused`` is the factors and addend that it is of floats."""

    def apply(x, y, i):
        if i.towards is None:
            return plain(x, y, i)
        if fused is None:
            raise PTXError(f"no such rounding here: {i.text}")
        return _fused(*fused(*np.broadcast_arrays(x, y), x.dtype.type(1)), i)

    return apply


def _least(plain, strict, of_zeros):
    def apply(x, y, i):
        if x.dtype.kind != "f":
            return strict(x, y)
        zeros = (x == 0) & (y == 0)
        return np.where(zeros, of_zeros(x, y), (strict if "NaN" in i.opcode else plain)(x, y))

    return apply


BINARY = {
    "add": _directed(lambda x, y, i: x + y, lambda x, y, one: (x, one, y)),
    "sub": _directed(lambda x, y, i: x - y, lambda x, y, one: (x, one, -y)),
    "mul": _directed(_product, lambda x, y, one: (x, y, np.copysign(one - one, x * y))),
    "div": _directed(lambda x, y, i: _quotient(x, y), None),
    "rem": lambda x, y, i: x - _quotient(x, y) * y,
    # -0 is below +0.
    "min": _least(np.fmin, np.minimum, lambda x, y: -(-x - y)),
    "max": _least(np.fmax, np.maximum, lambda x, y: x + y),
    "and": lambda x, y, i: x & y,
    "or": lambda x, y, i: x | y,
    "xor": lambda x, y, i: x ^ y,
    "copysign": lambda x, y, i: np.copysign(y, x),
}


@operation(*BINARY)
def _binary(m, i):
    target, x, y = i.operands
    m.write(target, _finished(BINARY[i.opcode[0]](_given(m, i, x), _given(m, i, y), i), i))


@operation("fma", "mad")
def _multiply_add(m, i):
    target, *rest = i.operands
    x, y = _given(m, i, rest[0]), _given(m, i, rest[1])
    if i.type.kind == "f":
        value = _fused(x, y, _given(m, i, rest[2]), i)
    else:
        value = _product(x, y, i)
        value = value + m.read(rest[2], value.dtype)
    m.write(target, _finished(value, i))


@operation("shl", "shr")
def _shift(m, i):
    target, x, count = i.operands
    value, by = m.read(x, i.type), m.read(count, "u32").astype(np.int64)
    bits = 8 * i.type.itemsize
    if i.opcode[0] == "shr" and i.type.kind == "i":
        return m.write(target, value >> np.minimum(by, bits - 1).astype(value.dtype))
    value = value.view(UNSIGNED[i.type.itemsize])
    few = np.minimum(by, bits - 1).astype(value.dtype)
    return m.write(target, np.where(by >= bits, 0, value << few if i.opcode[0] == "shl" else value >> few).astype(value.dtype))


UNARY = {
    "neg": np.negative,
    "abs": np.abs,
    "not": np.invert,
    "sqrt": np.sqrt,
    "rcp": lambda x: (1 / x).astype(x.dtype),
    "rsqrt": lambda x: (1 / np.sqrt(x)).astype(x.dtype),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "popc": lambda x: np.bitwise_count(x).astype(np.uint32),
    "clz": lambda x: np.array([8 * x.itemsize - int(v).bit_length() for v in x.view(UNSIGNED[x.itemsize])], np.uint32),
    "brev": lambda x: np.array([int(f"{int(v):0{8 * x.itemsize}b}"[::-1], 2) for v in x], x.dtype),
}


@operation(*UNARY)
def _unary(m, i):
    if i.towards is not None:
        raise PTXError(f"no such rounding here: {i.text}")
    m.write(i.operands[0], _finished(UNARY[i.opcode[0]](_given(m, i, i.operands[1])), i))


_COMPARE = {
    "eq": np.equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    "num": lambda x, y: ~(np.isnan(x) | np.isnan(y)),
    "nan": lambda x, y: np.isnan(x) | np.isnan(y),
}


def _compared(name, x, y):
    if name == "ne":
        return (x != y) & (x == x) & (y == y)
    if name in _COMPARE:
        return _COMPARE[name](x, y)
    # equ, neu, ltu ...: true of NaN too.
    return _compared(name[:-1], x, y) | np.isnan(x) | np.isnan(y)


_JOIN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _relation(m, i, x, y, joined, dtype):
    """(whether two operands compare so, and whether they do not), each joined with a predicate where the opcode says how."""
    found = _compared(i.opcode[1], _given(m, i, x, dtype), _given(m, i, y, dtype))
    join = next((f for name, f in _JOIN.items() if name in i.opcode[2:]), None)
    return (found, ~found) if join is None else tuple(join(f, m.predicate(joined[0])) for f in (found, ~found))


@operation("setp")
def _set_predicate(m, i):
    target, x, y, *joined = i.operands
    for register, value in zip(target.split("|"), _relation(m, i, x, y, joined, i.type), strict=False):
        m.write(register, value)


@operation("set")
def _set(m, i):
    """1 of floats, every bit of integers."""
    target, x, y, *joined = i.operands
    to = i.type_of(i.opcode[-2])
    found, _ = _relation(m, i, x, y, joined, i.type)
    m.write(target, np.where(found, to.type(1) if to.kind == "f" else ~to.type(0), to.type(0)))


@operation("slct")
def _select_by_sign(m, i):
    target, x, y, sign = i.operands
    to = i.type_of(i.opcode[-2])
    m.write(target, np.where(_given(m, i, sign) >= 0, m.read(x, to), m.read(y, to)).astype(to))


@operation("testp")
def _test(m, i):
    x = m.read(i.operands[1], i.type)
    tests = {"finite": np.isfinite, "infinite": np.isinf, "notanumber": np.isnan, "number": lambda v: ~np.isnan(v)}
    m.write(i.operands[0], tests[i.opcode[1]](x))


def _field(m, begin, length, bits):
    """Where a field begins and ends, within a number of this many bits."""
    begin, length = (m.read(v, "u32").astype(np.int64) & 255 for v in (begin, length))
    return np.minimum(begin, bits), np.minimum(begin + length, bits)


def _ones(count, kind):
    """Numbers of that many ones."""
    bits = 8 * np.dtype(kind).itemsize
    return np.where(count >= bits, ~kind(0), (kind(1) << np.minimum(count, bits - 1).astype(kind)) - kind(1))


@operation("bfe")
def _extract(m, i):
    target, x, *field = i.operands
    kind, bits = UNSIGNED[i.type.itemsize], 8 * i.type.itemsize
    begin, end = _field(m, *field, bits)
    value = m.read(x, i.type)
    found = (value.view(kind) >> np.minimum(begin, bits - 1).astype(kind)) & _ones(end - begin, kind)
    if i.type.kind == "i":  # the sign is the field's last bit, or the number's where the field is beyond it
        length = m.read(field[1], "u32").astype(np.int64) & 255
        negative = (value.view(kind) >> np.clip(end - 1, 0, bits - 1).astype(kind)) & kind(1) & (length > 0)
        found = found | np.where(negative, ~_ones(end - begin, kind), kind(0))
    m.write(target, found.astype(kind))


@operation("bfi")
def _insert(m, i):
    target, part, whole, *field = i.operands
    kind, bits = UNSIGNED[i.type.itemsize], 8 * i.type.itemsize
    begin, end = _field(m, *field, bits)
    mask = _ones(end, kind) & ~_ones(begin, kind)
    shifted = m.read(part, i.type) << np.minimum(begin, bits - 1).astype(kind)
    m.write(target, (m.read(whole, i.type) & ~mask) | (shifted & mask))


@operation("prmt")
def _permute(m, i):
    target, low, high, selector = i.operands
    both = m.read(low, "u32").astype(np.uint64) | (m.read(high, "u32").astype(np.uint64) << np.uint64(32))
    chosen, found = m.read(selector, "u32").astype(np.uint64), np.uint64(0)
    for byte in range(4):
        which = chosen >> np.uint64(4 * byte)
        value = (both >> ((which & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        signs = np.where(value & np.uint64(128), np.uint64(255), np.uint64(0))
        found = found | (np.where(which & np.uint64(8), signs, value) << np.uint64(8 * byte))
    m.write(target, found.astype(np.uint32))


@operation("shf")
def _funnel(m, i):
    target, low, high, count = i.operands
    low, high, count = (m.read(v, "u32").astype(np.uint64) for v in (low, high, count))
    count = count & np.uint64(31) if "wrap" in i.opcode else np.minimum(count, 32)
    both = (high << np.uint64(32)) | low
    m.write(target, ((both >> count) if i.opcode[1] == "r" else (both << count) >> np.uint64(32)).astype(np.uint32))


@operation("lop3")
def _logic(m, i):
    target, x, y, z, table = i.operands[:5]
    x, y, z = (m.read(v, "u32") for v in (x, y, z))
    found, table = np.uint32(0), int(table, 0)
    for row in range(8):
        if table >> row & 1:
            found = found | ((x if row & 4 else ~x) & (y if row & 2 else ~y) & (z if row & 1 else ~z))
    m.write(target, found)
