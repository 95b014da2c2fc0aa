"""train.py and sample.py on a GPU, as a user runs them: pytest -m gpu; --on-cpu tries the tests out on a CPU."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from itertools import count
from pathlib import Path

import pytest
import torch

pytest.importorskip("annotated_types", reason="train.py and sample.py read their options by annotated-types")
import sample as sample_script
import train as train_script
from common.hardware import Hardware
from common.memory import release_memory
from model import GPT, GPTConfig
from tests.conftest import ROOT
from tests.test_train import read_events, tensors_of
from training import micro_batch
from training.step_graphs import StepGraphs

pytestmark = pytest.mark.gpu
TINY = ("debug", "--max_steps=60", "--eval_interval=20", "--eval_tokens=2000", "--log_interval=5", "--sample_tokens=20")


@pytest.fixture
def train(small_text, tmp_path, monkeypatch, device):
    """train.main, in a folder of its own, with this text on this device."""
    monkeypatch.chdir(tmp_path)
    before = torch.get_float32_matmul_precision()

    def run(name, *flags, preset=TINY):
        return train_script.main([*preset, f"--data={small_text}", f"--run={name}", f"--device={device}", *flags])

    yield run
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(before)


def assert_it_learned(name):
    losses = [event["loss"] for event in read_events(name, "step")]
    assert all(0 < loss < 10 for loss in losses), losses
    assert losses[-1] < losses[0] - 0.5, losses
    evaluations = [event["val_loss"] for event in read_events(name, "eval")]
    assert evaluations[-1] < evaluations[0] - 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_run_learns_and_its_samples_are_printed(dtype, train, device, capsys):
    dtype = "float32" if device.type == "cpu" else dtype
    assert train("notes", f"--dtype={dtype}", "--dropout=0.1") == 0
    printed = capsys.readouterr().out
    if device.type == "cuda":
        path = "sdpa" if dtype == "float32" else "triton"
        assert f"attention: {path}" in printed
    assert_it_learned("notes")
    command = ["--run=notes", f"--device={device}", f"--dtype={dtype}", "--prompt=Anna", "--max_new_tokens=40"]
    assert sample_script.main([*command, "--num_samples=3", "--top_k=20", "--seed=1"]) == 0
    out = capsys.readouterr().out
    assert out.count("Anna") >= 3
    assert len(out) > 100


@pytest.mark.parametrize("preset", ["speedrun_char_cpu", "vaswani2017", "modern_124m"])
def test_other_presets_learn_too(preset, train):
    """n-grams and Muon, sine waves and label smoothing, and the kind of modern_124m with documents and a window."""
    small = (
        "--n_layer=2",
        "--n_head=2",
        "--n_embd=64",
        "--block_size=64",
        "--tokens_per_step=1024",
        "--warmup_steps=5",
    )
    small += ("--tokenizer=bytes", "--learning_rate=0.01")
    if preset == "modern_124m":
        small += ("--n_hidden=128", "--n_kv_head=1", "--document_mask=true", "--sliding_window=40")
    assert train("notes", *small, preset=(preset, *TINY[1:])) == 0
    assert_it_learned("notes")


@pytest.mark.parametrize("flags", [("--dropout=0.3",), ("--optimizer=muon", "--compile=true")], ids=["adamw", "muon"])
def test_recorded_steps_train_as_others_do(flags, train, device, monkeypatch):
    recordings, record = [], StepGraphs._try_to_record

    def counted(self, batches):
        record(self, batches)
        recordings.append(self.replay)

    monkeypatch.setattr(StepGraphs, "_try_to_record", counted)
    flags = (*flags, "--log_interval=1", "--dtype=float32", "--attention=sdpa")
    if device.type == "cpu":
        flags += ("--compile=false",)
    assert train("recorded", *flags) == train("plain", *flags, "--cuda_graphs=false") == 0
    assert len(recordings) == (device.type == "cuda")
    assert all(recordings)
    losses = [[event["loss"] for event in read_events(name, "step")] for name in ("recorded", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert len({*losses[0]}) > 50


def test_a_server_answers(train, device, tmp_path):
    pytest.importorskip("starlette", reason="sample.py --serve needs starlette")
    pytest.importorskip("uvicorn", reason="sample.py --serve needs uvicorn")
    assert train("runs/notes", "--max_steps=20") == 0
    command = [sys.executable, ROOT / "sample.py", "--run=runs/notes", "--serve", "--port=0", f"--device={device}"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        lines = iter(server.stderr.readline, "")
        address = next(found[1] for line in lines if (found := re.search(r"(http://127\.0\.0\.1:\d+)", line)))
        for n in (1, 3):
            body = json.dumps({"model": "notes", "prompt": "Anna", "max_tokens": 30, "n": n, "seed": 1}).encode()
            request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=120) as answer:
                choices = json.load(answer)["choices"]
            assert len(choices) == n
            assert all(len(choice["text"]) > 5 or choice["finish_reason"] == "stop" for choice in choices)
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0


def test_a_killed_run_resumes_to_the_same_bits(train, device, small_text, tmp_path):
    flags = ("--deterministic=true", "--compile=false", "--dropout=0.1", "--max_steps=400", "--eval_interval=50")
    assert train("straight", *flags) == 0
    command = [sys.executable, ROOT / "train.py", *TINY, f"--data={small_text}", "--run=killed", f"--device={device}"]
    process = subprocess.Popen([*command, *flags], cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(Path("killed/checkpoints").glob("step-*100/state.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not Path("killed/checkpoints/step-00000400").exists()
    assert train_script.main(["--resume=killed"]) == 0
    assert tensors_of("killed", 400) == tensors_of("straight", 400)


def test_a_compiled_run_repeats_and_resumes_to_the_same_bits(train):
    flags = ("--deterministic=true", "--compile=true", "--max_steps=20", "--eval_interval=10")
    assert train("one", *flags) == train("other", *flags) == train("half", *flags) == 0
    assert tensors_of("one", 20) == tensors_of("other", 20)
    for path in Path("half/checkpoints/step-00000020").rglob("*.*"):
        path.unlink()
    assert train_script.main(["--resume=half"]) == 0
    assert tensors_of("half", 20) == tensors_of("one", 20)


def test_the_trial_finds_rows_that_fit(device, monkeypatch):
    """Told that less memory is free than 64 rows need, it takes as many as fit, and a step with them stays below."""
    if device.type == "cpu":  # each trial needs 4 MiB less than the one before
        trials = count()
        for name in ("memory_allocated", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, lambda device: 0)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**25 - 2**22 * next(trials))
    config = GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=5000, eos_id=0)
    if device.type == "cuda":
        config = dataclasses.replace(config, n_embd=128, block_size=256)
    model, hardware = GPT(config).to(device).train(), Hardware(torch.device("cuda"), torch.bfloat16, 1, {})
    micro_batch.measure_peak(model, hardware, 1)  # cuBLAS allocates its workspace
    needed = micro_batch.measure_peak(model, hardware, 64)
    free = int(needed / 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    fitting = micro_batch.fit_micro_batch(64, model, hardware)
    assert 1 < fitting < 64
    if device.type == "cuda":
        assert micro_batch.measure_peak(model, hardware, fitting) < free
        assert micro_batch.measure_peak(model, hardware, 2 * fitting) > micro_batch.MEMORY_SHARE * free


def test_a_run_recovers_from_out_of_memory(train, device, monkeypatch, capsys):
    """The process may use 700 MiB more; 64 rows keep 1.3 GiB for the backward pass. The trial is left out."""
    shape = ("--n_layer=4", "--n_head=4", "--n_embd=256", "--block_size=256", "--tokens_per_step=16384")
    shape += ("--max_steps=8", "--eval_interval=8", "--log_interval=1", "--sample_tokens=0", "--compile=false")
    if device.type == "cuda":
        release_memory()
        allowed = torch.cuda.memory_reserved(device) + 700 * 2**20
        torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(device).total_memory)
        monkeypatch.setattr(micro_batch, "fit_to_memory", lambda size, peak_bytes, free: size)
    else:
        shape += ("--n_layer=1", "--n_embd=16", "--block_size=16", "--tokens_per_step=1024")
        shape += ("--micro_batch_size=auto",)
        forward = GPT.forward

        def short_of_memory(self, ids, *args, **kwargs):
            if self.training and ids.shape[0] > 16:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(self, ids, *args, **kwargs)

        monkeypatch.setattr(GPT, "forward", short_of_memory)
    try:
        assert train("short", *shape) == 0
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert "step 0: out of memory; micro-batch 64 → 32." in capsys.readouterr().out
    losses = [event["loss"] for event in read_events("short", "step")]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
