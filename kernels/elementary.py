"""exp, log, power, expm1, log1p, tanh, erf, decay and ndtr on "a number", in float32 and float64: for targets that have none of their own.

The usual three steps: range reduction (Cody & Waite, "Software Manual for the Elementary Functions", 1980), a minimax polynomial
(Remez; tests/test_elementary.py finds how near each could come), reconstruction.  log, and with it the exponent of power, is carried as an
unevaluated sum hi + lo (Dekker, "A Floating-Point Technique for Extending the Available Precision", 1971): x^p magnifies the relative
error of p * ln(x) up to 88 times in float32, 709 times in float64.

Largest errors seen, in ulp: exp 0.65, log 0.51, power 0.69; where the result is subnormal, and so rounded a second time, 0.77, -, 0.86.
expm1 1.10, log1p 0.67, tanh 0.96, erf 1.26 in float32, 2.3 in float64; decay 1.03, ndtr 0.74 of the last place of 1.  Zeros,
infinities and NaN as in C.
"""

from .number import absolute, bits_of, by_width, from_bits, fused, highest, like, polynomial, where

# (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2: e^r to 2^-27.7 and 2^-56.5.
EXP = (
    (0.49999994, 0.1666652, 0.041668393, 0.008368779, 0.0013814471),
    (
        0.5000000000000011,
        0.1666666666666641,
        0.04166666666652921,
        0.008333333333495598,
        0.001388888894391509,
        0.00019841269504804003,
        2.480149277146614e-05,
        2.7557587325091364e-06,
        2.763037526162264e-07,
        2.4999965173732404e-08,
    ),
)
# (atanh(s) / s - 1 - z / 3) / z^2, z = s^2 <= (3 - sqrt(8))^2: atanh(s) to 2^-36.5 and 2^-66.3.
ATANH = (
    (0.20000076, 0.14273567, 0.11709288),
    (
        0.1999999999999999,
        0.1428571428572255,
        0.11111111108769668,
        0.09090909434980693,
        0.07692278447571159,
        0.0666815824440493,
        0.058374187066636544,
        0.05994427762107517,
    ),
)
# erf(t) / t - 1 in t^2 for t <= 1: erf to 2^-28.5 and 2^-55.1.
ERF = (
    (0.12837917, -0.37612626, 0.112835854, -0.026853813, 0.005188328, -0.00080101984, 7.8538775e-05),
    (
        0.12837916709551256,
        -0.3761263890318352,
        0.11283791670944185,
        -0.02686617064311144,
        0.005223977606118201,
        -0.0008548325929299106,
        0.00012055293576377275,
        -1.4924712290816286e-05,
        1.6447131419811136e-06,
        -1.6206312501557555e-07,
        1.3710974567312202e-08,
        -7.779456921831154e-10,
    ),
)
# -ln(erfc(t)) in t - ERFC_AT for 1 <= t <= ERF_IS_ONE: erfc, to 2^-26.9 and 2^-54.8 of erf.
ERFC = (
    (5.364941, 4.4181595, 0.9237531, 0.016487272, -0.003543685, 0.000712722, -0.00018557259),
    (
        10.72036304198075,
        6.303753689003467,
        0.9573942188227795,
        0.007411891857589243,
        -0.0013533104902456094,
        0.00024569171757880614,
        -4.308222580011155e-05,
        7.115875152939774e-06,
        -1.0682662831400457e-06,
        1.3670126275237966e-07,
        -1.2033100888318784e-08,
        -1.372572938842211e-09,
        4.515843387549883e-10,
        8.210927329931558e-12,
        1.8378258064159525e-10,
        8.075015468858016e-12,
        -1.425913732957838e-11,
        -7.153251122070288e-12,
        -9.580006771475686e-13,
    ),
)
ERFC_AT, ERF_IS_ONE = (2.0, 3.0), (4.0, 6.0)
# -ln(ndtr(-t)) for 0 <= t <= 6 (8.5): ndtr to 2^-25.8 and 2^-54.5.  Beyond it rises faster, to where e^-that is 0.
NDTR = (
    (0.6931472, 0.7978857, 0.31829658, 0.036393713, -0.0049043423, 0.000101109064, 0.00012653241, -2.6769843e-05, 1.9214337e-06),
    (
        0.6931471805599453,
        0.7978845608028571,
        0.3183098861842026,
        0.03633560234946404,
        -0.004782111669904918,
        -3.698125071155534e-05,
        0.000212027868406598,
        -5.216620332439324e-05,
        1.6300692932755787e-06,
        2.8299540421469907e-06,
        -9.039806045157157e-07,
        5.1239724878280667e-08,
        6.274493432798355e-08,
        -3.0571525211528725e-08,
        8.233423787933178e-09,
        -1.4828622044666662e-09,
        1.700936305157855e-10,
        -6.9335004416562624e-12,
        -1.6048271777175922e-12,
        3.8843395843157275e-13,
        -4.4311110933453756e-14,
        3.037266616793376e-15,
        -1.2027491488157286e-16,
        2.1331864640651336e-18,
    ),
)
NDTR_EVEN, NDTR_ODD = (tuple(c[i::2] for c in NDTR) for i in range(2))
RAISE, LOWER = (64.0, 512.0), (2.0**-64, 2.0**-512)
NDTR_IS_ZERO = (9.98, 10.6617)
TANH_IS_ONE = (10.0, 20.0)
# (tanh(t) / t - 1) / t^2 in t^2 for t <= 1: tanh to 2^-26.9 and 2^-54.9.
TANH = (
    (-0.33333296, 0.13332345, -0.053879805, 0.02148666, -0.007946109, 0.0023013663, -0.00035845244),
    (
        -0.33333333333332943,
        0.13333333333292868,
        -0.053968253953426575,
        0.021869488259834945,
        -0.008863232451854802,
        0.0035921056074529776,
        -0.0014557213317139385,
        0.0005896186991745363,
        -0.00023804388882492074,
        9.476820236822638e-05,
        -3.6086651560415525e-05,
        1.23413484727743e-05,
        -3.419687946383451e-06,
        6.544976064909711e-07,
        -6.269341727686473e-08,
    ),
)
LOG2_E = 1.4426950408889634
# ln(2) and 1/3 in two parts; the first of ln(2) has so many trailing zeros that its product with any exponent is exact.
LN2 = (0.693145751953125, 0.6931471803691238)
LN2_REST = (1.4286068e-06, 1.9082149292705877e-10)
THIRD = (0.33333334, 0.3333333333333333)
THIRD_REST = (-9.934108e-09, 1.850371707708594e-17)

