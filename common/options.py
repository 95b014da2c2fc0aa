"""The options that both scripts have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from common.option import fixed

if TYPE_CHECKING:
    from annotated_types import Ge


@dataclass(frozen=True)
class RunOptions:
    run: str | None = None
    """train.py: the run directory to write (none: runs/PRESET-N). sample.py: a run, checkpoint or model folder (none: newest run)."""
    seed: Annotated[int, Ge(0)] = fixed(1337)
    """Seed of everything drawn: initial weights, data order and dropout in train.py, tokens in sample.py."""

    def problems(self) -> list[str]:
        return ["--run= is empty"] if self.run == "" else []
