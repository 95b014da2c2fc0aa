"""Models that were stored, opened with their options checked: those in their ranges, and as far as the headers of the
weights bear them out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from common.option import section_from
from common.weights import Shapes, check_header
from errors import UserError
from model import GPTConfig
from model_folder import CONFIG, LORA_A, LORA_B, WEIGHTS, ModelFolder, open_model_folder

COPY_AGAIN = "copy the folder again from its source, or use another checkpoint"


def open_checked(path: Path, *, check_weights: bool = True) -> tuple[ModelFolder, GPTConfig]:
    """open_model_folder, with its options as checked_config has them. Raises UserError."""
    folder = open_model_folder(path, check_weights=check_weights)
    config = checked_config(folder)
    return replace(folder, config=config.to_dict()), config


def checked_config(folder: ModelFolder) -> GPTConfig:
    """The options of a stored model. Every option is in its range, and those that say how many tensors there are, and
    how large, agree with the headers of the weights, which the sizes of the files have confirmed. So what is built
    from them takes no more memory than the weights. Takes neither memory nor time that they could ask for. Raises
    UserError."""
    place = folder.path / CONFIG
    try:
        config = section_from(GPTConfig, folder.config)
    except ValueError as error:
        raise UserError(f"{place}: {error}; {COPY_AGAIN}") from None
    try:
        given = {name: shape for name, (_, shape) in folder.frozen_header().items()}
        check_header(config, given)
        if folder.adapter is not None:
            own = {name: shape for name, (_, shape) in folder.header().items()}
            check_adapters(given, own, folder.adapter.rank)
    except ValueError as error:
        weights = folder.path / WEIGHTS if folder.adapter is None else folder.base() / WEIGHTS
        raise UserError(f"{place} does not fit {weights}: {error}; {COPY_AGAIN}") from None
    return config


def check_adapters(weights: Shapes, adapters: Shapes, rank: int) -> None:
    """Raises ValueError where adapters (training/lora.py) are not those of a rank for matrices of these weights."""
    for name, shape in adapters.items():
        layer = name.removesuffix(LORA_A).removesuffix(LORA_B)
        matrix = tuple(weights.get(f"{layer}.weight", ()))
        if layer == name or len(matrix) != 2 or {layer + LORA_A, layer + LORA_B} - adapters.keys():
            raise ValueError(f"{name!r} is not part of an adapter of its base")
        expected = (rank, matrix[1]) if name.endswith(LORA_A) else (matrix[0], rank)
        if tuple(shape) != expected:
            raise ValueError(f"adapter.rank={rank}: {name!r} has the shape {tuple(shape)}, expected {expected}")
