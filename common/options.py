"""The options that train.py and sample.py share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from common.option import fixed

if TYPE_CHECKING:
    from annotated_types import Ge


@dataclass(frozen=True)
class RunOptions:
    run: str | None = None
    """train.py: directory to write (runs/PRESET-N by default). sample.py: run, checkpoint or model folder (newest)."""
    seed: Annotated[int, Ge(0)] = fixed(1337)
    """Random seed. train.py: initial weights, data order, dropout. sample.py: sampled tokens."""

    def problems(self) -> list[str]:
        return ["--run= is empty"] if self.run == "" else []
