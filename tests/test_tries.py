"""The rules of --try=N on plain numbers: which settings, how long, and which of them go on."""

import re

import pytest

from errors import UserError
from tests.test_plan import FixedCost, facts
from training import tries
from training.plan import Shape, choose_freely
from training.tries import (
    Result,
    Trial,
    choose_winner,
    describe_trials,
    next_round,
    plan_tries,
    rank,
    rounds,
    taking_part,
)


def candidates(number: int = 8, minutes: float = 600, tokens: int = 20_000_000, **given: object):
    return plan_tries(facts(tokens), {"budget_minutes": minutes, **given}, number).candidates


def result(loss: float, error: float = 0.0, **changes: object) -> Result:
    """Of two clusters; against one with error 0, the difference has the standard error `error`."""
    clusters = [{"nats": [100 * (loss - error), 100 * (loss + error)], "counts": [100, 100]}]
    return Result(
        **{
            "steps": 100,
            "loss": loss,
            "bits_per_byte": loss,
            "clusters": clusters,
            "made": 0,
            "loop_seconds": 0.0,
            **changes,
        }
    )


def trials(*losses: list[float], error: float = 0.0) -> list[Trial]:
    """Trials by their losses after each round. Trial 1, the plan, has error 0, the others the given one."""
    return [
        Trial(
            i, {"learning_rate": 0.1 * i} if i > 1 else {}, {}, 0.1, [result(loss, error * (i > 1)) for loss in given]
        )
        for i, given in enumerate(losses, 1)
    ]


# ---- which settings


def test_the_plan_is_first_then_one_change_at_a_time():
    found = candidates()
    assert found[0].changes == {}
    assert [list(one.changes) for one in found[1:3]] == [["learning_rate"]] * 2
    rate = found[0].values["learning_rate"]
    assert [one.changes["learning_rate"] for one in found[1:3]] == [pytest.approx(2 * rate), pytest.approx(rate / 2)]
    sizes = [one.values["n_layer"] * one.values["n_embd"] ** 2 for one in found]
    assert sizes[3] < sizes[0] < sizes[4]
    assert found[3].step_seconds < found[0].step_seconds < found[4].step_seconds
    assert len({str(one.changes) for one in found}) == len(found)
    assert candidates()[5:] == found[5:], "the same every time"


def test_regularization_is_tried_where_the_epochs_make_a_difference():
    few, many = candidates(minutes=60), candidates(minutes=600, tokens=2_000_000)
    assert not any(one.changes.keys() == {"weight_decay"} for one in few)
    changed = [one for one in many if one.changes and one.changes.keys() <= {"dropout", "weight_decay"}]
    assert changed
    assert many[0].values["weight_decay"] not in [one.values["weight_decay"] for one in changed]


