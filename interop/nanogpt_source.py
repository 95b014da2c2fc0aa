"""Opens what nanoGPT and llm.c write: ckpt.pt, and checkpoints of one binary file. Both hold GPT-2's tensors and no
tokenizer.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from common.tokenizer import Tokenizer, named_tokenizer
from errors import UserError
from files import DamagedFile
from interop import layouts
from interop.pickled import load_pickled, plain_tensors
from interop.sources import Source

MAX_LAYERS = 512
LLMC_DTYPES = {3: torch.float32, 5: torch.bfloat16}  # by version


def open_nanogpt(path: Path, pickle: bool, tokenizer: str | None) -> Source:
    """nanoGPT's ckpt.pt. Raises UserError."""
    content = load_pickled(path, pickle)
    arguments, weights = content.get("model_args"), content.get("model")
    if not isinstance(arguments, dict) or not isinstance(weights, dict):
        found = ", ".join(sorted(map(str, content))[:6])
        raise UserError(f"{path}: not a checkpoint of nanoGPT: expected entries model and model_args; found {found}")
    tensors = {
        name.removeprefix("_orig_mod."): tensor.detach() for name, tensor in plain_tensors(path, weights).items()
    }
    size = sum(tensor.nbytes for tensor in tensors.values())
    names = {"n_layer", "n_head", "n_embd", "block_size", "bias"}
    if missing := sorted(names - arguments.keys()):
        raise UserError(f"{path}: model_args lacks {missing[0]!r}")
    options = {name: arguments[name] for name in names} | {"mlp": "gelu_exact"}
    made = own_tokenizer(path, tokenizer, arguments.get("vocab_size"))
    facts = {"class": "nanoGPT", "config": {name: arguments[name] for name in sorted(names)}}
    return Source("nanoGPT", options, layouts.nanogpt, set(tensors), tensors.__getitem__, size, made, facts)


def own_tokenizer(path: Path, name: str | None, vocab_size: object) -> Tokenizer:
    """The tokenizer of a checkpoint that has none: GPT-2's where the vocabulary is its, else `name`. Raises
    UserError."""
    if name is not None:
        return named_tokenizer(name)
    if vocab_size in (50_257, 50_304):
        return named_tokenizer("gpt2")
    raise UserError(
        f"{path}: a vocabulary of {vocab_size} ids, and the file does not say of which tokenizer: add"
        " --tokenizer=FILE (for nanoGPT's characters: the dataset.json of the same text, prepared by python -m"
        " prepare_data text --tokenizer=char, which gives the same ids)"
    )


def open_llmc(path: Path, head: bytes, tokenizer: str | None) -> Source:
    """llm.c's checkpoint of GPT-2: 256 int32 of header, then the tensors one after another. Raises UserError."""
    version = int.from_bytes(head[4:], "little")
    if version not in LLMC_DTYPES:
        raise UserError(f"{path}: llm.c's version {version}; expected 3 (float32) or 5 (bfloat16)")
    header = torch.from_file(str(path), size=256, dtype=torch.int32).tolist() if path.stat().st_size >= 1024 else []
    if min(header[2:8], default=0) < 1:
        raise DamagedFile(path, "no header of llm.c's checkpoints")
    T, V, L, H, C, padded = header[2:8]
    dtype, layer_shapes = LLMC_DTYPES[version], {
        "ln_1.weight": (C,), "ln_1.bias": (C,), "attn.c_attn.weight": (3 * C, C), "attn.c_attn.bias": (3 * C,),
        "attn.c_proj.weight": (C, C), "attn.c_proj.bias": (C,), "ln_2.weight": (C,), "ln_2.bias": (C,),
        "mlp.c_fc.weight": (4 * C, C), "mlp.c_fc.bias": (4 * C,), "mlp.c_proj.weight": (C, 4 * C),
        "mlp.c_proj.bias": (C,),
    }  # fmt: skip
    count = (padded + T + 2) * C + L * sum(map(math.prod, layer_shapes.values()))
    if path.stat().st_size != (expected := 1024 + count * dtype.itemsize):
        raise DamagedFile(path, f"{path.stat().st_size} bytes, but its header says {expected}")
    if L > MAX_LAYERS:
        raise DamagedFile(path, f"{L} layers; Sprout's models have at most {MAX_LAYERS}")
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (padded, C), "wpe.weight": (T, C)}
    for name, shape in layer_shapes.items():
        shapes |= {f"h.{layer}.{name}": shape for layer in range(L)}
    shapes |= {"ln_f.weight": (C,), "ln_f.bias": (C,)}
    sizes = [math.prod(shape) for shape in shapes.values()]
    numbers = torch.from_file(str(path), size=1024 // dtype.itemsize + sum(sizes), dtype=dtype)
    values = numbers[1024 // dtype.itemsize :].split(sizes)
    tensors = {
        f"transformer.{name}": value.view(shape) for (name, shape), value in zip(shapes.items(), values, strict=True)
    }
    options = {"n_layer": L, "n_head": H, "n_embd": C, "block_size": T}
    made = own_tokenizer(path, tokenizer, V)
    size = path.stat().st_size
    facts = {"class": "llm.c"}
    return Source("llm.c", options, layouts.nanogpt, set(tensors), tensors.__getitem__, size, made, facts)
