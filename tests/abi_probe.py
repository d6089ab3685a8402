"""The other side of test_abi.py: runs in the interpreter of another torch.

    python abi_probe.py calls.pt results.pt

Makes every call of the file through ``torch.ops.n3`` and writes what came back, the written arguments included.
"""

from __future__ import annotations

import sys

import torch

import n3kernels


def main(calls_file: str, results_file: str) -> None:
    results = {}
    for name, (args, kwargs) in torch.load(calls_file, weights_only=True).items():
        out = n3kernels._dispatch.OPS[name].overload(*args, **kwargs)
        outs = [out] if isinstance(out, torch.Tensor) else list(out or ())  # some write their arguments alone
        written = [a for a in args if isinstance(a, torch.Tensor)]
        results[name] = (n3kernels.explain(name).backend, outs, written)
    torch.save({"torch": str(torch.__version__), "library": n3kernels._library.name, "results": results}, results_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
