"""The tiny Nemotron 3 checkpoint that ships with the package, and its byte-level vocabulary.

Ids 0...63 are special tokens, with the ids that the family's tokenizer gives them; id 64 + b is the byte b.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

__all__ = ["BOS", "BYTE0", "EOS", "IM_END", "IM_START", "NEWLINE", "PAD", "PATH", "THINK", "THINK_END"]
__all__ += ["decode", "encode"]

PATH = Path(__file__).parent
PAD, BOS, EOS, IM_START, IM_END, THINK, THINK_END = 0, 1, 2, 10, 11, 12, 13
BYTE0 = 64
NEWLINE = BYTE0 + 10
_NAMES = {PAD: "<pad>", BOS: "<s>", EOS: "</s>", IM_START: "<|im_start|>", IM_END: "<|im_end|>"}
_NAMES |= {THINK: "<think>", THINK_END: "</think>"}


def encode(text: str | bytes, *, bos: bool = False, eos: bool = False) -> list[int]:
    """Bytes (UTF-8 of a string) to ids, without looking for special tokens in the text.

    >>> encode("a", bos=True)
    [1, 161]
    """
    data = text.encode() if isinstance(text, str) else text
    return [BOS] * bos + [BYTE0 + b for b in data] + [EOS] * eos


def decode(ids: Iterable[int]) -> str:
    """Ids to text; bytes that are no UTF-8 become replacement characters, special tokens their names.

    >>> decode([1, 161])
    '<s>a'
    """
    out = bytearray()
    for i in ids:
        out += bytes([i - BYTE0]) if i >= BYTE0 else _NAMES.get(i, f"<{i}>").encode()
    return out.decode("utf-8", "replace")
