from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, backends_here
from torch.utils._python_dispatch import TorchDispatchMode

from n3kernels import _dispatch, nvfp4, use_backend
from n3kernels.mamba import gated_rms_norm
from n3kernels.moe import experts, latent_moe, route

TOKENS, WIDTH, LATENT, EXPERTS, INNER, SHARED, TOP_K = 7, 64, 32, 8, 48, 80, 3


def inputs(dtype=torch.float32, activation="relu2", latent=LATENT, shape=(TOKENS,), grad=False, norm=False):
    def normal(*shape):
        t = (torch.randn(shape, device=DEVICE) * shape[-1] ** -0.5).to(dtype)
        return t.requires_grad_() if grad else t

    halves = 1 if activation == "relu2" else 2
    width = latent or WIDTH
    args = {
        "x": torch.randn(*shape, WIDTH, device=DEVICE).to(dtype).requires_grad_(grad),
        "router_weight": normal(EXPERTS, WIDTH), "router_bias": torch.randn(EXPERTS, device=DEVICE) / 10,
        "w_up": normal(EXPERTS, halves * INNER, width), "w_down": normal(EXPERTS, width, INNER),
        "shared_up": normal(halves * SHARED, WIDTH), "shared_down": normal(WIDTH, SHARED),
    }  # fmt: skip
    if latent:
        args |= {"fc1": normal(latent, WIDTH), "fc2": normal(WIDTH, latent)}
    if norm:
        args["latent_norm"] = torch.randn(latent, device=DEVICE).to(dtype).requires_grad_(grad)
    return args


OPTIONS = {"top_k": TOP_K, "scale": 2.5}


def definition(x, router_weight, router_bias, w_up, w_down, shared_up, shared_down, fc1=None, fc2=None,
               latent_norm=None, *, activation):  # fmt: skip
    """The layer in float64, all experts for all tokens."""
    def act(h):
        gate, up = h.chunk(2, -1) if activation != "relu2" else (h, h)
        return {"relu2": F.relu, "silu": F.silu, "gelu": F.gelu}[activation](gate) * up

    logits = F.linear(x.float(), router_weight.float())
    scores = logits.double().sigmoid()
    ids = (scores + router_bias).topk(TOP_K).indices
    weights = scores.gather(1, ids)
    weights = torch.zeros_like(scores).scatter(1, ids, 2.5 * weights / weights.sum(1, keepdim=True))
    x, w_up, w_down, shared_up, shared_down = (t.double() for t in (x, w_up, w_down, shared_up, shared_down))
    z = x if fc1 is None else x @ fc1.double().t()
    h = act(torch.einsum("tl,eil->tei", z, w_up))
    y = torch.einsum("te,tei,eli->tl", weights, h, w_down)
    if latent_norm is not None:
        y = latent_norm.double() * y * (y.square().mean(1, keepdim=True) + 1e-5).rsqrt()
    return (y if fc2 is None else y @ fc2.double().t()) + act(x @ shared_up.t()) @ shared_down.t()


KINDS = [(None, False), (LATENT, False), (LATENT, True)]  # without a latent width, with it, and with Kimi K3's norm


@pytest.mark.parametrize("activation", ["relu2", "silu", "gelu"])
@pytest.mark.parametrize("latent, norm", KINDS)
@pytest.mark.parametrize("dtype, gate", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_agrees_with_the_definition(activation, latent, norm, dtype, gate):
    """The gate of 16 bits is for the five values that are rounded on the way (z, y, the two activations, the sum)."""
    args = inputs(dtype, activation, latent, norm=norm)
    y, truth = latent_moe(**args, **OPTIONS, activation=activation), definition(**args, activation=activation)
    assert y.dtype == dtype
    assert (y.double() - truth).norm() <= gate * truth.norm()


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3), (2, 0, 3), (2, 1, 2)])
def test_leading_dimensions(shape):
    args = inputs(shape=shape)
    y = latent_moe(**args, **OPTIONS)
    flat = latent_moe(**{**args, "x": args["x"].reshape(-1, WIDTH)}, **OPTIONS)
    assert y.shape == args["x"].shape
    torch.testing.assert_close(y.reshape(-1, WIDTH), flat)


