"""Decoding: plain, and speculative with the MTP layer. Both give the same text, token for token, or, in the modes
"token" and "block", texts of the same law."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import mtp
from .._dispatch import batch_invariant
from .layers import one_by_one
from .model import Nemotron

__all__ = ["Result", "generate"]

MODES = ("coupled", "token", "block")


@dataclasses.dataclass
class Result:
    """What `generate` returns."""

    tokens: list[list[int]]  # per prompt, the generated ids; a stop id is included
    emitted: list[int]  # emitted[n]: how many decode steps gave n tokens to a sequence
    prefill_seconds: float
    decode_seconds: float

    @property
    def acceptance_length(self) -> float:
        """Mean number of tokens per decode step and sequence; 1 without drafts."""
        return sum(n * count for n, count in enumerate(self.emitted)) / max(1, sum(self.emitted))

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of decoding; each prompt's first token belongs to the prefill."""
        return sum(len(t) - 1 for t in self.tokens) / max(self.decode_seconds, 1e-9)


@torch.inference_mode()
def generate(
    model: Nemotron,
    prompts: Sequence[Sequence[int]],
    max_tokens: int = 128,
    *,
    drafts: int = 0,
    mode: str = "coupled",
    draft_ids: int = 32,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | Sequence[int] = 0,
    stop_ids: Sequence[int] | None = None,
    thinking: mtp.ThinkingBudget | None = None,
) -> Result:
    """Continues every prompt until a stop id or ``max_tokens``.

    With ``drafts`` = k > 0 the MTP layer proposes k tokens and one forward pass of the model verifies them: greedily at
    temperature 0, otherwise by ``mode``. ``"coupled"`` verifies against the very token that plain sampling draws with
    the same seed at the same position; greedily or coupled the text is that of ``drafts=0``, whatever is proposed.
    ``"token"`` and ``"block"`` draw the drafts by themselves and give a text of the same law, but not the same text.

    Args:
        prompts: token ids, at least one per prompt; lengths may differ.
        max_tokens: generated tokens per prompt.
        drafts: tokens proposed per step; needs a checkpoint with an MTP layer.
        mode: ``"coupled"``, ``"token"`` or ``"block"``, see `n3kernels.mtp.verify`.
        draft_ids: the tokens among which a draft is drawn, 1 to 64, in modes ``"token"`` and ``"block"``.
        temperature, top_k, top_p, min_p: as in `n3kernels.mtp.sample`; temperature 0 is greedy.
        seed: of the draws; one number, or one per prompt.
        stop_ids: default: the config's ``eos_token_id``. Pass ``()`` to never stop.
        thinking: limits the tokens before the end of thinking; its state advances with the text.
    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, an unknown mode, or drafts without an MTP layer.
    """
    config, batch = model.config, len(prompts)
    for i, prompt in enumerate(prompts):
        bad = [t for t in prompt if not 0 <= t < config.vocab_size]
        if not len(prompt) or bad:
            got = f"id {bad[0]}" if bad else "no ids"
            raise ValueError(f"generate: prompt {i} must hold ids in [0, {config.vocab_size}), got {got}")
    if drafts and model.mtp is None:
        raise ValueError("generate: drafts need a checkpoint with an MTP layer (num_nextn_predict_layers is 0)")
    if mode not in MODES:
        raise ValueError(f"generate: mode must be one of {', '.join(MODES)}, got {mode}")
    if batch == 0 or max_tokens <= 0:
        return Result([[] for _ in prompts], [0] * (drafts + 2), 0.0, 0.0)
    stop = config.eos_token_ids if stop_ids is None else tuple(stop_ids)
    device = model.backbone.embeddings.weight.device
    # A text that is done still feeds drafts + 1 tokens per step, after having ended up to ``drafts`` tokens too long.
    room = max(map(len, prompts)) + max_tokens + 2 * drafts + 1
    run = _Run(
        model=model, drafts=drafts, mode="greedy" if temperature <= 0 else mode, draft_ids=draft_ids,
        text=[list(p) for p in prompts], prompt_lengths=[len(p) for p in prompts],
        cache=model.cache(batch, room, drafts), draft_cache=model.draft_cache(batch, room, drafts) if drafts else None,
        options=_options(batch, seed, temperature, top_k, top_p, min_p, device),
        stop=torch.tensor(stop, dtype=torch.int32, device=device), stop_ids=set(stop), thinking=thinking,
        done=[False] * batch, max_tokens=max_tokens, emitted=[0] * (drafts + 2),
    )  # fmt: skip
    began = time.perf_counter()
    run.prefill()
    middle = time.perf_counter()
    with one_by_one(), batch_invariant():  # the promise of equal texts holds for batches of any size
        while not all(run.done):
            run.step()
    outputs = [t[n : n + max_tokens] for t, n in zip(run.text, run.prompt_lengths, strict=True)]
    return Result(outputs, run.emitted, middle - began, time.perf_counter() - middle)


