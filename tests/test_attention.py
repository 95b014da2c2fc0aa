"""The fused kernels against attention in float64: by Triton's interpreter on a CPU, or with -m gpu on a GPU."""

import ast
import dataclasses
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import common.hardware as hardware_module
import model as model_module
from common.hardware import Choice, choose_attention
from errors import UserError
from model import GPT, AttentionContext, GPTConfig, Launch, attention, dense_mask
from tests.conftest import ROOT

pytest.importorskip("triton", reason="the kernel is Triton's")
import triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
old_triton, new_numpy = triton.__version__.startswith("3.6."), tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4)
if DEVICE == "cpu" and old_triton and new_numpy:
    pytest.skip(
        "triton 3.6 and numpy from 2.4 on break run-time loop bounds in the interpreter", allow_module_level=True
    )

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
CHOICES = {
    "T": (129, 97, 65, 64, 17, 2, 1),
    "D": (128, 96, 80, 64, 48, 32, 16),
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "heads": ((2, 2), (2, 1), (4, 2)),
    "hidden": ("nothing", "documents", "window", "both"),
    "scale": (1.0, 20.0),
    "layout": ("packed", "values apart", "contiguous", "strided"),
    "blocks": ((64, 64), (128, 64), (32, 64), (64, 32)),
}
if DEVICE == "cuda":  # each case is compiled: seconds by the table, minutes with large blocks of float32
    CHOICES |= {"T": (193, 128, 64, 2, 1), "D": (128, 80, 64, 16), "dtype": (torch.float16, torch.bfloat16)}
    CHOICES |= {"blocks": ("by the table",)}


def pairwise(choices: dict[str, tuple]) -> list[dict]:
    """Cases in which every pair of values of two different choices occurs at least once: greedy, always the same."""
    names = list(choices)
    missing = {
        ((a, x), (b, y)): None for a, b in itertools.combinations(names, 2) for x in choices[a] for y in choices[b]
    }  # in order
    cases = []
    while missing:
        case: dict = dict(next(iter(missing)))
        for name in names:
            if name not in case:
                found = [
                    sum(_pair(names, name, value, other, case[other]) in missing for other in case)
                    for value in choices[name]
                ]
                case[name] = choices[name][found.index(max(found))]
        for a, b in itertools.combinations(names, 2):
            missing.pop(((a, case[a]), (b, case[b])), None)
        cases.append({name: case[name] for name in names})
    return cases


def _pair(names, a, x, b, y):
    return ((a, x), (b, y)) if names.index(a) < names.index(b) else ((b, y), (a, x))


CASES = pairwise(CHOICES)
FLOAT32 = [{**CASES[0], "T": 65, "D": 16, "dtype": torch.float32}] if DEVICE == "cuda" else []