def test_the_projection_commutes_with_the_ranks():
    """Expert parallelism: fc2 of the ranks' sum is the sum of fc2 over the ranks, and both are the layer."""
    args = inputs()
    x, fc1, fc2, w_up, w_down = (args[name] for name in ("x", "fc1", "fc2", "w_up", "w_down"))
    logits = F.linear(x, args["router_weight"])
    ids, weights, _, _ = route(logits, args["router_bias"], **OPTIONS)
    parts = [
        experts(F.linear(x, fc1), w_up[a:b], w_down[a:b], ids, weights, first_expert=a)
        for a, b in ((0, 3), (3, 4), (4, EXPERTS))
    ]
    shared = F.linear(F.relu(F.linear(x, args["shared_up"])).square(), args["shared_down"])
    whole = latent_moe(**args, **OPTIONS)
    torch.testing.assert_close(F.linear(sum(parts), fc2) + shared, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sum(F.linear(p, fc2) for p in parts) + shared, whole, rtol=1e-5, atol=1e-5)


def test_the_projection_does_not_commute_with_the_ranks_behind_a_norm():
    """The norm of a rank's part is another: sum first."""
    args = inputs(norm=True)
    x, fc1, fc2, w_up, w_down = (args[name] for name in ("x", "fc1", "fc2", "w_up", "w_down"))
    ids, weights, _, _ = route(F.linear(x, args["router_weight"]), args["router_bias"], **OPTIONS)
    z, cuts = F.linear(x, fc1), ((0, 3), (3, EXPERTS))
    parts = [experts(z, w_up[a:b], w_down[a:b], ids, weights, first_expert=a) for a, b in cuts]
    shared = F.linear(F.relu(F.linear(x, args["shared_up"])).square(), args["shared_down"])
    whole = latent_moe(**args, **OPTIONS)

    def behind(y):
        return F.linear(gated_rms_norm(y, None, args["latent_norm"], LATENT), fc2)

    torch.testing.assert_close(behind(sum(parts)) + shared, whole, rtol=1e-5, atol=1e-5)
    assert (sum(map(behind, parts)) + shared - whole).norm() > 0.1 * whole.norm()


def test_the_norm_forgets_the_scale():
    """Of the experts' sum and of the routing weights alike; norm_eps is what it divides by in the end."""
    args = inputs(norm=True)
    one = latent_moe(**args, top_k=TOP_K, norm_eps=0.0)
    torch.testing.assert_close(latent_moe(**args, top_k=TOP_K, scale=64.0, norm_eps=0.0), one, rtol=1e-4, atol=1e-5)
    shared = latent_moe(**{**args, "w_down": args["w_down"] * 0}, top_k=TOP_K)
    torch.testing.assert_close(latent_moe(**args, top_k=TOP_K, norm_eps=1e20), shared, rtol=1e-4, atol=1e-5)


def test_zero_weights():
    args = inputs()
    shared = F.linear(F.relu(F.linear(args["x"], args["shared_up"])).square(), args["shared_down"])
    torch.testing.assert_close(latent_moe(**{**args, "w_down": args["w_down"] * 0}, **OPTIONS), shared)
    zero = {name: t if name in ("x", "router_bias") else t * 0 for name, t in args.items()}
    assert not latent_moe(**zero, **OPTIONS).any()


def test_a_token_does_not_see_the_others():
    args = inputs()
    truth = latent_moe(**args, **OPTIONS)
    args["x"] = args["x"].clone()
    args["x"][3] = float("nan")
    y = latent_moe(**args, **OPTIONS)
    keep = [t for t in range(TOKENS) if t != 3]
    torch.testing.assert_close(y[keep], truth[keep])
    assert y[3].isnan().all()


def test_bias_moves_the_choice():
    """A bias above every score takes all tokens to its experts."""
    args = inputs(latent=None)
    args["router_bias"] = torch.tensor([0.0, 0, 9, 9, 0, 9, 0, 0], device=DEVICE)
    others = [e for e in range(EXPERTS) if e not in (2, 3, 5)]
    truth = latent_moe(**args, **OPTIONS)
    args["w_up"] = args["w_up"].clone()
    args["w_up"][others] = float("nan")
    torch.testing.assert_close(latent_moe(**args, **OPTIONS), truth)


@pytest.mark.parametrize("activation", ["relu2", "silu"])
@pytest.mark.parametrize("which", ["experts", "shared", "all"])
def test_nvfp4(activation, which):
    args = inputs(torch.float32, activation)
    packed = dict(args)
    if which != "shared":
        for name in ("w_up", "w_down"):
            packed[name] = nvfp4.NVFP4Tensor.stack([nvfp4.quantize(w) for w in args[name]])
    if which != "experts":
        for name in ("shared_up", "shared_down"):
            packed[name] = nvfp4.quantize(args[name])
    plain = {n: w.dequantize(torch.float32) if isinstance(w, nvfp4.NVFP4Tensor) else w for n, w in packed.items()}
    y, truth = (latent_moe(**a, **OPTIONS, activation=activation) for a in (packed, plain))
    torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu2", "silu", "gelu"])
