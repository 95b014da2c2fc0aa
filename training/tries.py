"""--try=N as rules: which settings are tried, for how long, and which of them go on. Pure functions of plain numbers,
without files; config/trying.py starts the runs.

Number 1 is the plan; the others change one thing of it, then two and three at once: the learning rate, the size, the
regularization. What is given is not changed. Successive halving (Jamieson and Talwalkar 2016): in each round all that
are left train for equal seconds at a constant learning rate, then the better half goes on from where it is. The plan
gives way only to what is clearly better on the same val tokens. Reading order: plan_tries, then Trial and `rank`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.clusters import Clusters
from common.option import show
from errors import UserError
from training.plan import (
    EVALUATION_SHARE,
    MAX_EPOCHS,
    MIN_EVAL_TOKENS,
    Facts,
    RunPlan,
    Shape,
    choose_freely,
    nearest_power,
    regularization,
    shapes,
)
from training.plan_lines import show_time

SHARE = 0.5  # of the time for the trials; the winner has the rest
RATES, EPOCHS = (2.0, 0.5), (2.0, 0.5)  # times the learning rate; the regularization of so many times the epochs
START_SECONDS = 6.0  # of a trial before its first step and after its last one, until that is measured
MIN_STEPS, MIN_STARTS = 100, 2  # of a first trial: steps, and its length in starts
WARMUP_SHARE = 0.2  # of a first trial at most
CHANGED = ("n_layer", "n_embd", "learning_rate", "dropout", "weight_decay")

# ---- Which settings, and how long ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """values: of the options that the plan chooses; changes: those in which it differs from the plan."""

    values: dict[str, Any]
    changes: dict[str, Any]
    step_seconds: float


@dataclass(frozen=True)
class TryPlan:
    """plan: for the time that the winner trains. given: what the user has chosen, with that time. seconds: for all.
    eval_tokens: of the val split, on which trials are compared; None: all of it."""

    plan: RunPlan
    given: dict[str, Any]
    seconds: float
    candidates: list[Candidate]
    eval_tokens: int | None

    @property
    def sizes(self) -> list[int]:
        return rounds(len(self.candidates))


def plan_tries(facts: Facts, given: Mapping[str, Any], number: int) -> TryPlan:
    """At most `number` candidates, the plan first, and their time. Raises UserError where that is too short."""
    plan, own, seconds = _plan(facts, given, number, given["budget_minutes"])
    candidates = choose_candidates(facts, own, plan)
    if len(candidates) < 2:
        raise UserError(
            f"--try={number}: nothing is left to try, since learning rate, size and regularization are given or have no"
            " other value here; leave out --try, or one of these flags"
        )
    if len(candidates) < number:
        return plan_tries(facts, given, len(candidates))
    _refuse_short_time(facts, given, number)
    first = round_seconds(seconds, 0, rounds(number), START_SECONDS)
    tokens = first / candidates[0].step_seconds * plan.outlook.tokens_per_step
    scored = max(MIN_EVAL_TOKENS, nearest_power(3 * EVALUATION_SHARE * tokens))
    for candidate in candidates if "warmup_steps" not in given else ():
        longest = max(1, int(WARMUP_SHARE * first / candidate.step_seconds))
        candidate.values["warmup_steps"] = min(longest, candidate.values["warmup_steps"])
    eval_tokens = given.get("eval_tokens", None if scored >= facts.val_tokens else scored)
    return TryPlan(plan, own, seconds, candidates[:number], eval_tokens)


def _plan(facts: Facts, given: Mapping[str, Any], number: int, minutes: float) -> tuple[RunPlan, dict[str, Any], float]:
    """The plan for the winner's part of the time; what is given, with that time; the seconds of all."""
    share = winner_share(number)
    own = {**given, "budget_minutes": minutes * share, "teachers": 0}
    plan = choose_freely(facts, own)
    assert plan.outlook.seconds is not None
    return plan, own, min(60 * minutes, plan.outlook.seconds / share)  # a short text does not need all minutes


