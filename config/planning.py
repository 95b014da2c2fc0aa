"""Puts the plan of training/plan.py into the options of a run that has a text and no preset, in two stages: the
tokenizer, before the text is prepared; everything else from its tokens and from what a step costs on this machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import config
from common.hardware import Hardware, choose_attention
from common.option import option_names
from common.options import HardwareOptions, RunOptions
from common.stored_models import checked_config
from common.tokenizer import bytes_per_token
from config.chain import share_time
from config.start import Start
from errors import UserError, quote
from model import GPTConfig
from parallel.processes import first_before_others, holders, world_size
from prepare_data import PrepareOptions
from prepare_data.shards import Dataset
from prepare_data.split import Counts
from training import plan as rules
from training import setup
from training.compilation import find_obstacle, gain
from training.kept_text import KeptText, open_kept
from training.options import EvalOptions, OptimizerOptions, TrainOptions
from training.plan_lines import describe
from training.step_cost import StepCost, free_bytes
from training.teachers import check_context

# Options that existing weights determine, or a prepared dataset.
TOKENIZER = ("tokenizer", "vocab_size", "split_pattern")


def open_data(start: Start, hardware: Hardware) -> tuple[Start, Dataset, KeptText]:
    """The start, with the options of the plan where it needs one, which is printed; the dataset that --data names,
    prepared first where it is text; and the old text that is mixed in. Raises UserError."""
    start, dataset = first_before_others(partial(_plan_and_open, start, hardware), _chosen)
    train, block_size = start.options.section(TrainOptions), start.options.section(GPTConfig).block_size
    for teacher in (*start.teachers, *start.handed_on):
        check_context(teacher, block_size)
    data, prepare = start.options.section(RunOptions).data, start.options.section(PrepareOptions)
    setup.check_size(dataset, data, train, block_size, start.argv, start.source is not None)
    sources, is_forced, kept = (start.resumed, start.initial), "keep_share" in start.flags, KeptText()
    if not start.options.section(EvalOptions).eval_only:
        kept = open_kept(dataset, train, block_size, prepare, *sources, is_forced)
    require_same(dataset, *kept.datasets)
    return start, dataset, kept


def require_same(*datasets: Dataset) -> None:
    """Raises UserError, in all processes, where they do not have the same datasets."""
    found = holders(tuple(one.fingerprint[:12] for one in datasets))
    if len(found) > 1:
        texts = ", ".join(f"{where} has {' and '.join(texts) or 'none'}" for texts, where in found.items())
        raise UserError(
            f"{' and '.join(str(one.folder) for one in datasets)}: other tokens on some machines ({texts});"
            " copy these folders from one machine to all, with --data_dir to where they are"
        )


def _plan_and_open(start: Start, hardware: Hardware, chosen: Any) -> tuple[Start, Dataset]:
    """The start with its plan, and the dataset. chosen: by the plan of rank 0, where that has one."""
    if chosen is not None:
        values, reasons, chain = chosen
        start = replace(start, options=replace(start.options, values=values), reasons=reasons, chain=chain)
        return start, open_dataset(start, None, hardware)
    planning = Planning(start, hardware) if start.needs_plan else None
    dataset = open_dataset(start, planning, hardware)
    return share_time(start if planning is None else planning.choose(dataset), start), dataset


def _chosen(planned: tuple[Start, Dataset]) -> Any:
    """What the other processes take over of a start."""
    start, _ = planned
    return start.options.values, start.reasons, start.chain


def open_dataset(start: Start, planning: Planning | None, hardware: Hardware) -> Dataset:
    """The dataset that --data names, prepared first where it is text, as the plan has it. Raises UserError."""
    options = start.options if planning is None else planning.options
    train, attention = options.section(TrainOptions), options.section(HardwareOptions).attention
    setup.choose_auto(train, options.section(GPTConfig), attention, hardware, {})  # refuses what needs no text
    choose = None if planning is None or start.with_tokenizer is not None else planning.prepare
    prepare = options.section(PrepareOptions)
    data = options.section(RunOptions).data
    return setup.open_data(data, prepare, start.resumed, start.with_tokenizer, start.flags, choose)


class Planning:
    """The plan of one run: `prepare` is called with the counts of a text that is prepared, then `choose`, or the two
    parts of it."""

    def __init__(self, start: Start, hardware: Hardware) -> None:
        self.start, self.hardware = start, hardware
        self.data, self.reasons = start.options.section(RunOptions).data, dict[str, str]()
        names = start.chosen
        if start.initial is not None:
            names |= {*option_names(GPTConfig)} - ({"dropout", "block_size"} - start.flags)
        if start.with_tokenizer is not None:
            names |= {*TOKENIZER}
        self.given = {name: start.options.values[name] for name in names}
        contexts = [teacher.config["block_size"] for teacher in (*start.teachers, *start.handed_on)]
        if "block_size" not in names and contexts and min(contexts) < rules.CONTEXT:
            self.given["block_size"] = min(contexts)
        self.options = config.replace(start.options, **self.given, **rules.first_values(self.given, world_size()))

    def prepare(self, counts: Counts) -> PrepareOptions:
        """How the text is prepared. Raises UserError where it is too short."""
        if counts.bytes < rules.MIN_BYTES and not self.is_by_hand:
            raise self._too_short(f"{counts.bytes:,} bytes", f"{rules.MIN_BYTES:,}")
        pattern = self.options.section(PrepareOptions).split_pattern
        measure = partial(bytes_per_token, counts.sample.slices, pattern=pattern)
        text = rules.Text(counts.characters, len(counts.alphabet), measure)
        values, self.reasons = rules.choose_tokenizer(text, self.given)
        self.options = config.replace(self.options, **values)
        return self.options.section(PrepareOptions)

    def choose(self, dataset: Dataset) -> Start:
        """The start with the options of the plan and their reasons; prints the plan. Raises UserError."""
        facts = self.facts(dataset)
        plan = rules.choose(facts, self.given)
        print("\n".join(describe(plan, facts, self.given, self.start.flags)))
        options = self.with_values(dataset, plan.values)
        return replace(self.start, options=options, reasons=self.reasons | plan.reasons)

    def facts(self, dataset: Dataset) -> rules.Facts:
        """What the rules know. Raises UserError where the text is too short."""
        tokens = len(dataset.train)
        if tokens < rules.MIN_TOKENS and not self.is_by_hand:
            raise self._too_short(f"{tokens:,} tokens to train on", f"{rules.MIN_TOKENS:,}")
        initial = self.start.initial
        facts = rules.Facts(
            tokens, len(dataset.val), rules.NoCost(), self._describe(dataset), _train_bytes(dataset),
            self.hardware.device.type, free_bytes=free_bytes(self.hardware), processes=world_size(),
            context=None if initial is None else initial.config["block_size"],
        )  # fmt: skip
        cost, startup = self._cost(dataset, rules.choose_context(facts, self.given))
        return replace(facts, cost=cost, startup_seconds=startup)

    def with_values(self, dataset: Dataset, values: Mapping[str, Any]) -> config.Options:
        """The options with the values of a plan."""
        return config.replace(self.options, **self._prepared(dataset), **values)

    @property
    def is_by_hand(self) -> bool:
        """Whether the user has chosen what short texts need, or weights that exist."""
        return "block_size" in self.given or self.start.initial is not None

    def _too_short(self, found: str, needed: str) -> UserError:
        flag = f"--data={quote(self.data)}"
        return UserError(
            f"{flag}: {found} are too few for a plan, which needs {needed}; readable sentences need some 300,000 bytes."
            f" To train a model that exists on this text: python train.py --init_from=RUN {flag}."
            f" To see a tiny model learn it by heart: python train.py debug {flag} --block_size=16"
        )

    def _prepared(self, dataset: Dataset) -> dict[str, Any]:
        """How a dataset that was prepared before was prepared, as far as the plan chooses that."""
        stored = dataset.meta.get("options")
        if self.start.with_tokenizer is not None or not isinstance(stored, dict):
            return {}
        return {name: stored[name] for name in TOKENIZER if name in stored and name not in self.given}

    def _describe(self, dataset: Dataset) -> str:
        """The text and its tokens, and why it has this tokenizer."""
        found = _train_bytes(dataset)
        size = "shards" if found is None else f"{found:,} bytes"
        tokenizer = dataset.tokenizer
        why = self.reasons.get("vocab_size") or self.reasons.get("tokenizer")
        weights = "weights" if self.start.initial is not None else "teacher"
        why = why or (f"that of the {weights}" if self.start.with_tokenizer is not None else "as it was prepared")
        if "tokenizer" in self.start.flags or "vocab_size" in self.start.flags:
            why = "as given"
        name = f"{tokenizer.name} of {tokenizer.vocab_size:,} ids"
        return f"{size} to train on, {len(dataset.train):,} tokens, {name} ({why})"

    def _cost(self, dataset: Dataset, context: int) -> tuple[StepCost, float]:
        """What a step costs, measured unless the number of steps is given, and the seconds before the first one."""
        options, hardware = self.options, self.hardware
        size = {"vocab_size": dataset.tokenizer.vocab_size, "eos_id": dataset.tokenizer.eos_id}
        shapes = rules.shapes(context, self.given)
        own = {name: value for name, value in options.values.items() if name in option_names(GPTConfig)}
        model = GPTConfig(**{**own, **shapes[0]._asdict(), **size, "dropout": 0.0})
        attention = options.section(HardwareOptions).attention
        path = choose_attention(attention, hardware.device, hardware.dtype, model.head_size).value
        train, (takes, saves) = options.section(TrainOptions), gain(model, hardware)
        minutes = self.given.get("budget_minutes")
        seconds = 60 * (rules.PATIENT_MINUTES if minutes is None else minutes)
        compiles = train.compile
        if compiles == "auto":
            compiles = find_obstacle(hardware) is None and saves * seconds > takes
        teachers = [checked_config(teacher) for teacher in self.start.teachers]
        saves = saves if compiles else 0.0
        optimizer, others = options.section(OptimizerOptions), (saves, teachers, train.cuda_graphs, train.lora_rank)
        cost = StepCost(model, optimizer, hardware, path, *others)
        if self.given.get("max_steps") is None:
            cost.measure(shapes)
        return cost, takes if compiles else 0.0


def _train_bytes(dataset: Dataset) -> int | None:
    """Of the text; None where the dataset does not know it (shards of other programs)."""
    sizes = [entry.get("bytes") for entry in dataset.meta["shards"]["train"]]
    return sum(sizes) if all(isinstance(size, int) for size in sizes) else None