@pytest.mark.parametrize(
    "given",
    [
        {"learning_rate": 0.02}, {"n_layer": 3}, {"n_embd": 96}, {"dropout": 0.3}, {"weight_decay": 0.5},
        {"n_layer": 2, "n_embd": 64}, {"optimizer": "adamw", "block_size": 64}, {"min_learning_rate": 0.002},
        {"tokens_per_step": 1024, "warmup_steps": 7},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_given_is_not_tried(given):
    found = candidates(minutes=600, tokens=2_000_000, **given)
    assert len(found) > 1
    for one in found:
        assert one.changes.keys().isdisjoint(given)
        assert one.values.keys().isdisjoint(given)
        assert one.values.get("learning_rate", 1) >= given.get("min_learning_rate", 0)


def test_where_nothing_is_left_to_try_that_is_said():
    given = {"learning_rate": 0.02, "n_layer": 2, "n_embd": 64, "dropout": 0.1, "weight_decay": 0.1}
    with pytest.raises(UserError, match="nothing is left to try"):
        candidates(**given)


def test_a_larger_model_that_does_not_fit_into_memory_is_not_tried():
    free, largest = 20 * 3_000_000, 0
    given = {"budget_minutes": 6000}
    for one in plan_tries(facts(20_000_000, free_bytes=free), given, 12).candidates:
        largest = max(largest, FixedCost().memory_bytes(Shape(one.values["n_layer"], one.values["n_embd"], 1, 128)))
    assert largest <= free
    assert max(one.values["n_embd"] for one in candidates(minutes=6000)) > 256


# ---- how long


@pytest.mark.parametrize(("number", "sizes"), [(2, [2]), (3, [3, 2]), (4, [4, 2]), (8, [8, 4, 2]), (9, [9, 5, 3, 2])])
def test_each_round_keeps_the_better_half(number, sizes):
    assert rounds(number) == sizes


@pytest.mark.parametrize("number", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("pace", [0.7, 1.0, 1.6])
def test_the_trials_take_half_of_the_time_whatever_the_machine_does(number, pace):
    """pace: seconds of a step, by those that were predicted. Of a start 4 s are measured, where more were expected."""
    sizes, seconds, before = rounds(number), 3600.0, []
    given = [Trial(i, {}, {}, 0.1) for i in range(1, number + 1)]
    for size in sizes:
        before.append(next_round(given, seconds, before, sizes))
        for trial in given[:size]:
            made = int(before[-1] / trial.step_seconds)
            loop = pace * made * trial.step_seconds
            trial.results.append(result(1.0, made=made, loop_seconds=loop))
            trial.seconds += loop + 4
    spent = sum(trial.seconds for trial in given)
    assert spent == pytest.approx(tries.SHARE * seconds, rel=0.06 if pace == 1 else 0.6 / len(sizes))
    assert given[0].seconds + seconds - spent == pytest.approx(tries.winner_share(number) * seconds, rel=0.3)


@pytest.mark.parametrize(
    ("minutes", "number", "tokens"), [(2, 8, 10**6), (0.5, 4, 10**6), (9, 16, 10**7), (900, 18, 40_000)]
)
def test_too_short_a_time_is_refused_with_what_is_enough(minutes, number, tokens):
    with pytest.raises(UserError, match="leave out --try") as caught:
        candidates(number, minutes, tokens)
    message = str(caught.value)
    advice = dict(re.findall(r"give --(budget_minutes|try)=([\d.e+]+)", message))
    assert advice
    if "budget_minutes" in advice:
        refused = int(re.search(r"--try=(\d+) is too many", message)[1])
        assert len(candidates(refused, float(advice["budget_minutes"]), tokens)) == refused
    if "try" in advice:
        assert len(candidates(int(advice["try"]), minutes, tokens)) == int(advice["try"])


def test_the_plan_is_the_one_for_the_time_that_the_winner_has():
    planned = plan_tries(facts(20_000_000), {"budget_minutes": 60}, 4)
    own = choose_freely(facts(20_000_000), {"budget_minutes": 60 * tries.winner_share(4), "teachers": 0})
    assert planned.plan.values == own.values
    assert planned.seconds == pytest.approx(3600, rel=0.02)


def test_a_first_trial_is_mostly_at_the_full_learning_rate():
    planned = plan_tries(facts(20_000_000), {"budget_minutes": 60}, 8)
    first = next_round([], planned.seconds, [], planned.sizes)
    for one in planned.candidates:
        assert one.values["warmup_steps"] <= 0.21 * first / one.step_seconds


# ---- which go on


def test_the_lower_loss_goes_on():
    given = trials([3.0, 2.5], [2.0, 1.9], [2.5], [2.2, 1.7])
    assert [trial.number for trial in rank(given, 0)] == [2, 4, 3, 1]
    assert [trial.number for trial in taking_part(given, [4, 2], 1)] == [2, 4]
    assert choose_winner(given).number == 4


def test_the_plan_gives_way_only_to_what_is_clearly_better():
    assert [t.number for t in rank(trials([2.0], [1.95], [1.8], [2.1], error=0.1), 0)] == [3, 1, 2, 4]
    assert choose_winner(trials([2.0], [1.95], error=0.1)).number == 1
    assert choose_winner(trials([2.0], [1.85], error=0.1)).number == 2


def test_what_failed_is_out_and_the_others_go_on():
    given = trials([2.0], [1.0], [1.5])
    given[1].out, given[1].results = "out of memory", []
    assert [trial.number for trial in taking_part(given, [3, 2], 1)] == [3, 1]
    given[2].out = "killed in round 2"
    assert choose_winner(given).number == 1
    given[0].out = "too"
    assert choose_winner(given) is None


def test_the_table_has_a_line_for_each_trial_and_two_more():
    given = trials([2.0, 1.5], [1.99, 1.2], [2.3], [], error=0.05)
    given[3].out = "out of memory"
    lines = describe_trials(given, given[1])
    assert len(lines) == len(given) + 2
    assert "2.0000 *" in lines[2]
    assert "1.5000 *" not in lines[2]
    assert "the plan" in lines[2]
    assert lines[3].endswith("learning_rate=0.2  <- continued")
    assert lines[5].endswith("out: out of memory")
