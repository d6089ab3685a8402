"""examples/state_drift.py, whose table docs/mamba.md shows, on 512 tokens."""

import runpy
from pathlib import Path

import pytest

from n3kernels import use_backend

EXAMPLE = Path(__file__).parents[2] / "examples" / "state_drift.py"
# RMS error of y over the last tokens relative to its RMS, for heads that remember about 640, 76 and 2 tokens. From a
# study of 4096 tokens, in rings of 16, in plain PyTorch; the kernels may have twice that.
EXPECTED = {
    "float32, nearest": (3e-7, 3e-7, 3e-7),
    "bfloat16, nearest": (2.2e-1, 4.8e-3, 8e-4),
    "bfloat16, stochastic": (1.0e-2, 4.8e-3, 1.1e-3),
    "float16, nearest": (2.3e-3, 4.2e-4, 1.0e-4),
    "float16, stochastic": (1.4e-3, 5.9e-4, 1.4e-4),
    "int8, nearest": (4.8e-2, 1.5e-2, 4e-3),
    "int8, stochastic": (2.2e-2, 1.8e-2, 6e-3),
    "float32, ring of 32": (3e-7, 3e-7, 3e-7),
    "bfloat16, ring of 32": (1.9e-3, 8e-4, 2e-4),
    "float16, ring of 32": (2.5e-4, 1.1e-4, 3e-5),
}
# float8 was not in that study: what the kernels had after 4096 tokens
OF_OUR_OWN = {"float8_e4m3fn, nearest": (1.3, 5e-2, 1.1e-2), "float8_e4m3fn, stochastic": (9e-2, 5.4e-2, 1.6e-2)}


@pytest.fixture(scope="module")
def errors():
    with use_backend("cpu"):
        table = runpy.run_path(str(EXAMPLE))["drift"]([512], 128)
    return {name: heads for name, (heads,) in table.items()}


def test_every_way_to_store_is_there(errors):
    assert set(errors) == EXPECTED.keys() | OF_OUR_OWN.keys()


@pytest.mark.parametrize("name", [*EXPECTED, *OF_OUR_OWN])
def test_drift(errors, name):
    """At most twice what is expected of 4096 tokens, and not so little that nothing was rounded."""
    for error, expected in zip(errors[name], {**EXPECTED, **OF_OUR_OWN}[name], strict=True):
        assert expected / 50 < error < 2 * expected
