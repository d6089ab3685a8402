"""Reading and writing checkpoints in the Hugging Face ``nemotron_h`` layout: bf16, FP8 and ModelOpt's NVFP4.

Every layer's precision is read from its tensors, never from its kind: ``weight`` uint8 with ``weight_scale`` e4m3 and
``weight_scale_2`` float32 is NVFP4, ``weight`` e4m3 with a float32 ``weight_scale`` is FP8 (decoded when loaded),
anything else is dense.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import CheckpointError, Config
from .layers import Experts, Linear
from .model import Nemotron

__all__ = ["load", "save"]

INDEX = "model.safetensors.index.json"

# Static scales of activations and of the KV cache: W4A16 computes with unquantised activations and needs none.
_UNUSED = re.compile(r"\.(input_scale|k_scale|v_scale)$")


class Files:
    """The tensors of a folder of ``*.safetensors`` files, read one at a time; `leftover` are those nobody asked for."""

    def __init__(self, folder: Path):
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise CheckpointError(f"{folder}: holds no *.safetensors file")
        self.folder, self.handles, self.where = folder, [], {}
        for path in paths:
            try:
                handle = safe_open(str(path), "pt")
            except SafetensorError as error:
                raise CheckpointError(f"{path}: not a complete safetensors file: {error}") from None
            self.handles.append(handle)
            for name in handle.keys():
                self.where[_canonical(name)] = (handle, name, path)
        for missing in sorted(_named_in_index(folder) - {path.name for path in paths})[:1]:
            raise CheckpointError(f"{folder / missing}: no such file, but {INDEX} names it")
        self.leftover = {name for name in self.where if not _UNUSED.search(name)}

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def read(self, name: str, shape: Iterable[int] | None = None, dtypes: tuple[torch.dtype, ...] = ()) -> Tensor:
        if name not in self.where:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing")
        handle, stored, path = self.where[name]
        self.leftover.discard(name)
        tensor = handle.get_tensor(stored)
        if shape is not None and tuple(tensor.shape) != tuple(shape):
            raise CheckpointError(f"{path}: {stored} must have shape {list(shape)}, got {list(tensor.shape)}")
        if dtypes and tensor.dtype not in dtypes:
            want = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise CheckpointError(f"{path}: {stored} must be {want}, got {str(tensor.dtype).removeprefix('torch.')}")
        return tensor

    def read_scalar(self, name: str) -> Tensor:
        scalar = self.read(name, None, (torch.float32,))
        if scalar.numel() != 1:
            raise CheckpointError(f"{self.where[name][2]}: {name} must have 1 element, got {scalar.numel()}")
        return scalar.reshape(())


def _named_in_index(folder: Path) -> set[str]:
    """The files that the index names; none where there is no index, as for a model in one file."""
    path = folder / INDEX
    if not path.is_file():
        return set()
    try:
        return set(json.loads(path.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: must hold a JSON object with a weight_map of tensors to files") from None


def _canonical(name: str) -> str:
    return "backbone." + name.removeprefix("model.") if name.startswith("model.") else name


_DENSE = (torch.bfloat16, torch.float16, torch.float32)


def load(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> Nemotron:
    """Reads a model from a folder with ``config.json`` and ``*.safetensors``.

    Args:
        path: the folder. Tensors may carry the prefix ``backbone.`` or ``model.``; experts may be one tensor each or
            stacked.
        dtype: of dense weights and of the computation; default bfloat16 on a GPU, float32 on a CPU. NVFP4 weights stay
            packed.
        device: default ``"cuda"`` where there is one, otherwise ``"cpu"``.
    Raises:
        CheckpointError: a missing, truncated or contradictory file; the message is one line.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    config = Config.read(folder)
    files = Files(folder)
    with torch.device("meta"):
        model = Nemotron(config)
    with torch.no_grad():
        for name, module in list(model.named_modules()):
            if isinstance(module, Linear):
                _load_linear(files, module, name, dtype, device)
            elif isinstance(module, Experts):
                for side in ("up_proj", "down_proj"):
                    _load_experts(files, module, name, side, dtype, device)
            else:
                _load_plain(files, module, name, dtype, device)
    for name in sorted(files.leftover)[:1]:
        raise CheckpointError(f"{files.where[name][2]}: unexpected tensor {files.where[name][1]}")
    return model.eval().requires_grad_(False)


def _load_plain(files: Files, module: nn.Module, prefix: str, dtype: torch.dtype, device: torch.device) -> None:
    for name, meta in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        # The decay rates and the router's bias steer long recurrences and choices: float32 whatever the model is.
        keep = name in ("A_log", "D", "dt_bias", "e_score_correction_bias")
        value = files.read(f"{prefix}.{name}", meta.shape, _DENSE)
        value = value.to(device=device, dtype=torch.promote_types(dtype, torch.float32) if keep else dtype)
        if name in module._parameters:
            setattr(module, name, nn.Parameter(value))
        else:
            setattr(module, name, value)


