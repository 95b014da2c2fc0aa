"""What runs on a GPU, tried without one: the devices of all tensors, and a few of the tests marked gpu.

Under FakeTensorMode PyTorch computes shapes, dtypes and devices only, and raises where two devices meet. "meta"
stands for the GPU: the CPU's PyTorch cannot run a backward pass on "cuda" without one.
"""

import dataclasses
import runpy
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from model import GPT, GPTConfig, KVCache
from tests.conftest import ROOT
from training.optim import make_optimizer
from training.options import OptimizerOptions

META = torch.device("meta")
FIELDS = {field.name for field in dataclasses.fields(GPTConfig)}
VARIANTS = {
    path.stem: {name: value for name, value in runpy.run_path(str(path)).items() if name in FIELDS}
    for path in sorted((ROOT / "config").glob("*.py"))
    if "\nn_layer = " in path.read_text("utf-8")
}
VARIANTS["documents"] = VARIANTS["modern_124m"] | {"document_mask": True, "sliding_window": 20, "n_kv_head": 4}
REDUCED = {"n_layer": 2, "block_size": 64, "vocab_size": 1500, "eos_id": 1499, "ngram_rows": 64}


def model_elsewhere(variant, attention):
    with torch.device(META):
        model = GPT(GPTConfig(**VARIANTS[variant] | REDUCED), seed=None, attention=attention)
    model.table = None if model.table is None else torch.empty(model.table.shape, device=META)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "triton"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_of_training_stays_on_its_device(variant, attention):
    muon = VARIANTS[variant].get("qk_norm", False)
    with FakeTensorMode(shape_env=ShapeEnv()):
        model = model_elsewhere(variant, attention).train()
        # the optimizer of n-gram tables picks rows by their values
        kind = "sgd" if model.ngrams is not None else "muon" if muon else "adamw"
        optimizer = make_optimizer(model, OptimizerOptions(optimizer=kind), torch.bfloat16)
        for _ in range(2):
            ids = torch.zeros(2, 65, dtype=torch.int64, device=META)
            loss = model(ids[:, :-1], ids[:, 1:], reduction="sum", label_smoothing=0.1)
            loss.backward()
            assert {parameter.grad.device for parameter in model.parameters()} == {META}
            optimizer.step()
        model.eval()
        with torch.no_grad():
            assert model(ids[:, :-1], ids[:, 1:], reduction="none").device == META


@pytest.mark.parametrize("attention", ["sdpa", "triton"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_stays_on_its_device(variant, attention):
    model = model_elsewhere(variant, attention).to(torch.bfloat16).eval()
    cache = KVCache(model.config, 3, META, torch.bfloat16)
    for lengths in ([9, 3], [5, 5]):
        model.prefill(torch.zeros(2, 9, dtype=torch.int64, device=META), lengths, cache, [0, 2])
        assert model.decode(torch.zeros(3, dtype=torch.int64, device=META), cache).device == META


TRIAL = "choices or evaluation or in_chunks or (presets and debug and both)"


def test_a_few_tests_marked_gpu_run_here():
    """The others, with --on-cpu by hand, take minutes."""
    pytest.importorskip("tests.test_attention", exc_type=ImportError)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--on-cpu", "tests/test_gpu.py", "-k", TRIAL]
    done = subprocess.run([*command, "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.startswith("....")