def first_visible(hidden: str, B: int, T: int) -> torch.Tensor | None:
    """Documents start at the middle and shortly before the end, elsewhere in the second row; the window is 20 long."""
    if hidden == "nothing":
        return None
    first = torch.full((B, T), -30, dtype=torch.int64)  # a window at the start reaches behind it
    if hidden in ("documents", "both"):
        first[:, :] = 0
        for b in range(B):
            for start in (T // 2 - b, T - 2 - b):
                first[b, max(0, start) :] = max(0, start)
    if hidden in ("window", "both"):
        first = torch.maximum(first, torch.arange(T) - 19)
    return first.to(torch.int32)


def fused(q, k, v, first):
    return attention(q, k, v, AttentionContext("triton", first_visible=first), layer=0)


def by_definition(q, k, v, first):
    """softmax(q · kᵀ / √D) · v in the inputs' dtype, written out."""
    group, T = q.shape[2] // k.shape[2], q.shape[1]
    q, k, v = q.transpose(1, 2), *(x.repeat_interleave(group, dim=2).transpose(1, 2) for x in (k, v))
    first = torch.zeros(q.shape[0], T, dtype=torch.int32, device=q.device) if first is None else first
    if q.dtype == torch.float64:
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~dense_mask(first), -torch.inf)
        return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask(first)).transpose(1, 2)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that were launched."""
    names = []
    jitted = model_module._jitted
    monkeypatch.setattr(model_module, "_jitted", lambda kernel: names.append(kernel.__name__) or jitted(kernel))
    return names


@pytest.mark.parametrize(
    "case", CASES + FLOAT32, ids=lambda case: "-".join(str(value).removeprefix("torch.") for value in case.values())
)
def test_outputs_and_gradients_are_as_good_as_plain_pytorch(case, launched, monkeypatch):
    """Errors against float64 are at most 2 × (gradients 3 ×) those of PyTorch in the same dtype, plus 4 rounding units;
    only these where PyTorch computes NaN, as its dq in float16 does on an H200 with torch 2.11 for large scores.

    With one token dq and dk are exactly 0, with two nearly so: differences of sums as large as dv, which therefore is
    the measure there.
    """
    T, D, dtype, (H, K) = case["T"], case["D"], case["dtype"], case["heads"]
    B = 2 if T < 64 else 1
    for key in list(model_module.LAUNCHES) if DEVICE == "cpu" else ():
        monkeypatch.setitem(model_module.LAUNCHES, key, (Launch(*case["blocks"], 4, 1),) * 3)
    generator = torch.Generator().manual_seed(T * D)
    first = first_visible(case["hidden"], B, T)
    room = 3 if case["layout"] == "strided" else 0
    base = torch.randn(B, T + room, H + 2 * K + room, D + 8 * room, generator=generator)
    base[:, :, : H + K] *= case["scale"] ** 0.5
    base, grad = base.to(DEVICE, dtype), torch.randn(B, T, H, D, generator=generator).to(DEVICE, dtype)
    first = None if first is None else first.to(DEVICE)

    def run(dtype, attend):
        leaf = base.detach().to(dtype).requires_grad_()
        q, k, v = leaf[:, room:, : H + 2 * K, :D].split((H, K, K), dim=2)
        if case["layout"] == "values apart":
            v = v.contiguous()
        elif case["layout"] == "contiguous":
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out = attend(q, k, v)
        out.backward(grad.to(dtype))
        return [out.detach(), *leaf.grad[:, room:, : H + 2 * K, :D].split((H, K, K), dim=2)]

    exact = run(torch.float64, lambda q, k, v: by_definition(q, k, v, first))
    plain = run(dtype, lambda q, k, v: by_definition(q, k, v, first))
    assert not launched
    ours = run(dtype, lambda q, k, v: fused(q, k, v, first))
    assert launched == ["_forward_kernel", "_query_gradient_kernel", "_key_value_gradient_kernel"]
    for name, times, mine, its, true in zip(("out", "dq", "dk", "dv"), (2, 3, 3, 3), ours, plain, exact, strict=True):
        assert mine.dtype == dtype
        error, allowed = (mine.double() - true).abs().max(), (its.double() - true).abs().max().nan_to_num(0.0)
        largest = (exact[3] if T <= 2 and name in ("dq", "dk") else true).abs().max()
        assert error <= times * allowed + 4 * torch.finfo(dtype).eps * largest, name


def test_hidden_scores_are_a_power_of_two():
    """A GPU computes s · scale − m in one step. Where m is s · scale, rounded, of a row without a visible key, that is
    the rounding error: 0 for powers of two, else as much as 1e22, an exponent beyond float32."""
    numbers = [
        node.value
        for node in ast.walk(ast.parse(Path(model_module.__file__).read_text("utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, float) and node.value > 1e20
    ]
    assert len(numbers) == 2
    for hidden, D in itertools.product(numbers, range(1, 129)):
        product = np.float32(hidden) * np.float32(math.log2(math.e) / math.sqrt(D))
        assert np.float64(product) == np.float64(hidden) * np.float64(np.float32(math.log2(math.e) / math.sqrt(D)))


def test_the_cases_cover_all_pairs_and_are_few():
    assert len(CASES) <= 60
    for a, b in itertools.combinations(CHOICES, 2):
        assert {(case[a], case[b]) for case in CASES} == set(itertools.product(CHOICES[a], CHOICES[b]))


TINY = GPTConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=64, block_size=96, vocab_size=40, eos_id=39)
MODELS = {
    "learned": TINY,
    "modern": dataclasses.replace(
        TINY, positions="rotary", norm="rmsnorm", mlp="swiglu", qk_norm=True, bias=False, sliding_window=50
    ),
}


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_a_model_learns_the_same_on_both_paths(config, launched):
    ids = torch.randint(0, 39, (2, 91), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    results = []
    for path in ("sdpa", "triton"):
        model = GPT(config, attention=path).to(DEVICE)
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    assert len(launched) == 3 * config.n_layer
    for ours, its in zip(*results, strict=True):
        torch.testing.assert_close(ours, its, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("path", ["sdpa", "triton"])
def test_losses_of_a_document_do_not_depend_on_earlier_documents(path):
    """Losses of all its tokens, for predecessors of several lengths, which shift the kernel's blocks."""
    config = dataclasses.replace(MODELS["modern"], sliding_window=None, document_mask=True)
    model = GPT(config, attention=path).to(DEVICE)
    draw = torch.Generator().manual_seed(2)
    document = [39, *torch.randint(0, 39, (20,), generator=draw).tolist(), 39]
    losses = []
    for before in (
        [],
        [39, 1, 2, 3],
        [39, *range(38), 39],
        [39, *torch.randint(0, 39, (70,), generator=draw).tolist()],
    ):
        ids = torch.tensor([before + document], device=DEVICE)
        losses.append(model(ids[:, :-1], ids[:, 1:], reduction="none")[0, len(before) :].detach())
    for other in losses[1:]:
        assert len(other) == 21
        torch.testing.assert_close(other, losses[0], rtol=1e-5, atol=1e-5)


