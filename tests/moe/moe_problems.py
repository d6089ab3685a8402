"""Problems of the grouped experts, and what is right, for every test module of the family."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from conftest import DEVICE, assert_close_to, backends_here, fenced

from n3kernels import _dispatch
from n3kernels.moe import reference
from n3kernels.nvfp4 import NVFP4Tensor

ACTIVATIONS = ("relu2", "silu", "gelu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fast(*ops):
    """The backends for large problems: the interpreter would take minutes."""
    return [b for b in backends_here(ops) if b != "triton" or DEVICE == "cuda"]


def checking(*ops):
    """The backends that look at values: not those of a GPU, nor their kernels in the interpreter."""
    return [b for b in backends_here(ops) if b in ("reference", "cpu") and DEVICE == "cpu"]


def refusal(backend, form):
    """Why moe_experts does not take weights of this form there, or None."""
    refuses = _dispatch.OPS["moe_experts"].supports.get(backend)
    if refuses is None:
        return None
    x = torch.zeros(1, 16, dtype=torch.bfloat16)  # dtype and sizes are those that every kernel takes
    ids, gains = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1)
    if form == "dense":
        return refuses(x, x.new_zeros(1, 16, 16), x.new_zeros(1, 16, 16), ids, gains)
    q, scale = torch.zeros(1, 16, 8, dtype=torch.uint8), torch.zeros(1, 16, 1, dtype=torch.float8_e4m3fn)
    return refuses(x, q, q, ids, gains, scale, torch.zeros(1), scale, torch.zeros(1))


def renamed(w, back):
    """The weights whose expert e is expert back[e] of ``w``."""
    if isinstance(w, torch.Tensor):
        return w[back]
    block_scale = w.block_scale.view(torch.uint8)[back].view(w.block_scale.dtype)
    return NVFP4Tensor.from_parts(w.q[back], block_scale, w.global_scale[back])


def inputs(tokens, k, num_experts, width, inner, first, activation, dtype, form="dense"):
    """x, w_up, w_down, ids, weights, options; ids reach past the local experts on both sides."""
    if form == "nvfp4":
        width, inner = (-(-size // 16) * 16 for size in (width, inner))  # whole blocks
    rows = inner * (1 if activation == "relu2" else 2)
    x = fenced(torch.randn(tokens, width).to(DEVICE, dtype))
    if form == "nvfp4":
        w_up, w_down = nvfp4(num_experts, rows, width), nvfp4(num_experts, width, inner)
    else:
        w_up, w_down = torch.randn(num_experts, rows, width), torch.randn(num_experts, width, inner)
        w_up, w_down = (fenced(t.to(DEVICE, dtype)) for t in (w_up * width**-0.5, w_down * inner**-0.5))
    ids = torch.randint(max(first - 2, -1), first + num_experts + 2, (tokens, k), dtype=torch.int32)
    ids, weights = (fenced(t.to(DEVICE)) for t in (ids, torch.randn(tokens, k)))
    return x, w_up, w_down, ids, weights, {"activation": activation, "first_expert": first}


def nvfp4(*shape):
    """Any codes under any finite scales, one global scale per expert."""
    q = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8)
    block_scale = (torch.rand(*shape[:-1], shape[-1] // 16) * 2).to(torch.float8_e4m3fn)
    global_scale = torch.rand(shape[0], device=DEVICE) / 8
    return NVFP4Tensor.from_parts(fenced(q.to(DEVICE)), fenced(block_scale.to(DEVICE)), global_scale)


def dense(w):
    """The exact values in float64, those of NVFP4 by another route than the operator's reference."""
    if isinstance(w, torch.Tensor):
        return w.double()
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.double, device=w.q.device)
    codes = torch.stack((w.q % 16, w.q // 16), -1).flatten(-2).long()
    values = magnitudes[codes % 8] * (1 - 2 * (codes // 8))
    return values * w.block_scale.double().repeat_interleave(16, -1) * w.global_scale.double()[:, None, None]


def routing(tokens, num_experts, top_k, scale=1.0):
    """ids and weights; by the reference, as a forced backend may have no routing."""
    return reference.moe_route(torch.randn(tokens, num_experts, device=DEVICE), top_k=top_k, scale=scale)[:2]


def definition(x, w_up, w_down, ids, weights, activation="relu2", first_expert=0):
    """Slot by slot in float64, and the sum of the magnitudes of the terms that the down projection adds up."""
    w_up, w_down = dense(w_up), dense(w_down)
    y = torch.zeros(x.shape, dtype=torch.double, device=x.device)
    magnitude = torch.zeros_like(y)
    for t, row in enumerate(ids.tolist()):
        for j, e in enumerate(row):
            if not first_expert <= e < first_expert + len(w_up):
                continue
            h = w_up[e - first_expert] @ x[t].double()
            gate, up = (h, h) if activation == "relu2" else h.chunk(2)
            act = {"relu2": F.relu, "silu": F.silu, "gelu": F.gelu}[activation](gate) * up  # relu(h) * h = relu(h)^2
            down, weight = w_down[e - first_expert], weights[t, j].double()
            y[t] += weight * (down @ act)
            magnitude[t] += weight.abs() * (down.abs() @ act.abs())
    return y, magnitude


def assert_right(y, truth, magnitude):
    """The truth rounded once; a kernel may have rounded the activation to 16 bits, too: half a unit of each term."""
    narrow = torch.finfo(y.dtype).eps / 2 if y.dtype in (torch.float16, torch.bfloat16) else 0.0
    assert_close_to(y, truth, acc=1.0, scale=narrow * magnitude + 1e-5 * (magnitude + 1))


FUNCTIONS = {"relu2": lambda h: F.relu(h).square(), "silu": F.silu, "gelu": F.gelu}


def whole_truth(x, w_up, w_down, ids, weights, activation="relu2"):
    """The same as `definition`, expert by expert: for large problems, whose slots are all local."""
    w_up, w_down, y = dense(w_up), dense(w_down), torch.zeros(x.shape, dtype=torch.double, device=x.device)
    for e in ids.unique().tolist():
        token, slot = (ids == e).nonzero(as_tuple=True)
        h = x[token].double() @ w_up[e].t()
        gate, up = (h, 1) if activation == "relu2" else h.chunk(2, 1)
        down = (FUNCTIONS[activation](gate) * up) @ w_down[e].t()
        y.index_add_(0, token, weights[token, slot, None].double() * down)
    return y


def assert_within_the_gate(y, x, w_up, w_down, ids, weights, activation="relu2"):
    """moe's bound on a fused low-precision pipeline: relative L2 error 3e-3 (float32: 1e-5), and no element further
    off than 6 units in the last place of its row's maximum."""
    truth = whole_truth(x, w_up, w_down, ids, weights, activation)
    error = y.double() - truth
    narrow = y.dtype != torch.float32
    assert error.norm() <= (3e-3 if narrow else 1e-5) * truth.norm()
    unit = torch.finfo(y.dtype).eps if narrow else 1e-5
    assert (error.abs().amax(1) <= 6 * unit * truth.abs().amax(1)).all()
