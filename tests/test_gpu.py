"""The model on a GPU: kernels, compiled steps, decoding by CUDA graphs, evaluation. Scripts: test_gpu_scripts.py.

    python -m pytest -m gpu tests/test_gpu.py               on a GPU; -n 8 compiles side by side
    python -m pytest -m gpu tests/test_gpu.py --on-cpu      a trial in tiny sizes, interpreted, nothing recorded

Errors are taken against float64, and compared with PyTorch's in the same dtype. Of requirements.txt this needs torch,
numpy, Triton and what the imports below need, but no annotated-types, which train.py needs.
"""

import dataclasses
import runpy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import generation.cuda_graphs as cuda_graphs
import model as model_module
from bench.launch_check import largest_error
from common.hardware import Hardware, choose_hardware
from common.options import HardwareOptions
from generation.engine import generate, next_logits
from generation.options import SamplingOptions
from generation.sampling import draw, uniform
from model import GPT, IGNORED_TARGET, ChunkedCrossEntropy, GPTConfig, widened
from parallel.sharding import local, make_mesh, shard
from tests.conftest import ROOT
from tests.test_attention import by_definition, first_visible, fused
from training.compilation import compile_model, use_compiled
from training.data import MicroBatch
from training.evaluation import evaluate
from training.lora import add_adapters, narrow_frozen
from training.optim import clip_gradients, make_optimizer
from training.options import OptimizerOptions

pytestmark = pytest.mark.gpu
FIELDS = {field.name for field in dataclasses.fields(GPTConfig)} - {"vocab_size"}
PRESETS = {
    path.stem: {name: value for name, value in runpy.run_path(str(path)).items() if name in FIELDS}
    for path in sorted((ROOT / "config").glob("*.py"))
    if "\nn_layer = " in path.read_text("utf-8")
}