def test_hidden_blocks_are_skipped_not_computed(monkeypatch):
    """NaN in all keys and values that no query of a block can see reaches no output: no product read them."""
    monkeypatch.setitem(model_module.LAUNCHES, ("other", 4, 64), (Launch(32, 32, 4, 1),) * 3)
    T, window = 128, 16
    qkv = torch.randn(1, T, 3, 16, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    first = (torch.arange(T) - window + 1)[None].to(DEVICE, torch.int32)
    clean = fused(*qkv.split(1, dim=2), first)
    qkv[:, :32, 1:] = torch.nan  # rows from 64 on see keys from 49 on
    dirty = fused(*qkv.split(1, dim=2), first)
    assert torch.equal(dirty[:, 64:], clean[:, 64:])
    assert dirty[:, :32].isnan().all()
    qkv.requires_grad_()
    grad = torch.zeros_like(dirty)
    grad[:, 96:] = 1.0
    gradient = torch.autograd.grad(fused(*qkv.split(1, dim=2), first), qkv, grad)[0]
    assert gradient[:, 96:].isfinite().all()


def test_gradients_are_bitwise_reproducible():
    qkv = torch.randn(2, 70, 4, 32, generator=torch.Generator().manual_seed(4)).to(DEVICE).requires_grad_()
    first, second = (
        torch.autograd.grad(fused(*qkv.split((2, 1, 1), dim=2), None).square().sum(), qkv)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_views_of_the_projection_reach_the_kernel_without_a_copy(config, monkeypatch):
    """By their storage and strides: all three with learned positions, the values where queries and keys are rotated."""
    packed, seen = [], []
    launch_kernel = model_module.launch_kernel

    def record(name, launch, *tensors):
        seen.append((name, tensors[:3]))
        return launch_kernel(name, launch, *tensors)

    monkeypatch.setattr(model_module, "launch_kernel", record)
    model = GPT(config, attention="triton").to(DEVICE)
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda module, args, out: packed.append(out.untyped_storage().data_ptr()))
    model(torch.randint(0, 39, (2, 20)).to(DEVICE)).sum().backward()
    assert [name for name, _ in seen[:2]] == ["forward"] * 2
    assert len(seen) == 6
    layers = [0, 1, 1, 1, 0, 0]  # the backward pass starts at the last one
    for layer, (_, (q, k, v)) in zip(layers, seen, strict=True):
        views = (v,) if config.positions == "rotary" else (q, k, v)
        assert all(x.untyped_storage().data_ptr() == packed[layer] for x in views)
        assert all(x.stride() == (20 * 128, 128, 16, 1) for x in views)  # of (B, T, (H + 2K) · D)
        assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("layout", "T", "is_read"),
    [
        ("packed", 64, True),
        ("rotated", 64, True),
        ("packed", 72, False),
        ("heads apart", 64, False),
        ("odd", 64, False),
    ],
)
@pytest.mark.parametrize("hidden", ["nothing", "both"])
def test_blocks_read_by_descriptors_give_the_same_bits(layout, T, is_read, hidden, monkeypatch):
    """Where descriptors cannot describe the tensors, or blocks reach beyond T, the kernels take pointers."""
    architecture, dtype, block, warps = "other", torch.float32, 32, 4
    if DEVICE == "cuda":
        if (capability := torch.cuda.get_device_capability()) < (9, 0):
            pytest.skip("TMA came with Hopper")
        architecture, dtype, block = "sm_{}{}".format(*capability), torch.float16, 64
    generator = torch.Generator().manual_seed(6)
    B, H, K, D, T = 2, 4, 2, 32, T * block // 32
    packed, grad = (torch.randn(B, T, heads, D, generator=generator).to(DEVICE, dtype) for heads in (H + 2 * K, H))
    q, k, v = packed.split((H, K, K), dim=2)
    if layout == "rotated":
        q, k = torch.cat((q, k), dim=2).split((H, K), dim=2)
    elif layout == "heads apart":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif layout == "odd":
        q, k, v = (torch.cat((x.flatten(2), x[:, :, 0, :1]), dim=2)[..., :-1].unflatten(2, (-1, D)) for x in (q, k, v))
    first = first_visible(hidden, B, T)
    first = None if first is None else first.to(DEVICE)
    launches, launch_kernel = [], model_module.launch_kernel

    def record(name, launch, *tensors):
        launches.append(launch)
        return launch_kernel(name, launch, *tensors)

    monkeypatch.setattr(model_module, "launch_kernel", record)
    key, results = (architecture, dtype.itemsize, 64), []
    monkeypatch.setitem(model_module.LAUNCHES, key, (Launch(block, block, warps, 2),) * 3)
    for tma in (False, True):
        monkeypatch.setitem(model_module.TMA_LAUNCHES, key, (Launch(block, block, warps, 2, tma),) * 3)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = fused(*leaves, first)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    assert [launch.tma for launch in launches] == [False] * 3 + [is_read] * 3
    for plain, described in zip(*results, strict=True):
        assert torch.equal(plain, described)


