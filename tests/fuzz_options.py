"""Options typed by hand, presets and saved config.json files, with unexpected values."""

from __future__ import annotations

import contextlib
import io
import random
import warnings
from functools import cache
from pathlib import Path
from unittest import mock

import config
from config.loader import Loader
from tests.fuzz_values import VALUES, Tries, as_json, edit, edit_bytes, memory_folder

OWN = ("debug", "quickstart", "finetune", "--help", "--", "-x", "--=", "=", "")
SCRIPTS = ("train.py", "train.py", "sample.py", "prepare_data")
PRESET = b'"""A preset."""\nn_layer = 2\nlearning_rate = 3e-4 * 2\ndropout = -0.1 + 0.2\nstop = ["a", "b"]\n'
LINES = (
    "n_embd = 2 ** 62", "n_head = 7 // 0", "seed = -2 ** 63", "n_layer = [[1]]", "import os", "n_layer = (((1)))",
    "n_layer = 9 ** 9 ** 9", "n_layer: int = 1", "x = lambda: 0", "n_layer = 1 if 1 else 2", "data = f'{1}'", "a.b = 1",
    "n_embd = 1e400",
)  # fmt: skip


def run(examples: int, seed: int) -> list[str]:
    """Half of them command lines, the rest files."""
    rng, tries = random.Random(seed), Tries()
    warnings.simplefilter("ignore", SyntaxWarning)  # of presets such as 1and
    names = [
        *config.load("train.py", ["debug"]).values,
        *config.load("sample.py", []).values,
        "n_layr",
        "resume ",
        "\x1b",
    ]
    saved = config.dump(config.load("train.py", ["debug"]), {})
    presets = mock.patch.object(Loader, "presets", cache(Loader.presets))  # listing a folder takes longer than an input
    with presets, memory_folder() as home, contextlib.redirect_stdout(io.StringIO()):
        for number in range(examples):
            kind = number % 8
            script = rng.choice(SCRIPTS)
            if kind < 5:
                argv = [word for _ in range(rng.randint(1, 4)) if "\0" not in (word := _word(rng, names))]
            else:
                path = Path(home, "own.py" if kind < 7 else "config.json")
                data = _preset(rng) if kind < 7 else as_json(edit(saved, rng))
                path.write_bytes(data if rng.random() < 0.8 else edit_bytes(data, rng))
                argv, script = [str(path)], "train.py"
            tries.attempt(lambda: _load(script, argv), (argv, path.read_bytes() if kind >= 5 else ""))  # noqa: B023
    return tries.problems


def _load(script: str, argv: list[str]) -> None:
    with contextlib.suppress(SystemExit):  # --help
        config.load(script, argv)


def _word(rng: random.Random, names: list[str]) -> str:
    if rng.random() < 0.15:
        return rng.choice(OWN)
    value = rng.choice(VALUES)
    text = value if isinstance(value, str) else str(value).lower() if rng.random() < 0.7 else repr(value)
    return rng.choice(("--{}={}", "--{}={}", "--{}={}", "--{}", "-{}={}", "{}={}", "--{} {}")).format(
        rng.choice(names), text
    )


def _preset(rng: random.Random) -> bytes:
    lines = PRESET.decode().splitlines()
    for _ in range(rng.randint(1, 3)):
        line = (
            rng.choice(LINES)
            if rng.random() < 0.6
            else f"{rng.choice(('n_layer', 'seed', 'stop', 'x'))} = {rng.choice(VALUES)!r}"
        )
        lines[rng.randrange(1, len(lines))] = line
    return "\n".join(lines).encode("utf-8", "replace")
