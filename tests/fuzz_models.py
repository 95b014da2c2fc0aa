"""Crafted models, headers and options, drawn from a seed: each has to end in success or in a UserError, at once and
without gigabytes. `run` returns what did not; tests/test_hostile_models.py and tests/torture.py call it.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import resource
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import config
import sample
from checkpoint import open_checkpoint, save_checkpoint
from common.option import Option
from common.stored_models import open_checked
from common.tokenizer import bytes_tokenizer
from common.weights import export_weights
from errors import UserError
from files import json_bytes
from generation.text import load_model
from interop import classes
from model import GPT, GPTConfig
from tests.timing import least_seconds

SECONDS, MEGABYTES = 1.0, 200  # of one example, of this process alone, beyond which it is a problem
SIZES = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=32, vocab_size=257, eos_id=256)
MODELS = {
    "gpt2": SIZES,
    "modern": replace(
        SIZES, positions="rotary", norm="rmsnorm", mlp="swiglu", qk_norm=True, bias=False, n_kv_head=1, n_hidden=24,
        tie_embeddings=False, rope_factor=4.0,
    ),
    "paper": replace(
        SIZES, positions="sinusoidal", norm_position="post", mlp="relu", scale_embeddings=True, document_mask=True,
    ),
    "n-grams": replace(
        SIZES, positions="rotary", rotary_dim=4, max_ngram=3, ngram_rows=64, sliding_window=8, parallel_residual=True,
    ),
}  # fmt: skip
NUMBERS = [
    0, 1, 2, 3, 7, -1, -4, 0.5, 7.5, -0.0, 1e-300, 1e300, 2**15, 2**17, 2**24, 2**24 + 1, 2**31, 2**32, 10**9, 10**12,
    2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**18, 10**400, 1e9, 1e18, 1.5, math.inf, -math.inf, math.nan,
]  # fmt: skip
OTHERS = ["", "none", "auto", "rotary", "x" * 300, "\ud800", "\0", True, False, None, [], {}, [1], {"a": 1}, "1e9"]
DUPLICATE = object()
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": True,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}  # fmt: skip


def make_run(run: Path, name: str) -> Path:
    """A run with one checkpoint of a model of MODELS → its model folder."""
    model = GPT(MODELS[name], seed=3)
    moments = {f"exp_avg.{key}": torch.zeros_like(tensor) for key, tensor in export_weights(model).items()}
    tokenizer = bytes_tokenizer().to_dict()
    return save_checkpoint(
        run, 1, model=export_weights(model), config=MODELS[name].to_dict(), tokenizer=tokenizer, optimizer=moments,
        state={},
    ) / "model"  # fmt: skip


def sign(checkpoint: Path) -> None:
    """Writes a manifest of the files as they are."""
    manifest = json.loads((checkpoint / "manifest.json").read_bytes())
    for name in manifest["files"]:
        data = (checkpoint / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "crc32": zlib.crc32(data)}
    write_manifest(checkpoint, manifest)


def write_manifest(checkpoint: Path, manifest: dict[str, Any]) -> None:
    """With the checksum of itself."""
    content = {name: value for name, value in manifest.items() if name != "crc32"}
    (checkpoint / "manifest.json").write_bytes(json_bytes({**content, "crc32": zlib.crc32(json_bytes(content))}))


# ---- What is drawn ---------------------------------------------------------------------------------------------------


def any_value(rng: random.Random, near: object) -> Any:
    """A hostile value, or one near to the given one."""
    kind = rng.randrange(4)
    if kind == 0 and isinstance(near, int | float) and not isinstance(near, bool) and abs(near) < 2**60:
        return rng.choice([near + 1, near - 1, near * 2, near * 1000, -near, float(near), near + 0.5])
    if kind == 1:
        return rng.choice(OTHERS)
    if kind == 2:
        return 2 ** rng.randrange(70) + rng.choice([-1, 0, 1])
    return rng.choice(NUMBERS)


def edited(rng: random.Random, values: dict[str, Any]) -> bytes:
    """JSON of the values with one to three changes, or damaged as a text."""
    values, names = dict(values), [*values] or ["x"]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        name = rng.choice(names)
        kind = rng.randrange(12)
        if kind == 0:
            values.pop(name, None)
        elif kind == 1:
            values[rng.choice(["n_layers", "zero_init", "adapter", name.upper()])] = any_value(rng, 1)
        elif isinstance(values.get(name), dict):
            values[name] = json.loads(edited(rng, values[name]).decode(errors="replace") or "0") if kind > 8 else kind
        else:
            values[name] = any_value(rng, values.get(name))
    text = json.dumps(values)
    return text.encode()


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Text of JSON, damaged."""
    at = rng.randrange(len(data))
    kinds: list[Callable[[], bytes]] = [
        lambda: data[:at],
        lambda: data + data[at:],
        lambda: data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
        lambda: b"[" * rng.choice([10, 5000, 200_000]),
        lambda: b'{"a":' * rng.choice([10, 5000, 100_000]),
        lambda: b"{" + data.strip()[1:-1] + b"," + data.strip()[1:-1] + b"}",
        lambda: b'{"n_layer": ' + b"9" * rng.choice([20, 400, 5000]) + b"}",
        lambda: b"[" + b"{}," * rng.choice([10, 20_000, 400_000]) + b"{}]",
        lambda: b"\xef\xbb\xbf" + data,
        lambda: data.decode().encode("utf-16"),
        lambda: b"",
    ]
    return rng.choice(kinds)()