def _refuse_short_time(facts: Facts, given: Mapping[str, Any], number: int) -> None:
    """Raises UserError where the first trials would be too short to tell anything."""

    def is_enough(number: int, minutes: float) -> bool:
        plan, _, seconds = _plan(facts, given, number, minutes)
        step = facts.cost.step_seconds(plan.outlook.shape, plan.outlook.tokens_per_step)
        trial = round_seconds(seconds, 0, rounds(number), START_SECONDS)
        return trial >= max(MIN_STEPS * step, (MIN_STARTS - 1) * START_SECONDS)

    minutes = given["budget_minutes"]
    if is_enough(number, minutes):
        return
    fewer = [f"give --try={count}" for count in range(number - 1, 1, -1) if is_enough(count, minutes)]
    times = (float(f"{minutes * 1.1**power:.2g}") for power in range(1, 100))
    enough = [time for time in times if time > minutes and is_enough(number, time) and is_enough(number, time / 1.2)]
    longer = [f"give --budget_minutes={time:g}" for time in enough]
    first = round_seconds(_plan(facts, given, number, minutes)[2], 0, rounds(number), 0.0)
    short = "" if longer else f", since the text is short (a plan reads it {MAX_EPOCHS:g} times at most)"
    raise UserError(
        f"--try={number} is too many for --budget_minutes={minutes:g}: each of the first {number} trials would have"
        f" {show_time(first)}{short}, and needs time for {MIN_STEPS} steps and its start;"
        f" {', or '.join([*longer[:1], *fewer[:1], 'leave out --try'])}"
    )


def rounds(number: int) -> list[int]:
    """The number of trials in each round."""
    sizes = [number]
    while sizes[-1] > 2:
        sizes.append(math.ceil(sizes[-1] / 2))
    return sizes


def round_seconds(left: float, number: int, sizes: Sequence[int], start: float) -> float:
    """Of training, for a trial of round `number` (from 0). All rounds have equal parts of the time that is left, as
    far as it is for trials. start: what a trial takes besides."""
    return left / (len(sizes) / SHARE - number) / sizes[number] - start


def winner_share(number: int) -> float:
    """Of the time: what the winner has, in its trials and after them."""
    sizes = rounds(number)
    return 1 - SHARE + SHARE * sum(1 / size for size in sizes) / len(sizes)


def choose_candidates(facts: Facts, given: Mapping[str, Any], plan: RunPlan) -> list[Candidate]:
    """All that differ, those with fewer changes first."""
    rates = (None, *RATES) if "learning_rate" not in given else (None,)
    sizes = (None, *_neighbors(facts, given, plan.outlook.shape))
    settings = itertools.product((None, *EPOCHS), sizes, rates)
    found = dict[str, Candidate]()
    for epochs, size, rate in sorted(settings, key=lambda setting: sum(part is not None for part in setting)):
        candidate = _change(facts, given, plan, size, rate, epochs)
        if rate is None or candidate.values["learning_rate"] >= given.get("min_learning_rate", 0.0):
            found.setdefault(show_changes(candidate.changes), candidate)
    return list(found.values())


def _neighbors(facts: Facts, given: Mapping[str, Any], shape: Shape) -> list[Shape]:
    """The next smaller and the next larger shape of the plan's, as far as memory allows."""
    ladder = sorted(shapes(shape.block_size, given), key=facts.cost.parameters)
    at = ladder.index(shape)
    larger = [
        other
        for other in ladder[at + 1 : at + 2]
        if facts.free_bytes is None or facts.cost.memory_bytes(other) <= facts.free_bytes
    ]
    return ladder[max(0, at - 1) : at] + larger


def _change(
    facts: Facts, given: Mapping[str, Any], plan: RunPlan, size: Shape | None, rate: float | None, epochs: float | None
) -> Candidate:
    """The plan with another shape (with what follows from it), a multiple of the learning rate, and the regularization
    of a multiple of the epochs."""
    values, shape, own_epochs = dict(plan.values), size or plan.outlook.shape, plan.epochs
    if size is not None:
        fixed = {"n_layer": size.n_layer, "n_embd": size.n_embd, "tokens_per_step": plan.outlook.tokens_per_step}
        other = choose_freely(facts, {**given, **fixed})
        values |= other.values | {name: value for name, value in fixed.items() if name not in given}
        own_epochs = other.epochs
    if rate is not None:
        values["learning_rate"] = float(f"{rate * values['learning_rate']:.1e}")
    if epochs is not None:
        regularized = zip(("dropout", "weight_decay"), regularization(epochs * own_epochs), strict=True)
        values |= {name: value for name, value in regularized if name not in given}
    changes = {name: values[name] for name in CHANGED if name in values and values[name] != plan.values.get(name)}
    return Candidate(values, changes, facts.cost.step_seconds(shape, plan.outlook.tokens_per_step))


