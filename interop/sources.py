"""Opens a model of another program: what it is, the names of its tensors, its tokenizer.

`open_source` tells the kinds apart: a transformers folder, which is opened here; a GGUF file (gguf_source.py); the
checkpoints of nanoGPT and llm.c (nanogpt_source.py). Pickle files are read where the user allows it (pickled.py). Code
in a folder is never run.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.imported_tokenizer import ImportedTokenizer, backend, ids_around, read_tokenizer_json
from common.option import show
from common.tokenizer import Tokenizer
from errors import UserError, quote
from files import DamagedFile, read_json, read_text
from interop import classes, layouts
from interop.pickled import load_pickled, plain_tensors
from tensor_files import MAX_HEADER, MAX_TENSORS

# buffers in older files: masks, and frequencies of the rotation
IGNORED = re.compile(r".*(attn\.(masked_)?bias|attention\.(masked_)?bias|rotary_emb\.inv_freq)")
MAX_SETTINGS, MAX_TOKENIZER = 2**24, 2**26  # bytes of JSON
MAX_CONFIG = 2**20  # bytes of a config.json
LLMC_MAGIC = 20240326
FLOATS = {torch.float32, torch.float16, torch.bfloat16, torch.float64}


@dataclass
class Source:
    """A model of another program. options: of GPTConfig, without the vocabulary. read: a tensor by its name there.
    facts: what is known of its origin, for the model card of an export."""

    kind: str
    options: dict[str, Any]
    layout: layouts.Layout
    names: set[str]
    read: Callable[[str], Tensor]
    bytes: int
    tokenizer: Tokenizer
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def open_source(path: Path, *, pickle: bool, tokenizer: str | None, eos: str | None) -> Source:
    """The model in a folder or file. pickle: torch.save's files may be read, by torch's restricted unpickler.
    tokenizer: for files that have none. eos: the name of the end-of-sequence token, where another one is wanted. Raises
    UserError."""
    if path.is_dir() and not (path / "config.json").exists() and len(found := [*path.glob("*.gguf")]) == 1:
        path = found[0]  # what `export --to=gguf` writes
    if path.is_dir():
        refuse_unused("--tokenizer", tokenizer, "the folder has its own")
        return open_transformers(path, pickle, eos)
    if not path.is_file():
        exists = os.path.lexists(path)
        why = (
            "neither a file nor a folder (a link to nothing, a pipe, a device)" if exists else "no such file or folder"
        )
        is_name = not exists and re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", str(path))
        name = str(path) if is_name else "OWNER/NAME"
        raise UserError(
            f"{path}: {why}. Expected a folder with config.json and model.safetensors, a .gguf file, nanoGPT's"
            f" ckpt.pt or llm.c's .bin; for a model of the Hugging Face hub: python -m interop import {name} --download"
        )
    with path.open("rb") as file:
        head = file.read(8)
    if head[:4] == b"GGUF":
        from interop.gguf_source import open_gguf

        refuse_unused("--tokenizer", tokenizer, "the file has its own")
        return open_gguf(path, eos)
    refuse_unused("--eos", eos, "the file names no tokens, and the tokenizer says which one ends a text")
    if int.from_bytes(head[:4], "little") == LLMC_MAGIC:
        from interop.nanogpt_source import open_llmc

        return open_llmc(path, head, tokenizer)
    if head[:4] == b"PK\3\4" or path.suffix in (".pt", ".pth", ".bin"):
        from interop.nanogpt_source import open_nanogpt

        return open_nanogpt(path, pickle, tokenizer)
    raise UserError(f"{path}: neither GGUF, nor a checkpoint of nanoGPT or llm.c; a transformers model is a folder")


def refuse_unused(flag: str, value: str | None, why: str) -> None:
    """Raises UserError for a flag without an effect."""
    if value is not None:
        raise UserError(f"{flag}={show(value)} has no effect: {why}; leave the flag out")


# ---- transformers ----------------------------------------------------------------------------------------------------


def open_transformers(folder: Path, pickle: bool, eos: str | None) -> Source:
    """A folder of transformers' save_pretrained. Raises UserError."""
    if not (folder / "config.json").is_file():
        ours = "; it is a run or model folder of Sprout already" if (folder / "checkpoints").is_dir() else ""
        raise UserError(f"{folder}: has no config.json, so it is no transformers model{ours}")
    config = read_object(folder / "config.json", MAX_CONFIG)
    if (folder / "sprout_tokenizer.json").is_file():
        again = f"python sample.py --run={quote(str(folder))}"
        raise UserError(f"{folder}: is a model folder of Sprout already: {again}")
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else ""
        raise UserError(f"{folder}: its weights are quantized ({method}); import the original, or a GGUF of it")
    notes = []
    if config.get("auto_map") or any(folder.glob("*.py")):
        notes.append("the folder holds code of its own (auto_map or .py files), which is not run")
    name = classes.class_of(config)
    options = classes.read_config(config, name)
    names, read, size = open_safetensors(folder) or open_pickled(folder, pickle)
    facts = {"class": name, "config": config, **_facts(folder)}
    return Source(
        name,
        options,
        classes.CLASSES[name].layout,
        names,
        read,
        size,
        read_tokenizer(folder, config, eos),
        facts,
        notes,
    )


