"""A run, checkpoint or model folder of ours → a folder for other programs. `export_model` is the whole way: what the
model is there, space, the files under a temporary name, the proof, the name.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint import resolve_model_folder
from common.memory import OutOfMemory, attempt, require_memory
from common.stored_models import open_checked
from common.tokenizer import Tokenizer, tokenizer_from_dict
from common.weights import check_weights
from errors import UserError
from files import sync_directory
from interop import classes, gguf_file, proof
from interop.layouts import split
from interop.model_card import model_card, run_of
from interop.tokenizer_files import tokenizer_config, tokenizer_json
from model import GPT, GPTConfig, sinusoidal_table
from model_folder import WEIGHTS, ModelFolder, open_model_folder, write_model_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_FILE = 5 * 10**9  # bytes of a safetensors file, as transformers has it
MARKS = (
    "not the same in llama.cpp: words with combining marks (decomposed accents, Hindi, vowel points) get other ids, as"
    " its version of the split pattern gpt4o ends words before them; tokenizers of --split_pattern=gpt2 are the same"
)
MARGIN = 10**7  # bytes for the small files


@dataclass
class Model:
    """A model of ours, and what it is elsewhere: name, the class of transformers; fields, its config.json; target, the
    options of that class (biases, a table of positions) that compute the same."""

    folder: ModelFolder
    config: GPTConfig
    tokenizer: Tokenizer
    name: str
    fields: dict[str, Any]
    target: GPTConfig


def export_model(run: Path, to: str, out: Path | None, dtype: str | None, which: str) -> tuple[Path, list[str]]:
    """Writes the folder `out` (None: exports/NAME-…) → its path, and what was proved. Raises UserError, and then there
    is no such folder; one that failed its proof is left as NAME-unproved."""
    model = open_model(run, which)
    allowed = DTYPES if to == "hf" else gguf_file.DTYPES
    if dtype is not None and dtype not in allowed:
        raise UserError(f"--dtype={dtype} with --to={to}; expected {', '.join(allowed)}")
    name = model_name(model.folder.path)
    out = out or Path("exports", f"{name}-{to}" + (f"-{dtype}" if dtype else ""))
    if os.path.lexists(out):
        raise UserError(f"{out} exists; remove it, or give another folder with --out=DIR")
    if to == "gguf":
        gguf_file.import_gguf()
        gguf_file.architecture_of(model.name, model.target)
        gguf_file.tokenizer_fields(model.tokenizer)  # raises, before minutes are spent
    check_room(model, out, to, dtype)
    write = write_hf if to == "hf" else write_gguf
    try:
        with new_folder(out) as temporary:
            return out, attempt(lambda: write(model, temporary, name, dtype))
    except OutOfMemory:
        raise OutOfMemory("the export needs more memory than is free; end other programs") from None


def export_model_folder(run: Path, out: Path | None, dtype: str | None, which: str) -> tuple[Path, list[str]]:
    """Writes the model folder `out` (None: exports/NAME-model): whole weights as stored, whatever processes wrote them,
    adapters merged → its path, and what was checked. Raises UserError, and then there is no such folder."""
    if dtype is not None:
        raise UserError(f"--dtype={dtype} with --to=model, which keeps the weights as they are stored; leave it out")
    folder, _ = open_checked(resolve_model_folder(run, which), check_weights=False)  # model_tensors checks them
    out = out or Path("exports", f"{model_name(folder.path)}-model")
    if os.path.lexists(out):
        raise UserError(f"{out} exists; remove it, or give another folder with --out=DIR")
    merged = 0 if folder.adapter is None else stored_bytes(open_model_folder(folder.base(), check_weights=False))
    require_memory(stored_bytes(folder) + merged + MARGIN, "the export")
    try:
        tensors = attempt(folder.model_tensors)
    except OutOfMemory:
        raise OutOfMemory("the export needs more memory than is free; end other programs") from None
    write_model_folder(out, tensors, folder.config, folder.tokenizer, {})
    try:
        check_copy(out, tensors, folder)
    except UserError:
        shutil.rmtree(out, ignore_errors=True)
        raise
    size = sum(tensor.nbytes for tensor in tensors.values())
    return out, [f"read back bit by bit: {len(tensors)} tensors, {size / 1e6:,.1f} MB"]


def check_copy(out: Path, tensors: Mapping[str, Tensor], folder: ModelFolder) -> None:
    """Raises UserError where a model folder does not hold these tensors, bit for bit, and the folder's JSON values."""
    copy = open_model_folder(out)
    same, reader = (copy.config, copy.tokenizer) == (folder.config, folder.tokenizer), copy.reader()
    same = same and reader.layout == {name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in reader.layout}
    same = same and reader.layout.keys() == tensors.keys()
    if not same or any(not as_bytes(reader.tensor(name)).equal(as_bytes(tensors[name])) for name in tensors):
        raise UserError(f"what was read back from {out} is not what was written; check its disk")


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def stored_bytes(folder: ModelFolder) -> int:
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in folder.header().values())


