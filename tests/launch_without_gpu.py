"""Launches the attention kernels as for a Hopper GPU, up to the driver: python -m tests.launch_without_gpu.

A stand-in for Triton's driver gets what would go to the GPU: compiled kernels and their arguments. So the way of a
launch through Triton is real: specialization, descriptors, compiler options. Prints a line of JSON per kind of launch.
"""

import json
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import model

launches: dict[str, dict[str, Any]] = {}


class Launcher:
    """Takes a kernel's arguments instead of Triton's launcher in C."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.signature, self.metadata = source.signature, metadata

    def __call__(self, *arguments: Any) -> None:
        kinds = [str(kind) for kind in self.signature.values()]
        row = {
            "kernel": self.metadata.name, "warps": self.metadata.num_warps, "maxnreg": self.metadata.maxnreg,
            "descriptors": [kind for kind in kinds if "tensordesc" in kind],
            "passed": sum(type(argument).__name__ == "TensorDescriptor" for argument in arguments),
        }  # fmt: skip
        launches.setdefault(json.dumps(row), row)


UTILITIES = SimpleNamespace(
    load_binary=lambda name, kernel, shared, device: (1, 2, 100, 0, 1024),
    get_device_properties=lambda device: {"max_shared_mem": 232_448, "multiprocessor_count": 132},
    unload_module=lambda module: None,
)
DRIVER = SimpleNamespace(
    utils=UTILITIES, launcher_cls=Launcher, get_current_device=lambda: 0, get_current_stream=lambda device: 0,
    get_current_target=lambda: GPUTarget("cuda", 90, 32), get_device_interface=lambda: torch.cuda,
)  # fmt: skip


def main() -> None:
    driver.set_active(DRIVER)
    for table in (model.LAUNCHES, model.TMA_LAUNCHES):
        table.update({("other", *key[1:]): row for key, row in table.items() if key[0] == "sm_90"})
    for T, H, K, D, masked in (
        (1024, 4, 4, 64, False),
        (1, 2, 1, 64, True),
        (37, 1, 1, 64, False),
        (256, 4, 1, 128, True),
    ):
        packed = torch.randn(1, T, H + 2 * K, D, dtype=torch.float16)
        q, k, v = packed.split((H, K, K), dim=2)
        first = torch.zeros(1, T, dtype=torch.int32) if masked else None
        out, lse = model.fused_attention(q, k, v, first)
        model.fused_attention_backward(torch.ones_like(out), q, k, v, first, out, lse)
    for row in launches.values():
        print(json.dumps(row))


if __name__ == "__main__":
    main()