def read_object(path: Path, limit: int = MAX_SETTINGS) -> dict[str, Any]:
    """A JSON file; the hub's cache consists of links."""
    return read_json(path.resolve(), limit)


def _facts(folder: Path) -> dict[str, Any]:
    generation = folder / "generation_config.json"
    return {"generation_config": read_object(generation)} if generation.is_file() else {}


def open_safetensors(folder: Path) -> tuple[set[str], Callable[[str], Tensor], int] | None:
    """(names, reader, bytes) of model.safetensors or of the files that its index names; None where there is neither.
    Raises UserError."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        files = {single}
    elif index.is_file():
        listed = read_object(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
            raise DamagedFile(index, "has no weight_map")
        if outside := [file for file in listed.values() if Path(file).name != file]:
            raise DamagedFile(index, f"names {outside[0]!r}, which is not a file of this folder")
        files = {folder / file for file in listed.values()}
    else:
        return None
    place = dict[str, Path]()
    for file in sorted(files):
        if not file.is_file():
            raise DamagedFile(file, "is missing; the download is not complete")
        try:
            with file.open("rb") as header:  # says why a file cannot be read
                length = int.from_bytes(header.read(8), "little")
            if length > MAX_HEADER:
                raise DamagedFile(file, f"a header of {length:,} bytes; Sprout reads at most {MAX_HEADER:,}")
            with safe_open(file, framework="pt") as tensors:
                place |= dict.fromkeys(tensors.keys(), file)
        except (SafetensorError, OSError, MemoryError) as error:
            raise DamagedFile(file, f"damaged, or not complete ({error})") from None
        if len(place) > MAX_TENSORS:
            raise DamagedFile(file, f"more than {MAX_TENSORS:,} tensors, which no model has that Sprout reads")

    def read(name: str) -> Tensor:
        with safe_open(place[name], framework="pt") as tensors:
            return tensors.get_tensor(name)

    return set(place), read, sum(file.stat().st_size for file in files)


def open_pickled(folder: Path, allowed: bool) -> tuple[set[str], Callable[[str], Tensor], int]:
    """The same of pytorch_model.bin. Raises UserError."""
    files = sorted(file for file in folder.glob("pytorch_model*.bin") if file.is_file())
    if not files:
        raise UserError(f"{folder}: has neither model.safetensors nor model.safetensors.index.json")
    tensors = dict[str, Tensor]()
    for file in files:
        tensors |= plain_tensors(file, load_pickled(file, allowed))
    return set(tensors), tensors.__getitem__, sum(file.stat().st_size for file in files)


def read_tokenizer(folder: Path, config: Mapping[str, Any], eos: str | None) -> Tokenizer:
    """The tokenizer of a transformers folder. Raises UserError."""
    path, vocab = folder / "tokenizer.json", folder / "vocab.json"
    if path.is_file():
        definition = read_text(path.resolve(), MAX_TOKENIZER)
    elif vocab.is_file() and (folder / "merges.txt").is_file():
        definition = gpt2_definition(folder)
    else:
        found = "a SentencePiece model, which is not covered" if (folder / "tokenizer.model").is_file() else "none"
        raise UserError(
            f"{folder}: expected tokenizer.json, or vocab.json and merges.txt, for its tokenizer; found {found}"
        )
    content, settings = read_tokenizer_json(definition), dict[str, Any]()
    if (folder / "tokenizer_config.json").is_file():
        settings = read_object(folder / "tokenizer_config.json")
    template, file = settings.get("chat_template"), folder / "chat_template.jinja"
    if file.is_file():
        template = read_text(file.resolve(), MAX_SETTINGS)
    named = [eos, settings.get("eos_token"), config.get("eos_token_id")]
    return make_tokenizer(definition, content, named, template if isinstance(template, str) else None)


def make_tokenizer(
    definition: str, content: Mapping[str, Any], named: list[Any], template: str | None = None
) -> ImportedTokenizer:
    """named: what may name the end-of-sequence token, the first that does counts: its text, a dict with it as
    `content`, an id or a list of ids. Raises UserError."""
    made = backend(definition)
    vocab = made.get_vocab(with_added_tokens=True)
    for name in [*named, "<|endoftext|>"]:
        name = name.get("content") if isinstance(name, dict) else name[0] if isinstance(name, list) and name else name
        eos_id = name if type(name) is int else vocab.get(name) if isinstance(name, str) else None
        if eos_id is not None:
            break
        if name is not None and name is named[0]:
            raise UserError(
                f"--eos={show(name)}: the tokenizer has no such token; special ones are {_special(content)}"
            )
    else:
        raise UserError(
            f"the tokenizer does not say which token ends a text; name it with --eos=TOKEN: {_special(content)}"
        )
    start, _ = ids_around(content)
    return ImportedTokenizer(definition, eos_id, start[0] if start else None, template)


def _special(content: Mapping[str, Any]) -> str:
    names = [token.get("content", "") for token in content.get("added_tokens") or [] if token.get("special")]
    return ", ".join(show(repr(name)) for name in names[:12]) or "none"


def gpt2_definition(folder: Path) -> str:
    """A tokenizer.json of vocab.json and merges.txt, as GPT-2's tokenizer was published."""
    vocab = read_object(folder / "vocab.json")
    if not all(type(id) is int for id in vocab.values()):
        raise DamagedFile(folder / "vocab.json", "expected an id for every token")
    lines = read_text((folder / "merges.txt").resolve(), MAX_SETTINGS).splitlines()
    merges = [line for line in lines if line and not line.startswith("#version")]
    special = [token for token in ("<|endoftext|>",) if token in vocab]
    return bpe_definition(vocab, [line.split(" ") for line in merges], special)


def bpe_definition(
    vocab: Mapping[str, int], merges: list[list[str]], special: list[str], before: list[dict[str, Any]] | None = None,
    *, added: list[str] | None = None, use_regex: bool = False, ignore_merges: bool = False,
    normalizer: dict[str, Any] | None = None,
) -> str:  # fmt: skip
    """A tokenizer.json of byte-level BPE. special, added: tokens that are never merged; the former stand for no text.
    before: the pre-tokenizers before the one for bytes, which has GPT-2's pattern with use_regex or where there are
    none."""
    byte_level: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level |= {"use_regex": use_regex or before is None}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    kinds = dict.fromkeys(special, True) | dict.fromkeys(added or [], False)
    listed: list[dict[str, Any]] = [
        {"id": vocab[token], "content": token, **flags, "special": kinds[token]} for token in kinds
    ]
    model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": ignore_merges}
    content = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": sorted(listed, key=lambda token: token["id"]),
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*before, byte_level]} if before else byte_level,
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {**model, "vocab": dict(vocab), "merges": merges},
    }  # fmt: skip
    return json.dumps(content, ensure_ascii=False)
