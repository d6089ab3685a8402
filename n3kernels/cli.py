"""The command line: ``n3kernels demo``, ``n3kernels quantize``, ``n3kernels doctor``, ``n3kernels bench``.

Wrong input ends with one line on stderr and exit code 2. Exit code 1 says that something here computes wrongly.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE
from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from . import __version__, doctor, tiny
from ._recipes import RECIPES
from ._truth import Deviation, Watch
from .mtp import ThinkingBudget
from .nemotron import CheckpointError, Nemotron, Result, generate, load
from .quantize_checkpoint import Job

__all__ = ["main"]

PROMPT = "import os\nimport sys\n\n\ndef main(argv=None):\n    parser ="
MOST_PROMPT = 8192  # bytes; the attention of a prompt takes memory with its square
WATCHED_TOKENS = 16
WIDE = 110  # columns from which two texts stand side by side

app = typer.Typer(add_completion=False, rich_markup_mode=None, help="Operators of the Nemotron 3 models for PyTorch.")


class UserError(Exception):
    """What the user can put right; the message is one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    try:
        code = typer.main.get_command(app).main(argv, prog_name="n3kernels", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (UserError, CheckpointError) as error:
        return _refuse(str(error))
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:  # a wrong option; the class belongs to click or to typer's own copy of it
        if not hasattr(error, "format_message"):
            raise
        return _refuse(error.format_message())


def _refuse(message: str) -> int:
    print("n3kernels:", " ".join(message.split()), file=sys.stderr)
    return 2


def _console() -> Console:
    return Console(highlight=False, soft_wrap=False)


# ---------------------------------------------------------------- demo


@app.command()
def demo(
    prompt: Annotated[str, typer.Option(help="Text to continue.", show_default=False)] = PROMPT,
    max_tokens: Annotated[int, typer.Option(min=2, max=65536, help="Tokens (bytes) to generate.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.6,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the draws.")] = 0,
    drafts: Annotated[int, typer.Option(min=1, max=32, help="Tokens that the MTP layer proposes per step.")] = 3,
    model: Annotated[Path | None, typer.Option(help="Folder of a checkpoint; default: the shipped one.")] = None,
    budget: Annotated[int | None, typer.Option(min=0, help="Let it think first, for at most so many tokens.")] = None,
) -> int:
    """Generate text with a tiny model, plain and with multi-token prediction, and show that both are the same."""
    if not math.isfinite(temperature):
        raise UserError(f"--temperature must be finite, got {temperature}")
    text = os.fsencode(prompt)
    if len(text) > MOST_PROMPT:
        raise UserError(f"--prompt must be at most {MOST_PROMPT} bytes, got {len(text)}")
    folder = model or tiny.PATH
    net = load(folder)
    if net.config.vocab_size != tiny.BYTE0 + 256:
        rule = f"the demo reads and writes bytes: vocab_size must be {tiny.BYTE0 + 256}"
        raise UserError(f"{folder}: {rule}, got {net.config.vocab_size}")
    ids = tiny.encode(text, bos=True)
    if budget is not None:
        ids += [tiny.THINK, tiny.NEWLINE]

    def run(drafts: int, tokens: int = max_tokens, mode: str = "coupled") -> Result:
        thinking = None if budget is None else _thinking(ids, budget, net)
        options: dict[str, Any] = {"temperature": temperature, "seed": seed, "thinking": thinking}
        try:
            return generate(net, [ids], tokens, drafts=drafts, mode=mode, **options)
        except (ValueError, NotImplementedError) as error:
            raise UserError(str(error)) from None

    with Watch() as watch:  # also warms up
        run(drafts, min(WATCHED_TOKENS, max_tokens))
    plain, speculative = run(0), run(drafts)
    out = _console()
    _print_model(out, net, folder)
    _print_texts(out, tiny.decode(ids), plain, speculative, drafts)
    same = _print_comparison(out, plain, speculative)
    _print_acceptance(out, speculative)
    if temperature > 0:
        _print_modes(out, {mode: run(drafts, mode=mode) for mode in ("token", "block")})
    _print_operators(out, watch.seen, min(WATCHED_TOKENS, max_tokens))
    return 0 if same else 1


def _thinking(ids: list[int], budget: int, net: Nemotron) -> ThinkingBudget:
    end = (tiny.THINK_END,)
    return ThinkingBudget(
        [ids], budget, end_ids=end, end_think_ids=(end,), prompt_think_ids=(tiny.THINK, tiny.NEWLINE),
        newline_ids=(tiny.NEWLINE,), device=net.backbone.embeddings.weight.device,
    )  # fmt: skip


def _print_model(out: Console, net: Nemotron, folder: Path) -> None:
    tensors = net.state_dict()
    size = sum(t.numel() * t.element_size() for t in tensors.values()) / 1e6
    weights = [t for name, t in tensors.items() if not name.endswith(("_scale", "_scale_2"))]
    millions = sum(t.numel() * (2 if t.dtype == torch.uint8 else 1) for t in weights) / 1e6
    device = net.backbone.embeddings.weight.device
    out.print(f"{folder}: {len(net.config.layers)} layers, {millions:.1f} M parameters in {size:.1f} MB, on {device}")
    facts = folder / "result.json"
    if facts.is_file():
        bits = json.loads(facts.read_text()).get("bits_per_byte", {})
        named = {"nvfp4": "NVFP4", "bf16": "bf16", "four_gram": "a 4-gram model"}
        values = ", ".join(f"{named[name]} {bits[name]:.3f}" for name in named if name in bits)
        out.print(f"bits per byte on held-out files of the standard library: {values}")


def _print_texts(out: Console, prompt: str, plain: Result, speculative: Result, drafts: int) -> None:
    ratio = speculative.tokens_per_second / max(plain.tokens_per_second, 1e-9)
    panels = []
    for title, result, note in (
        ("plain", plain, ""),
        (f"multi-token prediction, {drafts} drafts", speculative, f", {ratio:.2f} x"),
    ):
        body = Text(_printable(prompt), style="dim").append(_printable(tiny.decode(result.tokens[0])), style="not dim")
        foot = f"{len(result.tokens[0])} tokens, {result.tokens_per_second:.1f} per second{note}"
        panels.append(Panel(body, title=title, subtitle=foot))
    if out.width >= WIDE:
        grid = Table.grid(expand=True)
        grid.add_column(ratio=1)
        grid.add_column(ratio=1)
        grid.add_row(*panels)
        out.print(grid)
    else:
        out.print(Group(*panels))


def _printable(text: str) -> str:
    """A model of bytes may write control sequences; a terminal is not to obey them."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _print_comparison(out: Console, plain: Result, speculative: Result) -> bool:
    a, b = plain.tokens[0], speculative.tokens[0]
    if a == b:
        out.print(f"Both texts are equal, token for token ({len(a)} tokens).", style="bold green")
        return True
    first = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    names = [repr(tiny.decode(t[first : first + 1])) if first < len(t) else "the end" for t in (a, b)]
    message = f"THE TEXTS DIFFER from token {first} on: plain has {names[0]}, with drafts {names[1]}. This is a bug."
    out.print(message, style="bold red")
    return False


def _print_acceptance(out: Console, result: Result) -> None:
    steps = sum(result.emitted)
    if not steps:
        return
    out.print(f"\nacceptance length {result.acceptance_length:.2f} tokens per step, over {steps} steps")
    for tokens, count in enumerate(result.emitted):
        if tokens:
            bar = "█" * round(40 * count / steps)
            out.print(f"  {tokens:>2} tokens  {count:>5} steps  {count / steps:>4.0%}  {bar}".rstrip())


def _print_modes(out: Console, results: dict[str, Result]) -> None:
    lengths = ", ".join(f"{mode} {result.acceptance_length:.2f}" for mode, result in results.items())
    out.print(f"\nOther texts of the same law, from drafts drawn by themselves; acceptance length by mode: {lengths}")


def _print_operators(out: Console, seen: dict[str, Deviation], tokens: int) -> None:
    out.print(f"\nOperators in {tokens} tokens with drafts, against their definition in float64 on the same arguments:")
    table = Table(box=SIMPLE)
    for name in ("operator", "calls by backend", *doctor.MEASURES):
        number = name in doctor.MEASURES
        table.add_column(name, justify="right" if number else "left", no_wrap=not number)
    for name, d in sorted(seen.items()):
        calls = ", ".join(f"{backend} {count}" for backend, count in d.calls.most_common())
        table.add_row(name, calls, *doctor.describe(d))
    out.print(table)


# ---------------------------------------------------------------- quantize


@app.command("quantize")
def quantize_command(
    src: Annotated[Path, typer.Argument(help="Folder of a dense checkpoint.", show_default=False)],
    dst: Annotated[Path, typer.Argument(help="Folder to write: new, or a stopped run's.", show_default=False)],
    recipe: Annotated[str, typer.Option(help=" or ".join(RECIPES))] = "nvfp4",
    exclude: Annotated[list[str] | None, typer.Option(help="Layers to keep (*, ?, [...]); may be repeated.")] = None,
    device: Annotated[str, typer.Option(help="Where to quantize, such as cuda.")] = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be written.")] = False,
) -> int:
    """Write a bf16 checkpoint as NVFP4 in ModelOpt's layout."""
    if recipe not in RECIPES:
        raise UserError(f"--recipe must be {' or '.join(RECIPES)}, got {recipe}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from None
    job, out = Job(src, recipe, exclude or (), device), _console()
    if dry_run:
        _print_job(out, job)
        return 0
    measures = TaskProgressColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    bar = Progress(TextColumn("{task.description}"), BarColumn(), *measures, console=out)
    task = bar.add_task("", total=job.work)

    def advance(size: int, file: str) -> None:
        bar.start()  # now that the folder is found fit to be written
        bar.update(task, advance=size, description=file)

    try:
        there = job.run(dst, advance)
    finally:
        if bar.live.is_started:
            bar.stop()
    resumed = f", {len(there)} of which were there" if there else ""
    out.print(f"{dst}: {len(job.packed)} weights packed, {_megabytes(job)} in {_files(job)}{resumed}")
    return 0


def _print_job(out: Console, job: Job) -> None:
    table = Table(box=SIMPLE)
    for name in ("tensors", "count", "shape", "stored as", "written as", "MB before", "MB after"):
        table.add_column(name, justify="right" if name in ("count", "MB before", "MB after") else "left")
    for row in sorted(job.rows(), key=lambda row: row.name):
        shape = "various" if row.shape is None else str(list(row.shape))
        kept = "NVFP4" if row.reason is None else f"{row.dtype}: {row.reason}"
        sizes = (f"{size / 1e6:.2f}" for size in (row.before, row.after))
        table.add_row(row.name, str(row.count), shape, row.dtype, kept, *sizes)
    out.print(table)
    out.print(f"{_megabytes(job)} in {_files(job)}; nothing was written")


def _megabytes(job: Job) -> str:
    return f"{job.work / 1e6:.1f} MB -> {job.total_size / 1e6:.1f} MB"


def _files(job: Job) -> str:
    return f"{len(job.shards)} file{'s' if len(job.shards) > 1 else ''}"


# ---------------------------------------------------------------- doctor and bench


@app.command("doctor")
def doctor_command(
    prove: Annotated[bool, typer.Option("--prove", help="Run the tests on this GPU and keep the record.")] = False,
) -> int:
    """Show what is built, which backend serves which operator here, and check every operator on a small call."""
    if prove:
        reason = doctor.why_not_prove()
        if reason:
            raise UserError(f"doctor --prove: {reason}")
        return doctor.prove()
    return doctor.report(_console())


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def bench(ctx: typer.Context) -> int:
    """Time the operators against plain torch; `n3kernels bench --help` lists the options."""
    try:
        import pytest_benchmark  # noqa: F401

        from .benchmarks import run
    except ModuleNotFoundError as error:
        raise UserError(f"bench needs {error.name}: pip install 'n3kernels[bench]'") from None
    try:
        return run.main(ctx.args)
    except SystemExit as stop:  # argparse has printed why, or the help
        return stop.code if isinstance(stop.code, int) else 2


def _version(value: bool) -> None:
    if value:
        print(f"n3kernels {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


if __name__ == "__main__":
    sys.exit(main())