def _options(batch, seed, temperature, top_k, top_p, min_p, device) -> dict[str, Tensor | None]:
    def filled(value, dtype):
        return None if value is None else torch.full((batch,), value, dtype=dtype, device=device)

    seeds = [seed] * batch if isinstance(seed, int) else list(seed)
    return {
        "seed": torch.tensor(seeds, dtype=torch.int64, device=device),
        "temperature": filled(temperature, torch.float32), "top_k": filled(top_k, torch.int32),
        "top_p": filled(top_p, torch.float32), "min_p": filled(min_p, torch.float32),
    }  # fmt: skip


@dataclasses.dataclass
class _Run:
    """One call of `generate`. ``text`` is prompt and output; the caches hold all of it but the last token."""

    model: Nemotron
    drafts: int
    mode: str
    draft_ids: int
    text: list[list[int]]
    prompt_lengths: list[int]
    cache: object
    draft_cache: object
    options: dict[str, Tensor | None]
    stop: Tensor
    stop_ids: set[int]
    thinking: mtp.ThinkingBudget | None
    done: list[bool]
    max_tokens: int
    emitted: list[int]

    def prefill(self) -> None:
        hidden = []
        for b, ids in enumerate(self.text):
            self.cache.prefill(b)
            hidden.append(self.model.backbone(self._ids([ids]), self.cache))
            self.cache.commit([len(ids)])
        first = self._sample(torch.cat([h[:, -1] for h in hidden]))
        self._append(first[:, None], [1] * len(self.text))
        if not self.drafts:
            return
        last = []
        for b, h in enumerate(hidden):
            self.draft_cache.prefill(b)
            last.append(self.model.draft_hidden(self._ids([self.text[b][1:]]), h, self.draft_cache)[:, -1])
            self.draft_cache.commit([h.shape[1]])
        self.draft_from = torch.cat(last)  # MTP hidden from which the next token but none is drafted

    def step(self) -> None:
        inputs = [self._ids([t[-1:] for t in self.text])]
        if self.drafts:
            inputs.append(self._propose())
        tokens = torch.cat(inputs, 1)
        self.cache.decode(tokens.shape[1])
        hidden = self.model.backbone(tokens, self.cache)
        if self.drafts:
            counts, out = self._verify(hidden, tokens)
        else:
            out = self._sample(hidden[:, 0])[:, None]
            counts = [1] * len(self.text)
        counts = [0 if done else n for done, n in zip(self.done, counts, strict=True)]
        for n in counts:
            self.emitted[n] += n > 0
        self.cache.commit(counts)
        if self.drafts:
            self._follow(out, hidden, counts)
        self._append(out, counts)

    def _propose(self) -> Tensor:
        """k drafts per sequence, drawn with the noise that plain sampling will use, so that they agree more often, or
        with noise of their own; their laws are kept for `_verify` then."""
        drafts, laws, hidden = [], [], self.draft_from
        for j in range(self.drafts):
            if self.mode in ("token", "block"):
                draft, *law = mtp.draft_sample(
                    self.model.logits(hidden), self.options["seed"], self._positions() + j, max_ids=self._most_ids(),
                    temperature=self.options["temperature"],
                )  # fmt: skip
                laws.append(law)
            else:
                draft = self._sample(hidden, ahead=j)
            drafts.append(draft.long()[:, None])
            if j + 1 < self.drafts:
                self.draft_cache.decode(1)
                hidden = self.model.draft_hidden(drafts[-1], hidden[:, None], self.draft_cache)[:, 0]
                self.draft_cache.commit([1] * len(self.text))
        self.draft_cache.rewind(self.drafts - 1)  # true tokens take the place of what was drafted: see _follow
        proposed, self.laws = torch.cat(drafts, 1), self._by_row(laws) if laws else {}
        return self._with_forced(proposed) if self.thinking else proposed

    def _with_forced(self, proposed: Tensor) -> Tensor:
        """The drafts, but what is about to be forced in place of what was drawn, and certain."""
        hint = self.thinking.suggest(self.drafts)
        if self.laws:
            ids, probs = self.laws.values()
            row = torch.nn.functional.pad(hint, (0, 1), value=-1).flatten()[:, None]
            certain = torch.arange(ids.shape[1], device=ids.device) == 0
            ids = torch.where(row >= 0, torch.where(certain, row, -1), ids)
            probs = torch.where(row >= 0, certain.to(probs.dtype), probs)
            self.laws = {"draft_ids": ids, "draft_probs": probs}
        return torch.where(hint >= 0, hint, proposed)

    def _most_ids(self) -> int:
        return min(self.draft_ids, self.model.config.vocab_size)

    def _by_row(self, laws: list) -> dict[str, Tensor]:
        """Ids and probabilities of the drafts, ``[B (k + 1), M]``; the last row of a sequence has no draft."""
        ids, probs = (torch.stack(parts, 1) for parts in zip(*laws, strict=True))
        ids, probs = (torch.nn.functional.pad(t, (0, 0, 0, 1), value=v) for t, v in ((ids, -1), (probs, 0.0)))
        return {"draft_ids": ids.flatten(0, 1), "draft_probs": probs.flatten(0, 1)}

    def _verify(self, hidden: Tensor, tokens: Tensor) -> tuple[list[int], Tensor]:
        batch, rows = tokens.shape
        proposed = torch.cat([tokens[:, 1:], tokens.new_full((batch, 1), -1)], 1).int().flatten()
        cu_rows = torch.arange(0, batch * rows + 1, rows, dtype=torch.int32, device=tokens.device)
        forced = self.thinking.forced(proposed, cu_rows) if self.thinking else None
        out, counts, *_ = mtp.verify(
            self.model.logits(hidden).flatten(0, 1), proposed, cu_rows, pos=self._positions(), mode=self.mode,
            max_drafts=self.drafts, forced_token=forced, eos_ids=self.stop if len(self.stop) else None, **self.laws,
            **self.options,
        )  # fmt: skip
        return counts.tolist(), out

    def _follow(self, out: Tensor, hidden: Tensor, counts: list[int]) -> None:
        """Runs the MTP layer over the true tokens and hiddens, in place of what was drafted there."""
        self.draft_cache.decode(hidden.shape[1])
        after = self.model.draft_hidden(out.long().clamp(min=0), hidden, self.draft_cache)
        self.draft_cache.commit(counts)
        rows = torch.arange(len(counts), device=out.device)
        self.draft_from = after[rows, torch.tensor(counts, device=out.device).clamp(min=1) - 1]

    def _sample(self, hidden: Tensor, ahead: int = 0) -> Tensor:
        forced = None
        if self.thinking and not ahead:
            rows = torch.arange(len(self.text) + 1, dtype=torch.int32, device=hidden.device)
            forced = self.thinking.forced(rows.new_full((len(self.text),), -1), rows)
        options = {name: value for name, value in self.options.items() if name != "seed"}
        return mtp.sample(
            self.model.logits(hidden), self.options["seed"], self._positions() + ahead, forced_token=forced, **options
        )[0]

    def _append(self, out: Tensor, counts: list[int]) -> None:
        if self.thinking:
            self.thinking.advance(out, torch.tensor(counts, dtype=torch.int32, device=out.device))
        for b, (row, n) in enumerate(zip(out.tolist(), counts, strict=True)):
            self.text[b] += row[:n]
            made = len(self.text[b]) - self.prompt_lengths[b]
            ended = n > 0 and row[n - 1] in self.stop_ids
            self.done[b] = self.done[b] or ended or made >= self.max_tokens

    def _positions(self) -> Tensor:
        return torch.tensor([len(t) for t in self.text], dtype=torch.int64, device=self.stop.device)

    def _ids(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self.stop.device)