@pytest.mark.parametrize("latent, norm", KINDS)
def test_gradients(activation, latent, norm):
    args = inputs(torch.double, activation, latent, grad=True, norm=norm)
    args["router_bias"] = args["router_bias"].double()
    names = [name for name, t in args.items() if t.requires_grad]
    leaves = [args[name] for name in names]

    def layer(*leaves):
        return latent_moe(**{**args, **dict(zip(names, leaves, strict=True))}, **OPTIONS, activation=activation)

    torch.autograd.gradcheck(layer, leaves, fast_mode=True)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shape", [(4,), (2, 3)])
def test_compile(dynamic, shape):
    fn = torch.compile(latent_moe, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (4, 9):
        args = inputs(shape=(*shape[:-1], tokens), grad=True, norm=True)
        leaves = [t for t in args.values() if t.requires_grad]
        results = []
        for run in (fn, latent_moe):
            y = run(**args, **OPTIONS)
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaves)))
        torch.testing.assert_close(*results)


def test_compile_nvfp4():
    args = inputs(torch.bfloat16)
    for name in ("shared_up", "shared_down"):
        args[name] = nvfp4.quantize(args[name])
    for name in ("w_up", "w_down"):
        args[name] = nvfp4.NVFP4Tensor.stack([nvfp4.quantize(w) for w in args[name]])
    fn = torch.compile(latent_moe, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fn(**args, **OPTIONS), latent_moe(**args, **OPTIONS))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shape", [(0,), (4,), (2, 3)])
@pytest.mark.parametrize("norm", [False, True])
def test_opcheck(grad, shape, norm):
    args = inputs(shape=shape, grad=grad, norm=norm)
    torch.library.opcheck(torch.ops.n3.latent_moe.default, tuple(args.values()), OPTIONS)


