"""Bugs seeded in the PTX of CUDA's kernels, each of which the emulator's checks, or the bounds of test_cuda_counters.py, must catch."""

import re

import emulated
import pytest
from fastpool.bench import cuda_model, ptx
from test_cuda_code import CALLS, FACTORIES, LAST, activated, chosen, convolved, pooling, unpooled
from test_cuda_counters import COUNTS, Counting, complaints

pytestmark = emulated.needs_toolchain

BARRIER = re.compile(r"bar\.sync\s+0;")
STORE = re.compile(r"st\.global\.(f32|b16|u8)\s+\[([^]]*)\], *(%\w+);")


@pytest.fixture
def mutated(monkeypatch):
    """``mutated(name, change)``: of kernels of this name PTX is what ``change`` makes of it, which is something else."""
    from fastpool.kernels.cuda.compile import Kernel

    plain = Kernel.ptx

    def forget():
        cuda_model._parsed.cache_clear()
        emulated.costly.cache_clear()

    def mutate(name, change):
        def text(kernel, cc):
            was = plain(kernel, cc)
            found = change(was) if kernel.name == name else was
            assert (found == was) == (kernel.name != name)
            return found

        monkeypatch.setattr(Kernel, "ptx", text)
        forget()

    yield mutate
    forget()


def caught(call, match):
    with emulated.device(), pytest.raises(ptx.PTXError, match=match):
        call()


# Calls whose last block has threads with nothing to do; other tests compile their kernels too.
GUARDED = {
    "windows.forward": pooling("max", (1, 3, 16, 34)),
    "windows.backward": pooling("max", (1, 3, 16, 34)),
    "windows.flat_positions": chosen((1, 1, 16, 40)),
    "wide.forward": pooling("max", (1, 3, 16, 24)),
    "wide.backward": pooling("max", (1, 3, 16, 24)),
    "whole_map.forward": pooling("max", (1, 3, 8, 8), windows=None),
    "whole_map.backward": pooling("max", (1, 3, 8, 9), windows=None),
    "elementwise.value": activated("relu", 2052),
    "elementwise.gradient": activated("relu", 2052),
    "unpool.scatter": unpooled((1, 3, 16, 32)),
    "unpool.gather": unpooled((1, 3, 16, 32)),
    "correlate.pack": convolved((1, 8, 4, 4), (32, 8, 1, 1), filled=128, grad=False),
    "correlate.summed": convolved((1, 64, 4, 9), (32, 64, 3, 3), filled=128, grad=False),
    "weight_gradient.ordered": convolved((1, 3, 4, 4), (3, 1, 3, 3), groups=3),
    "depthwise.forward": convolved((1, 3, 4, 4), (3, 1, 3, 3), groups=3),
}


@pytest.mark.parametrize("name", GUARDED)
def test_a_missing_guard(name, mutated):
    """The first branch is taken by threads that have nothing to do."""
    mutated(name, lambda text: re.sub(r"@%p\d+ bra\s+\$\w+;", "", text, count=1))
    caught(GUARDED[name], "out of bounds")


def test_every_kernel_has_its_guard_or_its_barrier_tried():
    assert set(GUARDED) | {name for name, *_ in BARRIERS.values()} == set(FACTORIES)


BARRIERS = {
    "maps": ("whole_map.forward", pooling("max", (1, 2, 36, 32), windows=None)),
    "maps, channels_last": ("whole_map.forward", pooling("max", (1, 40, 7, 7), LAST, None)),
    "convolution": ("correlate.forward", CALLS["conv small, contiguous"]),
    "convolution, divided": ("correlate.forward", CALLS["conv divided, contiguous"]),
    "weights": ("weight_gradient.partial", CALLS["conv small, contiguous"]),
    "depthwise": ("depthwise.weights", convolved((1, 3, 4, 4), (3, 1, 3, 3), groups=3)),
    "depthwise, channels_last": ("depthwise.weights", convolved((1, 3, 4, 4), (3, 1, 3, 3), LAST, groups=3)),
}


