"""Operators of the Nemotron 3 models for PyTorch: ``nvfp4``, ``mamba``, ``moe`` and ``mtp``.

Importing this package loads one C++/CUDA library and registers every operator under ``torch.ops.n3``. ``N3_LIBRARY``
names another file than the ``_C.so`` beside this one, such as a build with sanitizers.
"""

import importlib.util
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

try:
    __version__ = version("n3kernels")
except PackageNotFoundError:  # a source tree that was built but not installed
    __version__ = "0.0.0"

if importlib.util.find_spec("n3kernels.triton_ops") is None:
    # A source tree on PYTHONPATH, not installed: triton_ops and benchmarks lie beside this package, not in it.
    __path__.append(str(Path(__file__).parent.parent))

_library = Path(os.environ.get("N3_LIBRARY") or Path(__file__).parent / "_C.so")
if not _library.is_file():
    raise ImportError(
        f"n3kernels: the compiled library is missing ({_library}). Build it with "
        "`pip install --no-build-isolation -e .` in the source tree."
    )
try:
    torch.ops.load_library(str(_library))
except OSError as error:
    raise ImportError(
        f"n3kernels: the library does not load in torch {torch.__version__} (it needs torch >= 2.11): {error}"
    ) from error

from . import mamba, moe, mtp, nvfp4  # noqa: E402
from ._dispatch import BACKENDS, batch_invariant, explain, start, use_backend  # noqa: E402

start(_library)
del start

__all__ = ["BACKENDS", "__version__", "batch_invariant", "explain", "mamba", "moe", "mtp", "nvfp4", "use_backend"]
