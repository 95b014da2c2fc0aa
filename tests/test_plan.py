"""The rules of the plan as pure functions: what grows with the text and the time, and what a flag changes."""

import re
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest

from errors import UserError
from training.expected import REACHED, Reached, expect
from training.plan import (
    CONTEXT,
    FIRST_EPOCHS,
    MAX_EPOCHS,
    MIN_STEPS,
    TEACHER_EPOCHS,
    TEACHER_MINUTES,
    TOKENS_PER_PARAMETER,
    Facts,
    Shape,
    Text,
    choose,
    choose_context,
    choose_tokenizer,
    first_values,
    regularization,
    shapes,
)
from training.plan_lines import describe, show_time


@dataclass(frozen=True)
class FixedCost:
    """A machine of so many FLOP/s; a step takes `least` seconds at least."""

    speed: float = 2e11
    least: float = 0.01
    vocab_size: int = 1024

    def parameters(self, shape: Shape) -> int:
        return self.block_parameters(shape) + self.vocab_size * shape.n_embd

    def block_parameters(self, shape: Shape) -> int:
        return 12 * shape.n_layer * shape.n_embd**2

    def step_seconds(self, shape: Shape, tokens: int) -> float:
        return self.least + 6 * tokens * self.parameters(shape) / self.speed

    def memory_bytes(self, shape: Shape) -> int:
        return 20 * self.parameters(shape)