FRACTION_BITS = (23, 52)
FRACTION = (0x7FFFFF, 0xFFFFFFFFFFFFF)
ONE, ROOT_HALF = (0x3F800000, 0x3FF0000000000000), (0x3F3504F3, 0x3FE6A09E667F3BCD)
TOP, BIAS = (2.0**23, 2.0**52), (127, 1023)
TOP_BITS = (0x4B000000, 0x4330000000000000)
SMALLEST_NORMAL = (2.0**-126, 2.0**-1022)


def exp(x):
    """e^x."""
    return _exp(x, like(x, 0))


def log(x):
    """The natural logarithm; NaN below 0, -inf at 0."""
    hi, lo = _log(x)
    return hi + lo


def power(x, p):
    """x^p for x >= 0; NaN below."""
    hi, lo = _log(x)
    y = p * hi
    one = like(x, 1)
    return where((x == one) | (p == like(p, 0)), one, _exp(y, fused(p, hi, -y) + p * lo))


def expm1(x):
    """e^x - 1."""
    # Below, e^x is less than half of the last place of 1.
    low, high = by_width(x, -18, -38), by_width(x, 89, 710)
    y = where(x < low, low, where(x > high, high, x))
    n, r, rest = _reduced(y, like(x, 0))
    half, one = _nearest_integer(n * like(x, 0.5)), like(x, 1)
    # 2^n ((1 - 2^-n) + r + rest)
    whole = one - _two_to(-half) * _two_to(half - n)
    y = (whole + r) + (((whole - (whole + r)) + r) + rest)
    return where(x == like(x, 0), x, y * _two_to(half) * _two_to(n - half))


def log1p(x):
    """ln(1 + x); NaN below -1, -inf there."""
    zero, one = like(x, 0), like(x, 1)
    u = one + x
    hi, lo = _log(u)
    # What 1 + x lost, by the slope 1 / u; it is had exactly by subtracting the larger of the two first.
    lost = where(x > one, one - (u - x), x - (u - one))
    plain = (u > zero) & (u < highest(x)) & ~(x == zero)
    return where(plain, hi + (lo + lost / where(plain, u, one)), where(x == zero, x, hi))


def tanh(x):
    """The hyperbolic tangent."""
    zero, one, two, size = like(x, 0), like(x, 1), like(x, 2), absolute(x)
    z = x * x
    near = where(z == zero, x, fused(x * z, polynomial(z, *TANH), x))
    most = by_width(x, *TANH_IS_ONE)
    far = one - two / (_exp_of_little(where(size > most, most, size) * two) + one)
    return where(size < one, near, where(x < zero, -far, far))


def erf(x):
    """The error function."""
    one, size = like(x, 1), absolute(x)
    most = by_width(x, *ERF_IS_ONE)
    near = fused(x, polynomial(x * x, *ERF), x)
    far = one - _exp_of_little(-polynomial(where(size > most, most, size) - by_width(x, *ERFC_AT), *ERFC))
    return where(size < one, near, where(x < like(x, 0), -far, far))


def decay(x):
    """e^-x for x >= 0."""
    # From here on it rounds to 0.
    most = by_width(x, 104, 746)
    n, fraction = _fraction_of_exp(-where(x > most, most, x))
    # n may lie below the range of exponents: only the last multiplication rounds.
    return fraction * _two_to(n + by_width(x, *RAISE)) * by_width(x, *LOWER)


