"""From a text to samples of it: training on short documents, on Chinese text, and each step by its own command."""

import itertools
import random
import re
from pathlib import Path

import numpy as np
import pytest

import sample as sample_script
from errors import UserError
from prepare_data.__main__ import main as prepare
from tests.test_train import read_events, train

COMMON = ("debug", "--threads=1", "--dtype=float32", "--sample_tokens=0", "--eval_tokens=2000")


@pytest.fixture(autouse=True)
def _working_directory(tmp_path, monkeypatch):
    folder = tmp_path / "mein Ordner é"
    folder.mkdir()
    monkeypatch.chdir(folder)


def sample(*args: str) -> int:
    return sample_script.main([*args, "--threads=1"])


def test_samples_end_with_eos_at_the_lengths_of_the_documents(capsys):
    """What EOS is for: trained on 4,000 documents of 10 to 30 letters, a model ends 200 samples at such lengths."""
    draw = random.Random(0)
    lengths = [draw.randint(10, 30) for _ in range(4000)]
    letters = "abcdefghijklmnopqrstuvwxyz"
    starts = [draw.randrange(26) for _ in lengths]
    documents = [
        "".join(letters[(start + i) % 26] for i in range(length)) for start, length in zip(starts, lengths, strict=True)
    ]
    Path("alphabet.txt").write_text("\n".join(documents), encoding="utf-8")
    shape = ("--n_layer=2", "--n_embd=64", "--block_size=64", "--positions=learned", "--document_mask=true")
    steps = ("--tokens_per_step=2048", "--max_steps=250", "--eval_interval=250")
    rate = ("--learning_rate=3e-3", "--warmup_steps=20")
    data = ("--data=alphabet.txt", r"--separator=\n", "--tokenizer=bytes")
    assert train(*COMMON, *shape, *steps, *rate, *data, "--run=runs/alphabet") == 0
    capsys.readouterr()
    assert sample("--run=runs/alphabet", "--num_samples=200", "--temperature=1", "--max_new_tokens=60") == 0
    out, err = capsys.readouterr()
    texts = out.rstrip("\n").split("\n---\n")
    reasons = re.findall(r"^sample \d+: (.*?), \d+ tokens", err, re.MULTILINE)
    assert len(texts) == len(reasons) == 200
    assert reasons.count("end of sequence") >= 190
    sample_lengths = np.array([len(text) for text in texts])
    assert abs(sample_lengths.mean() - np.mean(lengths)) < 1.5
    # Kolmogorov-Smirnov statistic of 200 draws: 0.115 at the 1 % level, plus a margin for the model
    x = np.arange(61)
    corpus_cdf, sample_cdf = ((np.asarray(values)[:, None] <= x).mean(axis=0) for values in (lengths, sample_lengths))
    assert np.abs(corpus_cdf - sample_cdf).max() < 0.15
    is_next_letter = [(ord(b) - ord(a)) % 26 == 1 for text in texts for a, b in itertools.pairwise(text)]
    assert np.mean(is_next_letter) > 0.95, "the samples must be like the documents"


def chinese_text() -> str:
    subjects = ("小明", "老师", "我的朋友", "那只猫")
    verbs = ("喜欢", "看见了", "正在画")
    objects = ("月亮。", "一本书！", "春天的花。", "大海？")
    draw = random.Random(1)
    return "\n".join(draw.choice(subjects) + draw.choice(verbs) + draw.choice(objects) for _ in range(4000))


def test_chinese_from_preparation_to_streamed_samples(capsys):
    text = chinese_text()
    Path("中文.txt").write_bytes(text.encode("gb18030"))
    with pytest.raises(UserError) as caught:
        train(*COMMON, "--data=中文.txt")
    assert "--encoding=gb18030" in str(caught.value)
    assert re.search(r"offset \d+|byte \d+", str(caught.value))
    tokenizer = ("--tokenizer=bpe", "--vocab_size=300")
    assert prepare(["text", "--input=中文.txt", "--encoding=gb18030", "--name=汉语", *tokenizer]) == 0
    steps = ("--max_steps=120", "--eval_interval=60", "--learning_rate=2e-2")
    assert train(*COMMON, "--data=汉语", "--run=runs/汉语", *steps) == 0
    assert read_events("runs/汉语", "eval")[-1]["val_loss"] < 2.5
    capsys.readouterr()
    assert sample("--run=runs/汉语", "--prompt=小明", "--max_new_tokens=80", "--temperature=0.5") == 0
    out, _ = capsys.readouterr()
    assert out.startswith("小明")
    unknown = [character for character in out if character not in text]
    assert len(unknown) <= 0.05 * len(out), out


def test_the_newest_run_is_sampled_by_default(capsys, small_text):
    for name in ("first", "second"):
        assert train(*COMMON, f"--data={small_text}", "--max_steps=2", f"--run=runs/{name}") == 0
    capsys.readouterr()
    assert sample("--max_new_tokens=5") == 0
    assert "runs/second" in capsys.readouterr().err.replace("\\", "/")