def header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with another header."""
    length = int.from_bytes(data[:8], "little")
    content, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind, name = rng.randrange(9), rng.choice([*content])
    if kind == 0:
        other = rng.choice(["blocks.0.x", "blocks.01.attn.qkv.weight", "x" * 400, "\x1b[2J", name.upper()])
        content[other] = content.pop(name)
    elif kind == 1:
        content[name] = {**content[name], "shape": [any_value(rng, 16) for _ in range(rng.randrange(4))]}
    elif kind == 2:
        content[name] = {**content[name], "dtype": rng.choice(["F64", "BF16", "F8_E4M3", "U8", "X", 7, None])}
    elif kind == 3:
        content[name] = {**content[name], "data_offsets": [any_value(rng, 16), any_value(rng, 64)]}
    elif kind == 4:
        count = rng.choice([1, 10, 1000, 10_000])
        content |= {f"e{i}": {"dtype": "I8", "shape": [0, 2**40], "data_offsets": [0, 0]} for i in range(count)}
    elif kind == 5:
        content["__metadata__"] = rng.choice([{}, {"a": "b"}, {"a": 1}, 7, {name: "{}"}])
    elif kind == 6:
        content[name] = {**content[name], "shape": content[name]["shape"][::-1] + [1] * rng.randrange(2)}
    elif kind == 7:
        content.pop(name)
    encoded = json.dumps(content).encode()
    size = (
        len(encoded) if rng.randrange(8) else rng.choice([0, 1, 2**24 + 1, 10**8, 2**63, 2**64 - 1, len(encoded) + 1])
    )
    made = size.to_bytes(8, "little") + encoded + body
    if kind == 8:
        at = rng.randrange(len(made))
        return made[:at] if rng.randrange(2) else made[:at] + bytes([rng.randrange(256)]) + made[at + 1 :]
    return made


def flag(rng: random.Random, options: list[Option]) -> str:
    """A flag, as typed."""
    option = rng.choice(options)
    value = any_value(rng, option.default if isinstance(option.default, int | float) else 1)
    texts = ["n" * 256, "é" * 200, "a/" * 2100 + "a", "utf-7", "idna", "unicode_escape", "rot13", "~nobody", "-", "1e9"]
    text = rng.choice([str(value)[:5000] if value != 10**400 else "9" * 401, *texts, "9" * 5000, "a\udcff", "\ud800"])
    return f"--{option.name}={text}"


# ---- What is tried ---------------------------------------------------------------------------------------------------


class Folders:
    """Model folders to craft examples of, in a folder of their own."""

    def __init__(self, home: Path, rng: random.Random) -> None:
        self.rng, self.home = rng, home
        self.folders = [make_run(home / f"run {name}", name) for name in MODELS]
        self.files = {
            path: path.read_bytes() for folder in self.folders for path in folder.parent.rglob("*") if path.is_file()
        }
        self.options = {name: [*config._loader.own(name).values()] for name in config.SCRIPTS}

    def restore(self, folder: Path) -> None:
        for path, data in self.files.items():
            if path.is_relative_to(folder.parent):
                path.write_bytes(data)

    def example(self) -> tuple[str, Callable[[], object]]:
        """What is tried, in words, and the action; a folder is crafted already."""
        kind = self.rng.choice(["config", "config", "config", "header", "header", "text", "options", "options", "hf"])
        if kind == "options":
            script = self.rng.choice([*config.SCRIPTS])
            flags = [flag(self.rng, self.options[script]) for _ in range(self.rng.choice([1, 1, 2, 3]))]
            return f"{script} {flags}", lambda: config.load(script, flags)
        if kind == "hf":
            data = edited(self.rng, LLAMA)
            return f"config.json of transformers {data!r}", lambda: read_foreign(data)
        folder = self.rng.choice(self.folders)
        name = {"config": "config.json", "header": "model.safetensors"}.get(kind)
        name = name or self.rng.choice(["config.json", "sprout_tokenizer.json", "../manifest.json"])
        path = folder / name
        before = self.files[path.resolve()] if path.resolve() in self.files else self.files[path]
        if kind == "header":
            data = header(self.rng, before)
        elif kind == "config":
            data = edited(self.rng, json.loads(before))
        else:
            data = damaged(self.rng, before)
        path.write_bytes(data)
        if name != "../manifest.json":
            sign(folder.parent)
        what = f"{folder.parents[2].name}: {name} is {data[:1500]!r}"
        return what, self.rng.choice([partial_sample(folder), partial_load(folder), partial_open(folder)])


def partial_sample(folder: Path) -> Callable[[], object]:
    flags = [f"--run={folder}", "--prompt=ab", "--max_new_tokens=2", "--device=cpu", "--temperature=0"]
    return lambda: sample.main(flags)


def partial_load(folder: Path) -> Callable[[], object]:
    return lambda: load_model(folder, torch.device("cpu"))


def partial_open(folder: Path) -> Callable[[], object]:
    """What train.py reads first with --resume, --init_from and --teacher."""

    def read() -> None:
        open_checkpoint(folder.parent).optimizer_tensors()
        open_checked(folder)

    return read


def read_foreign(data: bytes) -> GPTConfig:
    from files import parse_json

    try:
        values = parse_json(data)
    except ValueError as error:
        raise UserError(str(error)) from None
    name = classes.class_of(values)
    return classes.to_config(classes.read_config(values, name), 257, 256)


def run(examples: int, seed: int) -> list[str]:
    """Tries so many crafted examples → one line for each that ended in anything but success or a UserError, or took
    too much time or memory."""
    rng, found = random.Random(seed), list[str]()
    home = Path(tempfile.mkdtemp(prefix="fuzz models "))
    try:
        folders = Folders(home, rng)
        for folder in folders.folders:
            for action in (partial_sample, partial_load, partial_open):  # the first calls allocate and import
                _quietly(action(folder))
        for _ in range(examples):
            what, action = folders.example()
            memory, problems = _peak(), set[str]()

            def try_it(action: Callable[[], object] = action, problems: set[str] = problems) -> None:
                try:
                    _quietly(action)
                except (UserError, SystemExit):
                    pass
                except Exception as error:  # noqa: BLE001 - whatever it is, it is what is looked for
                    problems.add(f"{type(error).__name__}: {str(error)[:200]}")

            if (seconds := least_seconds(try_it, SECONDS)) > SECONDS or _peak() - memory > MEGABYTES:
                problems.add(f"{seconds:.1f} s and {_peak() - memory:.0f} MB")
            found += [f"{problem}: {what}" for problem in sorted(problems)]
            for folder in folders.folders:
                if f"run {folder.parents[2].name.removeprefix('run ')}: " in what:
                    folders.restore(folder)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return found


def _quietly(action: Callable[[], object]) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        action()


def _peak() -> float:
    """Megabytes of this process at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e3 if sys.platform != "darwin" else 1e6)


if __name__ == "__main__":
    for number in range(int(sys.argv[1]) // 1000):
        problems = run(1000, seed=int(sys.argv[2]) + number)
        print("\n".join([f"{len(problems)} problems in 1000 examples", *(line[:700] for line in problems)]), flush=True)
