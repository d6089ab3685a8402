from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from n3kernels import _philox

INT64 = st.integers(-(2**63), 2**63 - 1)
WORD = st.integers(0, 2**32 - 1)

# counter, key, output: kat_vectors of Random123 1.14, philox4x32 with 10 rounds
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("counter, key, out", KNOWN)
@pytest.mark.parametrize("make", [int, torch.tensor])
def test_known_answers(counter, key, out, make):
    got = _philox.philox4x32(*map(make, words(key)), *map(make, words(counter)))
    assert [int(word) for word in got] == words(out)


@given(st.lists(WORD, min_size=6, max_size=6))
def test_tensors_equal_integers_of_any_size(args):
    """Products wrap in int64 and do not in Python: the high words are the same."""
    got = _philox.philox4x32(*(torch.tensor([a]) for a in args))
    assert [int(word) for word in got] == list(_philox.philox4x32(*args))


@given(INT64, INT64, st.sampled_from(range(5)), st.integers(0, 2**30 - 1))
def test_counter(seed, pos, stream, index):
    """Every bit of seed and position counts, each draw is word index & 3 of the counter with stream and index >> 2."""
    lo, hi = (torch.tensor(seed) & 0xFFFFFFFF).item(), seed % 2**64 >> 32
    counter = (pos % 2**32, pos % 2**64 >> 32, stream * 2**28 + index // 4, 0)
    want = _philox.philox4x32(lo, hi, *counter)[index % 4]
    assert _philox.word(torch.tensor(seed), torch.tensor(pos), stream, torch.tensor(index)) == want
    assert _philox.word(seed, pos, stream, torch.tensor([index])) == want


def test_no_two_draws_share_a_word():
    """Streams, positions, seeds and indices are different draws: no repetition beyond chance in 5 * 4 * 4 * 500."""
    streams, seeds, positions = torch.meshgrid(torch.arange(5), torch.arange(4), torch.arange(4), indexing="ij")
    draws = [
        _philox.word(seed, pos, stream, torch.arange(500))
        for stream, seed, pos in zip(
            streams.flatten().tolist(), seeds.flatten().tolist(), positions.flatten().tolist(), strict=True
        )
    ]
    draws = torch.cat(draws)
    assert len(draws.unique()) >= len(draws) - 3  # 40000^2 / 2^33 = 0.19 expected


def test_uniform_is_strictly_inside():
    r = torch.tensor([0, 1, 2**31, 2**32 - 1])
    u = (r.double() + 0.5) * 2.0**-32
    assert (u > 0).all() and (u < 1).all() and u[-1] == 1 - 2.0**-33
    got = _philox.uniform(7, 9, _philox.ACCEPT, torch.arange(1000))
    assert torch.equal(got, (_philox.word(7, 9, _philox.ACCEPT, torch.arange(1000)).double() + 0.5) * 2.0**-32)


def test_gumbel_at_its_ends():
    """Against log in exact terms: near u = 1 the tail is exponential, -log(-log u) = -log(1 - u) to first order."""
    u = torch.tensor([2.0**-33, 0.25, 0.5, 0.75, 1 - 2.0**-33], dtype=torch.float64)
    g = _philox._gumbel(u)
    want = [-math.log(33 * math.log(2)), -math.log(2 * math.log(2)), -math.log(math.log(2)), -math.log(-math.log(0.75))]
    torch.testing.assert_close(g[:4], torch.tensor(want, dtype=torch.float64), rtol=1e-15, atol=1e-15)
    assert abs(g[4].item() - (33 * math.log(2) - 2.0**-34)) < 1e-14
    assert (g.diff() > 0).all()


def test_gumbel_moments():
    g = torch.cat([_philox.gumbel(seed, 0, _philox.TARGET, torch.arange(10000)) for seed in range(20)])
    assert abs(g.mean() - 0.57721566) < 4 * math.pi / math.sqrt(6 * len(g))
    assert abs(g.var() / (math.pi**2 / 6) - 1) < 4 * math.sqrt(4.4 / len(g))  # kurtosis 5.4
