"""The numerics of every preset, reduced: loss, gradient norm and a few weights of three steps against recorded numbers.

The numbers were recorded before the training loop and the attention interface were rewritten. They are compared with a
tolerance, since other CPUs and versions of torch round differently. After a change of the numerics that is meant:

    python -m tests.test_golden_steps     writes tests/golden_steps.json anew
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

import train
from checkpoint import list_checkpoints, open_checkpoint
from config import PLANNED
from config.loader import NOT_PRESETS

GOLDEN = Path(__file__).with_name("golden_steps.json")
PRESETS = (
    "debug",
    "quickstart",
    "shakespeare_char_cpu",
    "shakespeare_char",
    "shakespeare_char_best",
    "speedrun_char_cpu",
    "qwen3_char_cpu",
    "vaswani2017",
    "gpt2_124m",
    "modern_124m",
)
REDUCED = (
    *("--n_layer=2", "--n_head=4", "--n_embd=32", "--block_size=32", "--tokens_per_step=256", "--micro_batch_size=4"),
    *("--max_steps=3", "--warmup_steps=1", "--log_interval=1", "--eval_interval=3", "--eval_tokens=500"),
    *("--tokenizer=bytes", "--split=tail", "--sample_tokens=0", "--dtype=float32", "--device=cpu", "--threads=1"),
)
WEIGHTS = ("embed.weight", "blocks.0.attn.qkv.weight", "blocks.1.mlp.down.weight")
TEXT = "".join(f"{i}: the {('cat', 'moon', 'tree')[i % 3]} is {i * i % 97} steps away.\n" for i in range(400))


def three_steps(preset: str, folder: Path) -> dict[str, list[float]]:
    """Losses and gradient norms of three steps, the val loss after them, and the first four numbers of some weights."""
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    extra = ["--ngram_rows=512"] if preset.startswith("speedrun") else []
    os.chdir(folder)
    assert train.main([preset, "--data=text.txt", f"--run={preset}", *REDUCED, *extra]) == 0
    events = [json.loads(line) for line in Path(preset, "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    tensors = open_checkpoint(list_checkpoints(Path(preset))[-1]).model_tensors()
    return {
        "loss": [event["loss"] for event in steps],
        "grad_norm": [event["grad_norm"] for event in steps],
        "val_loss": [event["val_loss"] for event in events if event["event"] == "eval"][-1:],
        **{name: tensors[name].flatten()[:4].tolist() for name in WEIGHTS},
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_three_steps_give_the_recorded_numbers(preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, expected = three_steps(preset, tmp_path), json.loads(GOLDEN.read_text())[preset]
    assert found.keys() == expected.keys()
    for name, numbers in expected.items():
        assert found[name] == pytest.approx(numbers, rel=2e-4, abs=2e-6), (
            f"{preset}: {name} has moved. If the change of numerics is not meant, it is a bug: compare with the commit "
            "before. If it is meant, say so in the commit, measure what it does to the loss, and record the numbers "
            "anew: python -m tests.test_golden_steps"
        )


def test_every_preset_has_recorded_numbers():
    presets = {path.stem for path in (GOLDEN.parent.parent / "config").glob("*.py")}
    assert set(PRESETS) == presets - {*NOT_PRESETS, PLANNED}  # which has no model of its own


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        numbers = {preset: three_steps(preset, Path(temporary)) for preset in PRESETS}
    lines = ",\n".join(f" {json.dumps(preset)}: {json.dumps(found)}" for preset, found in numbers.items())
    GOLDEN.write_text(f"{{\n{lines}\n}}\n")
    print(f"wrote {GOLDEN}", file=sys.stderr)
