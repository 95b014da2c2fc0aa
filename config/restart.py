"""The command line of processes that torchrun starts again (--max-restarts): it is the same as at first, so it would
begin a new run. They go on with the run that it has begun before, which run.json tells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import config
from checkpoint import list_checkpoints, resolve_run
from common.options import RunOptions
from common.run_directory import runs_of_this_launch
from parallel.processes import by_first, launches
from training.metrics import log
from training.options import EvalOptions, TrainOptions


def begin_or_resume(train: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """train(argv), or the same with the arguments that continue what this command has begun. Raises UserError."""
    if launches():
        argv = by_first(partial(_continued, argv))
    return train(argv)


def _continued(argv: Sequence[str]) -> list[str]:
    options = config.load("train.py", argv)
    train, run = options.section(TrainOptions), options.section(RunOptions).run
    if train.plan or options.section(EvalOptions).eval_only:
        return [*argv]
    if train.resume is not None:  # which may have been followed by another run (--teachers)
        run = str(resolve_run(Path(train.resume))[0])
    begun = runs_of_this_launch(Path(run).parent if run else Path("runs"))
    if saved := [path for path in begun if list_checkpoints(path)]:
        log(f"torchrun has started again; {saved[-1]} is resumed")
        return [f"--resume={saved[-1]}"]
    if begun and train.resume is None:
        log(f"torchrun has started again; {begun[0]}, which has no checkpoint, begins anew")
        return [*argv, f"--run={begun[0]}"]
    return [*argv]
