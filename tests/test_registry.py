"""Every operator has every layer: schema, reference, fake, wrapper, docstring, backends, tests and benchmark."""

from __future__ import annotations

import ast
import inspect
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import DEVICE

import n3kernels
from n3kernels import _dispatch, doctor
from n3kernels._dispatch import OPS
from n3kernels._samples import SAMPLES, sample
from n3kernels._truth import Deviation

ROOT = Path(__file__).parent.parent
FAMILIES = ("nvfp4", "mamba", "moe", "mtp")
EVERY_OP = sorted(OPS)
BACKWARD = sorted(name for name in OPS if name.endswith("_bwd"))
FORWARD = sorted(set(OPS) - set(BACKWARD))

# Operators that no test module names in OPS, and why.
UNNAMED = {
    "latent_moe": "a composite: it has no backends to run the tests with",
}
# Operators with kernels that no benchmark names, and why.
UNMEASURED = {
    "mtp_commit": "a few integers per request: its time is that of the call, which bench_dispatch measures",
    "mtp_verify_tree": "the rows are looked at as in mtp_verify, which bench_verify measures",
    "thinking_budget": "a few integers per row: its time is that of the call, which bench_dispatch measures",
    "nvfp4_embedding": "a lookup of a few rows: its time is that of the call, which bench_dispatch measures",
    "latent_moe_front": "a part of the layer on a GPU, which bench_latent_moe measures whole",
    "latent_moe_tail": "a part of the layer on a GPU, which bench_latent_moe measures whole",
    "nvfp4_repack": "runs once, when a checkpoint is loaded",
    "nvfp4_swizzle_scale": "runs once, when a checkpoint is loaded",
    "nvfp4_unswizzle_scale": "runs once, when a checkpoint is loaded",
}


def schemas():
    return {s.name.removeprefix("n3::") + (f".{s.overload_name}" if s.overload_name else ""): s
            for s in torch._C._jit_get_all_schemas() if s.name.startswith("n3::")}  # fmt: skip


def family(name):
    return OPS[name].check.__module__.split(".")[1]


@cache
def sources(pattern):
    return {path: path.read_text() for path in sorted(ROOT.glob(pattern))}


# ---------------------------------------------------------------- schema, registration, reference


def test_every_schema_is_registered():
    assert set(schemas()) == set(OPS)
    text = (ROOT / "csrc/ops.cpp").read_text()
    declared = re.findall(r'm\.def\(\s*"([\w.]+)\(', text)
    assert sorted(declared) == EVERY_OP


def test_every_operator_belongs_to_a_family():
    assert {family(name) for name in OPS} == set(FAMILIES)


@pytest.mark.parametrize("name", EVERY_OP)
def test_the_reference_has_the_signature_of_the_schema(name):
    arguments, parameters = schemas()[name].arguments, OPS[name].signature.parameters
    assert list(parameters) == [a.name for a in arguments]
    for argument, parameter in zip(arguments, parameters.values(), strict=True):
        assert (parameter.kind == parameter.KEYWORD_ONLY) == argument.kwarg_only, argument.name
        has_default = parameter.default is not parameter.empty
        assert has_default == argument.has_default_value(), argument.name
        assert not has_default or parameter.default == argument.default_value, argument.name


@pytest.mark.parametrize("name", EVERY_OP)
def test_the_annotated_arguments_are_written_and_no_others(name):
    args, kwargs = sample(name, DEVICE)
    before, options = sample(name, DEVICE)
    OPS[name].overload(*args, **kwargs)
    written = {a.name for a in schemas()[name].arguments if a.alias_info is not None and a.alias_info.is_write}
    bind = OPS[name].signature.bind
    then, now = bind(*before, **options).arguments, bind(*args, **kwargs).arguments
    for argument, value in now.items():
        if isinstance(value, torch.Tensor):
            old, new = (t.contiguous().reshape(-1).view(torch.uint8) for t in (then[argument], value))
            assert torch.equal(old, new) == (argument not in written), argument


@pytest.mark.parametrize("name", EVERY_OP)
def test_the_fake_kernel_has_the_shapes_of_the_real_one(name):
    args, kwargs = sample(name, DEVICE)
    torch.library.opcheck(OPS[name].overload, args, kwargs, test_utils="test_faketensor")


@pytest.mark.parametrize("name", EVERY_OP)
def test_fake_or_composite(name):
    entry = torch._library.simple_registry.singleton.find(f"n3::{name}")
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(f"n3::{name}", "CompositeImplicitAutograd")
    assert composite == OPS[name].composite
    assert (entry.fake_impl.kernel is not None) != composite


# ---------------------------------------------------------------- the sample calls


def test_every_operator_has_a_sample():
    assert set(SAMPLES) == set(OPS)


@pytest.mark.parametrize("name", EVERY_OP)
def test_a_sample_is_always_the_same(name):
    torch.manual_seed(1)
    (args, kwargs), (again, options) = sample(name), sample(name)
    for a, b in zip((*args, *kwargs.values()), (*again, *options.values()), strict=True):
        assert a is None or (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)


@pytest.mark.parametrize("name", EVERY_OP)
def test_every_backend_agrees_with_the_definition(name):
    """What `n3kernels doctor` checks; and at least one backend takes the sample."""
    arch = "cpu" if DEVICE == "cpu" else _dispatch._cuda_arch()
    found = doctor.check(OPS[name], DEVICE, arch)
    assert "reference" in found
    for backend, deviation in found.items():
        assert isinstance(deviation, Deviation), f"{backend}: {deviation}"
        assert doctor.is_right(deviation), f"{backend}: {deviation}"
        assert deviation.error is not None or deviation.integers


