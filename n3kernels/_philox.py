"""Counter-based random numbers, the same words on every backend: Philox4x32-10.

Every draw of the library is a pure function of (seed, absolute position, stream, index): nothing depends on the batch,
the slot, the number of drafts or the number of threads. The contract, which the C++ and Triton kernels share:

* key = (seed's low word, seed's high word);
* counter = (pos's low word, pos's high word, stream << 28 | index >> 2, 0); the draw is output word ``index & 3``;
* uniform: u = (word + 1/2) * 2^-32, strictly inside (0, 1), in float64 (float32 would round the largest to 1);
* Gumbel: -log(-log(u)); for u > 1/2 as -log(-log1p(-v)) with v = 1 - u, exact in float64.

An index is a token id or a tile id and must be below 2^30. Stochastic rounding draws one word per element of a tensor
instead, `element_words`: key = seed, counter = (element >> 2, offset), both of 64 bits, word ``element & 3``.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "ACCEPT", "DRAFT", "RESIDUAL", "TARGET", "TILE",
    "element_words", "gumbel", "philox4x32", "uniform", "word",
]  # fmt: skip

# Streams: drafter and verifier never share noise, except where coupled sampling wants it (TARGET and TILE on both).
DRAFT, ACCEPT, TARGET, RESIDUAL, TILE = range(5)

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1: the key schedule


def philox4x32(
    key_lo: Tensor | int, key_hi: Tensor | int,
    c0: Tensor | int, c1: Tensor | int, c2: Tensor | int, c3: Tensor | int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Ten rounds of Philox4x32: four int64 tensors of uint32 words, in the broadcast shape of the arguments.

    Arguments are int64 tensors or Python integers, of 32 bits; of integers alone it makes integers.

    >>> [f"{word:08x}" for word in philox4x32(0, 0, 0, 0, 0, 0)]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    for i in range(10):
        k0, k1 = (key_lo + i * _WEYL[0]) & _WORD, (key_hi + i * _WEYL[1]) & _WORD
        # Products of tensors pass 2^63 and wrap; shifted down with their sign and masked, their high words are right.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _WORD) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32 & _WORD) ^ c3 ^ k1, p0 & _WORD
    return c0, c1, c2, c3


def word(seed: Tensor | int, pos: Tensor | int, stream: int, index: Tensor) -> Tensor:
    """The uint32 word, as int64, of each draw; ``seed``, ``pos`` and ``index`` are of 64 bits and broadcast."""
    counter = stream << 28 | index >> 2
    words = philox4x32(seed & _WORD, seed >> 32 & _WORD, pos & _WORD, pos >> 32 & _WORD, counter, 0)
    return _select(words, index & 3)


def element_words(seed: Tensor, element: Tensor, step: Tensor | int = 0) -> Tensor:
    """The uint32 word, as int64, of each element; ``seed`` is (key, offset), ``step`` is added to the offset."""
    key, offset = seed.unbind()
    offset = (offset + step) + torch.zeros_like(element)
    index = element >> 2
    counter = (index & _WORD, index >> 32 & _WORD, offset & _WORD, offset >> 32 & _WORD)
    return _select(philox4x32(key & _WORD, key >> 32 & _WORD, *counter), element & 3)


def _select(words: tuple[Tensor, Tensor, Tensor, Tensor], which: Tensor) -> Tensor:
    first, second = torch.where(which == 0, words[0], words[1]), torch.where(which == 2, words[2], words[3])
    return torch.where(which < 2, first, second)


def uniform(seed: Tensor | int, pos: Tensor | int, stream: int, index: Tensor) -> Tensor:
    """One float64 in (0, 1) per draw."""
    return (word(seed, pos, stream, index).to(torch.float64) + 0.5) * 2.0**-32


def gumbel(seed: Tensor | int, pos: Tensor | int, stream: int, index: Tensor) -> Tensor:
    """One standard Gumbel variate per draw, float64, between -3.2 and 22.9."""
    return _gumbel(uniform(seed, pos, stream, index))


def _gumbel(u: Tensor) -> Tensor:
    minus_log_u = torch.where(u > 0.5, -torch.log1p(-(1 - u)), -torch.log(u))
    return -torch.log(minus_log_u)
