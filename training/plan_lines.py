"""The lines that show a plan (training/plan.py) to the user: what was chosen, why, and what flags changed in it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from common.option import show
from training.expected import expect
from training.plan import Facts, RunPlan, choose_freely

# Options with which a plan is another one, and not changed: its length, and the models before and after it.
LENGTH, ORDER = {"budget_minutes", "max_steps"}, {"teachers", "teacher"}
MAX_CHANGES = 4  # named in the line about flags


def describe(plan: RunPlan, facts: Facts, given: Mapping[str, Any], flags: Collection[str] = ()) -> list[str]:
    """At most six lines. flags: the names of what the user has given."""
    values, outlook = {**given, **plan.values}, plan.outlook
    shape, why = outlook.shape, plan.reasons
    head = f"plan: {_duration(plan, given)}, {outlook.tokens:,} tokens, {show_epochs(plan.epochs)} epochs"
    such = ""
    if not values.get("teacher") and not facts.fine_tuning:  # what was measured counts from the first teacher on
        such = expect(facts.train_bytes or 0, outlook.parameters, outlook.tokens, values["teachers"] > 0)
    lines = [head + _followers(plan, given) + (f"; such runs reached {such}" if such else "")]
    lines += [f"  text: {facts.text}"] if facts.text else []
    model = (
        f"  model: {shape.n_layer} layers, {shape.n_embd} channels, {shape.n_head} heads, context {shape.block_size}"
    )
    size = why.get("n_layer") or why.get("n_embd") or "as given"
    lines.append(f"{model}, {outlook.parameters:,} parameters: {size}")
    step = f"{outlook.tokens_per_step:,} tokens ({why.get('tokens_per_step', 'as given')})"
    rate = f"{values['optimizer']} at {show(values['learning_rate'])} ({why.get('learning_rate', 'as given')})"
    lines.append(f"  steps: {step}, {rate}, {values['schedule']}")
    held_out = f"{values['eval_tokens']:,} tokens" if values["eval_tokens"] else "the whole val split"
    lines.append(
        f"  dropout {show(values['dropout'])}, weight decay {show(values['weight_decay'])}: by the epochs;"
        f" evaluated each {values['eval_interval']:,} steps on {held_out}"
    )
    own = {name: value for name, value in given.items() if name not in flags or name in LENGTH | ORDER}
    return lines + _forced(plan, choose_freely(facts, own), given)


def _duration(plan: RunPlan, given: Mapping[str, Any]) -> str:
    outlook, minutes = plan.outlook, given.get("budget_minutes")
    steps = f"{outlook.steps:,} step{'s' * (outlook.steps != 1)}"
    if outlook.seconds is None:
        return steps
    if minutes is not None and "max_steps" not in plan.values:
        own = plan.values.get("budget_minutes", minutes)
        return f"about {steps} in {show_time(60 * own)}" + (f" of {show_time(60 * minutes)}" if own < minutes else "")
    about = f"{steps} in about {show_time(outlook.seconds)}"
    if plan.values.get("max_steps") is None:
        return f"until the val loss stops falling, expected within {about}"
    return about if minutes is None else f"{about} of {show_time(60 * minutes)}, as more epochs would be memorized"


def _followers(plan: RunPlan, given: Mapping[str, Any]) -> str:
    """What follows the run, "" for nothing."""
    number = {**plan.values, **given}.get("teachers", 0)
    if number == 0:
        return ""
    before = f"{number - 1} more like it, and " if number > 1 else ""
    them = {1: "it", 2: "both"}.get(number, "them all")
    why = "" if "teachers" in given else f" ({plan.reasons['teachers']})"
    rest = "" if given.get("budget_minutes") is None else " in the rest"
    return f"; then {before}another model learns from {them}{rest}{why}"


def show_time(seconds: float) -> str:
    """Two digits of seconds, minutes or hours."""
    for unit, size in (("s", 1), ("min", 60)):
        if seconds < 100 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds / 3600:,.2g} h" if seconds < 360_000 else f"{seconds / 3600:,.0f} h"


def show_epochs(epochs: float) -> str:
    return f"{epochs:.2g}" if epochs < 100 else f"{epochs:,.0f}"


def _forced(plan: RunPlan, free: RunPlan, given: Mapping[str, Any]) -> list[str]:
    """One line that says what else flags have changed, if they have. free: the plan without them."""
    named = given.keys() - LENGTH
    forced = {name: value for name, value in free.values.items() if name in named and given[name] != value}
    before = {name: value for name, value in free.values.items() if plan.values.get(name, value) != value}
    changed = [f"{name}={show(plan.values[name])} (else {show(value)})" for name, value in before.items()]
    epochs, before_epochs = show_epochs(plan.epochs), show_epochs(free.epochs)
    if epochs != before_epochs:
        changed.insert(0, f"{epochs} epochs (else {before_epochs})")
    if not forced or not changed:
        return []
    flags = ", ".join(f"--{name}={show(given[name])} (else {show(value)})" for name, value in forced.items())
    more = f" and {len(changed) - MAX_CHANGES} more" if len(changed) > MAX_CHANGES else ""
    return [f"  flags: {flags} → {', '.join(changed[:MAX_CHANGES])}{more}"]