# ---------------------------------------------------------------- the public wrapper


def wrappers(name):
    """The public functions whose source calls the operator."""
    if name == "nvfp4_dequantize":  # called by NVFP4Tensor.dequantize
        return [n3kernels.nvfp4.dequantize]
    base, _, overload = name.partition(".")
    call = f"torch.ops.n3.{base}.{overload or 'default'}("
    module = getattr(n3kernels, family(name))
    functions = [getattr(module, public) for public in module.__all__]
    return [f for f in functions if inspect.isfunction(f) and call in inspect.getsource(f)]


@pytest.mark.parametrize("name", FORWARD)
def test_there_is_one_public_wrapper(name):
    assert len(wrappers(name)) == 1


@pytest.mark.parametrize("name", BACKWARD)
def test_a_backward_operator_serves_autograd(name):
    forward = name.removesuffix("_bwd")
    assert not wrappers(name)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"n3::{forward}", "Autograd")


@pytest.mark.parametrize("name", FORWARD)
def test_the_docstring_has_its_sections(name):
    text = inspect.getdoc(wrappers(name)[0])
    for section in ("Args:", "Returns:", "Raises:", "Source:"):
        assert re.search(rf"^{section}", text, re.MULTILINE), f"no section {section}"
    assert ">>> " in text, "no doctest"
    assert text.split("\n\n")[0].endswith("."), "it does not begin with a sentence"


@pytest.mark.parametrize("name", FORWARD)
def test_the_docstring_names_every_parameter(name):
    (wrapper,) = wrappers(name)
    text = inspect.getdoc(wrapper).partition("Args:")[2].partition("Returns:")[0]
    for parameter in inspect.signature(wrapper).parameters:
        assert re.search(rf"\b{parameter}\b", text), f"{parameter} is not described"


# ---------------------------------------------------------------- backends


def in_sources(name, backend):
    """Whether a C++ or CUDA file registers the kernel: it may be left out of this build."""
    suffix = {"cpu": "*_cpu.cpp", "cuda": "*.cu"}[backend]
    return any(f'm.impl("{name}"' in text for text in sources(f"csrc/*/{suffix}").values())


@pytest.mark.parametrize("name", [name for name in EVERY_OP if not OPS[name].composite])
@pytest.mark.parametrize("which", ["cpu", "triton", "cuda"])
def test_an_implementation_or_a_reason(name, which):
    op = OPS[name]
    has = op.triton is not None if which == "triton" else which in op.kernels or in_sources(name, which)
    assert has != bool(op.missing.get(which)), f"{which}: an implementation, or a reason in `missing`, and not both"


@pytest.mark.parametrize("name", [name for name in EVERY_OP if OPS[name].triton])
def test_the_triton_entry_can_be_imported(name):
    pytest.importorskip("triton", reason="triton is not installed")
    assert callable(_dispatch._triton(OPS[name].triton))


# ---------------------------------------------------------------- tests and benchmarks


@cache
def modules_of_tests():
    """{test module: (names in its OPS, its test functions and their parameters)}, read without importing it."""
    found = {}
    for path, text in sources("tests/*/test_*.py").items():
        tree = ast.parse(text)
        names = [ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)
                 and any(isinstance(t, ast.Name) and t.id == "OPS" for t in node.targets)]  # fmt: skip
        tests = {node.name: [a.arg for a in node.args.args] for node in tree.body if isinstance(node, ast.FunctionDef)}
        found[path] = (set(names[0]) if names else set(), tests)
    return found


@pytest.mark.parametrize("name", EVERY_OP)
def test_a_test_module_names_it(name):
    """Without a name in OPS an operator's tests prove nothing about its kernels."""
    folder = ROOT / "tests" / family(name)
    named = [path for path, (names, _) in modules_of_tests().items() if name in names and path.parent == folder]
    assert bool(named) != (name in UNNAMED), UNNAMED.get(name, "no test module has it in OPS")
    if name in UNNAMED and name in BACKWARD:
        assert not OPS[name].kernels and OPS[name].triton is None, f"has a kernel now: {UNNAMED[name]}"


@pytest.mark.parametrize("name", sorted(set(FORWARD) - set(UNNAMED)))
def test_every_backend_is_held_to_the_messages(name):
    """The tests of bad calls run on each backend, so that the messages are the same on all."""
    tests = {}
    for path, (names, functions) in modules_of_tests().items():
        if name in names and path.parent.name == family(name):
            tests |= functions
    assert any("bad_calls" in test and "backend" in parameters for test, parameters in tests.items())
    assert sum("backend" in parameters for parameters in tests.values()) >= 3


@pytest.mark.parametrize("name", [name for name in FORWARD if OPS[name].kernels or OPS[name].triton])
def test_a_benchmark_or_a_reason(name):
    named = re.compile(rf'[".]{name.split(".")[0]}\b')
    measured = any(named.search(text) for text in sources("benchmarks/*/bench_*.py").values())
    assert measured != (name in UNMEASURED), "a benchmark, or a reason in UNMEASURED, and not both"


def test_reasons_are_of_operators():
    assert set(UNNAMED) | set(UNMEASURED) <= set(OPS)
