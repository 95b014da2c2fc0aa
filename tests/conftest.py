"""What every test shares: one thread per worker, no network, paths to the project."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on busy cores wait for each other; see also torch.set_num_threads below
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the attention kernel runs as Python; read when Triton is first imported

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def small_text(tmp_path_factory) -> Path:
    """A file of 60 kB of simple sentences, in a folder with a space and non-ASCII letters in its name."""
    folder = tmp_path_factory.mktemp("kleiner Korpus é")
    names, verbs, things = ("Anna", "Ben", "Cleo", "Dora"), ("sees", "takes", "likes", "draws"), ("a cat", "the moon", "two trees", "water")
    lines = [f"{names[i % 4]} {verbs[i // 4 % 4]} {things[i // 16 % 4]} {i % 10}.\n" for i in range(3000)]
    path = folder / "sätze 1.txt"
    path.write_text("".join(lines), encoding="utf-8")
    return path