@pytest.mark.parametrize("path", ["sdpa", "triton"])
def test_a_window_on_transposed_ids(path):
    """Ids are often made as (T, B) and transposed; what follows from them has such strides too."""
    model = GPT(MODELS["modern"], attention=path).to(DEVICE)
    ids = torch.randint(0, 39, (2, 70), generator=torch.Generator().manual_seed(7)).to(DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(model(ids.t().contiguous().t()), model(ids))


def test_first_visible_with_strides_of_its_own_or_a_wrong_shape():
    B, T = 2, 70
    q, k, v = torch.randn(B, T, 3, 16).to(DEVICE).split(1, dim=2)
    one = first_visible("both", 1, T).to(DEVICE)
    expected = fused(q, k, v, one.repeat(B, 1))
    for same in (one.expand(B, T), one.repeat(B, 1).t().contiguous().t(), one.expand(B, T).long()):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = fused(*leaves, same)
        assert torch.equal(out, expected)
        gradients = torch.autograd.grad(out.sum(), leaves)
        expected_leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        expected_gradients = torch.autograd.grad(fused(*expected_leaves, one.repeat(B, 1)).sum(), expected_leaves)
        assert all(map(torch.equal, gradients, expected_gradients))
    for wrong in (one, one.expand(B, T)[:, :-1]):
        with pytest.raises(ValueError, match=r"first_visible has the shape \(.*\), expected \(2, 70\)"):
            fused(q, k, v, wrong)


def test_strides_of_heads_are_multiplied_in_64_bits():
    """Heads 2³⁰ numbers apart: the third begins beyond 2³¹. Few of the pages are ever touched."""
    T, D, apart = 5, 16, 2**30
    if DEVICE == "cuda":
        pytest.skip("it would take 13 GB of memory, all of it real there")
    memory = torch.empty(2 * apart + 3 * T * D, dtype=torch.float16, device=DEVICE)
    far = memory.as_strided((1, T, 3, D), (3 * T * D, D, apart, 1))
    near = torch.randn(1, T, 3, D, generator=torch.Generator().manual_seed(8)).to(DEVICE, torch.float16)
    far.copy_(near)
    assert far.stride() == (3 * T * D, D, apart, 1)
    results = []
    for x in (near, far):
        leaves = [x.detach().requires_grad_() for _ in range(3)]
        out = fused(*leaves, None)
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(near))])
    for ours, its in zip(*results, strict=True):
        assert torch.equal(ours, its)


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_operator_passes_opcheck(contiguous, masked):
    q, k, v = torch.randn(1, 19, 4, 16).to(DEVICE).requires_grad_().split((2, 1, 1), dim=2)
    if contiguous:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    first = torch.zeros(1, 19, dtype=torch.int32, device=DEVICE) if masked else None
    results = torch.library.opcheck(torch.ops.sprout.attention.default, (q, k, v, first))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_torch_compile_needs_no_graph_break(config, launched):
    model = GPT(config, attention="triton").to(DEVICE)
    ids = torch.randint(0, 39, (2, 33), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradients = []
    for way in (model, compiled):
        way(ids[:, :-1], ids[:, 1:]).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        model.zero_grad()
    assert len(launched) == 2 * 3 * config.n_layer
    for eager, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, eager)