def test_autocast_is_not_looked_at():
    """The router's products above all: float32 logits, whatever the caller's autocast is."""
    args = inputs()
    truth = latent_moe(**args, **OPTIONS)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = latent_moe(**args, **OPTIONS)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_router_works_on_the_full_width_in_float32(dtype):
    """Two experts whose router weights differ by 2^-20 are told apart, in a bfloat16 layer as well."""
    args = inputs(dtype)
    args["x"] = torch.ones_like(args["x"])
    args["router_weight"] = torch.tensor([1.0, -1.0], device=DEVICE).repeat(EXPERTS, WIDTH // 2)  # logits of 0
    args["router_weight"][5] += 2.0**-20
    args["router_bias"] = None
    args["w_up"] = args["w_up"].clone()
    args["w_up"][[0, 1, 2, 3, 4, 6, 7]] = float("nan")
    assert latent_moe(**args, top_k=1).isfinite().all()


def test_meta_tensors():
    args = {name: t.to("meta") for name, t in inputs(norm=True).items()}
    assert latent_moe(**args, **OPTIONS).shape == (TOKENS, WIDTH)


# ---- with one kernel for the front and one for the tail

WITHIN = ("moe_route", "moe_experts", "gated_rms_norm", "latent_moe_front", "latent_moe_tail")
FUSED = [which for which in ("triton", "cuda") if all(which in backends_here([op]) for op in WITHIN)]


class Calls(TorchDispatchMode):
    """The names of the operators that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("which", FUSED)
@pytest.mark.parametrize("activation", ["relu2", "silu"])
@pytest.mark.parametrize("latent, norm", KINDS)
@pytest.mark.parametrize("dtype, gate", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_one_kernel_each(which, activation, latent, norm, dtype, gate):
    """Where nothing asks for gradients; the values are the definition's."""
    args = inputs(dtype, activation, latent, shape=(2, 3), norm=norm)
    flat = {**args, "x": args["x"].flatten(0, 1)}
    with use_backend(which), Calls() as calls:
        y = latent_moe(**args, **OPTIONS, activation=activation)
    assert {"n3::latent_moe_front", "n3::latent_moe_tail"} <= set(calls.names)
    assert not {"aten::mm", "aten::addmm", "aten::linear"} & set(calls.names)
    truth = definition(**flat, activation=activation)
    assert (y.flatten(0, 1).double() - truth).norm() <= gate * truth.norm()


@pytest.mark.parametrize("which", FUSED)
@pytest.mark.parametrize("wants", ["x", "fc1", "shared_down", None])
def test_gradients_take_the_other_way(which, wants):
    """The kernels have none; under no_grad they serve all the same."""
    args = inputs()
    if wants:
        args[wants].requires_grad_()
    with use_backend(which), Calls() as calls:
        y = latent_moe(**args, **OPTIONS)
    fused = {"front": "n3::latent_moe_front" in calls.names, "tail": "n3::latent_moe_tail" in calls.names}
    assert fused == {"front": wants not in ("x", "fc1"), "tail": wants is None}
    assert y.requires_grad == (wants is not None)
    with use_backend(which), torch.no_grad(), Calls() as calls:
        latent_moe(**args, **OPTIONS)
    assert {"n3::latent_moe_front", "n3::latent_moe_tail"} <= set(calls.names)


def test_a_kernel_is_asked_for_the_activation_too(monkeypatch):
    """One that takes relu2 alone does not stand in the way of silu."""

    def relu2_alone(*args, activation="relu2"):
        return None if activation == "relu2" else "takes relu2"

    monkeypatch.setitem(_dispatch.OPS["latent_moe_front"].supports, "triton", relu2_alone)
    for activation in ("relu2", "silu") if "triton" in FUSED else ():
        with use_backend("triton"), Calls() as calls:
            latent_moe(**inputs(activation=activation), **OPTIONS, activation=activation)
        assert ("n3::latent_moe_front" in calls.names) == (activation == "relu2")


@pytest.mark.parametrize("which", FUSED)
def test_compiled_with_one_kernel_each(which):
    args = inputs(torch.bfloat16)
    with use_backend(which):
        fn = torch.compile(latent_moe, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(fn(**args, **OPTIONS), latent_moe(**args, **OPTIONS))


def test_the_reference_takes_torchs_products():
    with use_backend("reference"), Calls() as calls:
        latent_moe(**inputs(), **OPTIONS)
    assert not {"n3::latent_moe_front", "n3::latent_moe_tail"} & set(calls.names)


BAD = [
    ({"x": torch.zeros(2, WIDTH, dtype=torch.int32)}, "x must be float32, float16 or bfloat16, got int32"),
    ({"x": torch.zeros(WIDTH)}, "x must have at least 2 dimensions, got 1"),
    ({"activation": "relu"}, "activation must be one of relu2, silu, gelu, got relu"),
    ({"router_weight": torch.zeros(8)}, "router_weight must have 2 dimensions, got 1"),
    ({"router_weight": torch.zeros(8, 63)}, "router_weight must have shape [8, 64], got [8, 63]"),
    ({"router_bias": torch.zeros(7)}, "router_bias must have shape [8], got [7]"),
    ({"fc2": None}, "fc1 and fc2 must be given together or not at all, got 1 of 2"),
    ({"fc1": torch.zeros(32, 63)}, "fc1 must have shape [32, 64], got [32, 63]"),
    ({"fc2": torch.zeros(64, 31)}, "fc2 must have shape [64, 32], got [64, 31]"),
    ({"fc1": torch.zeros(32, 64).half()}, "fc1 must have the dtype of x (float32), got float16"),
    ({"latent_norm": torch.zeros(32).half()}, "latent_norm must have the dtype of x (float32), got float16"),
    ({"latent_norm": torch.zeros(64)}, "latent_norm must have shape [32], got [64]"),
    ({"fc1": None, "fc2": None, "latent_norm": torch.zeros(64)}, "latent_norm must be None without fc1 and fc2"),
    ({"w_up": torch.zeros(8, 48, 31)}, "w_up must have shape [8, 48, 32], got [8, 48, 31]"),
    ({"w_up": torch.zeros(7, 48, 32), "w_down": torch.zeros(7, 32, 48)},
     "w_up must have the 8 experts of router_weight, got 7"),
    ({"shared_up": torch.zeros(79, 64)}, "shared_up must have shape [80, 64], got [79, 64]"),
    ({"shared_down": torch.zeros(63, 80)}, "shared_down must have shape [64, 80], got [63, 80]"),
    ({"shared_down": torch.zeros(64)}, "shared_down must have 2 dimensions, got 1"),
    ({"shared_up": torch.zeros(80, 64).half()}, "shared_up must have the dtype of x (float32), got float16"),
    ({"shared_up_global": torch.zeros(())},
     "shared_up_scale and shared_up_global must be given together or not at all, got 1 of 2"),
    ({"up_global": torch.zeros(8)},
     "up_scale, up_global, down_scale and down_global must be given together or not at all, got 1 of 4"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", BAD)
def test_bad_calls(change, message):
    call = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in {**inputs(), **OPTIONS, **change}.items()}
    with pytest.raises(RuntimeError) as error:
        torch.ops.n3.latent_moe(**call)
    assert str(error.value) == f"n3::latent_moe: {message}"


def test_router_limits_are_the_routers():
    with pytest.raises(RuntimeError, match="n3::moe_route: top_k must be between 1 and 8, got 9"):
        latent_moe(**inputs(), top_k=9)
