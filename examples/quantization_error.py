"""What NVFP4 costs: the error of every recipe of the quantiser and of the products, on three kinds of data.

    python examples/quantization_error.py
    python examples/quantization_error.py --json benchmarks/results/quantization_error.json    # for docs/gallery.md

Prints two markdown tables of relative L2 errors, |approximation - truth| / |truth|, the truth in float64. Recipes
quantise activations X [512, 2688]; products are X W^T with W [1856, 2688] normal (Nemotron 3 Nano's expert, up), its
exact value the product in float64. The kinds of X, all float32:

    normal     independent standard normal numbers
    heavy      Student's t with 3 degrees of freedom
    channels   normal, times a factor per channel that is log-normal (sigma 0.5), 20 for one channel in 128: what
               activations of language models look like, of which a few channels carry the largest values
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from n3kernels import nvfp4

ROWS, OUTPUTS, K = 512, 1856, 2688  # tokens; rows and columns of Nano's experts


def inputs(rows: int, k: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    heavy = normal(rows, k) / (sum(normal(rows, k).square() for _ in range(3)) / 3).sqrt()
    factor = torch.exp(0.5 * normal(k))
    factor[torch.randperm(k, generator=generator)[: max(1, k // 128)]] = 20.0
    return {"normal": normal(rows, k), "heavy": heavy, "channels": normal(rows, k) * factor}


def rotation() -> Tensor:
    """The signs of a random Hadamard rotation: the same for every recipe and input."""
    return 1.0 - 2.0 * torch.randint(2, (16,), generator=torch.Generator().manual_seed(7)).float()


def rotated(x: Tensor) -> Tensor:
    """``(x * signs) @ H16 / 4`` in every 16 elements, in float64: what the rotated codes stand for."""
    h = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return ((x.double().unflatten(-1, (-1, 16)) * rotation().double()) @ h / 4).flatten(-2)


RECIPES: dict[str, dict] = {
    "nearest": {},
    "stochastic": {"rounding": "stochastic"},
    "four-over-six, absolute": {"four_over_six": True},
    "four-over-six, squares": {"four_over_six": True, "metric": "mse"},
    "Hadamard": {"hadamard": rotation()},
    "Hadamard, four-over-six": {"hadamard": rotation(), "four_over_six": True},
    "16x16 blocks": {"block": "16x16"},
    "global scale per row": {"per_row": True},
}


def error(out: Tensor, truth: Tensor) -> float:
    return ((out.double() - truth).norm() / truth.norm()).item()


def recipe_errors(rows: int = ROWS, k: int = K) -> dict[str, dict[str, float]]:
    """Recipe -> kind of data -> relative L2 error of the quantised tensor."""
    table: dict[str, dict[str, float]] = {}
    for recipe, options in RECIPES.items():
        for kind, x in inputs(rows, k).items():
            source = {"generator": torch.Generator().manual_seed(1)} if "rounding" in options else {}
            t = nvfp4.quantize(x, **options, **source)
            truth = rotated(x) if "hadamard" in options else x.double()
            table.setdefault(recipe, {})[kind] = error(t.dequantize(torch.float32), truth)
    return table


def products() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """What is computed -> the product of X and W, both dense float32."""

    def w4a4(x: Tensor, w: Tensor, **options) -> Tensor:
        return nvfp4.gemm(nvfp4.quantize(x, per_row=True, **options), nvfp4.quantize(w, **options), torch.float32)

    return {
        "bfloat16": lambda x, w: x.bfloat16().float() @ w.bfloat16().float().T,
        "W4A16": lambda x, w: nvfp4.linear(x, nvfp4.quantize(w)),
        "W4A16, four-over-six": lambda x, w: nvfp4.linear(x, nvfp4.quantize(w, four_over_six=True)),
        "W4A8": lambda x, w: nvfp4.linear(x, nvfp4.quantize(w), compute="fp8"),
        "W4A4": w4a4,
        "W4A4, four-over-six": lambda x, w: w4a4(x, w, four_over_six=True),
        "W4A4, Hadamard": lambda x, w: w4a4(x, w, hadamard=rotation()),  # the rotation of both sides cancels
    }


def product_errors(rows: int = ROWS, outputs: int = OUTPUTS, k: int = K) -> dict[str, dict[str, float]]:
    """Product -> kind of activations -> relative L2 error of the result."""
    w = torch.randn(outputs, k, generator=torch.Generator().manual_seed(2))
    data = inputs(rows, k)
    truths = {kind: x.double() @ w.double().T for kind, x in data.items()}
    return {
        name: {kind: error(product(x, w), truths[kind]) for kind, x in data.items()}
        for name, product in products().items()
    }


def show(title: str, table: dict[str, dict[str, float]]) -> None:
    kinds = list(next(iter(table.values())))
    print(f"| {title} | " + " | ".join(kinds) + " |")
    print("|---" + "|---:" * len(kinds) + "|")
    for name, errors in table.items():
        print(f"| {name} | " + " | ".join(f"{errors[kind]:.3g}" for kind in kinds) + " |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args()
    recipes, of_products = recipe_errors(), product_errors()
    show("quantised tensor", recipes)
    show("product", of_products)
    if args.json:
        from n3kernels.benchmarks import facts

        facts.keep(args.json, {"shape": [ROWS, OUTPUTS, K], "recipes": recipes, "products": of_products})


if __name__ == "__main__":
    main()
