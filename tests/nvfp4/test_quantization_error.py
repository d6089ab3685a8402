"""examples/quantization_error.py: small problems give the recorded errors, which docs/numerics.md shows."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = runpy.run_path(str(ROOT / "examples" / "quantization_error.py"))
RECORDED = json.loads((ROOT / "benchmarks" / "results" / "quantization_error.json").read_text())


@pytest.fixture(scope="module")
def small():
    return {"recipes": EXAMPLE["recipe_errors"](64, 256), "products": EXAMPLE["product_errors"](64, 32, 256)}


@pytest.mark.parametrize("what", ["recipes", "products"])
def test_small_problems_have_the_recorded_errors(small, what):
    """To 5 % on normal data; tails and outliers differ more from draw to draw."""
    assert small[what].keys() == RECORDED[what].keys()
    for name, by_kind in small[what].items():
        for kind, error in by_kind.items():
            room = 0.05 if kind == "normal" else 0.25
            assert error == pytest.approx(RECORDED[what][name][kind], rel=room), f"{name}, {kind}"


def test_recipes_are_in_the_order_they_must_have(small):
    error = {name: by_kind["normal"] for name, by_kind in small["recipes"].items()}
    assert error["four-over-six, squares"] < error["four-over-six, absolute"] < error["nearest"] < error["stochastic"]
    assert error["nearest"] < error["16x16 blocks"]


def test_the_rotation_is_the_quantisers():
    """Were it another, a rotated tensor would be off by its whole size."""
    assert all(max(by_kind.values()) < 0.2 for name, by_kind in RECORDED["recipes"].items() if "Hadamard" in name)


def test_numerics_shows_the_recorded_errors():
    table = (ROOT / "docs" / "numerics.md").read_text()
    recipes, products = RECORDED["recipes"], RECORDED["products"]
    rows = {
        "NVFP4, nearest": recipes["nearest"],
        "square blocks of 16x16": recipes["16x16 blocks"],
        "stochastic rounding, which is unbiased": recipes["stochastic"],
        "W4A16 product (weights quantised)": products["W4A16"],
        "W4A4 (`gemm`, both sides quantised)": products["W4A4"],
    }
    for row, by_kind in rows.items():
        (cell,) = [line.split("|")[2] for line in table.splitlines() if line.startswith(f"| {row} |")]
        assert float(cell) == pytest.approx(by_kind["normal"], rel=6e-3), row