def facts(tokens: int = 400_000, **changes: object) -> Facts:
    return replace(Facts(tokens, tokens // 10, FixedCost()), **changes)


SIZES = (2000, 20_000, 120_000, 400_000, 2_000_000, 20_000_000, 1_500_000_000)
MINUTES = (0.2, 1, 3, 15, 60, 600, 6000)


def plan(tokens: int, minutes: float | None, **given: object):
    return choose(facts(tokens), {"budget_minutes": minutes, **given})


# ---- what grows with what


def test_a_longer_text_has_no_smaller_vocabulary():
    texts = [
        Text(characters, 100) for characters in (4000, 124_999, 125_000, 10**6, 5 * 10**6, 2 * 10**7, 10**8, 10**10)
    ]
    found = [choose_tokenizer(text, {})[0].get("vocab_size", 257) for text in texts]
    assert found == [257, 257, 512, 2048, 4096, 4096, 8192, 32_768]


@pytest.mark.parametrize(
    ("rates", "size"),
    [((2.0, 2.6, 3.2, 3.7), 4096), ((2.3, 3.0, 3.5, 3.9), 2048), ((2.0, 2.2, 3.5, 5.0), 512)],
    ids=["kernel documentation", "the Bible", "a first doubling that is no use"],
)
def test_a_vocabulary_ends_where_doubling_it_shortens_the_text_little(rates, size):
    asked = []

    def bytes_per_token(sizes):
        asked.extend(sizes)
        return dict(zip(sizes, rates, strict=True))

    text = Text(4 * 10**6, 100, bytes_per_token)
    values, reasons = choose_tokenizer(text, {})
    assert values["vocab_size"] == size
    assert asked == [512, 1024, 2048, 4096]
    assert ("would shorten the text by" in reasons["vocab_size"]) == (size != 4096)
    assert choose_tokenizer(text, {"vocab_size": 300})[0] == {"tokenizer": "bpe"}
    assert len(asked) == 4


def test_the_vocabulary_has_room_for_the_letters_of_the_text():
    values, reasons = choose_tokenizer(Text(350_000, 3000), {})  # a megabyte of Chinese
    assert values == {"tokenizer": "bpe", "vocab_size": 2048}
    assert "3,000 different characters" in reasons["vocab_size"]


@pytest.mark.parametrize("tokens", SIZES)
def test_more_minutes_give_no_smaller_model_and_no_shorter_steps(tokens):
    plans = [plan(tokens, minutes) for minutes in MINUTES]
    for one, more in pairwise(plans):
        assert one.outlook.parameters <= more.outlook.parameters
        if (one.outlook.shape, one.values["teachers"]) == (more.outlook.shape, more.values["teachers"]):
            assert one.outlook.tokens_per_step <= more.outlook.tokens_per_step


@pytest.mark.parametrize("minutes", [*MINUTES, None])
def test_more_text_gives_no_smaller_model(minutes):
    plans = [plan(tokens, minutes) for tokens in SIZES]
    assert all(one.outlook.parameters <= more.outlook.parameters for one, more in pairwise(plans))


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("minutes", [*MINUTES, None])
def test_a_plan_keeps_its_own_rules(tokens, minutes):
    found = plan(tokens, minutes)
    outlook = found.outlook
    assert outlook.tokens_per_step % outlook.shape.block_size == 0
    assert found.epochs <= MAX_EPOCHS * 1.01
    assert 0 <= found.values["dropout"] <= 0.2
    assert 0 < found.values["warmup_steps"] <= max(outlook.steps, 10) / 5 + 10
    is_smallest = outlook.parameters == min(FixedCost().parameters(shape) for shape in shapes(CONTEXT, {}))
    assert is_smallest or outlook.tokens >= TOKENS_PER_PARAMETER * outlook.block_parameters
    assert set(found.reasons) == set(found.values)
    assert len(describe(found, facts(tokens, text="a text"), {"budget_minutes": minutes})) <= 6


def test_more_epochs_are_more_regularized():
    found = [regularization(epochs) for epochs in (0.1, 1, 2, 3, 4, 6, 8, 40)]
    assert found == sorted(found)
    assert (found[0], found[2], found[-1]) == ((0.0, 0.1), (0.0, 0.1), (0.0, 1.0))


def test_untrained_heads_look_at_recent_tokens_where_a_run_has_few_epochs():
    assert plan(10**8, 3).values["first_attention"] == "recent"
    assert plan(20_000, 3).values["first_attention"] == "random"
    for given in ({"positions": "learned"}, {"rotary_dim": 4}):  # which have no such heads
        assert "first_attention" not in plan(10**8, 3, **given).values


def test_the_context_is_as_long_as_the_text_allows():
    assert choose_context(facts(10**6), {}) == CONTEXT
    assert choose_context(facts(1000), {}) < 1000 / 8


# ---- length


def test_a_short_text_ends_the_run_before_the_time_does():
    found = plan(120_000, 600, teachers=0)
    assert found.values["budget_minutes"] is None
    assert found.values["max_steps"] * found.outlook.tokens_per_step == pytest.approx(MAX_EPOCHS * 120_000, rel=0.01)
    assert "of 10 h" in describe(found, facts(120_000), {"budget_minutes": 600, "teachers": 0})[0]


def test_the_time_of_compiling_is_no_sign_of_a_short_text():
    found = facts(2_000_000, startup_seconds=14.0)
    plan = choose(found, {"budget_minutes": 1})
    assert plan.outlook.seconds == pytest.approx(60, rel=0.02)
    assert "budget_minutes" not in plan.values
    assert "in 60 s" in describe(plan, found, {"budget_minutes": 1})[0]


def test_a_text_that_one_model_would_read_often_has_a_student():
    found, alone = plan(400_000, 15), plan(400_000, 15, teachers=0)
    assert alone.epochs > TEACHER_EPOCHS
    assert (found.values["teachers"], found.values["budget_minutes"]) == (1, 5.0)
    assert found.outlook == plan(400_000, 5, teachers=0).outlook
    head = describe(found, facts(), {"budget_minutes": 15})[0]
    assert "in 5 min of 15 min" in head
    assert "then another model learns from it in the rest (one model alone would read the text" in head
    longer = plan(120_000, 10)  # the first one does not need all of its part
    assert (longer.values["teachers"], longer.values["budget_minutes"]) == (1, None)
    assert longer.epochs == pytest.approx(FIRST_EPOCHS, rel=0.01)


def test_more_time_than_a_text_needs_is_for_more_teachers():
    found = [plan(120_000, minutes) for minutes in (10, 18, 60, 600, None)]
    assert [each.values["teachers"] for each in found] == [1, 2, 4, 4, 4]
    assert found[2].epochs == pytest.approx(FIRST_EPOCHS, rel=0.01)
    assert found[4].values["max_steps"] == found[4].outlook.steps  # also where no time is given
    head = describe(found[2], facts(120_000), {"budget_minutes": 60})[0]
    assert "; then 3 more like it, and another model learns from them all in the rest (one model alone" in head


def test_a_model_with_teachers_is_larger():
    own, taught = (plan(400_000, 600, teachers=0, teacher=teacher) for teacher in ((), ("runs/a",)))
    assert taught.outlook.block_parameters > own.outlook.block_parameters
    assert "sees 1.4 tokens" in taught.reasons["n_layer"]


@pytest.mark.parametrize(
    ("tokens", "minutes", "given"),
    [
        (20_000_000, 15, {}),  # which one model reads rarely
        (120_000, TEACHER_MINUTES / 2, {}),
        (120_000, None, {"max_steps": 50_000}),
        (120_000, 15, {"teacher": ("runs/a",)}),
        (120_000, 15, {"try": 4}),
        (120_000, 15, {"teachers": 0}),
    ],
)
def test_a_long_text_and_what_is_given_by_hand_has_none(tokens, minutes, given):
    assert plan(tokens, minutes, **given).values.get("teachers", 0) == 0
    fine_tuned = choose(facts(tokens, context=CONTEXT), {"budget_minutes": minutes, **given})
    assert fine_tuned.values.get("teachers", 0) == 0


def test_a_flag_without_a_value_leaves_the_student():
    assert plan(400_000, 15, **{"max_steps": None, "try": None, "teacher": ()}).values["teachers"] == 1


def test_the_plan_of_a_student_is_not_changed_by_flags_that_say_so():
    given = {"budget_minutes": 10, "teachers": 0, "teacher": ("runs/a",), "seed": 2}
    assert not any("flags:" in line for line in describe(choose(facts(), given), facts(), given, given.keys()))


def test_teachers_share_the_time_and_make_the_shortest_one_longer():
    found = plan(20_000_000, 21, teachers=3)
    assert "teachers" not in found.values
    assert found.values["budget_minutes"] == 4.2  # of 21; the last one has twice as much as each of the three
    for teachers in (0, 2):
        with pytest.raises(UserError, match="is too short for a plan") as caught:
            plan(400_000, 0.01, teachers=teachers)
        enough = float(re.search(r"give --budget_minutes=(\S+) or more", str(caught.value))[1])
        assert plan(400_000, enough, teachers=teachers)
        with pytest.raises(UserError):
            plan(400_000, enough / 1.5, teachers=teachers)


def test_without_a_time_the_val_loss_ends_the_run():
    found = plan(120_000, None, teachers=0)
    assert (found.values["max_steps"], found.values["patience"]) == (None, 5)
    assert describe(found, facts(), {"teachers": 0})[0].startswith("plan: until the val loss stops falling")


@pytest.mark.parametrize("given", [{"schedule": "cosine"}, {"patience": None}], ids=str)
def test_a_flag_that_needs_a_length_gets_one(given):
    assert plan(120_000, None, **given).values["max_steps"] > 300


def test_a_long_text_leaves_the_length_to_the_time():
    found = plan(10**9, 3)
    assert not {"max_steps", "budget_minutes"} & found.values.keys()


def test_too_short_a_time_is_refused_with_one_that_is_enough():
    with pytest.raises(UserError, match=r"--budget_minutes=0\.001 is too short.*--max_steps=N") as caught:
        plan(10**6, 0.001)
    [needed] = {word.rstrip(",") for word in str(caught.value).split("--budget_minutes=")[2].split()[:1]}
    found = plan(10**6, float(needed))
    assert found.outlook.steps >= MIN_STEPS


def test_what_does_not_fit_into_memory_is_not_chosen():
    free = 20 * 3_000_000
    found = choose(facts(10**9, free_bytes=free), {"budget_minutes": 6000})
    assert FixedCost().memory_bytes(found.outlook.shape) <= free


def test_weights_that_exist_have_a_lower_rate():
    fixed = {"n_layer": 3, "n_embd": 96, "n_head": 3, "block_size": 100, "budget_minutes": 3}
    one, other = (choose(facts(context=CONTEXT if tuned else None), fixed) for tuned in (False, True))
    assert other.values["learning_rate"] < one.values["learning_rate"]
    assert other.values.keys().isdisjoint(fixed)
    assert other.outlook.tokens_per_step % 100 == 0


# ---- flags

GIVEN = [
    {"n_layer": 3}, {"n_embd": 512}, {"n_embd": 100}, {"n_head": 5}, {"n_kv_head": 2}, {"n_embd": 96, "n_head": 4},
    {"block_size": 100}, {"tokens_per_step": 3000}, {"tokens_per_step": 64, "micro_batch_size": 2},
    {"micro_batch_size": 3}, {"learning_rate": 0.5}, {"min_learning_rate": 0.01}, {"optimizer": "adamw"},
    {"optimizer": "sgd"}, {"dropout": 0.4}, {"weight_decay": 2.0}, {"schedule": "cosine"}, {"warmup_steps": 7},
    {"eval_interval": 3}, {"eval_tokens": None}, {"beta2": 0.5}, {"log_interval": 1}, {"positions": "learned"},
    {"max_steps": 7}, {"bias": True},
]  # fmt: skip


@pytest.mark.parametrize("given", GIVEN, ids=str)
@pytest.mark.parametrize("minutes", [1, None])
def test_every_flag_beats_the_plan_and_fits_with_it(given, minutes):
    found = choose(facts(), {"budget_minutes": minutes, **given})
    assert found.values.keys().isdisjoint(given)
    values = {**found.values, **given}
    assert values["n_embd"] % values["n_head"] == 0
    assert values["n_embd"] // values["n_head"] % 2 == 0
    assert values["n_head"] % values.get("n_kv_head", 1) == 0
    assert values["tokens_per_step"] % (values["block_size"] * values.get("micro_batch_size", 1)) == 0
    assert values["learning_rate"] >= values.get("min_learning_rate", 0)


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ({"tokenizer": "char"}, {}),
        ({"tokenizer": "gpt2"}, {}),
        ({"tokenizer": "bpe"}, {"vocab_size": 512}),
        ({"vocab_size": 300}, {"tokenizer": "bpe"}),
        ({"split_pattern": "gpt2"}, {"tokenizer": "bpe", "vocab_size": 512}),
    ],
)
def test_a_tokenizer_that_is_given_is_kept(given, values):
    assert choose_tokenizer(Text(5000, 60), given)[0] == values