def open_model(run: Path, which: str) -> Model:
    """Raises UserError where the folder is damaged, or the model does not fit a class."""
    folder, config = open_checked(resolve_model_folder(run, which), check_weights=False)  # the same
    try:
        tokenizer = tokenizer_from_dict(folder.tokenizer)
        if (config.vocab_size, config.eos_id) != (tokenizer.vocab_size, tokenizer.eos_id):
            raise ValueError(f"the model has {config.vocab_size} ids, its tokenizer {tokenizer.vocab_size}")
    except ValueError as error:
        raise UserError(f"{folder.path}: {error}; copy the folder again from its source") from error
    name, fields = classes.to_transformers(config)
    target = classes.to_config(classes.read_config(fields, name), config.vocab_size, tokenizer.eos_id)
    return Model(folder, config, tokenizer, name, fields, target)


def model_name(folder: Path) -> str:
    """The run's name, else the folder's."""
    return plain_name((run_of(folder) or folder.resolve()).name)


def plain_name(name: str) -> str:
    """A name in the characters that the hub and Ollama take."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "model"


def check_room(model: Model, out: Path, to: str, dtype: str | None) -> None:
    """Raises UserError where disk or memory cannot suffice."""
    with torch.device("meta"):
        numbers = sum(parameter.numel() for parameter in GPT(model.target, seed=None).parameters())
    size = {"bfloat16": 2, "float16": 2, "f16": 2, "q8_0": 1.1}.get(dtype or "", 4)
    if to == "hf" and dtype is None and model.folder.adapter is None:
        size = min(4, stored_bytes(model.folder) / numbers)
    home = next(place for place in (out, *out.absolute().parents) if place.exists())
    needed, free = numbers * size + MARGIN, shutil.disk_usage(home).free
    if free < needed:
        raise UserError(
            f"{out} needs {needed / 1e9:.1f} GB, and {home} has {free / 1e9:.1f} GB free; name another disk"
        )
    # the weights as stored, those written, and in float32 our model or the other program's
    require_memory(numbers * (4 + 4 + 4) + MARGIN, "the export")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder under a temporary name, which gets its own when the body is done; it becomes OUT-unproved where the
    proof fails, and is removed on other errors. Raises UserError."""
    temporary, unproved = out.with_name(f".{out.name}.writing"), out.with_name(f"{out.name}-unproved")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for path in temporary.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        sync_directory(temporary)
        if os.path.lexists(out):
            raise UserError(f"{out} exists; remove it, or give another folder with --out=DIR")
        os.rename(temporary, out)
        sync_directory(out.parent)
    except proof.ProofFailed as failed:
        shutil.rmtree(unproved, ignore_errors=True)
        os.rename(temporary, unproved)
        raise UserError(f"the written model is not the same as ours: {failed}. It is left as {unproved}") from None
    except OSError as error:
        raise UserError(f"{out} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---- Weights ---------------------------------------------------------------------------------------------------------


def in_class_form(model: Model, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors as a model of the target options has them: with zeros for biases that ours lacks, fixed waves as a
    table, scaled embeddings."""
    with torch.device("meta"):
        check_weights(GPT(model.config, seed=None), tensors)
        form = GPT(model.target, seed=None)
    shapes = {name: form.unpad(name, parameter).shape for name, parameter in form.named_parameters()}
    found, C, embedding = dict[str, Tensor](), model.config.n_embd, tensors["embed.weight"]
    for name, shape in shapes.items():
        if name == "embed.weight" and model.config.scale_embeddings:
            found[name] = embedding * C**0.5
        elif name in tensors:
            found[name] = tensors[name]
        elif name == "head.weight":
            found[name] = embedding.clone()
        elif name == "position.weight":
            found[name] = sinusoidal_table(*shape)
        else:
            assert name.endswith("bias"), f"{model.name} does not have {name}"
            found[name] = torch.zeros(shape, dtype=embedding.dtype)
    assert tensors.keys() <= found.keys(), f"{model.name} lacks {sorted(tensors.keys() - found.keys())}"
    return found


def load_tensors(model: Model) -> dict[str, Tensor]:
    try:
        return in_class_form(model, model.folder.model_tensors())
    except ValueError as error:
        raise UserError(f"{model.folder.path}: {error}; copy the folder again from its source") from error


def refuse_overflow(tensors: Mapping[str, Tensor], dtype: str) -> None:
    if infinite := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise UserError(f"--dtype={dtype}: {infinite[0]!r} has numbers beyond its range; use bfloat16 or float32")


# ---- transformers ----------------------------------------------------------------------------------------------------


def write_hf(model: Model, folder: Path, name: str, dtype: str | None) -> list[str]:
    """Raises UserError, OSError, ProofFailed."""
    tensors = load_tensors(model)
    kinds = {tensor.dtype for tensor in tensors.values()}
    wanted = DTYPES[dtype] if dtype else kinds.pop() if len(kinds) == 1 else torch.float32
    tensors = {name: tensor.to(wanted) for name, tensor in tensors.items()}
    kept = str(wanted).removeprefix("torch.")
    refuse_overflow(tensors, kept)
    write_safetensors(folder, model, tensors)
    special = {"bos_token_id": model.tokenizer.start_id, "eos_token_id": model.tokenizer.eos_id}
    write_json(folder / "config.json", model.fields | special | {"dtype": kept, "torch_dtype": kept})
    write_json(folder / "generation_config.json", special | {"do_sample": True, "temperature": 0.8, "top_p": 0.95})
    (folder / "tokenizer.json").write_text(tokenizer_json(model.tokenizer), "utf-8")
    write_json(folder / "tokenizer_config.json", tokenizer_config(model.tokenizer, model.config.block_size))
    if template := getattr(model.tokenizer, "chat_template", None):
        (folder / "chat_template.jinja").write_text(template, "utf-8")
    exact = not model.config.scale_embeddings or wanted == torch.float32
    found = [proof.check_files(folder, model.target, tensors, model.tokenizer)]
    form = (model.config, own_tensors(model, wanted)) if exact else (model.target, tensors)
    reference = proof.make_reference(*form, model.tokenizer)
    del form
    checked = proof.check_transformers(folder, reference, model.tokenizer)
    if checked is None:
        found.append("not opened in transformers, which is not installed here (pip install transformers)")
    else:
        found.append(checked if kept == "float32" else f"{checked}; all in float32, with the weights rounded to {kept}")
    parameters = sum(tensor.numel() for tensor in tensors.values())
    card = model_card(name, model.name, model.config, parameters, model.folder, model.tokenizer.name, found)
    (folder / "README.md").write_text(card, "utf-8")
    return found


def own_tensors(model: Model, dtype: torch.dtype) -> dict[str, Tensor]:
    """Our tensors, rounded to a dtype."""
    return {name: tensor.to(dtype) for name, tensor in model.folder.model_tensors().items()}


def write_safetensors(folder: Path, model: Model, tensors: Mapping[str, Tensor]) -> None:
    """model.safetensors, or several files and their index."""
    from safetensors.torch import save_file

    theirs, shards, size = dict[str, str](), list[dict[str, Tensor]]([{}]), 0
    for entry in classes.CLASSES[model.name].layout(model.target):
        if entry.ours not in tensors:
            continue
        for name, tensor in zip(entry.theirs, split(entry, tensors[entry.ours], model.target), strict=True):
            if shards[-1] and sum(part.nbytes for part in shards[-1].values()) + tensor.nbytes > MAX_FILE:
                shards.append({})
            shards[-1][name] = tensor.contiguous()
            size += tensor.nbytes
    for number, shard in enumerate(shards, 1):
        whole = len(shards) == 1
        file = WEIGHTS if whole else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        theirs |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": theirs}
        write_json(folder / f"{WEIGHTS}.index.json", index)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def write_gguf(model: Model, folder: Path, name: str, dtype: str | None) -> list[str]:
    """Raises UserError, OSError, ProofFailed."""
    dtype, path = dtype or "f32", folder / f"{name}.gguf"
    architecture = gguf_file.architecture_of(model.name, model.target)
    form = load_tensors(model)
    tensors = {key: gguf_file.rounded(key, tensor, dtype) for key, tensor in form.items()}
    refuse_overflow(tensors, dtype)
    gguf_file.write_gguf(path, name, architecture, model.target, tensors, model.tokenizer, dtype)
    has_template = bool(getattr(model.tokenizer, "chat_template", None))
    (folder / "Modelfile").write_text(gguf_file.modelfile(path.name, model.config, has_template), "utf-8")
    found = [proof.check_files(path, model.target, tensors, model.tokenizer)]
    reference = proof.make_reference(model.target, tensors, model.tokenizer)
    tolerance = llama_cpp_tolerance(reference, architecture, dtype)
    checked = proof.check_llama_cpp(path, reference, model.tokenizer, tolerance)
    found.append(checked or "not opened in llama.cpp, which is not installed here (pip install cyllama)")
    if getattr(model.tokenizer, "pattern", "") == "gpt4o":
        found.append(MARKS)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    kind = f"GGUF {architecture} ({dtype})"
    card = model_card(name, kind, model.config, parameters, model.folder, model.tokenizer.name, found)
    (folder / "README.md").write_text(card, "utf-8")
    return found


def llama_cpp_tolerance(reference: proof.Reference, architecture: str, dtype: str) -> proof.Tolerance:
    """What llama.cpp's arithmetic explains, by measurement: it takes GELU from a table of 16-bit numbers, and with
    16-bit and 8-bit weights it rounds the activations, too. Other weights or options would differ by the spread."""
    if dtype == "f32":
        allowed = reference.tolerance().allowed
        return proof.Tolerance(max(allowed, 0.005 * reference.spread()) if architecture == "gpt2" else allowed)
    return proof.Tolerance({"f16": 0.02, "q8_0": 0.15}[dtype] * reference.spread(), is_rms=True)