@pytest.fixture(autouse=True)
def _own_precision():
    """Without TF32, which choose_hardware allows to the whole process."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


# ---- the kernels


def assert_as_good(ours, plain, exact, dtype):
    """Of out, dq, dk and dv: errors at most 2 × (gradients 3 ×) those of PyTorch, plus 4 rounding units; and so for the
    norms of rows, plus one: numbers of late tokens are smaller than 4 rounding units of the largest one."""
    for name, times, mine, its, true in zip(("out", "dq", "dk", "dv"), (2, 3, 3, 3), ours, plain, exact, strict=True):
        assert mine.dtype == its.dtype == dtype
        error, allowed = (mine.double() - true).abs().max(), (its.double() - true).abs().max()
        largest = max(true.abs().max(), exact[3].abs().max() if true.shape[1] <= 2 else 0.0)
        assert error <= times * allowed + 4 * torch.finfo(dtype).eps * largest, (name, error, allowed)
        if true.shape[1] > 2:  # before, dq and dk are 0 but for rounding
            error, allowed = largest_error(mine, true), largest_error(its, true)
            assert error <= times * allowed + torch.finfo(dtype).eps, (name, "rows", error, allowed)


def out_and_gradients(attend, inputs, grad, first, dtype=None):
    q, k, v = (x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs)
    out = attend(q, k, v, first)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad.to(out.dtype))]


def packed(device, dtype, B, T, H, K, D):
    """q, k and v as views of one projection, and a gradient of the output."""
    draw = torch.Generator(device).manual_seed(T * D)
    qkv = torch.randn(B, T, H + 2 * K, D, generator=draw, device=device).to(dtype)
    return qkv.split((H, K, K), dim=2), torch.randn(B, T, H, D, generator=draw, device=device).to(dtype)


def compare(inputs, grad, first, rows=slice(None)):
    """The kernels on all rows of the batch, against PyTorch and float64 on some."""
    ours = [x[rows] for x in out_and_gradients(fused, inputs, grad, first)]
    few, first = [x[rows].contiguous() for x in inputs], None if first is None else first[rows]
    plain = out_and_gradients(by_definition, few, grad[rows], first)
    exact = out_and_gradients(by_definition, few, grad[rows], first, torch.float64)
    assert_as_good(ours, plain, exact, inputs[0].dtype)


@pytest.mark.parametrize("hidden", ["nothing", "both"])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_kernels_are_as_good_as_pytorch_in_the_shapes_of_the_presets(preset, hidden, device):
    config = GPTConfig(**PRESETS[preset])
    H, T = (config.n_head, config.block_size) if device.type == "cuda" else (2, 24)
    first = first_visible(hidden, 2, T)
    first = None if first is None else first.to(device)
    compare(*packed(device, torch.bfloat16, 2, T, H, H, config.head_size), first)


@pytest.mark.parametrize(
    ("T", "H", "K", "D", "hidden"),
    [
        *((1, 12, 12, 64, "nothing"), (2, 4, 1, 128, "both"), (1000, 4, 2, 64, "both")),
        *((1023, 8, 2, 128, "nothing"), (1024, 12, 4, 64, "documents"), (1024, 4, 2, 128, "window")),
    ],
)
def test_the_kernels_are_as_good_as_pytorch_in_other_shapes(T, H, K, D, hidden, device):
    if device.type == "cpu":
        T, H, K = min(T, 37), H // K, 1
    first = first_visible(hidden, 2, T)
    first = None if first is None else first.to(device)
    compare(*packed(device, torch.float16, 2, T, H, K, D), first)


def test_as_many_tokens_as_the_largest_micro_batch(device):
    """2^16 tokens of GPT-2's shape, the first and last rows compared."""
    B, T, H = (64, 1024, 12) if device.type == "cuda" else (3, 16, 2)
    compare(*packed(device, torch.bfloat16, B, T, H, H, 64), None, rows=[0, B // 2, B - 1])


def test_strides_beyond_32_bits(device):
    """Rows that are 2^31 numbers apart, tokens 4,096 and heads 2^21."""
    T, H, D, row, head = (65, 3, 64, 2**31 + 128, 2**21) if device.type == "cuda" else (9, 3, 16, 2**17, 2**16 // 4)
    storage = torch.empty(row + T * 4096 + H * head, dtype=torch.bfloat16, device=device)
    inputs = [storage.as_strided((2, T, H, D), (row, 4096, head, 1), 512 * place) for place in range(3)]
    values, grad = packed(device, torch.bfloat16, 2, T, H, H, D)
    for x, value in zip(inputs, values, strict=True):
        x.copy_(value)
    compare(inputs, grad, None)


def test_gradients_are_equal_to_the_bit_in_two_runs(device):
    T, H = (1024, 8) if device.type == "cuda" else (40, 4)
    inputs, grad = packed(device, torch.bfloat16, 2, T, H, H // 4, 64)
    first = first_visible("both", 2, T).to(device)
    one, other = (out_and_gradients(fused, inputs, grad, first) for _ in range(2))
    assert all(map(torch.equal, one, other))


# ---- the loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kernel", [False, True])
def test_the_loss_in_chunks_is_as_good_as_pytorchs(kernel, smoothing, device, monkeypatch):
    """Loss and gradients in bfloat16, with a last chunk that is short and targets that do not count: errors against
    float64 at most 2 × PyTorch's, plus 4 rounding units."""
    N, C, V, rows = (2500, 256, 50_257, 50_304) if device.type == "cuda" else (300, 16, 70, 128)
    monkeypatch.setitem(model_module.CHUNK_LOGITS, device.type, 1000 * V if device.type == "cuda" else 1)
    draw = torch.Generator(device).manual_seed(2)
    hidden, weight = (torch.randn(n, C, generator=draw, device=device) for n in (N, rows))
    targets = torch.randint(0, V, (N,), generator=draw, device=device).masked_fill_(hidden[:, 0] > 1, IGNORED_TARGET)

    def in_chunks(hidden, weight):
        return ChunkedCrossEntropy.apply(hidden, weight, targets, V, torch.bfloat16, smoothing, kernel)

    def plain(hidden, weight):
        narrow = hidden.dtype if hidden.dtype == torch.float64 else torch.bfloat16
        logits = hidden.to(narrow) @ weight[:V].to(narrow).mT
        return F.cross_entropy(widened(logits), targets, reduction="sum", label_smoothing=smoothing)

    def run(loss_of, dtype=torch.float32):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
        loss = loss_of(*leaves)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    for ours, its, true in zip(run(in_chunks), run(plain), run(plain, torch.float64), strict=True):
        error, allowed = (ours - true).abs().max(), (its - true).abs().max()
        assert error <= 2 * allowed + 4 * torch.finfo(ours.dtype).eps * true.abs().max(), (error, allowed)


# ---- training steps

SHAPES = {name: {"n_layer": 2, "n_head": 2, "n_embd": 128, "block_size": 128} for name in ("gpt2_124m", "modern_124m")}
SHAPES["modern_124m"] |= {"n_hidden": 384, "n_kv_head": 1}


def small_run(preset, device):
    """A model of the preset's kind, and a batch."""
    config = GPTConfig(**{**PRESETS[preset], **SHAPES[preset], "vocab_size": 1500, "eos_id": 1499})
    rows, T = (4, 128) if device.type == "cuda" else (2, 16)
    ids = torch.randint(0, 1499, (rows, T + 1), generator=torch.Generator().manual_seed(1))
    return config, MicroBatch(ids[:, :-1], ids[:, 1:], None)


def losses_of_steps(config, hardware, attention, compiled, batch, steps, lora_rank=None):
    """(steps, 2): losses and gradient norms."""
    model = GPT(config, seed=5, attention=attention)
    if lora_rank is not None:
        add_adapters(model, lora_rank, 4.0, seed=0)
        narrow_frozen(model, hardware.dtype)
    model.to(hardware.device).train()
    optimizer_name, rate = ("adamw", 1e-2) if lora_rank else ("muon" if config.qk_norm else "adamw", 1e-3)
    options = OptimizerOptions(optimizer=optimizer_name, learning_rate=rate)
    scaler = torch.amp.GradScaler(hardware.device.type, enabled=hardware.dtype == torch.float16)
    optimizer = make_optimizer(model, options, hardware.dtype)
    state = SimpleNamespace(
        model=model, optimizer=optimizer, scaler=scaler, compiler="inductor" if compiled else "none"
    )
    forward = compile_model(model, state, batch, hardware)
    assert (state.compiler != "none") == compiled
    x, y, numbers = batch.x.to(hardware.device), batch.y.to(hardware.device), []
    for _ in range(steps):  # train.update
        with hardware.autocast():
            loss = forward(x, y, reduction="sum") / y.numel()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        numbers.append((float(loss.detach()), float(clip_gradients(model.parameters(), 1.0))))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return np.array(numbers)


@pytest.mark.parametrize(("attention", "lora_rank"), [("triton", None), ("sdpa", None), ("triton", 8)])
@pytest.mark.parametrize("preset", SHAPES)
def test_compiled_steps_learn_as_eager_ones_do(preset, attention, lora_rank, device):
    """Losses and gradient norms of the steps in bfloat16: errors against float32 at most 2 × the eager steps', each the
    largest of all steps, plus what a mean over the batch has if each token's is one rounding unit of bfloat16."""
    config, batch = small_run(preset, device)
    steps = 8 if device.type == "cuda" else 2
    narrow, wide = (Hardware(device, dtype, 1, {}) for dtype in (torch.bfloat16, torch.float32))
    exact = losses_of_steps(config, wide, "sdpa", False, batch, steps, lora_rank)
    eager, compiled = (
        losses_of_steps(config, narrow, attention, way, batch, steps, lora_rank) for way in (False, True)
    )
    assert np.isfinite(compiled).all()
    assert compiled[-1, 0] < compiled[0, 0] - (0.1 if lora_rank is None else 0.01)
    error, allowed = (np.abs(way - exact).max(axis=0) / exact.max(axis=0) for way in (compiled, eager))
    rounding = torch.finfo(torch.bfloat16).eps / batch.y.numel() ** 0.5
    assert (error <= 2 * allowed + rounding).all(), (error, allowed)


@pytest.fixture
def process_group(device):
    """Of this process alone: FSDP2 shards over it as over many."""
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0,
                            world_size=1)  # fmt: skip
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("attention", ["triton", "sdpa"])
def test_fsdp_learns_as_one_process_does(attention, compiles, recompute, device):
    """The attention kernel and compiled blocks under fully_shard's hooks: three steps of Muon, losses and weights."""
    tiny = device.type == "cpu"
    if tiny and compiles:
        pytest.skip("test_compilation.py has it on a CPU")
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32 if tiny else 256, "block_size": 32 if tiny else 256}
    kind = {"positions": "rotary", "norm": "rmsnorm", "qk_norm": True, "mlp": "swiglu", "bias": False}
    config, found = GPTConfig(**shape, **kind, vocab_size=300, eos_id=0), []
    dtype = torch.float32 if tiny else torch.bfloat16
    hardware = Hardware(device, dtype, 1, {})
    ids = torch.randint(300, (2, config.block_size), generator=torch.Generator().manual_seed(2)).to(device)
    for is_divided in (False, True):
        model = GPT(config, 5, attention)
        if is_divided:
            shard(model, make_mesh("fsdp", device), device, dtype)
            if compiles:
                use_compiled(model)
        model = model.to(device).train()
        model.recompute_blocks = recompute and is_divided
        optimizer, losses = make_optimizer(model, OptimizerOptions(optimizer="muon", learning_rate=1e-2), dtype), []
        for _ in range(3):
            with hardware.autocast():
                loss = model(ids, ids)
            loss.backward()
            norm = clip_gradients(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses += [loss.item(), norm.item()]
        found.append((losses, [local(parameter).clone() for parameter in model.parameters()]))
    (losses, weights), (divided_losses, divided_weights) = found
    assert divided_losses == pytest.approx(losses, rel=1e-4 if tiny else 2e-2)
    for one, other in zip(weights, divided_weights, strict=True):
        assert (one - other).norm() <= (1e-3 if tiny else 0.1) * one.norm()


def test_float16_learns_with_a_loss_scale(device):
    """The first updates may be left out, while the scale is found."""
    config, batch = small_run("gpt2_124m", device)
    dtype, steps = (torch.float16, 24) if device.type == "cuda" else (torch.bfloat16, 2)
    losses = losses_of_steps(config, Hardware(device, dtype, 1, {}), "triton", False, batch, steps)
    assert np.isfinite(losses[:, 0]).all()
    assert np.isfinite(losses[-1]).all()
    assert losses[-1, 0] < losses[0, 0] - 0.1


# ---- decoding

TINY = GPTConfig(n_layer=2, n_head=4, n_embd=64, block_size=160, vocab_size=61, eos_id=60, tie_embeddings=False)
MODELS = {
    "learned": {},
    "rotary and grouped": {"positions": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True, "n_kv_head": 2},
    "window": {"positions": "rotary", "sliding_window": 37},
    "documents": {"document_mask": True, "positions": "rotary", "n_kv_head": 1},
    "n-grams": {"max_ngram": 3, "ngram_rows": 64},
}
PROMPTS = [[60, 5, 6], [60, *range(7, 57)], [60, *range(20), 60, *range(20, 55)], [9, 8] * 59, [60, 5, 6]]
GREEDY = SamplingOptions(max_new_tokens=70, temperature=0.0, stop_at_eos=False, logprobs=1)


def decoding_model(device, dtype, attention="sdpa", **changes):
    """Weights large enough that greedy text does not fall into one repeated id."""
    model = GPT(dataclasses.replace(TINY, **changes), seed=3, attention=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8.0)
        if model.ngrams is not None:  # they start at 0
            model.ngrams.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(4))
    return model.to(device, dtype)


def continued(model, prompts, options, leaves=()):
    """Per prompt: the drawn ids and their log-probabilities. leaves: of some samples, the number of tokens after which
    they leave the batch."""
    drawn, stopped = [[] for _ in prompts], set()
    for event in generate(model, prompts, options, seed=7, stopped=stopped):
        if event.token is not None:
            drawn[event.sample].append((event.token, event.logprob))
        stopped |= {sample for sample, count in dict(leaves).items() if len(drawn[sample]) >= count}
    return drawn


@pytest.fixture
def replays(monkeypatch, device):
    """The number of replays of CUDA graphs so far."""
    counted = []
    if device.type == "cuda":
        replay = torch.cuda.CUDAGraph.replay
        monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: counted.append(1) or replay(graph))
    return counted


@pytest.mark.parametrize("name", MODELS)
def test_greedy_ids_are_those_without_cache_and_graphs(name, device, replays):
    """In float64. Rows of unequal lengths cross 64 and 128 places and the end of the context, and some leave early."""
    assert cuda_graphs.MIN_SPAN == 64
    model, options = decoding_model(device, torch.float64, **MODELS[name]), GREEDY
    if device.type == "cpu":
        options = dataclasses.replace(GREEDY, max_new_tokens=12)
    drawn = continued(model, PROMPTS, options, leaves={1: 9, 4: 4})
    assert len(replays) >= 70 * (device.type == "cuda")
    for prompt, tokens in zip(PROMPTS, drawn, strict=True):
        text = list(prompt)
        for token, logprob in tokens:
            logits = next_logits(model, text, keep_head=1)
            text.append(int(logits.argmax()))
            assert text[-1] == token, f"at {len(text)} ids"
            assert logprob == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-6)
    n = options.max_new_tokens
    assert [len(tokens) for tokens in drawn] == [n, 9, n, n, 4]
    assert len({token for tokens in drawn for token, _ in tokens}) > 5, "one repeated id would prove nothing"


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.9}])
def test_recorded_draws_are_those_of_the_host(filters, device, replays):
    """In float64: from the logits without a cache, drawn on the CPU."""
    model = decoding_model(device, torch.float64)
    options = SamplingOptions(max_new_tokens=20, temperature=1.5, stop_at_eos=False, **filters)
    drawn = continued(model, PROMPTS[:3], options)
    assert len(replays) >= 19 * (device.type == "cuda")
    for sample, (prompt, tokens) in enumerate(zip(PROMPTS[:3], drawn, strict=True)):
        text = list(prompt)
        for token, _ in tokens:
            logits = next_logits(model, text, keep_head=options.keep_head)[None].cpu()
            point = torch.tensor([uniform(7, sample, len(text))], dtype=torch.float64)
            text.append(int(draw(logits, point, options)[0]))
            assert text[-1] == token, f"at {len(text)} ids"
    assert len({token for tokens in drawn for token, _ in tokens}) > 5, "one repeated id would prove nothing"


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_in_bfloat16_are_as_good_as_without_a_cache(name, device, replays):
    """Errors against float64 at most 2 × those of the model without cache and graphs, plus 4 rounding units."""
    model = decoding_model(device, torch.bfloat16, "triton", **MODELS[name])
    plain = decoding_model(device, torch.bfloat16, "sdpa", **MODELS[name])
    exact = decoding_model(device, torch.bfloat16, "sdpa", **MODELS[name]).double()
    options = dataclasses.replace(GREEDY, max_new_tokens=70 if device.type == "cuda" else 5)
    errors, allowed, largest = [], [], 0.0
    for prompt, tokens in zip(PROMPTS, continued(model, PROMPTS, options), strict=True):
        text = list(prompt)
        for token, logprob in tokens:
            true = float(next_logits(exact, text, 1).log_softmax(-1)[token])
            errors.append(abs(logprob - true))
            allowed.append(abs(float(next_logits(plain, text, 1).float().log_softmax(-1)[token]) - true))
            largest = max(largest, float(next_logits(exact, text, 1).abs().max()))
            text.append(token)
    assert max(errors) <= 2 * max(allowed) + 4 * torch.finfo(torch.bfloat16).eps * largest
    assert len(replays) >= 70 * (device.type == "cuda")