def ndtr(x):
    """The normal distribution's function."""
    size, most = absolute(x), by_width(x, *NDTR_IS_ZERO)
    t = where(size > most, most, size)
    # Two chains of half the length: a register of GELU took 4.6 ns with one, 3.7 with two (EPYC, 16 lanes).
    z = t * t
    tail = _exp_of_little(-fused(t, polynomial(z, *NDTR_ODD), polynomial(z, *NDTR_EVEN)))
    return where(x < like(x, 0), tail, like(x, 1) - tail)


def _exp_of_little(x):
    """e^x where that is below 2^127 (2^1023), 0 where it is below 2^-126 (2^-1022) and not below 2^-127.4 (2^-1023.4), without what ``exp``
    does for the ends of the range and the last half ulp."""
    n, fraction = _fraction_of_exp(x)
    return _two_to(n) * fraction


def _fraction_of_exp(x):
    """(n, f), e^x = 2^n f, n an integer, f at least sqrt(1/2) and at most sqrt(2)."""
    nearest = _nearest(x)
    n = fused(x, like(x, LOG2_E), nearest) - nearest
    r = fused(n, -by_width(x, *LN2_REST), fused(n, -by_width(x, *LN2), x))
    return n, like(x, 1) + fused(r * r, polynomial(r, *EXP), r)


def _exp(hi, lo):
    """e^(hi + lo); lo is no larger than hi's last place, and disregarded where hi is out of range."""
    low, high = by_width(hi, -104, -746), by_width(hi, 89, 710)
    x = where(hi < low, low, where(hi > high, high, hi))
    lo = where(x == hi, lo, like(x, 0))
    n, r, rest = _reduced(x, lo)
    one = like(x, 1)
    y = one + r
    y = y + (((one - y) + r) + rest)
    # 2^n in two factors, for n may lie beyond either end of the range of exponents; only the second multiplication rounds.
    half = _nearest_integer(n * like(x, 0.5))
    return y * _two_to(half) * _two_to(n - half)


def _reduced(x, lo):
    """n, r, rest: e^(x + lo) = 2^n (1 + r + rest), n an integer, |r| at most ln(2) / 2."""
    nearest = _nearest(x)
    n = fused(x, like(x, LOG2_E), nearest) - nearest
    # The remainder is r + c: a is exact.
    a = fused(n, -by_width(x, *LN2), x)
    b = fused(n, -by_width(x, *LN2_REST), lo)
    r = a + b
    c = (a - r) + b
    return n, r, fused(r * r, polynomial(r, *EXP), c)


def _nearest_integer(x):
    nearest = _nearest(x)
    return (x + nearest) - nearest


def _nearest(x):
    """What rounds a number of less than half its size to an integer by being added and subtracted."""
    return by_width(x, *TOP) * like(x, 1.5)


def _two_to(n):
    """2^n for an integer n in the range of exponents."""
    shifted = bits_of(n + (_nearest(n) + by_width(n, *BIAS)))
    return from_bits(shifted << by_width(shifted, *FRACTION_BITS), n)


def _log(x):
    """ln(x) as hi + lo; hi alone where it is not finite."""
    zero, one, two = like(x, 0), like(x, 1), like(x, 2)
    # x = 2^k * m, sqrt(1/2) <= m < sqrt(2)
    small = x < by_width(x, *SMALLEST_NORMAL)
    bits = bits_of(where(small, x * by_width(x, *TOP), x))
    root = by_width(bits, *ROOT_HALF)
    bits = bits + (by_width(bits, *ONE) - root)
    m = from_bits((bits & by_width(bits, *FRACTION)) + root, x)
    exponent = bits >> by_width(bits, *FRACTION_BITS)
    k = from_bits(exponent | by_width(bits, *TOP_BITS), x) - (by_width(x, *TOP) + by_width(x, *BIAS))
    k = where(small, k - by_width(x, *FRACTION_BITS), k)
    # ln(m) = 2 atanh(s), s = f / (2 + f), every step with its error: s + s_e, z + z_e, ...
    f = m - one
    d = two + f
    inverse = one / d
    s = f * inverse
    s_e = inverse * (fused(-s, d, f) - s * (f - (d - two)))
    z = s * s
    z_e = fused(s, s, -z) + (s + s) * s_e
    # t = 1/3 + z * ...
    rest = fused(z, polynomial(z, *ATANH), by_width(x, *THIRD_REST))
    third = by_width(x, *THIRD)
    t = third + rest
    t_e = (third - t) + rest
    u = z * t
    u_e = fused(z, t, -u) + fused(z, t_e, z_e * t)
    a, a_e = s + s, s_e + s_e
    v = a * u
    v_e = fused(a, u, -v) + fused(a, u_e, a_e * u)
    h = a + v
    h_e = ((a - h) + v) + (v_e + a_e)
    whole = k * by_width(x, *LN2)
    hi = whole + h
    lo = ((whole - hi) + h) + fused(k, by_width(x, *LN2_REST), h_e)
    total = hi + lo
    lo = (hi - total) + lo
    special = where(x == zero, -highest(x), like(x, float("nan")))
    return where(x > zero, where(x < highest(x), total, x), special), lo