def test_the_kernel_is_chosen_by_what_the_machine_can(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    bfloat16, float16, float32 = torch.bfloat16, torch.float16, torch.float32
    no_kernel = "no fused kernel: Triton needs a GPU, the device is cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert choose_attention("auto", cpu, float32, 64) == Choice("sdpa", {"attention": no_kernel})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(hardware_module.shutil, "which", lambda name: "/usr/bin/cc")
    assert (
        choose_attention("auto", gpu, bfloat16, 64).value
        == choose_attention("auto", gpu, float16, 64).value
        == "triton"
    )
    assert choose_attention("triton", gpu, float32, 128) == Choice("triton", {})
    exact = "no fused kernel: its float32 products are exact, without tensor cores"
    assert choose_attention("auto", gpu, float32, 64) == Choice("sdpa", {"attention": exact})
    assert choose_attention("sdpa", gpu, bfloat16, 64).value == "sdpa"
    assert choose_attention("auto", gpu, bfloat16, 256).value == "sdpa"
    for device, head_size, reason in (
        (cpu, 64, "needs a GPU"),
        (torch.device("mps"), 64, "device is mps"),
        (gpu, 192, "head sizes up to 128"),
    ):
        with pytest.raises(UserError, match=reason):
            choose_attention("triton", device, bfloat16, head_size)
    monkeypatch.setattr(hardware_module.shutil, "which", lambda name: None)
    assert choose_attention("auto", gpu, bfloat16, 64).value == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UserError, match=r"compute capability \(7, 5\), \(8, 0\) is needed"):
        choose_attention("triton", gpu, bfloat16, 64)


@pytest.mark.parametrize(
    ("shapes", "dtypes", "message"),
    [
        (((1, 4, 2, 16),) * 3, (torch.float64,) * 3, "not torch.float64; use the sdpa path"),
        (((1, 4, 2, 192),) * 3, (torch.float16,) * 3, "head sizes up to 128, not 192; use the sdpa path"),
        (((1, 4, 2, 16),) * 3, (torch.float16, torch.float32, torch.float32), "of one dtype"),
        (((1, 4, 4, 16), (1, 4, 3, 16), (1, 4, 3, 16)), (torch.float16,) * 3, "K a divisor of H"),
        (((1, 4, 4, 16), (1, 4, 2, 16), (1, 4, 1, 16)), (torch.float16,) * 3, r"not .*\(1, 4, 2, 16\)"),
        (((1, 4, 2, 16), (1, 3, 2, 16), (1, 3, 2, 16)), (torch.float16,) * 3, r"not .*\(1, 3, 2, 16\)"),
        (((1, 4, 2, 16), (2, 4, 2, 16), (2, 4, 2, 16)), (torch.float16,) * 3, r"not .*\(2, 4, 2, 16\)"),
        (((1, 4, 2, 16), (1, 4, 2, 8), (1, 4, 2, 8)), (torch.float16,) * 3, r"not .*\(1, 4, 2, 8\)"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(shapes, dtypes, message):
    """Not compiled, which would crash or read other memory."""
    q, k, v = (torch.zeros(shape, dtype=dtype, device=DEVICE) for shape, dtype in zip(shapes, dtypes, strict=True))
    with pytest.raises(ValueError, match=message):
        fused(q, k, v, None)


@pytest.mark.parametrize("missing", [False, True])
def test_triton_is_not_imported_on_the_sdpa_path(missing):
    program = f"""
import sys
if {missing}: sys.modules["triton"] = None
import torch, model
before = set(sys.modules)
gpt = model.GPT(model.GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=8, vocab_size=10, eos_id=9))
gpt(torch.zeros(1, 8, dtype=torch.int64)).sum().backward()
assert not [name for name in sys.modules if name.startswith("triton") and sys.modules[name] is not None], "imported"
from common.hardware import choose_attention
print(choose_attention("auto", torch.device("cuda"), torch.bfloat16, 16).reasons["attention"] if {missing} else "fine")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ("no fused kernel: Triton is not installed" if missing else "fine")
