"""Manifests of checkpoints, tokenizers and dataset.json, with what their readers open."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

from checkpoint import open_checkpoint
from common.tokenizer import bytes_tokenizer, char_tokenizer, tokenizer_from_dict, train_bpe
from files import json_bytes, read_json
from prepare_data.__main__ import main as prepare
from prepare_data.shards import open_dataset
from tests.fuzz_values import Tries, as_json, edit, edit_bytes, memory_folder
from tests.test_checkpoint import save

Fuzz = Callable[[random.Random, Tries], None]


def run(examples: int, seed: int) -> list[str]:
    """Four of ten are tokenizers, three manifests, three datasets."""
    rng, tries = random.Random(seed), Tries()
    with memory_folder() as home, contextlib.redirect_stdout(io.StringIO()):
        kinds = (tokenizers(), manifests(Path(home)), datasets(Path(home)))
        for number in range(examples):
            kinds[(0, 1, 2, 0, 1, 2, 0, 1, 2, 0)[number % 10]](rng, tries)
    return tries.problems


def tokenizers() -> Fuzz:
    """As stored in a model folder. A mistake is a ValueError, which the callers turn into a message."""
    known = [
        bytes_tokenizer(),
        char_tokenizer("abc \n"),
        train_bpe(["the moon and the cat and the moon"], 262, "gpt4o"),
    ]
    contents = [tokenizer.to_dict() for tokenizer in known]

    def fuzz(rng: random.Random, tries: Tries) -> None:
        content = edit(rng.choice(contents), rng)

        def read() -> None:
            with contextlib.suppress(ValueError):
                tokenizer = tokenizer_from_dict(json.loads(as_json(content)))
                tokenizer.decode(tokenizer.encode("abc").tolist())

        tries.attempt(read, content)

    return fuzz


def manifests(home: Path) -> Fuzz:
    path = save(home, 1) / "manifest.json"
    whole = read_json(path)
    del whole["crc32"]

    def fuzz(rng: random.Random, tries: Tries) -> None:
        manifest = edit(whole, rng)
        data = as_json(manifest)
        if rng.random() < 0.8 and isinstance(manifest, dict):
            with contextlib.suppress(ValueError):  # infinity
                data = json_bytes({**manifest, "crc32": zlib.crc32(json_bytes(manifest))})
        path.write_bytes(data if rng.random() < 0.8 else edit_bytes(data, rng))
        tries.attempt(lambda: open_checkpoint(path.parent), data)

    return fuzz


def datasets(home: Path) -> Fuzz:
    """dataset.json, and the header of a shard."""
    text = home / "text.txt"
    text.write_text("the moon sees a cat\n" * 300, encoding="utf-8")
    prepare(["text", f"--input={text}", "--name=notes", f"--data_dir={home / 'data'}", "--tokenizer=char"])
    folder = home / "data" / "notes"
    whole, shard = read_json(folder / "dataset.json"), next(folder.glob("train_*.bin"))
    content = shard.read_bytes()
    shutil.copy(folder / "dataset.json", home / "whole.json")

    def fuzz(rng: random.Random, tries: Tries) -> None:
        if rng.random() < 0.7:
            data = as_json(edit(whole, rng))
            (folder / "dataset.json").write_bytes(data if rng.random() < 0.9 else edit_bytes(data, rng))
            shard.write_bytes(content)
        else:
            shutil.copy(home / "whole.json", folder / "dataset.json")
            head = edit_bytes(content[:1100], rng)
            data = head + content[1100:] if len(head) == 1100 else head
            shard.write_bytes(data)

        def read() -> None:
            dataset = open_dataset(folder)
            dataset.train.read(0, min(64, len(dataset.train)))
            _ = dataset.fingerprint, dataset.name

        tries.attempt(read, data[:300])

    return fuzz
