"""Trains the tiny Nemotron 3 model that ships with n3kernels, on the sources of Python's standard library.

    python examples/train_tiny.py                 # trains, evaluates, writes out/tiny (about 20 minutes on 2 cores)
    python examples/train_tiny.py --steps 20      # a quick look
    python examples/train_tiny.py --nvfp4         # with NVFP4 products in the linear layers, forward and backward

The text is every ``*.py`` file of the running Python's standard library without its tests, byte by byte. One file in
twenty, chosen by the CRC of its path, is held out. The run is seeded; it writes its state every few minutes and goes on
from there when it is started again. At the end it measures bits per byte on the held-out files for the bf16 and the
NVFP4 weights and for a 4-gram model of the same training bytes, and the acceptance length of the MTP layer.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import sysconfig
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from n3kernels.nemotron import Config, Nemotron, generate, load, save
from n3kernels.nemotron.layers import Linear, MoE
from n3kernels.nvfp4 import training_linear
from n3kernels.tiny import BYTE0, encode

CONFIG = Config(
    layers=("mamba", "moe", "mamba", "attention", "moe", "mamba", "moe"),
    mtp_layers=("attention", "moe"), num_nextn_predict_layers=1,
    vocab_size=BYTE0 + 256, hidden_size=192, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    mamba_num_heads=6, mamba_head_dim=64, ssm_state_size=64, n_groups=2, conv_kernel=4, chunk_size=64,
    n_routed_experts=32, num_experts_per_tok=6, moe_intermediate_size=128, moe_latent_size=64,
    moe_shared_expert_intermediate_size=384, routed_scaling_factor=2.5, eos_token_ids=(2, 11),
)  # fmt: skip
SKIP = ("test", "tests", "idle_test", "site-packages", "__pycache__")
MTP_WEIGHT = 0.3
BALANCE_RATE = 0.001  # of the router's correction bias, per step (auxiliary-loss-free balancing, arXiv:2408.15664)


def stays_dense(name: str) -> bool:
    """What ModelOpt's recipes for the family keep in bf16: latent projections, router, head and the MTP input."""
    return any(part in name for part in ("latent_proj", "lm_head", "eh_proj"))


class NVFP4Linear(Linear):
    """A linear layer of the model whose products, forward and backward, have NVFP4 operands."""

    def forward(self, x: torch.Tensor, activation: str | None = None) -> torch.Tensor:
        y = training_linear(x, self.weight)
        return F.relu(y).square() if activation == "relu2" else y


def use_nvfp4(model: Nemotron) -> int:
    """Gives the layers that NVIDIA's recipe trains in NVFP4 those products, and says how many they are: the input
    projections of Mamba and the shared experts, but for attention, Mamba's output projections,
    latent projections, head, MTP and the last 15 % of the layers."""
    last = len(model.config.layers) - round(0.15 * len(model.config.layers))
    count = 0
    for name, module in model.named_modules():
        parts = name.split(".")
        if type(module) is not Linear or parts[0] != "backbone" or int(parts[2]) >= last:
            continue
        if parts[-1] in ("in_proj", "up_proj", "down_proj"):
            module.__class__ = NVFP4Linear
            count += 1
    return count


def read_corpus() -> tuple[np.ndarray, list[bytes]]:
    """Token ids of all training files in one array, and the held-out files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train, held_out = [], []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if any(part in SKIP for part in path.relative_to(root).parts):
            continue
        text = path.read_bytes()
        if zlib.crc32(name.encode()) % 20 == 0:
            held_out.append(text)
        else:
            train.append(np.array(encode(text, bos=True, eos=True), dtype=np.int16))
    return np.concatenate(train), held_out


def batch_of(data: np.ndarray, rng: np.random.Generator, size: int, length: int) -> torch.Tensor:
    starts = rng.integers(0, len(data) - length, size)
    return torch.from_numpy(np.stack([data[s : s + length] for s in starts]).astype(np.int64))


def losses(model: Nemotron, ids: torch.Tensor, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of the next token, and of the tokens after it from ``depth`` applications of the MTP layer."""
    hidden = model.backbone(ids[:, :-1])
    main = F.cross_entropy(model.logits(hidden).flatten(0, 1), ids[:, 1:].flatten())
    drafts, h = [], hidden
    for step in range(1, depth + 1):
        h = model.draft_hidden(ids[:, step:-1], h[:, : ids.shape[1] - 1 - step])
        drafts.append(F.cross_entropy(model.logits(h).flatten(0, 1), ids[:, step + 1 :].flatten()))
    return main, torch.stack(drafts).mean()


