"""Every preset loads in every script, names its dataset, and learns when scaled down."""

from pathlib import Path

import pytest

import config
from model import GPTConfig
from tests.test_train import read_events, train

PRESETS = sorted(
    path.stem
    for path in (Path(__file__).parent.parent / "config").glob("*.py")
    if "\ndata = " in path.read_text("utf-8")
)
EXPECTED = {
    "quickstart",
    "shakespeare_char",
    "shakespeare_char_cpu",
    "gpt2_124m",
    "modern_124m",
    "vaswani2017",
    "debug",
    "speedrun_char_cpu",
    "qwen3_char_cpu",
}
SMALLER = (
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=32",
    "--n_hidden=none",
    "--n_kv_head=none",
    "--block_size=32",
    "--tokens_per_step=256",
)
QUICK = (
    "--max_steps=20",
    "--warmup_steps=2",
    "--learning_rate=1e-2",
    "--min_learning_rate=0",
    "--budget_minutes=none",
    "--log_interval=1",
)
QUIET = ("--eval_interval=20", "--eval_tokens=2000", "--sample_tokens=0", "--threads=1", "--dtype=float32")


def test_the_documented_presets_exist():
    assert set(PRESETS) >= EXPECTED


def test_qwen3_char_cpu_is_what_the_qwen3_class_can_express():
    """Its weights under other names gave transformers' logits (bench/NOTES.md)."""
    model = config.load("train.py", ["qwen3_char_cpu"]).section(GPTConfig)
    own = {"positions": "rotary", "norm": "rmsnorm", "norm_position": "pre", "mlp": "swiglu", "qk_norm": True}
    own |= {"bias": False, "scale_embeddings": False, "max_ngram": 1, "sliding_window": None, "document_mask": False}
    assert own.items() <= model.to_dict().items()


@pytest.mark.parametrize("script", config.SCRIPTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_loads_in_every_script(preset, script):
    options = config.load(script, [preset])
    if script == "train.py":
        assert options.origin["data"] == f"preset {preset}"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_learns_when_scaled_down(preset, tmp_path, monkeypatch, small_text):
    """Twenty steps with the preset's kind of model, optimizer and schedule."""
    monkeypatch.chdir(tmp_path)
    options = config.load("train.py", [preset])
    tokenizer = options.flat()["tokenizer"].replace("gpt2", "bytes")  # GPT-2's files may be missing
    data = [f"--data={small_text}", f"--tokenizer={tokenizer}"] + ["--vocab_size=300"] * (tokenizer == "bpe")
    assert train(preset, *SMALLER, *QUICK, *QUIET, *data, "--run=run") == 0
    losses = [event["loss"] for event in read_events("run", "step")]
    assert len(losses) == 20
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.3
