"""--teacher: knowledge distillation (Hinton et al. 2015). Trained models say for each token how probable every next id
is; a run learns from that beside the one id that followed.

On a text that is short for its model that tells more than the text alone: of two models trained on it, each is wrong
in its own way, and what both agree on is rather the text's than chance (bench/NOTES.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.hardware import Hardware, choose_attention
from common.stored_models import checked_config
from common.weights import build_for_weights, import_weights
from errors import UserError
from model import GPT, IGNORED_TARGET, AttentionPath
from model_folder import ModelFolder
from training.metrics import log

Loss = Callable[..., Tensor]


def taught(forward: Loss, folders: Sequence[ModelFolder], share: float, model: GPT, hardware: Hardware) -> Loss:
    """`forward` as train.update calls it, the loss of which also compares with the probabilities of the teachers:

        (1 − share) · cross-entropy with the targets + share · cross-entropy with the mean of their probabilities

    forward: `model`, or its compiled form; returned as it is where there are no teachers. Raises UserError for a
    teacher that cannot read the model's windows."""
    teachers = [load_teacher(folder, model, hardware) for folder in folders]
    if not teachers:
        return forward
    names = ", ".join(str(folder.path) for folder in folders)
    log(f"teacher: {names}; {share:.0%} of the targets are its probabilities")

    def loss(x: Tensor, y: Tensor, reduction: str, label_smoothing: float) -> Tensor:
        """x, y (B, T) → the sum over all targets that count, in nats; reduction is always "sum"."""
        soft = mean_probabilities(teachers, x)
        logits, flat = forward(x).float().flatten(0, 1), y.flatten()  # (B · T, V)
        options: dict[str, Any] = {"ignore_index": IGNORED_TARGET, "reduction": reduction}
        hard = F.cross_entropy(logits, flat, label_smoothing=label_smoothing, **options)
        each = -(soft.flatten(0, 1) * torch.log_softmax(logits, dim=-1)).sum(dim=-1)
        return (1 - share) * hard + share * each.masked_fill(flat == IGNORED_TARGET, 0).sum()

    return loss


@torch.no_grad()
def mean_probabilities(teachers: Sequence[GPT], x: Tensor) -> Tensor:
    """x (B, T) → (B, T, V) float32, the mean of the teachers' probabilities."""
    first, *others = teachers
    total = torch.softmax(first(x).float(), dim=-1)
    for teacher in others:
        total += torch.softmax(teacher(x).float(), dim=-1)
    return total / len(teachers)


def check_context(folder: ModelFolder, block_size: int) -> None:
    """Raises UserError for a teacher that cannot read windows of block_size."""
    if (context := checked_config(folder).block_size) < block_size:
        raise UserError(
            f"--teacher={folder.path}: its context of {context} is shorter than --block_size={block_size} of this run;"
            f" give --block_size={context}, or another teacher"
        )


def load_teacher(folder: ModelFolder, student: GPT, hardware: Hardware) -> GPT:
    """The teacher, to be evaluated, on the hardware; by PyTorch's attention if the student is. Raises UserError."""
    check_context(folder, student.config.block_size)
    config = checked_config(folder)
    wanted: AttentionPath | Literal["auto"] = "sdpa" if student.attention == "sdpa" else "auto"
    path = choose_attention(wanted, hardware.device, hardware.dtype, config.head_size).value
    tensors = folder.model_tensors()
    try:
        teacher = build_for_weights(replace(config, dropout=0.0), tensors, path)
        import_weights(teacher, tensors)
    except ValueError as error:
        raise UserError(
            f"--teacher={folder.path}: {error}; its weights and its config do not belong together"
        ) from None
    return teacher.to(hardware.device).eval()
