"""The options that train.py and sample.py share: the run, its text, the seed, the hardware."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from common.option import fixed, path

if TYPE_CHECKING:
    from annotated_types import Interval


@dataclass(frozen=True)
class RunOptions:
    run: str | None = path(None)
    """train.py: directory to write (default: runs/NAME-N, NAME after the text or preset). sample.py: run, checkpoint or
    model folder (default: the newest run)."""
    data: str = path("python_stdlib")
    """Dataset name or folder, text file or folder (prepared first), or a corpus: python_stdlib, shakespeare. sample.py
    --novelty: what to compare with instead of the run's own text."""
    seed: Annotated[int, Interval(ge=0, lt=2**63)] = fixed(1337)
    """Random seed. train.py: initial weights, data order, dropout. sample.py: sampled tokens."""

    def problems(self) -> list[str]:
        return [f"--{name}= is empty" for name in ("run", "data") if getattr(self, name) == ""]


@dataclass(frozen=True)
class HardwareOptions:
    device: str = "auto"
    """cpu, cuda, cuda:1, mps …; auto: the first available of cuda, mps and cpu."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of matrix products; auto: bfloat16 where native, else float16 on a GPU, float32 on a CPU."""
    threads: Annotated[int, Interval(ge=1, le=1024)] | Literal["auto"] = "auto"
    """CPU threads; auto: one per core. A CPU run is bitwise reproducible at the same number only."""
    attention: Literal["auto", "triton", "sdpa"] = "auto"
    """Fused Triton kernel or scaled_dot_product_attention; auto: the kernel where supported.

    That is in 16 bits on GPUs of compute capability 8.0 and later, and on ROCm; float32 has to ask for it.
    """