@pytest.mark.parametrize("what", BARRIERS)
def test_a_missing_barrier(what, mutated):
    """Any two that follow each other, of a sum's first ten, or the only one: of the last step's and the one behind it one may do."""
    name, call = BARRIERS[what]

    def without(first):
        def change(text):
            places = [found.span() for found in BARRIER.finditer(text)]
            assert len(places) > first + 2 or first == 0
            for begin, end in reversed(places[first : first + 2]):
                text = text[:begin] + text[end:]
            return text

        return change

    with emulated.device() as emulator:
        call()
    text = next(kernel for kernel, _ in emulator.launches if kernel.name == name).ptx((8, 0))
    for first in range(max(1, min(len(BARRIER.findall(text)) - 2, 10))):
        mutated(name, without(first))
        caught(call, "race|nobody has written")


AGAIN = r"{.reg .f32 was; ld.global.f32 was, [\2]; add.f32 was, was, \3; st.global.f32 [\2], was;}"
"""For a store: to what lies there."""
DOUBLED = r"{.reg .f64 wide; cvt.f64.f32 wide, \3; mul.f64 wide, wide, 0d3FF0000000000000; cvt.rn.f32.f64 \3, wide;} \g<0>"
"""Before one: by 1.0, of float64."""


def blocks_are_one(text):
    return text.replace("%ctaid.x", "0")


def further(what, by):
    """A change: the first such access is so many bytes further on."""
    return lambda text: re.sub(rf"({what}\.global\.v4\.\w+[^;]*\[%rd\d+)\]", rf"\1+{by}]", text, count=1)


def stored(instead):
    """A change: of every store."""
    return lambda text: STORE.sub(instead, text)


def behind_a_guard(text):
    """A barrier where all meet again is that of those who did not branch."""
    return re.sub(r"(\$L\w+:)\s*(bar\.sync\s+0;)", r"\2\n\1", text, count=1)


def before_a_store(text):
    """Another barrier, where some threads have nothing to write."""
    return re.sub(r"(?=st\.global)", "bar.sync 0; ", text, count=1)


def ended(text):
    """The last lane of a warp, before it is asked for its number."""
    return re.sub(r"(?=shfl\.sync)", "{.reg .pred p; .reg .b32 i; mov.u32 i, %tid.x; setp.eq.u32 p, i, 31; @p exit;} ", text, count=1)


SMALL, DEPTHWISE = CALLS["conv small, contiguous"], GUARDED["depthwise.forward"]
MUTANTS = {  # name -> (what is caught, kernel, change, call)
    "misaligned load": ("misaligned", "wide.forward", further("ld", 4), CALLS["max 2x2 s2"]),
    "misaligned store": ("misaligned", "wide.backward", further("st", 8), CALLS["max 2x2 s2"]),
    "misaligned activation": ("misaligned", "elementwise.value", further("ld", 4), CALLS["relu"]),
    "misaligned results": ("misaligned", "correlate.forward", further("st", 4), SMALL),
    "windows of one block": ("race", "windows.forward", blocks_are_one, CALLS["max 3x3 s2, by one"]),
    "maps of one block": ("race", "whole_map.forward", blocks_are_one, CALLS["max of maps"]),
    "tiles of one block": ("race", "correlate.forward", blocks_are_one, SMALL),
    "parts of a sum, of one block": (
        "race",
        "weight_gradient.partial",
        blocks_are_one,
        convolved((1, 8, 40, 33), (32, 8, 1, 1), filled=128),
    ),
    "a sum to what nobody wrote": ("nobody has written", "windows.backward", stored(AGAIN), CALLS["avg 3x3 s2, by one"]),
    "weights' sums to what nobody wrote": ("nobody has written", "depthwise.weights", stored(AGAIN), DEPTHWISE),
    "no weights packed": ("nobody has written", "correlate.pack", stored(""), SMALL),
    "nothing brought to shared memory": ("nobody has written", "correlate.forward", lambda t: re.sub(r"st\.shared[^;]*;", "", t), SMALL),
    "a barrier of half of a map's": ("not all threads", "whole_map.forward", behind_a_guard, CALLS["max of maps"]),
    "a barrier of half of a channel's": ("not all threads", "depthwise.weights", behind_a_guard, DEPTHWISE),
    "a barrier of those that write": (
        "not all threads",
        "correlate.forward",
        before_a_store,
        convolved((1, 32, 4, 8), (32, 32, 1, 1), filled=128),
    ),
    "a lane that has ended": ("does not take part", "whole_map.forward", ended, CALLS["max of small maps"]),
}


