"""Compiled training steps on a CPU: the choice, the cache, and the promises of an eager run."""

import hashlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import common.hardware as hardware_module
import train as train_script
from common import inductor
from common.hardware import Hardware
from model import GPT, GPTConfig
from parallel.sharding import make_mesh, shard, whole
from tests.test_train import read_events, tensors_of
from training import compilation
from training.compilation import choose_compile, compile_model, use_compiled
from training.data import MicroBatch
from training.options import EvalOptions, TrainOptions

ROOT = Path(__file__).resolve().parent.parent
needs_compiler = pytest.mark.skipif(
    compilation.cpu_obstacle() is not None, reason="compiled code needs Linux and a C++ compiler"
)


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch, tmp_path):
    """Runs and cache in folders of the test, the cache with a space in its name; other tests find no compiled code."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "my cache"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def hardware(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Hardware:
    return Hardware(torch.device(device), dtype, threads=torch.get_num_threads(), reasons={})


def model_and_batch(**changes: object) -> tuple[GPT, MicroBatch]:
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 65, "eos_id": None}
    model = GPT(GPTConfig(**shape | changes)).train()
    ids = torch.randint(0, 65, (3, 17), generator=torch.Generator().manual_seed(0))
    return model, MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), 7 if changes.get("dropout") else None)


# ---- The choice ------------------------------------------------------------------------------------------------------


def choose(device="cpu", option="auto", dtype=torch.float32, **train):
    model, batch = model_and_batch()
    return choose_compile(TrainOptions(compile=option, **train), EvalOptions(), model, [batch], hardware(device, dtype))


def test_on_a_cpu_the_seconds_saved_decide(monkeypatch):
    monkeypatch.setattr(compilation, "cpu_obstacle", lambda: None)
    worth = compilation.CPU_SECONDS / compilation.CPU_SAVES_OF_FUSED[torch.float32] / 60
    for minutes in (0.9 * worth, 1.1 * worth):
        choice = choose(budget_minutes=minutes)
        assert choice.value is (minutes > worth)
        assert "s saved against 14 s of compiling" in choice.reasons["compile"]
    assert choose(budget_minutes=0.9 * worth, option=True).value is True
    assert choose(budget_minutes=1.1 * worth, option=False).value is False


def test_more_is_expected_of_models_with_many_small_operations():
    for kind, dtypes in {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}.items():
        for dtype in dtypes:
            machine = Hardware(torch.device(kind), dtype, 1, {})
            plain, modern = (compilation.gain(GPTConfig(norm=norm), machine)[1] for norm in ("layernorm", "rmsnorm"))
            assert 0 < plain < modern <= 0.5


def test_with_a_filled_cache_shorter_runs_are_worth_it(monkeypatch):
    monkeypatch.setattr(compilation, "cpu_obstacle", lambda: None)
    minutes = 1.1 * compilation.CPU_CACHED_SECONDS / compilation.CPU_SAVES_OF_FUSED[torch.float32] / 60
    assert choose(budget_minutes=minutes).value is False
    model, batch = model_and_batch()
    folder = inductor.cache_folder(torch.get_num_threads())
    folder.mkdir(parents=True)
    (folder / compilation.signature(model, batch, hardware())).touch()
    assert choose(budget_minutes=minutes).value is True


def test_without_a_budget_two_micro_batches_are_measured_where_that_may_decide(monkeypatch):
    monkeypatch.setattr(compilation, "cpu_obstacle", lambda: None)
    measured = []
    run = compilation.run_micro_batch
    monkeypatch.setattr(compilation, "run_micro_batch", lambda *args: measured.append(1) or run(*args))
    assert choose(max_steps=3).value is False
    assert not measured
    assert choose(max_steps=50_000_000).value is True
    assert len(measured) == 2


@pytest.mark.parametrize(("platform", "which", "reason"), [
    ("darwin", "/usr/bin/clang++", "never tried on darwin"), ("win32", None, "never tried on win32"),
    ("linux", None, "there is no C++ compiler"),
])  # fmt: skip
def test_where_it_cannot_run_the_reason_is_given(platform, which, reason, monkeypatch):
    monkeypatch.setattr(compilation, "sys", SimpleNamespace(platform=platform))
    monkeypatch.setattr(inductor.shutil, "which", lambda name: which)
    choice = choose(budget_minutes=1000)
    assert choice.value is False
    assert reason in choice.reasons["compile"]


def test_on_a_gpu_the_seconds_saved_decide(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(hardware_module.shutil, "which", lambda name: "/usr/bin/cc")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    pytest.importorskip("triton")
    for seconds, pays in ((250.0, False), (350.0, True)):
        choice = choose("cuda", dtype=torch.bfloat16, budget_minutes=seconds / 60)
        assert choice.value is pays
        assert f"about {0.1 * seconds:.0f} s saved against 30 s" in choice.reasons["compile"]


def test_an_evaluation_compiles_nothing():
    model, batch = model_and_batch()
    options = TrainOptions(compile=True)
    assert choose_compile(options, EvalOptions(eval_only=True), model, [batch], hardware()).value is False


# ---- Compiled runs ---------------------------------------------------------------------------------------------------

COMPILED = (
    "quickstart",
    "--compile=true", "--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--positions=rotary",
    "--qk_norm=true", "--norm=rmsnorm", "--mlp=swiglu", "--dropout=0.2", "--tokens_per_step=256",
    "--micro_batch_size=4", "--eval_interval=3", "--eval_tokens=300", "--sample_tokens=5", "--log_interval=1",
)  # fmt: skip


def train(*args: str) -> None:
    """A run in this process: only the first compile of a process imports the compiler."""
    assert train_script.main(list(args)) == 0


@needs_compiler
def test_a_compiled_run_keeps_the_promises_of_an_eager_one(small_text, capsys, monkeypatch, tmp_path):
    """Losses equal to rounding, dropout masks included; resumed with another cache, the same bits."""
    data = f"--data={small_text}"
    train(*COMPILED, data, "--max_steps=6", "--run=whole")
    printed = capsys.readouterr().out
    assert "compiling a block of the model" in printed
    assert "compiled in" in printed
    assert "could not be used" not in printed
    config = json.loads(Path("whole/config.json").read_text("utf-8"))
    assert config["options"]["compile"] is True

    train(*COMPILED, data, "--max_steps=6", "--run=eager", "--compile=false")
    losses = {run: [event["loss"] for event in read_events(run, "step")] for run in ("whole", "eager")}
    assert losses["whole"] == pytest.approx(losses["eager"], rel=1e-5)
    assert len(losses["whole"]) == 6

    shutil.copytree("whole", "cut")
    shutil.rmtree("cut/checkpoints/step-00000006")
    Path(tmp_path / "no folder").write_text("the cache cannot be made here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no folder"))
    capsys.readouterr()
    train("--resume=cut")
    printed = capsys.readouterr().out
    assert "could not be used" in printed
    assert "compiled in" in printed
    assert "may not be bitwise exact" not in printed
    assert tensors_of("cut", 6) == tensors_of("whole", 6)

    shutil.copytree("whole", "elsewhere")
    shutil.rmtree("elsewhere/checkpoints/step-00000006")
    monkeypatch.setattr(compilation, "cpp_compiler", lambda: None)
    train("--resume=elsewhere", "--compile=false")
    assert "the resume may not be bitwise exact: compiler inductor" in capsys.readouterr().out


def test_without_a_compiler_a_run_that_asks_for_it_is_eager(small_text, capsys, monkeypatch):
    monkeypatch.setattr(compilation, "cpp_compiler", lambda: None)
    train(*COMPILED, f"--data={small_text}", "--max_steps=1", "--run=eager")
    assert "not compiled: there is no C++ compiler (g++)\n" in capsys.readouterr().out
    assert json.loads(Path("eager/config.json").read_text("utf-8"))["options"]["compile"] is False


def test_where_no_compiler_is_found_the_line_of_choices_says_so(small_text, capsys, monkeypatch):
    monkeypatch.setattr(compilation, "cpp_compiler", lambda: None)
    monkeypatch.setattr(compilation, "sys", SimpleNamespace(platform="linux"))
    train(*COMPILED, "--compile=auto", f"--data={small_text}", "--max_steps=1", "--run=eager")
    assert ", not compiled: there is no C++ compiler (g++), with which training would" in capsys.readouterr().out


def test_a_compiler_that_fails_leaves_an_eager_run(small_text, capsys, monkeypatch):
    def fail(path):
        raise RuntimeError("C++ compile error\nwith a page of text")

    monkeypatch.setattr(compilation, "cpp_compiler", lambda: "g++")
    monkeypatch.setattr(compilation, "use_cache", fail)
    train(*COMPILED, f"--data={small_text}", "--max_steps=1", "--run=eager")
    printed = capsys.readouterr().out
    assert printed.count("could not be used: RuntimeError: C++ compile error\n") == 2
    assert "not compiled: training goes on without" in printed
    assert json.loads(Path("eager/config.json").read_text("utf-8"))["options"]["compile"] is False


def test_eager_training_imports_no_compiler():
    code = (
        "import sys, torch; from tests.test_compilation import *; model, batch = model_and_batch(dropout=0.2)\n"
        "compilation.run_micro_batch(model, batch, hardware()); assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_kernels_of_a_graph_become_one_file():
    kernel = '#include <a.h>\n#include <b.h>\nextern "C"  void kernel(const float* in_ptr0)\n{\n    kernel_call();\n}\n'
    joined = inductor.join_sources([kernel, kernel.replace("b.h", "c.h")])
    assert joined.splitlines()[:3] == ["#include <a.h>", "#include <b.h>", "#include <c.h>"]
    assert "void kernel_0(const float*" in joined
    assert "void kernel_1(const float*" in joined
    assert joined.count("kernel_call()") == 2


def test_compiled_code_of_other_machines_is_not_used(monkeypatch):
    before = inductor.cache_folder(2)
    assert inductor.cache_folder(3) != before
    monkeypatch.setattr(inductor, "compiler_version", lambda: "another compiler")
    assert inductor.cache_folder(2) != before


def gradients(model: GPT, batch: MicroBatch) -> str:
    """Compiles, and returns the digest of the gradients of one micro-batch."""
    state = SimpleNamespace(compiler="some")
    compile_model(model, state, batch, hardware())
    assert state.compiler != "none"
    model(batch.x, batch.y).backward()
    return hashlib.sha256(b"".join(p.grad.numpy().tobytes() for p in model.parameters())).hexdigest()


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("damage", ["empty", "half", "other bytes", "gone"])
def test_a_damaged_cache_costs_only_time(damage, tmp_path):
    """Each file of the cache in turn."""
    expected = gradients(*model_and_batch())
    whole = inductor.cache_folder(torch.get_num_threads())
    shutil.copytree(whole, tmp_path / "copy")
    names = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file() and path.stat().st_size]
    assert len(names) >= 6
    for name in names:
        shutil.rmtree(whole, ignore_errors=True)  # it deletes itself where it was of no use
        shutil.copytree(tmp_path / "copy", whole)
        content = (whole / name).read_bytes()
        if damage == "gone":
            (whole / name).unlink()
        elif damage == "other bytes":
            (whole / name).write_bytes(bytes(random.Random(1).randbytes(len(content))))
        else:
            (whole / name).write_bytes(content[: len(content) // 2] if damage == "half" else b"")
        torch.compiler.reset()
        assert gradients(*model_and_batch()) == expected, name


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("shape", [
    {}, {"positions": "rotary", "qk_norm": True, "n_kv_head": 1, "mlp": "swiglu", "norm": "rmsnorm"},
    {"norm_position": "post", "positions": "sinusoidal", "mlp": "relu"}, {"document_mask": True, "eos_id": 3},
    {"sliding_window": 4, "mlp": "relu2", "bias": False},
    {"positions": "rotary", "rotary_dim": 4, "head_dim": 12, "parallel_residual": True, "dropout": 0.2},
    {"dropout": 0.3, "qkv_bias": False, "max_ngram": 3, "tie_embeddings": False},
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_gradients_differ_from_eager_ones_by_rounding(shape, dtype):
    model, batch = model_and_batch(**shape)
    found = []
    for compiler in ("none", "some"):
        compile_model(model, SimpleNamespace(compiler=compiler), batch, hardware(dtype=dtype))
        if batch.dropout_seed is not None:
            torch.manual_seed(batch.dropout_seed)
        with hardware(dtype=dtype).autocast():
            loss = model(batch.x, batch.y)
        loss.backward()
        found.append([p.grad.double().clone() for p in model.parameters()])
        model.zero_grad()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for eager, compiled in zip(*found, strict=True):
        assert (eager - compiled).norm() <= tolerance * eager.norm() + 1e-9
    assert model.run_block is not GPT.run_block


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_blocks_of_a_sharded_model_give_the_gradients_of_a_whole_one(dtype):
    """Under FSDP2's hooks, in a process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = []
        for is_sharded in (False, True):
            model, batch = model_and_batch(positions="rotary", qk_norm=True, mlp="swiglu", norm="rmsnorm")
            if is_sharded:
                shard(model, make_mesh("fsdp", torch.device("cpu")), torch.device("cpu"), dtype)
                use_compiled(model)
            with hardware(dtype=dtype).autocast():
                model(batch.x, batch.y).backward()
            found.append([whole(p.grad).double() for p in model.parameters()])
    finally:
        dist.destroy_process_group()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= tolerance * one.norm() + 1e-9