def show_changes(changes: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={show(value)}" for name, value in changes.items()) or "the plan"


# ---- Which of them go on ---------------------------------------------------------------------------------------------


@dataclass
class Result:
    """Of a trial after a round: its best evaluation so far. clusters: Evaluation.compared. made, loop_seconds: steps of
    the last process, and their seconds."""

    steps: int
    loss: float
    bits_per_byte: float
    clusters: list[dict[str, Any]]
    made: int
    loop_seconds: float

    def error(self, other: Result) -> float:
        """Standard error of the difference of the losses, in nats."""
        pairs = zip(self.clusters, other.clusters, strict=True)
        return max((Clusters(**one).change_error(Clusters(**another)) for one, another in pairs), default=0.0)

    def is_clearly_better(self, other: Result) -> bool:
        return other.loss - self.loss > self.error(other)


@dataclass
class Trial:
    """A candidate and what became of it. later: the options of the run that continues it, where a trial has others.
    seconds: of its processes. out: why it ended early."""

    number: int
    changes: dict[str, Any]
    later: dict[str, Any]
    step_seconds: float
    results: list[Result] = field(default_factory=list)
    seconds: float = 0.0
    out: str | None = None


def spent(trials: Sequence[Trial]) -> float:
    """Seconds."""
    return sum(trial.seconds for trial in trials)


def next_round(trials: Sequence[Trial], seconds: float, before: Sequence[float], sizes: Sequence[int]) -> float:
    """Seconds of training of each trial of the next round, by the predicted cost of a step: the time that is left, by
    what the trials took besides their steps, and by their pace. seconds: for all; before: those of earlier rounds."""
    measured = [(trial.step_seconds, result) for trial in trials for result in trial.results if result.made]
    start, pace = START_SECONDS, 1.0
    if measured:
        trained = sum(result.loop_seconds for _, result in measured)
        start = (spent(trials) - trained) / len(measured)
        pace = trained / sum(step_seconds * result.made for step_seconds, result in measured)
    part = round_seconds(seconds - spent(trials), len(before), sizes, start) / pace
    return max(part, before[0] / 2) if before else part


def taking_part(trials: Sequence[Trial], sizes: Sequence[int], number: int) -> list[Trial]:
    """The trials of round `number` (from 0)."""
    part = list(trials)
    for done in range(number):
        part = rank(part, done)[: sizes[done + 1]]
    return part


def rank(trials: Sequence[Trial], number: int) -> list[Trial]:
    """Those with a result of round `number`, the best first. Only what is clearly better than the plan precedes it."""
    order = sorted((t for t in trials if len(t.results) > number), key=lambda trial: trial.results[number].loss)
    plan = [trial for trial in order if trial.number == 1]
    better = [t for t in order if all(t.results[number].is_clearly_better(p.results[number]) for p in plan)]
    return better + plan + [trial for trial in order if trial not in better + plan]


def choose_winner(trials: Sequence[Trial]) -> Trial | None:
    """The best of those that came furthest; None where all are out."""
    alive = [trial for trial in trials if trial.out is None]
    most = max((len(trial.results) for trial in alive), default=0)
    return rank(alive, most - 1)[0] if most else None


def describe_trials(trials: Sequence[Trial], winner: Trial) -> list[str]:
    """The table: a line for each trial, below two lines that say what it shows."""
    columns = [[trial.results[i : i + 1] for trial in trials] for i in range(max(len(t.results) for t in trials))]
    lines = [
        "settings tried, bits per byte after each round on the same val tokens (*: within the error of the best one)",
        "trial"
        + "".join(f"{f'round {i}':>10}" for i in range(1, 1 + len(columns)))
        + "   steps  differs from the plan",
    ]
    for row, trial in enumerate(trials):
        cells = ""
        for column in columns:
            best = min((result for cell in column for result in cell), key=lambda result: result.loss)
            shown = [f"{one.bits_per_byte:.4f} {' ' if best.is_clearly_better(one) else '*'}" for one in column[row]]
            cells += f"{''.join(shown):>10}"
        steps = f"{trial.results[-1].steps:,}" if trial.results else ""
        end = "  <- continued" if trial is winner else f"  out: {trial.out}" if trial.out else ""
        lines.append(f"{trial.number:>5}{cells}{steps:>8}  {show_changes(trial.changes)}{end}")
    return lines