@pytest.mark.parametrize("what", MUTANTS)
def test_mutants(what, mutated):
    match, name, change, call = MUTANTS[what]
    mutated(name, change)
    caught(call, match)


LITERALS = {"windows.forward": "avg 3x3 s2, by one", "whole_map.forward": "avg of maps", "depthwise.forward": "depthwise, contiguous"}


@pytest.mark.parametrize("name", LITERALS)
def test_a_float64_literal(name, mutated):
    """The results are the same."""
    mutated(name, stored(DOUBLED))
    with emulated.device(), pytest.raises(AssertionError, match=name):
        CALLS[LITERALS[name]]()


SWAPPED = "{.reg .b32 low; and.b32 low, \\1, 31; shl.b32 low, low, 3; shr.u32 \\1, \\1, 5; or.b32 \\1, \\1, low;}"
"""A block's 256 threads in another order: those of a warp are 8 apart."""
SWAPS = {
    "windows.forward": "max 3x3 s2, by one, channels_last",
    "wide.forward": "max 3x3 s2, channels_last",
    "wide.backward": "max 2x2 s2, channels_last",
    "whole_map.backward": "avg of maps, channels_last",
    "elementwise.gradient": "relu",
    "unpool.gather": "unpool, channels_last",
    "depthwise.forward": "depthwise, channels_last",
    "correlate.summed": "conv divided, contiguous",
}


def counted(call, name):
    """What is wrong with the first launch of a kernel."""
    with emulated.device(emulator=Counting()) as emulator:
        CALLS[call]()
    return next(complaints(row, *found[1:]) for row, found in zip(COUNTS[call], emulator.found, strict=True) if row.kernel == name)


@pytest.mark.parametrize("name", SWAPS)
def test_uncoalesced_access(name, mutated):
    """Every element is where it was, of another thread: nothing but the bound of sectors tells."""
    mutated(name, lambda text: re.sub(r"mov\.u32\s+(%r\d+), %tid\.x;", rf"\g<0> {SWAPPED}", text))
    found = counted(SWAPS[name], name)
    assert any("access" in what for what in found)
    assert not any("bytes" in what for what in found)


@pytest.mark.parametrize(("name", "call"), [("windows.forward", "avg 3x3 s2, by one"), ("correlate.forward", "conv small, contiguous")])
def test_a_kernel_that_does_more(name, call, mutated):
    """An instruction beside each product; and results that are read back, or left out."""
    mutated(name, lambda text: re.sub(r"(?:mad|fma)\.[^;]*;", r"\g<0> mov.u32 %r1, %r1;", text))
    assert counted(call, name) == ["instructions"]
    mutated(name, lambda text: re.sub(r"st\.global\.([\w.]+)\s+\[([^]]*)\], *([^;]*);", r"\g<0> ld.global.\1 \3, [\2];", text))
    assert counted(call, name)[0] == "bytes loaded"
    mutated(name, lambda text: re.sub(r"st\.global[^;]*;", "", text, count=1))
    assert counted(call, name)[0] == "bytes stored"
