"""``mamba_ssm`` and ``causal_conv1d`` for code that imports them, where those packages are absent or to be replaced.

>>> from n3kernels.integrations import mamba_ssm
>>> put = mamba_ssm.install()
>>> from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
>>> from causal_conv1d import causal_conv1d_fn
>>> mamba_ssm.uninstall()
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from ..mamba import compat

__all__ = ["install", "uninstall"]

_TRITON = "mamba_ssm.ops.triton"
_FUNCTIONS = {
    "mamba_ssm": (),
    "mamba_ssm.ops": (),
    _TRITON: (),
    f"{_TRITON}.ssd_combined": ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"),
    f"{_TRITON}.selective_state_update": ("selective_state_update",),
    f"{_TRITON}.layernorm_gated": ("RMSNorm", "layernorm_fn", "rmsnorm_fn"),
    "causal_conv1d": ("causal_conv1d_fn", "causal_conv1d_update"),
    "causal_conv1d.causal_conv1d_interface": ("causal_conv1d_fn", "causal_conv1d_update"),
    "causal_conv1d.causal_conv1d_varlen": ("causal_conv1d_varlen_states",),
}
_VERSIONS = {"mamba_ssm": "2.3.2", "causal_conv1d": "1.7.0"}  # whose signatures these are
_replaced: dict[str, ModuleType | None] = {}


def install(replace: bool = False) -> list[str]:
    """Makes imports of ``mamba_ssm`` and ``causal_conv1d`` find the functions of `n3kernels.mamba`.

    Args:
        replace: also where the package itself is installed: its modules that hold these functions give way, all its
            others stay. False leaves an installed package alone. Names that were imported before keep what they are.
    Returns:
        The modules that were put, by name; calling it again puts nothing.

    >>> from n3kernels.integrations.mamba_ssm import install, uninstall
    >>> "causal_conv1d" in install()
    True
    >>> uninstall()
    """
    put = []
    for package in _VERSIONS:
        present = package not in _replaced and importlib.util.find_spec(package) is not None
        if present and not replace:
            continue
        for name, functions in _FUNCTIONS.items():
            if name.partition(".")[0] == package and name not in _replaced and (functions or not present):
                _put(name, functions)
                put.append(name)
    return put


def uninstall() -> None:
    """Takes back what `install` put."""
    for name, module in reversed(_replaced.items()):
        del sys.modules[name]
        if module is not None:
            sys.modules[name] = module
        _bind(name, module)
    _replaced.clear()


def _put(name: str, functions: tuple[str, ...]) -> None:
    module = ModuleType(name, f"{name} by n3kernels")
    package = any(other.startswith(name + ".") for other in _FUNCTIONS)
    module.__spec__ = ModuleSpec(name, None, origin="n3kernels", is_package=package)
    if package:
        module.__path__ = []
    if name in _VERSIONS:
        module.__version__ = _VERSIONS[name]
    for function in functions:
        setattr(module, function, getattr(compat, function))
    _replaced[name], sys.modules[name] = sys.modules.get(name), module
    _bind(name, module)


def _bind(name: str, module: ModuleType | None) -> None:
    """Sets the attribute of the parent package, which ``import a.b`` reads."""
    parent, _, child = name.rpartition(".")
    if parent not in sys.modules:
        return
    if module is not None:
        setattr(sys.modules[parent], child, module)
    elif hasattr(sys.modules[parent], child):
        delattr(sys.modules[parent], child)
