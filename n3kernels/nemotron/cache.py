"""What a sequence leaves behind for its next token: keys and values, convolution windows, SSM states."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import ATTENTION, MAMBA, Config

__all__ = ["Cache"]


class Cache:
    """State of ``batch`` sequences of up to ``max_length`` tokens, ready to verify ``drafts`` tokens at a time.

    Keys and values are taken back by forgetting a length. A recurrent state cannot be taken back, so a sequence owns
    ``drafts + 2`` state slots: one holds the state after the last committed token, and a verification writes the
    state after each of its ``drafts + 1`` tokens into the others. `commit` then moves the pointer to the slot of the
    last accepted token, and nothing is copied.
    """

    def __init__(
        self, config: Config, batch: int, max_length: int, drafts: int = 0, *,
        layers: tuple[str, ...] | None = None, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
    ):  # fmt: skip
        c, kinds = config, config.layers if layers is None else layers
        self.batch, self.slots = batch, drafts + 2 if drafts else 1
        self.lengths = [0] * batch
        self.prefilling = False
        self.current = torch.zeros(batch, dtype=torch.int64, device=device)  # slot of each sequence, 0...slots-1
        self._rows = torch.arange(batch, device=device)
        kv = (batch, c.num_key_value_heads, max_length, c.head_dim)
        conv = (batch * self.slots, c.conv_dim, c.conv_kernel - 1)
        ssm = (batch * self.slots, c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size)
        new = {"device": device}
        self.keys = [torch.zeros(kv, dtype=dtype, **new) if k == ATTENTION else None for k in kinds]
        self.values = [torch.zeros(kv, dtype=dtype, **new) if k == ATTENTION else None for k in kinds]
        self.conv = [torch.zeros(conv, dtype=dtype, **new) if k == MAMBA else None for k in kinds]
        self.ssm = [torch.zeros(ssm, dtype=torch.float32, **new) if k == MAMBA else None for k in kinds]

    def prefill(self, sequence: int) -> None:
        """The next forward passes feed a piece of one sequence's prompt."""
        self.prefilling, self._which = True, [sequence]
        self.has_initial = torch.tensor([self.lengths[sequence] > 0], device=self.current.device)
        self.state_slots = (self._rows * self.slots + self.current)[sequence : sequence + 1]
        self.draft_slots = None

    def decode(self, tokens: int) -> None:
        """The next forward pass feeds ``tokens`` tokens of every sequence, of which `commit` may keep a part."""
        if not 1 <= tokens <= max(1, self.slots - 1):
            raise ValueError(f"Cache.decode: tokens must be in 1...{max(1, self.slots - 1)}, got {tokens}")
        self.prefilling, self._which = False, list(range(self.batch))
        base = self._rows * self.slots
        self.state_slots = base + self.current
        self.draft_slots = None
        if self.slots > 1:
            steps = torch.arange(1, tokens + 1, device=base.device)
            self.draft_slots = base[:, None] + (self.current[:, None] + steps) % self.slots

    def commit(self, counts: list[int]) -> None:
        """Keeps the first ``counts[i]`` tokens of what the last forward pass fed to sequence i."""
        for sequence, count in zip(self._which, counts, strict=True):
            self.lengths[sequence] += count
        if not self.prefilling and self.slots > 1:
            self.current = (self.current + torch.tensor(counts, device=self.current.device)) % self.slots

    def rewind(self, count: int) -> None:
        """Forgets the last ``count`` tokens of every sequence; for a cache without recurrent states only."""
        self.lengths = [length - count for length in self.lengths]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores k and v ``[B, heads, T, head_dim]`` behind what is kept and returns the attention of q over both."""
        out, count = torch.empty_like(q), q.shape[2]
        for row, sequence in enumerate(self._which):
            start = self.lengths[sequence]
            keys, values = self.keys[layer][sequence], self.values[layer][sequence]
            if start + count > keys.shape[1]:
                raise ValueError(f"Cache: {start + count} tokens do not fit max_length {keys.shape[1]}")
            keys[:, start : start + count], values[:, start : start + count] = k[row], v[row]
            for piece in self._pieces(count):
                end = start + piece.stop
                mask = None
                if piece.stop - piece.start > 1:
                    position = torch.arange(end, device=q.device)
                    mask = position <= position[start + piece.start :, None]
                out[row, :, piece] = F.scaled_dot_product_attention(
                    q[row : row + 1, :, piece], keys[None, :, :end], values[None, :, :end], mask, enable_gqa=True
                )[0]
        return out

    def _pieces(self, count: int) -> list[slice]:
        # One query at a time in decode: the same bits for a token, however many are verified beside it.
        return [slice(0, count)] if self.prefilling else [slice(i, i + 1) for i in range(count)]
