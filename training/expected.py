"""What measured runs have reached, so that a plan can say what to expect of its own: bits per byte of the whole val
split, of texts that were planned by training/plan.py (bench/grid.py measures them; bench/NOTES.md).
"""

from __future__ import annotations

import math
from typing import NamedTuple

NEAR_SIZE, NEAR_EFFORT = 3.0, 8.0  # factors within which another run tells something


class Reached(NamedTuple):
    """text: for the user. train_bytes: of its train split. has_teacher: bits_per_byte are what a model with teachers
    reached, and parameters and tokens are those of the first teacher."""

    bits_per_byte: float
    text: str
    train_bytes: int
    parameters: int
    tokens: int
    has_teacher: bool = False


REACHED = (
    Reached(1.684, "a novel", 390_069, 919_168, 2_947_072),
    Reached(1.674, "a novel", 390_069, 1_870_016, 5_406_720),
    Reached(1.671, "a novel", 390_069, 705_792, 2_127_872, has_teacher=True),
    Reached(1.639, "a novel", 390_069, 1_870_016, 5_406_720, has_teacher=True),
    Reached(1.531, "a longer novel", 616_290, 771_328, 3_170_304),
    Reached(1.494, "a longer novel", 616_290, 1_968_320, 7_372_800),
    Reached(1.485, "a longer novel", 616_290, 984_704, 3_874_816, has_teacher=True),
    Reached(1.070, "help in German", 618_196, 771_328, 2_486_272),
    Reached(2.026, "plays", 1_003_854, 1_115_776, 2_807_808),
    Reached(1.992, "plays", 1_003_854, 2_164_928, 5_734_400),
    Reached(1.937, "plays", 1_003_854, 3_050_688, 6_346_752, has_teacher=True),
    Reached(2.111, "sayings and jokes", 2_230_557, 902_400, 1_861_632),
    Reached(1.802, "the Bible", 3_964_027, 902_400, 1_974_272),
    Reached(0.927, "help in Russian", 4_453_500, 1_377_920, 2_312_192),
    Reached(0.772, "help in Russian", 4_453_500, 3_443_904, 5_801_984),
    Reached(1.981, "Linux documentation", 4_458_805, 1_164_544, 1_570_816),
    Reached(1.824, "Linux documentation", 17_971_345, 1_377_920, 1_857_536),
)


def expect(
    train_bytes: int, parameters: int, tokens: int, has_teacher: bool, reached: tuple[Reached, ...] = REACHED
) -> str:
    """What the two nearest texts reached; "" where no measured run is near. Near is what has about as many bytes, and
    took about as much computing: parameters times tokens."""
    near = dict[str, tuple[float, Reached]]()
    for run in (run for run in reached if run.has_teacher == has_teacher):
        size = _distance(run.train_bytes, train_bytes) / math.log(NEAR_SIZE)
        effort = _distance(run.parameters * run.tokens, parameters * tokens) / math.log(NEAR_EFFORT)
        if max(size, effort) <= 1:
            near[run.text] = min((size + effort, run), near.get(run.text, (math.inf, run)))
    found = [run for _, run in sorted(near.values())[:2]]
    names = [f"{run.bits_per_byte:.2f} on {run.text} ({run.train_bytes / 1e6:.2g} MB)" for run in found]
    return f"bits per byte of {', '.join(names)}" if names else ""


def _distance(one: float, other: float) -> float:
    return abs(math.log(one / other)) if one > 0 and other > 0 else math.inf
