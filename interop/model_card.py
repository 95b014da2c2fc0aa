"""README.md of an exported folder, the model card of the Hugging Face hub: what is known of the model, nothing else.

Only names of files and folders are shown, no paths. The license is the user's to fill in.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict

from checkpoint import resolve_model_folder
from common.signature import is_own, own_texts
from errors import UserError
from files import DamagedFile, plain_file, read_json
from json_types import Mismatch, conform
from model import GPTConfig
from model_folder import ModelFolder
from terminal import visible

MAX_SAMPLES, MAX_SAMPLE_BYTES = 3, 100_000
RECIPE = (
    "optimizer", "learning_rate", "schedule", "warmup_steps", "weight_decay", "tokens_per_step", "max_steps", "dropout",
    "label_smoothing", "ema_half_life", "lora_rank", "seed",
)  # fmt: skip


class TokenCount(TypedDict):
    """What is read of a shard's entry in dataset.json."""

    tokens: int


def model_card(
    name: str, kind: str, config: GPTConfig, parameters: int, folder: ModelFolder, tokenizer: str, proof: list[str]
) -> str:
    """kind: the class or architecture; proof: what was compared, a line each."""
    state: Mapping[str, Any] = folder.state() or {}
    run, options = run_of(folder.path), state.get("options", {})
    made = "trained" if state or described_source(folder.path) is None else "imported"
    sections = [
        front_matter(kind),
        f"# {name}",
        f"A decoder-only Transformer of {parameters:,} parameters, {made} with Sprout and exported as {kind}.",
        "License: to be filled in by whoever publishes this model (and in the lines at the top).",
        section("Model", model_rows(config, kind, tokenizer)),
        section("Data", data_rows(state, options)),
        section("Training", training_rows(state, options)),
        section("Results", result_rows(state)),
        section("Origin", origin_rows(folder.path, state, options)),
        samples_section(run),
        section("Checked", [f"{line}." for line in proof]),
    ]
    return "\n\n".join(part for part in sections if part) + "\n"


def dictionary(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def front_matter(kind: str) -> str:
    """What the hub reads."""
    where = ["tags:", "- gguf"] if kind.startswith("GGUF") else ["library_name: transformers"]
    return "\n".join(["---", "license: other  # fill in", *where, "pipeline_tag: text-generation", "---"])


def section(title: str, rows: list[str]) -> str:
    """Rows hold names from elsewhere: each is one line, without control characters, and no HTML."""
    shown = [visible(" ".join(row.split())).replace("<", "&lt;") for row in rows]
    return f"## {title}\n\n" + "\n".join(f"- {row}" for row in shown) if rows else ""


def model_rows(config: GPTConfig, kind: str, tokenizer: str) -> list[str]:
    heads = f"{config.n_head} heads"
    if config.kv_heads != config.n_head:
        heads += f" ({config.kv_heads} of keys and values)"
    return [
        f"{kind}: {config.n_layer} layers, {heads}, {config.n_embd} channels",
        f"MLP: {config.mlp}, {config.hidden_size} wide",
        f"context of {config.block_size:,} tokens, {config.positions} positions",
        f"vocabulary of {config.vocab_size:,}; tokenizer: {tokenizer}"
        + ("" if tokenizer == "imported" else ", which begins every text with the end-of-sequence token"),
    ]


def data_rows(state: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    dataset = next(iter(own_texts(state)), None)
    if dataset is None:
        return []
    rows = [f"dataset: {dataset['name']}"] if dataset["name"] else []
    try:
        content = read_json(Path(dataset["path"]) / "dataset.json")
    except (DamagedFile, KeyError):  # prepared elsewhere, or removed
        return rows
    sizes = [_count(content[key], key) for key in ("documents", "bytes") if isinstance(content.get(key), int)]
    for split, files in dictionary(content.get("shards")).items():
        with suppress(Mismatch):  # another program's
            tokens = [file["tokens"] for file in conform(list[TokenCount], files)]
            sizes.append(f"{sum(tokens):,} tokens in the {split} split")
    return [*rows, ", ".join(sizes)]


def _count(number: int, plural: str) -> str:
    return f"{number:,} {plural if number != 1 else plural.removesuffix('s')}"


def training_rows(state: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    rows = []
    if state:
        rows.append(f"steps: {state['step']:,}; tokens: {state.get('tokens', 0):,}")
    known = {key: options[key] for key in RECIPE if options.get(key) not in (None, 0.0, False)}
    if known:
        rows.append(", ".join(f"{key}={value}" for key, value in known.items()))
    environment = state.get("environment", {})
    if environment.get("torch"):
        rows.append(f"PyTorch {environment['torch']} on {environment.get('device')}")
    return rows


def result_rows(state: Mapping[str, Any]) -> list[str]:
    loss, bits = state.get("val_loss"), state.get("val_bits_per_byte")
    found = [] if loss is None else [f"val loss: {loss:.4f} nats per token"]
    return found + ([] if bits is None else [f"val bits per byte: {bits:.4f}"])


def origin_rows(folder: Path, state: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """Of a fine-tune its base model, of an imported model its source."""
    rows = [f"imported: {described}"] if (described := described_source(folder)) else []
    base = options.get("init_from") if is_own(state) else None
    if not isinstance(base, str):
        return rows
    path = Path(base)
    shown = path.parent.parent.parent.name if path.parent.parent.name == "checkpoints" else path.name
    try:
        described = described_source(resolve_model_folder(path))
    except (UserError, OSError):  # moved or removed
        described = None
    return [*rows, f"fine-tuned from {shown}" + (f" ({described})" if described else "")]


def described_source(folder: Path) -> str | None:
    """What source.json says of an imported model; None where there is none."""
    if not (folder / "source.json").is_file():
        return None
    facts = read_json(folder / "source.json")
    config, general = facts.get("config"), facts.get("gguf")
    named = config.get("_name_or_path") if isinstance(config, dict) else None
    if isinstance(general, dict):
        named = general.get("general.name")
    is_name = isinstance(named, str) and re.fullmatch(r"[\w.-]+([ /][\w.-]+)*", named)
    return f"{facts.get('class')}" + (f", {named}" if is_name else "")


def run_of(folder: Path) -> Path | None:
    """The run that a model folder belongs to."""
    folder = folder.resolve()
    return folder.parents[2] if folder.parent.parent.name == "checkpoints" else None


def samples_section(run: Path | None) -> str:
    """The samples of the run's last sampling."""
    if run is None or not (run / "samples.txt").is_file():
        return ""
    with open(run / "samples.txt", "rb", opener=plain_file) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - MAX_SAMPLE_BYTES))
        content = file.read().decode("utf-8", errors="replace")
    _, *pieces = re.split(r"^==== step (\d+) (\(.*\)) ====\n", content, flags=re.MULTILINE)
    found = list(zip(pieces[0::3], pieces[2::3], strict=True))
    texts = [text.strip("\n") for step, text in found if step == found[-1][0]][-MAX_SAMPLES:]
    blocks = []
    for text in texts:
        longest = max(map(len, re.findall(r"`+", text)), default=0)
        fence = "`" * max(3, longest + 1)
        blocks.append(f"{fence}text\n{visible(text)}\n{fence}")
    return f"## Samples\n\nOf step {found[-1][0]}, not selected:\n\n" + "\n\n".join(blocks) if blocks else ""
