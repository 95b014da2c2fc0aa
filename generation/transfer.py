"""Numbers on their way between host and device: on a GPU, sent and read back without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_gpu(device: torch.device) -> bool:
    """Whether work is queued on the device, so that it can be a step ahead of Python, and recorded."""
    return device.type == "cuda"


def is_host(device: torch.device) -> bool:
    """Whether Python can read numbers of the device without waiting."""
    return device.type == "cpu"


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers, or lists of them, as a tensor."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if is_gpu(device) else tensor.to(device)


class Readback:
    """Copies of tensors on the host. The constructor does not wait for the device, `wait` does."""

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self.copied = None
        queued = is_gpu(device)
        self.host = [x.to("cpu", non_blocking=queued) for x in tensors]  # in pinned memory, if queued
        if queued:
            self.copied = torch.cuda.Event()
            self.copied.record(torch.cuda.current_stream(device))

    def wait(self) -> list[Any]:
        """The tensors as (nested) lists."""
        if self.copied is not None:
            self.copied.synchronize()
        return [x.tolist() for x in self.host]
