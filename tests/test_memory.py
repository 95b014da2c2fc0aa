"""attempt: what counts as out of memory, and that nothing of the failed action is alive when it is reported."""

import weakref

import pytest
import torch

import model as model_module
from common.memory import OutOfMemory, attempt
from model import GPT, GPTConfig

CPU_ERROR = "[enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to …"


def raising(error: BaseException):
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MemoryError("std::bad_alloc"),
    MemoryError(), RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"),
    RuntimeError("Triton Error [CUDA]: out of memory"), RuntimeError(CPU_ERROR),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"),
    RuntimeError("unable to mmap 25980952 bytes from file <model.safetensors>: Cannot allocate memory (12)"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
])  # fmt: skip
def test_every_lack_of_memory_is_one_error(error):
    with pytest.raises(OutOfMemory, match=r"^out of memory \(.+\); use a smaller model"):
        attempt(raising(error))


@pytest.mark.parametrize("error", [
    RuntimeError("shape mismatch"), ValueError("out of memory"), KeyboardInterrupt(),
    RuntimeError("C++ compile error\ncc1plus: out of memory allocating 65536 bytes"),
    RuntimeError("C++ compile error\ng++: error: vfork: Cannot allocate memory"),
])  # fmt: skip
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught:
        attempt(raising(error))
    assert caught.value is error


def test_an_error_that_another_one_hides_counts():
    def action() -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except torch.OutOfMemoryError as error:
            raise RuntimeError("the step failed") from error

    with pytest.raises(OutOfMemory):
        attempt(action)


def test_nothing_of_the_failed_action_is_alive():
    """Neither locals of its frames, nor what a reference cycle, a graph for gradients or autocast's cache holds."""
    alive, weight = [], torch.ones(64, 64, requires_grad=True)

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(weakref.ref(tensor))
        return tensor

    def fail(given: torch.Tensor) -> None:
        cycle = [remember(torch.zeros(10))]
        cycle.append(cycle)
        graph = remember((given @ weight).square())
        raise torch.OutOfMemoryError(f"CUDA out of memory beside {graph.numel()}")

    def action() -> None:
        local = remember(torch.zeros(64, 64, requires_grad=True))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fail(local)

    try:
        attempt(action)
    except OutOfMemory:
        assert len(alive) == 3
        assert [reference() for reference in alive] == [None] * 3


def test_it_is_recognized_where_torch_compile_calls_or_wraps(monkeypatch):
    """In the compiler, whose errors are wrapped, and in an operator within compiled code; then less fits."""

    def compiler(graph, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemory, match=r"^out of memory \(OutOfMemoryError: CUDA out of memory\); use"):
        attempt(lambda: torch.compile(torch.sin, backend=compiler)(torch.ones(3)))

    monkeypatch.setattr(model_module, "MIN_CHUNKED_LOGITS", 1)
    replace, alive = model_module.replace_logits, []

    def too_many(logits, targets, *args):
        alive.append(weakref.ref(logits))
        if len(logits) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return replace(logits, targets, *args)

    monkeypatch.setattr(model_module, "replace_logits", too_many)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=65, eos_id=None))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    ids = torch.zeros((2, 16), dtype=torch.int64)
    with pytest.raises(OutOfMemory):
        attempt(lambda: compiled(ids, ids).backward())
    assert [reference() for reference in alive] == [None]
    attempt(lambda: compiled(ids[:1], ids[:1]).backward())
    torch.compiler.reset()
