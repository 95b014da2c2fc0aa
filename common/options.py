"""The options that both scripts have."""

from dataclasses import dataclass
from typing import Annotated

from common.option import fixed


@dataclass(frozen=True)
class RunOptions:
    run: str | None = None
    """train.py: the run directory to write (none: runs/PRESET-N). sample.py: a run, checkpoint or model folder (none: newest run)."""
    seed: Annotated[int, "0 <= x"] = fixed(1337)
    """Seed of everything drawn: initial weights, data order and dropout in train.py, tokens in sample.py."""

    def problems(self) -> list[str]:
        return ["--run= is empty"] if self.run == "" else []
