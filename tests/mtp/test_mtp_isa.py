"""Every instruction set and number of threads of the CPU kernels gives the same bits, and the definition's tokens. The
choice is made once per process, so run as a program this file prints digests:
``N3_CPU_ISA=generic python tests/mtp/test_mtp_isa.py``."""

from __future__ import annotations

import hashlib
import math
import os
import random
import resource
import subprocess
import sys

import pytest
import torch

from n3kernels import use_backend
from n3kernels.mtp import draft_sample, reference, reference_verify, sample, verify, verify_tree

SETS = ("generic", "avx2", "avx512")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EDGES = (1, 5, 511, 512, 513, 4095, 4096, 4097, 9000)
INT = torch.int32


@pytest.fixture(autouse=True)
def on_the_cpu_kernels():
    with use_backend("cpu"):
        yield


class Problems:
    """Random calls: rows with ties, few infinities and NaNs, filters, masks and biases, drafts that are often right."""

    def __init__(self, seed: int, requests: int = 3):
        self.rng, self.g, self.b = random.Random(seed), torch.Generator().manual_seed(seed), requests

    def ints(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.g).to(INT)

    def per_slot(self, values: list, dtype=torch.float32) -> torch.Tensor:
        return torch.tensor(self.rng.choices(values, k=self.b), dtype=dtype)

    def rows(self, n: int, vocab: int) -> torch.Tensor:
        rng = self.rng
        x = rng.choice([0.5, 3.0, 8.0]) * torch.randn(n, vocab, generator=self.g)
        if rng.random() < 0.2:
            x = x.round()
        if rng.random() < 0.1:
            x[rng.randrange(n), rng.randrange(vocab)] = rng.choice([math.nan, math.inf, -math.inf])
        return x.to(rng.choice(DTYPES))

    def filters(self) -> dict[str, torch.Tensor]:
        found = {
            "temperature": self.per_slot([0.0, 0.6, 1.0, 2.0]), "top_k": self.per_slot([0, 1, 2, 5, 20, 300], INT),
            "top_p": self.per_slot([0.0, 0.3, 0.8, 0.95, 1.0]), "min_p": self.per_slot([0.0, 0.02, 0.3, 1.0]),
        }  # fmt: skip
        return {name: t for name, t in found.items() if self.rng.random() < 0.4}

    def edits(self, n: int, vocab: int) -> dict[str, torch.Tensor]:
        rng, found = self.rng, {}
        if rng.random() < 0.3:
            words = (vocab + 31) // 32
            found["bitmask"] = self.ints(-(2**31), 2**31, n, words) & self.ints(-(2**31), 2**31, n, words)
        if rng.random() < 0.2:
            found["forced_token"] = torch.tensor(rng.choices([-1, -1, -1, 0, vocab - 1, vocab], k=n), dtype=INT)
        if rng.random() < 0.3:
            counts = [rng.randrange(5) for _ in range(n)]
            cu = [sum(counts[:i]) for i in range(n + 1)]
            found["bias_ids"], found["bias_cu"] = self.ints(-1, vocab + 1, cu[-1]), torch.tensor(cu, dtype=INT)
            found["bias_val"] = self.ints(-3, 8, cu[-1]).float()
        return found

    def laws(self, logits: torch.Tensor, drafts: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The drafts, most of them drawn from the law that comes with them: none, listed or dense."""
        rng, (n, vocab) = self.rng, logits.shape
        like = logits.float().nan_to_num(-9.0) + torch.randn(n, vocab, generator=self.g)
        form = rng.choice(["certain", "listed", "dense"])
        if form == "listed":
            probs, ids = like.softmax(1).topk(min(vocab, rng.choice([1, 3, 16])))
            drawn = ids[torch.arange(n), torch.multinomial(probs, 1, generator=self.g)[:, 0]].to(INT)
            keep = (torch.rand(n, generator=self.g) < 0.1) | (drafts < 0)
            return torch.where(keep, drafts, drawn), {
                "draft_ids": ids.to(INT), "draft_probs": probs / probs.sum(1, keepdim=True)
            }  # fmt: skip
        if form == "dense":
            laws = {"draft_logits": like.to(logits.dtype), "draft_temperature": self.per_slot([0.0, 0.5, 1.0, 3.0])}
            if rng.random() < 0.3:
                laws["draft_vocab"] = torch.randperm(vocab, generator=self.g)[: max(1, vocab // 2)].to(INT)
                laws["draft_logits"] = laws["draft_logits"][:, : max(1, vocab // 2)].clone()
            return drafts, laws
        return drafts, {}

    def verification(self, mode: str, vocab: int, k: int) -> tuple[tuple, dict]:
        rng, n = self.rng, self.b * (k + 1)
        logits, options = self.rows(n, vocab), self.filters() | self.edits(n, vocab)
        likely = logits.float().nan_to_num(-9.0).topk(min(3, vocab)).indices
        drafts = likely[torch.arange(n), self.ints(0, min(3, vocab), n).long()].to(INT)
        for i in range(n):
            if rng.random() < 0.05:
                drafts[i] = rng.choice([-1, vocab, rng.randrange(vocab)])
        if mode in ("token", "block"):
            drafts, laws = self.laws(logits, drafts)
            options |= laws
        if mode in reference_verify.LOSSY:
            options |= {"allow_lossy": True, "relaxed_top_k": rng.choice([1, 3]), "relaxed_delta": 0.3}
        if rng.random() < 0.3:
            options["eos_ids"] = drafts[:1].clone()
        seed, pos = (torch.randint(0, 2**bits, (self.b,), generator=self.g) for bits in (62, 40))
        cu_rows = torch.arange(0, n + 1, k + 1, dtype=INT)
        return (logits, drafts, cu_rows, seed, pos), {"mode": mode, "max_drafts": k, **options}

    def tree(self, mode: str, vocab: int) -> tuple[tuple, dict]:
        rng, nodes = self.rng, 7
        n = self.b * nodes
        logits, options = self.rows(n, vocab), self.filters() | self.edits(n, vocab)
        likely = logits.float().nan_to_num(-9.0).topk(min(3, vocab)).indices
        tokens = likely[torch.arange(n), self.ints(0, min(3, vocab), n).long()].to(INT)
        parents = torch.tensor([rng.randrange(max(j, 1)) for _ in range(self.b) for j in range(nodes)], dtype=INT)
        if mode == "token" and rng.random() < 0.5:
            probs, ids = logits.float().nan_to_num(-9.0).softmax(1).topk(min(3, vocab))
            options |= {"draft_ids": ids.to(INT), "draft_probs": probs / probs.sum(1, keepdim=True)}
        seed, pos = (torch.randint(0, 2**bits, (self.b,), generator=self.g) for bits in (62, 40))
        cu_rows = torch.arange(0, n + 1, nodes, dtype=INT)
        return (logits, tokens, parents, cu_rows, seed, pos), {"mode": mode, "max_depth": 3, **options}


def calls():
    """(name, operator, args, options) of everything that is compared."""
    for i, vocab in enumerate(EDGES):
        problems = Problems(i)
        for mode in reference_verify.MODES:
            for k in (0, 3):
                yield f"verify {mode} {vocab} {k}", verify, *problems.verification(mode, vocab, k)
        for mode in ("greedy", "coupled", "token"):
            yield f"tree {mode} {vocab}", verify_tree, *problems.tree(mode, vocab)
        seed = torch.arange(3)
        yield f"draft {vocab}", draft_sample, (problems.rows(3, vocab), seed, seed), {"max_ids": 20}
    wide = 3 * torch.randn(6, 40_000, generator=torch.Generator().manual_seed(0))
    for name, option in SPECIAL.items():
        for dtype in DTYPES:
            options = {n: torch.full((6,), v, dtype=INT if n == "top_k" else torch.float32) for n, v in option.items()}
            yield f"sample {name} {dtype}", sample, (wide.to(dtype), torch.arange(6), torch.arange(6)), options


SPECIAL = {
    "plain": {}, "top_k above the sub-tiles": {"top_k": 1000}, "top_k of half the row": {"top_k": 20_000},
    "top_p of most": {"temperature": 3.0, "top_p": 0.99}, "top_p of a few": {"temperature": 0.5, "top_p": 0.5},
    "min_p of most": {"min_p": 1e-7}, "all": {"top_k": 200, "top_p": 0.9, "min_p": 0.001},
}  # fmt: skip


# ---------------------------------------------------------------- the same bits everywhere


def digests() -> str:
    lines = []
    for name, op, args, options in calls():
        digest = hashlib.sha256()
        for t in op(*args, **options):
            digest.update(t.contiguous().view(torch.uint8).numpy().tobytes())
        lines.append(f"{name}: {digest.hexdigest()[:16]}")
    return "\n".join(lines)


def on(isa: str, threads: int = 1) -> list[str]:
    env = {**os.environ, "N3_CPU_ISA": isa, "OMP_NUM_THREADS": str(threads)}
    run = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


def test_instruction_sets_and_threads_agree():
    want = on(SETS[0])
    assert len(want) > 100
    for isa, threads in (("avx2", 1), ("avx512", 2)):
        assert on(isa, threads) == want


# ---------------------------------------------------------------- the definition's tokens


def same(name: str, got, want) -> None:
    for i, (a, e) in enumerate(zip(got, want, strict=True)):
        if a.dtype.is_floating_point:
            torch.testing.assert_close(a, e, rtol=2e-5, atol=2e-5, msg=lambda m: f"{name}: {m}")
        elif i < len(got) - 1:  # the flags, which are last, are those of the rows that were looked at
            assert torch.equal(a, e), (name, a.tolist(), e.tolist())


@pytest.mark.parametrize("vocab", EDGES)
def test_tokens_of_every_mode_are_the_definitions(vocab):
    """No draw of these seeds falls within rounding of a boundary."""
    problems = Problems(1000 + vocab)
    for mode in reference_verify.MODES:
        for k in (0, 1, 3):
            for _ in range(4):
                args, options = problems.verification(mode, vocab, k)
                got, want = verify(*args, **options), reference_verify.mtp_verify(*args, **options)
                same(f"{mode} {sorted(options)}", got, want)
    for mode in ("greedy", "coupled", "token"):
        for _ in range(4):
            args, options = problems.tree(mode, vocab)
            same(f"tree {mode}", verify_tree(*args, **options), reference_verify.mtp_verify_tree(*args, **options))


def test_special_rows_are_the_definitions():
    """Ties across sub-tiles and tiles, equal rows, peaked rows, and filters past what the maxima tell."""
    vocab, seed = 9000, torch.arange(4)
    ties = torch.zeros(4, vocab)
    ties[:, [7, 511, 512, 4095, 4096, 8999]] = 3.0
    peaked = torch.full((4, vocab), -200.0)
    peaked[:, [5, 6000]] = torch.tensor([40.0, 39.0])
    wide = 3 * torch.randn(4, 40_000, generator=torch.Generator().manual_seed(0))
    for logits in (ties, torch.full((4, vocab), 2.5), torch.full((4, vocab), -1e30), peaked, 1e30 * ties, wide):
        for option in (*SPECIAL.values(), {"top_k": 3}, {"top_p": 0.0}, {"temperature": 0.0}, {"min_p": 1.0}):
            options = {n: torch.full((4,), v, dtype=INT if n == "top_k" else torch.float32) for n, v in option.items()}
            got, want = sample(logits, seed, seed, **options), reference.sample(logits, seed, seed, **options)
            same(f"{option}", got, want)


# ---------------------------------------------------------------- memory


def test_memory_does_not_grow_with_the_rows():
    """A thread's workspace is some floats per token of the vocabulary; 256 more rows need no more."""
    logits = torch.zeros(1, 131072, dtype=torch.bfloat16)

    def run(n):
        seed = torch.arange(n)
        sample(logits.expand(n, -1), seed, seed, top_p=torch.full((n,), 0.9))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    run(8)
    before = run(8)
    assert run(264) - before <= 256 * 2 + 512  # KiB


if __name__ == "__main__":
    with use_backend("cpu"):
        print(digests())
