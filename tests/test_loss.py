"""The loss in chunks: equal to the plain one, without a tensor of all logits, and no break in a compiled model."""

import functools
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_module
from model import GPT, IGNORED_TARGET, GPTConfig
from tests.conftest import ROOT

V, ROWS, T = 1100, 3, 64
CONFIG = GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=T, vocab_size=V, eos_id=None)
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture
def _chunks_of_forty_tokens(monkeypatch):
    monkeypatch.setattr(model_module, "MIN_CHUNKED_LOGITS", 1)
    monkeypatch.setattr(model_module, "MIN_CHUNK_ROWS", 1)
    monkeypatch.setattr(model_module, "CHUNK_LOGITS", {"cpu": 40 * V})
    monkeypatch.setattr(model_module, "EVAL_CHUNK_LOGITS", 40 * V)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids, targets = (torch.randint(0, V, (ROWS, T), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    targets[0, :5] = IGNORED_TARGET
    return ids, targets


def loss_of(model: GPT, dtype: torch.dtype = torch.float32, compiler: str | None = None, **options) -> torch.Tensor:
    """The loss of `batch`, of the model compiled whole if a compiler is named."""
    forward = model if compiler is None else torch.compile(model, backend=compiler, fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return forward(*batch(), **options)


def loss_and_gradients(*args, **options) -> list[torch.Tensor]:
    model = GPT(CONFIG).to(torch.float64 if torch.float64 in args else torch.float32)
    loss = loss_of(model, *args, **options)
    (3 * loss).backward()
    assert not model.embed.weight[V:].any()
    return [loss.detach().double(), *(parameter.grad.double() for parameter in model.parameters())]


@functools.cache
def plain_loss_and_gradients(dtype: torch.dtype, reduction: str, label_smoothing: float) -> list[torch.Tensor]:
    """Before a test makes the chunks small: this batch has too few logits for more than one."""
    return loss_and_gradients(dtype, reduction=reduction, label_smoothing=label_smoothing)


def assert_equal_up_to_rounding(found, expected, dtype):
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]  # the plain loss is in float32
    for ours, its in zip(found, expected, strict=True):
        assert (ours - its).norm() <= tolerance * its.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_loss_in_chunks_equals_the_plain_one(dtype, reduction, label_smoothing, request):
    """Loss and gradients, with targets that do not count, a padded vocabulary and a last chunk that is not full."""
    plain = plain_loss_and_gradients(dtype, reduction, label_smoothing)
    request.getfixturevalue("_chunks_of_forty_tokens")
    chunked = loss_and_gradients(dtype, reduction=reduction, label_smoothing=label_smoothing)
    assert_equal_up_to_rounding(chunked, plain, dtype)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_model_compiled_whole_does_not_break_at_the_loss(compiler, dtype, request):
    """As on a GPU: fullgraph raises at a break. Under autocast the products must stay in its dtype."""
    plain = plain_loss_and_gradients(dtype, "sum", 0.1)
    request.getfixturevalue("_chunks_of_forty_tokens")
    torch.compiler.reset()
    compiled = loss_and_gradients(dtype, compiler, reduction="sum", label_smoothing=0.1)
    assert_equal_up_to_rounding(compiled, plain, dtype)
    eager = loss_and_gradients(dtype, reduction="sum", label_smoothing=0.1)
    for ours, its in zip(compiled, eager, strict=True):
        assert (ours - its).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * its.norm()
    torch.compiler.reset()


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor that an operation returns, also inside autograd."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.usefixtures("_chunks_of_forty_tokens")
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_neither_training_nor_evaluation_makes_all_logits(dtype, label_smoothing):
    model, limit = GPT(CONFIG), 40 * CONFIG.padded_vocab_size
    assert limit > model.embed.weight.numel()
    for reduction in ("sum", "mean", "none"):
        with LargestTensor() as largest, torch.set_grad_enabled(reduction != "none"):
            loss = loss_of(model, dtype, reduction=reduction, label_smoothing=label_smoothing)
            if reduction != "none":
                loss.backward()
        assert 0 < largest.elements <= limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_evaluation_in_chunks_equals_the_plain_loss_and_makes_no_gradients(
    dtype, label_smoothing, request, monkeypatch
):
    model = GPT(CONFIG).to(torch.float64 if dtype == torch.float64 else torch.float32)
    reductions = ("none", "sum", "mean")
    monkeypatch.setattr(model_module, "chunked_loss", None)
    with torch.no_grad():
        plain = [loss_of(model, dtype, reduction=name, label_smoothing=label_smoothing) for name in reductions]
        request.getfixturevalue("_chunks_of_forty_tokens")
        found = [loss_of(model, dtype, reduction=name, label_smoothing=label_smoothing) for name in reductions]
    assert found[0].shape == (ROWS, T)
    assert not found[0][0, :5].any()
    for ours, its in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, its, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("vocab_size", [65, 1100, 9000])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernel_of_the_loss_equals_float64(vocab_size, label_smoothing, dtype):
    """In Triton's interpreter: rows of one block and of several, padded, and a target that does not count."""
    pytest.importorskip("triton", reason="the kernel is Triton's")
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (4 * torch.randn(5, vocab_size + 24, generator=generator)).to(dtype)
    targets = torch.randint(0, vocab_size, (5,), generator=generator)
    targets[2] = IGNORED_TARGET
    exact = logits[:, :vocab_size].double().requires_grad_()
    loss = F.cross_entropy(exact, targets, reduction="sum", label_smoothing=label_smoothing)
    loss.backward()
    rounding = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]  # the interpreter truncates
    for replace in (model_module.loss_kernel, model_module.replace_logits):
        total, gradient = replace(logits.clone(), targets, vocab_size, label_smoothing)
        assert total.item() == pytest.approx(loss.item(), rel=1e-6)
        assert (gradient[:, :vocab_size].double() - exact.grad).norm() <= rounding * exact.grad.norm()
        assert gradient.dtype == dtype
        assert not gradient[:, vocab_size:].any()
        assert not gradient[2].any()


@pytest.mark.usefixtures("_chunks_of_forty_tokens")
def test_a_model_with_the_fused_kernels_uses_that_of_the_loss(monkeypatch):
    pytest.importorskip("triton", reason="the kernel is Triton's")
    used = []
    kernel = model_module.loss_kernel
    monkeypatch.setattr(model_module, "loss_kernel", lambda *args: used.append(1) or kernel(*args))
    fused, plain = (loss_of(GPT(CONFIG, attention=path), reduction="sum") for path in ("triton", "sdpa"))
    assert len(used) == -(-ROWS * T // 40)
    assert fused.item() == pytest.approx(plain.item(), rel=1e-6)


COMPILE = """
import json, sys, triton, model
from bench.ahead_of_time import disassemble
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
kernel = model._jitted(model._loss_kernel)
signature = dict(zip(kernel.arg_names, ("*bf16", "*i64", "*fp32", "i32", "i32", "fp32", "constexpr")))
aligned = {(index,): [["tt.divisibility", 16]] for index in (0, 1, 2, 4)}  # 4: the row, a padded vocabulary
source = ASTSource(fn=kernel, signature=signature, constexprs={"BLOCK": 4096}, attrs=aligned)
compiled = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": 8})
print(json.dumps(disassemble(compiled.asm["cubin"])))
"""


@pytest.mark.parametrize("architecture", ["80", "90"])
def test_the_kernel_of_the_loss_compiles_to_wide_loads_without_spills(architecture):
    """Of rows that are aligned while the vocabulary is not. In a process that compiles: Triton interprets in this."""
    pytest.importorskip("triton", reason="the kernel is Triton's")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, architecture]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    code, usage = json.loads(result.stdout)
    loads, stores = (re.findall(rf"\b{name}\.E\S*", code) for name in ("LDG", "STG"))
    assert sum(".128" in load for load in loads) == 4  # two of eight numbers a thread, in both passes
    assert len(loads) == 6  # and the target and its logit
    assert sum(".128" in store for store in stores) == 2
    assert re.search(r"STACK:0\b", usage)
    assert not re.search(r"\b(STL|LDL)\b", code)