def test_draws_are_the_same_alone_and_in_a_batch(device):
    model = decoding_model(device, torch.float64, **MODELS["rotary and grouped"])
    options = SamplingOptions(max_new_tokens=20, temperature=0.9, top_k=20, top_p=0.9, stop_at_eos=False, logprobs=1)
    together = continued(model, [[60, 5, 6]] * 3, options)
    alone = continued(model, [[60, 5, 6]], options)
    assert [token for token, _ in alone[0]] == [token for token, _ in together[0]]
    assert together[0] != together[1]


# ---- evaluation


class Split:
    """A split of random tokens, as evaluate reads it."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __len__(self):
        return len(self.tokens)

    def read(self, start, count):
        return self.tokens[start : start + count]

    def mask(self, start, count):
        return None


def test_an_evaluation_is_that_of_a_cpu(device):
    """In float64 to the last digits; in bfloat16 with an error of at most 2 × the CPU's and 4 rounding units."""
    split = Split(np.random.default_rng(1).integers(0, 61, 160 * 20 + 7).astype(np.uint16))
    losses = {}
    for place in (torch.device("cpu"), device):
        for dtype in (torch.float64, torch.bfloat16):
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            attention = "triton" if place.type == "cuda" and dtype == torch.bfloat16 else "sdpa"
            model = decoding_model(place, wide, attention, **MODELS["documents"])
            hardware = Hardware(place, torch.float32 if dtype == torch.float64 else dtype, 1, {})
            result = evaluate(model, split, [b"x"] * 61, autocast=hardware.autocast, rows=3)
            losses[place, dtype] = result.loss
            assert result.targets == len(split) - 1
    exact = losses[torch.device("cpu"), torch.float64]
    assert losses[device, torch.float64] == pytest.approx(exact, rel=1e-9)
    error, allowed = (abs(losses[place, torch.bfloat16] - exact) for place in (device, torch.device("cpu")))
    assert error <= 2 * allowed + 4 * torch.finfo(torch.bfloat16).eps * exact


def test_the_choices_of_this_gpu_are_described(device):
    hardware = choose_hardware(HardwareOptions(device=str(device)))
    assert str(device) in hardware.describe()
    assert hardware.memory_bytes() > 0
    if device.type == "cuda":
        assert hardware.dtype == torch.bfloat16