def test_one_line_says_what_else_a_flag_changes():
    given = {"budget_minutes": 3, "n_embd": 512}
    lines = describe(choose(facts(), given), facts(), given, {"n_embd", "budget_minutes"})
    assert len(lines) <= 6
    assert lines[-1].startswith("  flags: --n_embd=512 (else ")
    assert "epochs (else" in lines[-1]
    weak = {"budget_minutes": 3, "dropout": 0.4}  # which changes nothing else
    assert not any("flags:" in line for line in describe(choose(facts(), weak), facts(), weak, set(weak)))


@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_values_before_the_text_is_known_fit_the_flags(given):
    values = first_values(given)
    assert values.keys().isdisjoint(given)
    assert {"tokenizer", "vocab_size"} <= values.keys()


def test_times_have_two_digits():
    assert [show_time(seconds) for seconds in (0.2, 28.4, 99, 180, 7200, 36_000, 1e6)] == [
        "0.2 s", "28 s", "99 s", "3 min", "2 h", "10 h", "278 h",
    ]  # fmt: skip


def test_a_plan_names_what_runs_like_it_reached():
    runs = (
        Reached(1.7, "a novel", 400_000, 10**6, 10**7),
        Reached(1.8, "a novel", 400_000, 10**6, 5 * 10**6),
        Reached(2.1, "a play", 1_000_000, 10**6, 10**7),
        Reached(2.2, "a manual", 9_000_000, 10**6, 10**7),
        Reached(1.6, "a novel", 400_000, 10**6, 10**7, has_teacher=True),
    )
    assert expect(400_000, 10**6, 10**7, True, runs) == "bits per byte of 1.60 on a novel (0.4 MB)"
    assert (
        expect(400_000, 10**6, 10**7, False, runs) == "bits per byte of 1.70 on a novel (0.4 MB), 2.10 on a play (1 MB)"
    )
    assert expect(400_000, 10**6, 10**6, False, runs) == "bits per byte of 1.80 on a novel (0.4 MB)"
    assert expect(9_000_000, 10**6, 10**8, False, runs) == ""  # ten times the computing of any
    assert expect(0, 10**6, 10**7, False, runs) == ""


def test_the_first_line_of_a_plan_has_what_such_runs_reached():
    found = facts(180_000, train_bytes=REACHED[0].train_bytes)
    line, *_ = describe(choose(found, {"budget_minutes": 2}), found, {"budget_minutes": 2})
    assert f"; such runs reached bits per byte of {REACHED[0].bits_per_byte:.2f} on " in line
    more, *_ = describe(choose(found, {"budget_minutes": 6}), found, {"budget_minutes": 6})
    assert f"; such runs reached bits per byte of {REACHED[2].bits_per_byte:.2f} on " in more  # with a student
    vast = facts(10**9, train_bytes=4 * 10**9)  # nothing like it was measured
    assert "bits per byte" not in describe(choose(vast, {"budget_minutes": 1}), vast, {"budget_minutes": 1})[0]