def balance(model: Nemotron) -> None:
    for module in model.modules():
        if isinstance(module, MoE):
            load_ = module.load.float()
            module.gate.e_score_correction_bias += BALANCE_RATE * torch.sign(load_.mean() - load_)


def make_optimizers(model: Nemotron, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the rest (embedding, head, router, experts, vectors)."""
    named = dict(model.named_parameters())
    outer = ("embeddings", "lm_head", "gate")
    matrices = [p for name, p in named.items() if p.dim() == 2 and not any(part in name for part in outer)]
    taken = {id(p) for p in matrices}
    decay = [p for p in named.values() if p.dim() >= 2 and id(p) not in taken]
    groups = [
        {"params": decay, "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True),
    ]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 3 % of the steps, then a cosine down to a twentieth."""
    warm = max(1, round(0.03 * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def train(
    folder: Path, data: np.ndarray, steps: int, size: int, length: int, peak: float, seed: int, nvfp4: bool
) -> tuple[Nemotron, float]:
    """The trained model and the seconds its steps took, over all parts of a resumed run."""
    torch.manual_seed(seed)
    model = Nemotron(CONFIG)
    model.init_weights()
    if nvfp4:
        print(f"{use_nvfp4(model)} linear layers train in NVFP4")
    optimizers = make_optimizers(model, peak)
    state, first, spent = folder / "state.pt", 0, 0.0
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        if saved["plan"] != [steps, size, length, peak, seed, nvfp4]:
            sys.exit(f"{state} belongs to a run with other settings; remove it or use another --out")
        model.load_state_dict(saved["model"])
        for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        first, spent = saved["step"], saved["seconds"]
    last_saved = time.monotonic()
    columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}"))
    # A log file gets a line every twenty steps instead of a bar.
    with Progress(*columns, TimeRemainingColumn(), disable=not Console().is_terminal) as progress:
        task = progress.add_task("", total=steps, completed=first)
        for step in range(first, steps):
            began = time.monotonic()
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = learning_rate(step, steps, peak)
            # The batch is a function of seed and step, so a resumed run sees what an unbroken one would have seen.
            ids = batch_of(data, np.random.default_rng([seed, step]), size, length)
            torch.manual_seed(seed << 32 | step)  # of stochastic rounding
            main, drafts = losses(model, ids, depth=1 if step < 0.7 * steps else 2)
            (main + MTP_WEIGHT * drafts).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad(set_to_none=True)
            with torch.no_grad():
                balance(model)
            spent += time.monotonic() - began
            rate = size * length * (step + 1) / spent
            bits, mtp_bits = main.item() / math.log(2), drafts.item() / math.log(2)
            text = f"loss {bits:.3f} bits, mtp {mtp_bits:.3f}, {rate:.0f} byte/s"
            progress.update(task, advance=1, description=text)
            if progress.disable and (step % 20 == 19 or step == first):
                print(f"step {step + 1}/{steps}: {text}", flush=True)
            if time.monotonic() - last_saved > 120 or step == steps - 1:
                saved = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
                saved |= {"step": step + 1, "seconds": spent, "plan": [steps, size, length, peak, seed, nvfp4]}
                torch.save(saved, state.with_suffix(".part"))
                os.replace(state.with_suffix(".part"), state)
                last_saved = time.monotonic()
    return model.requires_grad_(False), spent


# ---------------------------------------------------------------- evaluation


def windows(held_out: list[bytes], length: int, most: int) -> list[list[int]]:
    """The held-out files cut into windows, every n-th of them so that about ``most`` bytes are measured."""
    cut = [text[i : i + length] for text in held_out for i in range(0, len(text), length)]
    stride = max(1, sum(map(len, cut)) // most)
    return [encode(text, bos=True) for text in cut[::stride] if len(text) > 1]


@torch.no_grad()
def bits_per_byte(model: Nemotron, cut: list[list[int]]) -> float:
    """Each window is read from a cold start, its first byte included."""
    bits = count = 0
    for ids in cut:
        row = torch.tensor([ids])
        loss = F.cross_entropy(model(row[:, :-1]).flatten(0, 1), row[:, 1:].flatten(), reduction="sum")
        bits, count = bits + loss.item() / math.log(2), count + len(ids) - 1
    return bits / count


def four_gram_bits(train_ids: np.ndarray, cut: list[list[int]]) -> float:
    """Interpolated byte 4-gram with Witten-Bell smoothing: the lambda of a context is c / (c + distinct successors)."""
    text = (train_ids[train_ids >= BYTE0] - BYTE0).astype(np.int64)
    tables = []
    for order in range(4):
        key = sum(text[order - j : len(text) - j] << (8 * j) for j in range(order + 1))
        gram, n = np.unique(key, return_counts=True)
        context, start = np.unique(gram >> 8, return_index=True)
        total = np.add.reduceat(n, start)
        distinct = np.diff(np.append(start, len(gram)))
        tables.append((gram, n, context, total, distinct))
    bits = count = 0
    for ids in cut:
        row = np.array(ids[1:], dtype=np.int64) - BYTE0
        p = np.full(len(row), 1 / 256)
        for order, (gram, n, context, total, distinct) in enumerate(tables):
            key = np.zeros(len(row), dtype=np.int64)
            for j in range(order + 1):
                key[order:] |= row[order - j : len(row) - j] << (8 * j)
            g, c = np.searchsorted(gram, key), np.searchsorted(context, key >> 8)
            g, c = np.minimum(g, len(gram) - 1), np.minimum(c, len(context) - 1)
            known = (context[c] == key >> 8) & (np.arange(len(row)) >= order)
            hits = np.where(gram[g] == key, n[g], 0)
            p = np.where(known, (hits + distinct[c] * p) / (total[c] + distinct[c]), p)
        bits, count = bits - np.log2(p).sum(), count + len(row)
    return float(bits / count)


def acceptance_length(model: Nemotron, cut: list[list[int]], drafts: int = 3) -> float:
    """Mean number of tokens per verification, greedy, on the first half of held-out windows."""
    emitted = steps = 0
    for ids in cut[:: max(1, len(cut) // 12)][:12]:
        result = generate(model, [ids[: len(ids) // 2]], max_tokens=96, drafts=drafts, stop_ids=())
        emitted, steps = emitted + sum(i * n for i, n in enumerate(result.emitted)), steps + sum(result.emitted)
    return emitted / steps


def evaluate(folder: Path, model: Nemotron, data: np.ndarray, held_out: list[bytes], most: int) -> dict[str, float]:
    cut = windows(held_out, 1024, most)
    save(model, folder / "bf16")
    save(model, folder / "nvfp4", nvfp4=lambda name: not stays_dense(name))
    result = {"held_out_bytes": sum(len(ids) - 1 for ids in cut), "four_gram": four_gram_bits(data, cut)}
    for precision in ("bf16", "nvfp4"):
        loaded = load(folder / precision, device="cpu")
        result[precision] = bits_per_byte(loaded, cut)
    result["acceptance_length"] = acceptance_length(loaded, cut)
    return {name: round(value, 4) for name, value in result.items()}


def main(
    out: Path = Path("out/tiny"), steps: int = 1100, batch: int = 16, length: int = 257, lr: float = 3e-3,
    seed: int = 0, eval_bytes: int = 200_000, nvfp4: bool = False,
) -> None:  # fmt: skip
    """Trains and evaluates; prints bits per byte and writes OUT/bf16, OUT/nvfp4 and OUT/result.json."""
    out.mkdir(parents=True, exist_ok=True)
    data, held_out = read_corpus()
    print(f"{len(data)} training tokens, {sum(map(len, held_out))} held-out bytes in {len(held_out)} files")
    model, seconds = train(out, data, steps, batch, length, lr, seed, nvfp4)
    result = {
        "bits_per_byte": evaluate(out, model, data, held_out, eval_bytes),
        "training": {"steps": steps, "batch": batch, "length": length, "lr": lr, "seed": seed, "nvfp4": nvfp4},
        "minutes": round(seconds / 60, 1), "python": platform.python_version(), "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    typer.run(main)
