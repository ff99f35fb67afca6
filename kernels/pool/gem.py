"""Generalised mean (GeM; Radenovic, Tolias & Chum, "Fine-tuning CNN Image Retrieval with No Human Annotation", 2018, equation 3):
y = (mean max(x, eps)^p)^(1/p), over the elements inside the input: padding is neither counted nor summed.

The gradient by x is 0 below eps, as torch.clamp's.  The gradient by p is y / p * (sum x^p ln(x) / sum x^p - ln(mean x^p) / p).
A window of nothing but padding gives 0.
"""

from ..number import like, log, power, where
from . import Face, Structure, Summing, slope

# A number that no map holds, for max(x, eps)^p of padding is nothing that a mean could ignore; float32 has it exactly.
PADDING = -1.75 * 2.0**126


def padding(zero):
    return like(zero, PADDING)


def raised(x, p):
    """max(x, eps), its power and 1; the latter two 0 for padding."""
    zero, base = like(x, 0), where(x < p[1], p[1], x)
    counts = x != like(x, PADDING)
    return base, where(counts, power(base, p[0]), zero), where(counts, like(x, 1), zero)


def init(zero):
    return zero, zero


def accumulate(state, x, p):
    _, share, one = raised(x, p)
    return state[0] + share, state[1] + one


def combine(a, b):
    return a[0] + b[0], a[1] + b[1]


def mean(total, taps):
    return total / where(taps == like(taps, 0), like(taps, 1), taps)


def finalise(state, count, size, p):
    total, taps = state
    return where(taps == like(taps, 0), taps, power(mean(total, taps), like(total, 1) / p[0]))


def residue(state):
    return state[0]


def share(gy, x, y, total, count, size, p):
    # x^(p - 1) / y^(p - 1) / n, written without n: y^p = total / n.
    base, part, _ = raised(x, p)
    zero, one = like(x, 0), like(x, 1)
    flat = (x < p[1]) | (base == zero) | (total == zero)
    return where(flat, zero, gy * (part / where(flat, one, total)) * (y / where(flat, one, base)))


def init_by_p(zero):
    return zero, zero, zero


def accumulate_by_p(state, x, p):
    base, share, one = raised(x, p)
    flat = share == like(x, 0)
    weighted = where(flat, share, share * log(where(flat, like(x, 1), base)))
    return state[0] + share, state[1] + weighted, state[2] + one


def combine_by_p(a, b):
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def finalise_by_p(state, count, size, p):
    total, weighted, taps = state
    one = like(total, 1)
    flat = total == like(total, 0)
    m = where(flat, one, mean(total, taps))
    slope = weighted / where(flat, one, total) - log(m) / p[0]
    return where(flat, total, power(m, one / p[0]) / p[0] * slope)


def refuse(p, eps):
    if p == 0 or not abs(p) < float("inf"):
        return f"p must be a finite number other than 0, got {p!r}"
    if not 0 <= eps < float("inf"):
        return f"eps must be a finite number and at least 0, got {eps!r}"
    return None


DOC = """The generalised mean of each window, (mean max(x, eps)^p)^(1/p): p = 1 is the average, a large p nears the maximum.  Not in torch.

    ``kernel_size`` None takes the whole map.  ``p`` may be a tensor of one element that requires grad: it gets a gradient too.
    Padding does not count, as in avg_pool with count_include_pad=False.  The gradient is 0 where x < eps.  Saved for backward: one number
    an output, besides input and output.

    x^p is computed in the dtype computed in: beyond float32's range (for p = 3: x of 7e12) the mean is inf.
    """
GEM = Summing(
    "gem",
    init,
    accumulate,
    finalise,
    share,
    combine=combine,
    neutral=padding,
    residue=residue,
    parameters=("p", "eps"),
    slopes={"p": slope("gem_by_p", init_by_p, accumulate_by_p, finalise_by_p, combine_by_p, padding, ("p", "eps"))},
    face=Face("gem", "GeM", DOC, {"p": 3.0, "eps": 1e-6}, refuse, map_by_default=True, trainable=("p",)),
    structure=Structure(reads_above=True),
)