def _load_linear(files: Files, module: Linear, prefix: str, dtype: torch.dtype, device: torch.device) -> None:
    rows, cols = module.weight.shape
    name = f"{prefix}.weight"
    stored = files.where[name][0].get_slice(files.where[name][1]).get_dtype() if name in files else None
    if stored == "U8":
        parts = _read_nvfp4(files, prefix, rows, cols)
        module.set_nvfp4(*(t.to(device) for t in parts))
    elif stored == "F8_E4M3":
        scale = files.read_scalar(f"{prefix}.weight_scale")
        weight = files.read(name, (rows, cols)).float() * scale
        module.weight = nn.Parameter(weight.to(device=device, dtype=dtype))
    else:
        module.weight = nn.Parameter(files.read(name, (rows, cols), _DENSE).to(device=device, dtype=dtype))


def _read_nvfp4(files: Files, prefix: str, rows: int, cols: int) -> tuple[Tensor, Tensor, Tensor]:
    if cols % 16:
        raise CheckpointError(f"{files.folder}: {prefix}.weight is NVFP4, but its {cols} columns are no multiple of 16")
    q = files.read(f"{prefix}.weight", (rows, cols // 2), (torch.uint8,))
    block_scale = files.read(f"{prefix}.weight_scale", (rows, cols // 16), (torch.float8_e4m3fn,))
    if block_scale.view(torch.uint8).bitwise_and(0x7F).eq(0x7F).any():
        raise CheckpointError(f"{files.folder}: {prefix}.weight_scale holds NaN; export the checkpoint again")
    global_scale = files.read_scalar(f"{prefix}.weight_scale_2")
    return q, block_scale, global_scale


def _load_experts(
    files: Files, module: Experts, prefix: str, side: str, dtype: torch.dtype, device: torch.device
) -> None:
    count, rows, cols = getattr(module, side).shape
    stacked, first = f"{prefix}.{side}", f"{prefix}.0.{side}"
    if stacked in files:
        value = files.read(stacked, (count, rows, cols), _DENSE)
    elif f"{first}.weight_scale_2" in files:
        parts = [_read_nvfp4(files, f"{prefix}.{e}.{side}", rows, cols) for e in range(count)]
        module.set_nvfp4(side, *(torch.stack(part).to(device) for part in zip(*parts, strict=True)))
        return
    else:
        value = torch.stack([_read_dense(files, f"{prefix}.{e}.{side}", rows, cols) for e in range(count)])
    setattr(module, side, nn.Parameter(value.to(device=device, dtype=dtype)))


def _read_dense(files: Files, prefix: str, rows: int, cols: int) -> Tensor:
    weight = files.read(f"{prefix}.weight", (rows, cols), (*_DENSE, torch.float8_e4m3fn))
    if weight.dtype == torch.float8_e4m3fn:
        return weight.float() * files.read_scalar(f"{prefix}.weight_scale")
    return weight


def save(
    model: Nemotron, path: str | Path, *, nvfp4: Callable[[str], bool] = lambda name: False,
    dtype: torch.dtype = torch.bfloat16,
) -> None:  # fmt: skip
    """Writes ``config.json`` and ``model.safetensors``, experts one tensor each, as ModelOpt does.

    Args:
        path: the folder; it is made where it does not exist.
        nvfp4: says of a linear layer's name (``backbone.layers.0.mixer.in_proj``) whether it is stored as NVFP4;
            weights that are packed already stay as they are.
        dtype: of every other weight; ``A_log``, ``D``, ``dt_bias`` and the router's bias stay float32.
    """
    tensors: dict[str, Tensor] = {}
    quantized: list[str] = []

    def add(name: str, weight: Tensor, *scales: Tensor) -> None:
        if scales or nvfp4(name):
            parts = (weight, *scales) if scales else torch.ops.n3.nvfp4_quantize(weight.float())
            quantized.append(name)
            for suffix, part in zip(("", "_scale", "_scale_2"), parts, strict=True):
                tensors[f"{name}.weight{suffix}"] = part.reshape(()) if suffix == "_scale_2" else part
        else:
            tensors[f"{name}.weight"] = weight.to(dtype)

    for prefix, module in model.named_modules():
        if isinstance(module, Linear):
            scales = (module.weight_scale, module.weight_scale_2) if module.quantized else ()
            add(prefix, module.weight.detach(), *scales)
        elif isinstance(module, Experts):
            for side in ("up_proj", "down_proj"):
                parts = [getattr(module, side + suffix, None) for suffix in ("", "_scale", "_scale_2")]
                for e, stored in enumerate(zip(*(part.detach() for part in parts if part is not None), strict=True)):
                    add(f"{prefix}.{e}.{side}", *stored)
        else:
            for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                keep = name in ("A_log", "D", "dt_bias", "e_score_correction_bias")
                tensors[f"{prefix}.{name}"] = value.detach().to(torch.float32 if keep else dtype)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.to_dict()
    if quantized:
        layers = {name: {"quant_algo": "NVFP4", "group_size": 16} for name in quantized}
        config["quantization_config"] = {
            "quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers
        }  # fmt: skip
    tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
