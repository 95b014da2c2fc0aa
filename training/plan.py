"""The plan of a run without a preset: options that suit the text, the machine and the time. Rules alone: pure functions
of plain numbers, without torch and without files.

`choose_tokenizer` needs the size of the text alone, `choose` the tokens that it became. Each returns values by option
name, and a reason for each. What is `given`, by flags or by the weights of --init_from, is obeyed; the rules choose the
rest around it. The numbers of the rules are the tables at the top. training/step_cost.py measures what a step costs,
config/planning.py puts the values into the options.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from common.option import show
from errors import UserError

# ---- The rules as numbers --------------------------------------------------------------------------------------------

VOCABULARY = {125_000: 512, 500_000: 1024, 1_000_000: 2048, 3_000_000: 4096, 32_000_000: 8192, 128_000_000: 16_384,
              512_000_000: 32_768}  # fmt: skip
"""Characters of the text from which on bpe has so many ids at most; shorter texts are bytes."""
MIN_SHORTENING = 0.15  # of the text by twice as many ids; with less, a larger vocabulary was no gain, or a loss
LADDER = ((2, 128), (3, 128), (4, 128), (4, 192), (6, 192), (6, 256), (6, 320), (6, 384), (8, 384), (8, 512), (12, 512),
          (12, 768), (16, 1024))  # fmt: skip
"""Layers and width of the shapes."""
HEAD_SIZE = 64
CONTEXT = 128  # 0.01 to 0.08 bits per byte better than 256 after 1 to 3 million tokens; longer runs were not compared
MIN_WINDOWS = 16  # windows of the context in the train split; a shorter text has a shorter context
TOKENS_PER_PARAMETER = 2.0  # of its blocks: a model sees at least this many
MAX_EPOCHS = 40.0
TEACHER_EPOCHS, TEACHER_MINUTES = 20.0, 3.0  # of one model alone, from which on another one is trained before it
TEACHER_ROOM = 0.5  # of a shorter time: where one model alone takes less, there is room for another one, too
WHOLE = 0.95  # of the epochs: a step or two may be missing
MORE_TEACHERS = (4, 2)  # where the time suffices for as many, and for all epochs of all models
UNASKED_MINUTES = 30.0  # that time where none is given
FIRST_EPOCHS = 20.0  # of a teacher at most
STUDENT_TOKENS = 1.4  # TOKENS_PER_PARAMETER of a model with teachers, of whom it learns more from a token
TEACHER_COST = 0.5  # of a pass: what each teacher adds to it
RECENT_EPOCHS = 5.0  # with fewer, untrained heads look at recent tokens: a long text's run is short for its model
REGULARIZATION = {0: (0.0, 0.1), 4: (0.0, 0.1), 11: (0.0, 1.0), 40: (0.0, 1.0), 80: (0.1, 2.0)}
"""Dropout and weight decay by epochs, with straight lines in between. Only --try comes to the last."""
ARCHITECTURE = {
    "positions": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True, "bias": False, "tie_embeddings": True,
}  # fmt: skip
LEARNING_RATE = {"muon": 3e-3, "adamw": 1e-3, "sgd": 0.1}
WIDE = 256  # channels from which on Muon's learning rate falls as 1/√width (training/muon.py)
FINE_TUNING = 1 / 3  # of the learning rate, for weights that are trained already
FINE_TUNING_RATE = 0.06  # over the width: AdamW's for such weights
LARGE, LARGE_EPOCHS = 20.0, 5.0  # parameters of its blocks for each token of the text; epochs of such a model at most
FINE_TUNING_CONTEXT = {"cpu": 512, "mps": 512, "cuda": 1024}  # of weights with a longer one
EMA_HALF_LIFE = 0.1  # of the steps done
BETA2_HALF_LIFE, MIN_BETA2 = 28_000, 0.95  # tokens
TOKENS_PER_STEP = {"cpu": 2048, "mps": 4096, "cuda": 8192}
FREE_STEP = 0.9  # of a run's tokens: as many or more with half as many tokens a step, and it has half as many
STEPS_PER_TOKEN = 0.7  # a step has 2 * N tokens once the run has this times 2 * N steps: it grows as √tokens of the run
FEW_STEPS, MIN_STEPS = 300, 100  # with fewer than the first, a step has fewer tokens; the smallest plan has the second
MAX_ROWS = 512  # of a step
EVALUATIONS, PATIENT_EVALUATIONS = 10, 30  # of a run; the second without a time budget
LARGE_EVALUATIONS = 5  # of a LARGE model with one: each, with its samples and checkpoint, took 3 % of 15 minutes
EVALUATION_SHARE, MIN_EVAL_TOKENS = 0.05, 4096  # of the run's time
FEW_EPOCHS, PATIENCE = 2, 5  # with more epochs, so many evaluations without a better val loss end a run
OPEN_SCHEDULES = ("wsd", "constant", "inverse_sqrt")  # whose rate does not depend on the length
PATIENT_MINUTES = 120.0  # without a time budget the shape is one that sees enough tokens in this time
TRAINING_SHARE = 0.9  # of a time budget; evaluations, samples and checkpoints take the rest
MIN_BYTES, MIN_TOKENS = 4000, 1000  # of the text, and of its train split


# ---- What the rules know ---------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """The options of a model that the rules choose."""

    n_layer: int
    n_embd: int
    n_head: int
    block_size: int


class Cost(Protocol):
    """What models of a shape cost on this machine."""

    def parameters(self, shape: Shape) -> int: ...
    def block_parameters(self, shape: Shape) -> int: ...
    def step_seconds(self, shape: Shape, tokens: int) -> float: ...
    def memory_bytes(self, shape: Shape) -> int: ...


@dataclass(frozen=True)
class Text:
    """A text before it is prepared. alphabet: number of different characters. bytes_per_token: measures that for sizes
    of a vocabulary, None where there is no text to measure."""

    characters: int
    alphabet: int
    bytes_per_token: Callable[[Sequence[int]], Mapping[int, float]] | None = None


@dataclass(frozen=True)
class Facts:
    """A prepared text and the machine. free_bytes: memory for the training, None where it is not known. context: that
    of weights that are trained already, None where there are none. train_bytes: of the train split, None where they are
    not known."""

    train_tokens: int
    val_tokens: int
    cost: Cost
    text: str = ""
    """The text and its tokenizer, for the user."""
    train_bytes: int | None = None
    device: str = "cpu"
    startup_seconds: float = 0.0
    """Before the first step: compiling."""
    free_bytes: int | None = None
    context: int | None = None
    processes: int = 1
    """Among which the rows of a step are divided."""

    @property
    def fine_tuning(self) -> bool:
        return self.context is not None


class Outlook(NamedTuple):
    """How far a shape comes. seconds: of the run; None where the number of steps is given."""

    shape: Shape
    tokens_per_step: int
    steps: int
    tokens: int
    seconds: float | None
    parameters: int
    block_parameters: int


@dataclass(frozen=True)
class RunPlan:
    """values and reasons by option name."""

    values: dict[str, Any]
    reasons: dict[str, str]
    outlook: Outlook
    epochs: float


# ---- First the tokenizer ---------------------------------------------------------------------------------------------


def choose_tokenizer(text: Text, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The tokenizer and its size → (values, reasons). Raises UserError for a text that is too short for any."""
    if given.keys() & {"tokenizer"} and given["tokenizer"] != "bpe":
        return {}, {}
    size = max((ids for least, ids in VOCABULARY.items() if text.characters >= least), default=None)
    reason = f"{text.characters:,} characters"
    if size is None and not given.keys() & {"tokenizer", "vocab_size", "split_pattern"}:
        return {"tokenizer": "bytes"}, {"tokenizer": f"{reason}: too few to learn byte pairs from"}
    if size is not None and "vocab_size" not in given:
        size, reason = choose_vocabulary(text, size, reason)
    size = size or min(VOCABULARY.values())
    letters = nearest_power(256 + text.alphabet / 2)
    if letters > size:
        size, reason = letters, f"{text.alphabet:,} different characters"
    values = {"tokenizer": "bpe", "vocab_size": min(size, max(VOCABULARY.values()))}
    reasons = {"tokenizer": "byte pairs of this text: fewer tokens than bytes", "vocab_size": reason}
    return _without(values, given), _without(reasons, given)


def choose_vocabulary(text: Text, largest: int, reason: str) -> tuple[int, str]:
    """The size up to which each doubling shortens the text by MIN_SHORTENING, and the reason, which is that of the
    largest one where that is the size."""
    sizes = [size for size in VOCABULARY.values() if size <= largest]
    if text.bytes_per_token is None or len(sizes) == 1:
        return largest, reason
    found = text.bytes_per_token(sizes)
    for size, more in itertools.pairwise(sizes):
        if (gain := found[more] / found[size] - 1) < MIN_SHORTENING:
            return size, f"twice as many would shorten the text by {gain:.0%} only"
    return largest, reason


def nearest_power(number: float) -> int:
    """The power of two that is nearest on a logarithmic scale."""
    return 2 ** round(math.log2(number))


def first_values(given: Mapping[str, Any], processes: int = 1) -> dict[str, Any]:
    """Values around what is given before the text is known: they show whether flags contradict each other."""
    values = choose_freely(Facts(400_000, 40_000, NoCost(), processes=processes), given).values
    return choose_tokenizer(Text(1_000_000, 100), given)[0] | _without(values, given)


class NoCost:
    """A Cost for first_values."""

    def parameters(self, shape: Shape) -> int:
        return self.block_parameters(shape)

    def block_parameters(self, shape: Shape) -> int:
        return 12 * shape.n_layer * shape.n_embd**2

    def step_seconds(self, shape: Shape, tokens: int) -> float:
        return 0.1

    def memory_bytes(self, shape: Shape) -> int:
        return 0


# ---- Then everything else --------------------------------------------------------------------------------------------


def choose(facts: Facts, given: Mapping[str, Any]) -> RunPlan:
    """The plan around what is given. Raises UserError for a time that is too short for any."""
    _refuse_short_time(facts, given)
    return choose_freely(facts, given)


def choose_freely(facts: Facts, given: Mapping[str, Any]) -> RunPlan:
    """The same for any time."""
    teachers, why_teachers = choose_teachers(facts, given)
    minutes = _own_minutes(teachers, given)
    own = {**given, "teachers": teachers, **minutes}
    outlook = choose_outlook(facts, own)
    epochs = outlook.tokens / facts.train_tokens
    values, reasons = {"teachers": teachers}, {"teachers": why_teachers}
    model, steps = _model(facts, outlook, epochs, own), _steps(facts, outlook, own)
    for part in (model, steps, _optimization(facts, outlook, epochs, own)):
        values |= part[0]
        reasons |= part[1]
    length, why = _length(facts, outlook, epochs, own)
    why = dict.fromkeys(minutes, "the rest of the time is for the models that follow") | why
    values, reasons = _without(values, given) | minutes | length, _without(reasons, given) | why
    return RunPlan(values, reasons, outlook, epochs)


def choose_teachers(facts: Facts, given: Mapping[str, Any]) -> tuple[int, str]:
    """How many models are trained first, from which another one learns, and why. What is given by hand has none: a
    number of steps, weights, teachers, trials."""
    if "teachers" in given:
        return given["teachers"], "as given"
    if facts.fine_tuning or given.get("max_steps") is not None or given.get("teacher") or given.get("try"):
        return 0, "the length, or what it learns from, is given"
    alone, minutes = choose_outlook(facts, given), given.get("budget_minutes")
    epochs, seconds = alone.tokens / facts.train_tokens, alone.seconds or 0.0
    is_long = minutes is None or minutes >= TEACHER_MINUTES or seconds < TEACHER_ROOM * 60 * minutes
    if not is_long or epochs < TEACHER_EPOCHS:
        return 0, f"one model alone would read the text {epochs:.2g} times"
    why = f"one model alone would read the text {epochs:.2g} times and memorize it"
    for number in MORE_TEACHERS:
        each = choose_outlook(facts, {**given, "teachers": number, **_own_minutes(number, given)})
        is_whole = min(epochs / MAX_EPOCHS, each.tokens / facts.train_tokens / FIRST_EPOCHS) > WHOLE
        takes = number * (each.seconds or 0.0) + (1 + TEACHER_COST * number) * seconds
        if is_whole and takes <= 60 * (UNASKED_MINUTES if minutes is None else minutes):
            return number, why
    return 1, why


def own_share(teachers: int) -> float:
    """Of a time: for the first of so many models that are trained before the last one, which has twice as much."""
    return 1 / (teachers + 2) if teachers else 1.0


def _own_minutes(teachers: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """The time budget of a model that is trained before others, where there is one."""
    minutes = given.get("budget_minutes")
    return {} if minutes is None or teachers == 0 else {"budget_minutes": float(f"{minutes * own_share(teachers):.3g}")}


def choose_outlook(facts: Facts, given: Mapping[str, Any]) -> Outlook:
    """The largest shape that sees tokens_per_parameter in the time, of at most MAX_EPOCHS; else the smallest."""
    outlooks = [look(shape, facts, given) for shape in shapes(choose_context(facts, given), given)]
    outlooks.sort(key=lambda outlook: outlook.parameters)
    fitting = [outlook for outlook in outlooks if _fits(outlook, facts, tokens_per_parameter(given))]
    return fitting[-1] if fitting else outlooks[0]


def tokens_per_parameter(given: Mapping[str, Any]) -> float:
    return STUDENT_TOKENS if given.get("teacher") else TOKENS_PER_PARAMETER


def _fits(outlook: Outlook, facts: Facts, least: float) -> bool:
    has_memory = facts.free_bytes is None or facts.cost.memory_bytes(outlook.shape) <= facts.free_bytes
    return has_memory and outlook.steps >= MIN_STEPS and outlook.tokens >= least * outlook.block_parameters


def _refuse_short_time(facts: Facts, given: Mapping[str, Any]) -> None:
    """Raises UserError where the time is too short for the smallest model; one that the user has chosen is tried."""
    minutes, share = given.get("budget_minutes"), own_share(given.get("teachers", 0))
    if minutes is None or not given.keys().isdisjoint({"n_layer", "n_embd", "max_steps"}):
        return
    given = {**given, "budget_minutes": minutes * share}
    outlooks = [look(shape, facts, given) for shape in shapes(choose_context(facts, given), given)]
    shape, tokens, steps, *_ = min(outlooks, key=lambda outlook: outlook.parameters)
    seconds = facts.cost.step_seconds(shape, tokens)
    least = MIN_STEPS * seconds + facts.startup_seconds
    if steps >= MIN_STEPS or 60 * TRAINING_SHARE * minutes * share >= least:  # the text may be the limit
        return
    needed = show(math.ceil(120 * least / TRAINING_SHARE / 60 / share) / 100)  # a fifth more
    raise UserError(
        f"--budget_minutes={minutes:g} is too short for a plan: the smallest ({MIN_STEPS} steps of {tokens:,}"
        f" tokens, {shape.n_layer} layers, {shape.n_embd} wide) takes about {needed} minutes here; give"
        f" --budget_minutes={needed} or more, or a number of steps instead: --max_steps=N"
    )


def choose_context(facts: Facts, given: Mapping[str, Any]) -> int:
    """Tokens of the context, which divides the tokens of a step: CONTEXT, or of trained weights what they have, up to
    FINE_TUNING_CONTEXT; less where the train split has too few."""
    if "block_size" in given:
        return given["block_size"]
    largest = CONTEXT if facts.context is None else min(facts.context, FINE_TUNING_CONTEXT[facts.device])
    sizes = [*(size for size in (16, 32, 64, 128, 256, 512) if size < largest), largest]
    if "tokens_per_step" in given:
        tokens = given["tokens_per_step"] // _rows(given)
        sizes = [size for size in range(1, largest + 1) if tokens % size == 0]
    return max((size for size in sizes if size * MIN_WINDOWS <= facts.train_tokens), default=sizes[0])


def _rows(given: Mapping[str, Any]) -> int:
    """Sequences of which a step's number is a multiple."""
    rows = given.get("micro_batch_size", "auto")
    return 1 if rows == "auto" else rows


def shapes(context: int, given: Mapping[str, Any]) -> list[Shape]:
    """The shapes of the ladder with what is given, each once."""
    found = []
    for n_layer, width in LADDER:
        heads = given.get("n_head")
        unit = 2 * heads if heads else 1  # the rotation needs an even head size
        n_embd = given.get("n_embd") or unit * math.ceil(width / unit)
        n_head = heads or choose_heads(n_embd, given.get("n_kv_head") or 1)
        found.append(Shape(given.get("n_layer", n_layer), n_embd, n_head, context))
    return list(dict.fromkeys(found))


def choose_heads(n_embd: int, kv_heads: int) -> int:
    """Query heads near HEAD_SIZE that divide the width, of an even size, and a multiple of the key/value heads."""
    counts = [count for count in range(kv_heads, n_embd // 2 + 1, kv_heads) if n_embd % (2 * count) == 0]
    return min(counts, key=lambda count: abs(math.log(n_embd / count / HEAD_SIZE)), default=kv_heads)


def look(shape: Shape, facts: Facts, given: Mapping[str, Any]) -> Outlook:
    """The length of a step and of the run with a shape."""
    minutes, max_steps = given.get("budget_minutes"), given.get("max_steps")
    seconds = 60 * TRAINING_SHARE * (PATIENT_MINUTES if minutes is None else minutes) - facts.startup_seconds

    def steps_of(tokens: int) -> int:
        if max_steps is not None:
            return max_steps
        in_time = int(seconds / facts.cost.step_seconds(shape, tokens))
        return max(1, min(in_time, int(_max_epochs(shape, facts, given) * facts.train_tokens / tokens)))

    tokens = choose_step(shape.block_size, facts, given, steps_of)
    steps = steps_of(tokens)
    takes = (facts.startup_seconds + steps * facts.cost.step_seconds(shape, tokens)) / TRAINING_SHARE
    return Outlook(
        shape,
        tokens,
        steps,
        steps * tokens,
        None if max_steps is not None else takes,
        facts.cost.parameters(shape),
        facts.cost.block_parameters(shape),
    )


def choose_step(context: int, facts: Facts, given: Mapping[str, Any], steps_of: Callable[[int], int]) -> int:
    """Tokens of a step, whose number of steps is steps_of(tokens). On a GPU they are as few as on a CPU where the text
    is the run's limit: small steps learn more from a token. They are more where the time is the limit."""
    if "tokens_per_step" in given:
        return given["tokens_per_step"]
    unit = _rows(given) * facts.processes * context
    sizes = [unit * 2**power for power in range(20) if unit * 2**power <= max(unit, MAX_ROWS * context)]
    first = TOKENS_PER_STEP.get(facts.device, TOKENS_PER_STEP["cpu"])
    number = max((i for i, size in enumerate(sizes) if size <= first), default=0)
    run = [steps_of(size) * size for size in sizes]
    while number > 0 and sizes[number] > TOKENS_PER_STEP["cpu"] and run[number - 1] >= FREE_STEP * run[number]:
        number -= 1
    while number > 0 and steps_of(sizes[number]) < FEW_STEPS and given.get("max_steps") is None:
        number -= 1
    while number + 1 < len(sizes) and steps_of(sizes[number + 1]) >= STEPS_PER_TOKEN * sizes[number + 1]:
        number += 1
    return sizes[number]


def _model(
    facts: Facts, outlook: Outlook, epochs: float, given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    shape, per_parameter = outlook.shape, outlook.tokens / outlook.block_parameters
    each, least = "for each parameter of its blocks", tokens_per_parameter(given)
    size = f"the largest that sees {least:g} tokens {each}; it sees {per_parameter:.2g}"
    if per_parameter < least:
        size = f"the smallest; it sees {per_parameter:.2g} tokens {each}"
    reasons = {"n_layer": size, "n_embd": size, "n_head": f"heads of about {HEAD_SIZE} channels"}
    full = shape.block_size >= CONTEXT
    reasons["block_size"] = (
        "learned faster than a longer one" if full else f"{MIN_WINDOWS} windows to train on, or more"
    )
    if facts.context is not None:
        cut = "longer ones cost more than they teach" if full else f"{MIN_WINDOWS} windows to train on, or more"
        reasons["block_size"] = "that of the weights" if shape.block_size == facts.context else cut
    reasons |= dict.fromkeys(ARCHITECTURE, "learns fast, and programs for the Llama and Qwen3 classes can open it")
    values = {**shape._asdict(), **ARCHITECTURE}
    if given.get("positions", "rotary") == "rotary" and given.get("rotary_dim") is None:
        values["first_attention"] = "recent" if epochs < RECENT_EPOCHS else "random"
        reasons["first_attention"] = f"{epochs:.2g} epochs; recent is faster below {RECENT_EPOCHS:g}"
    return values, reasons


def _steps(facts: Facts, outlook: Outlook, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Tokens of a step, evaluations and log lines."""
    is_large = _is_large(outlook.shape, facts)
    count = PATIENT_EVALUATIONS if _is_patient(given) else LARGE_EVALUATIONS if is_large else EVALUATIONS
    tokens = nearest_power(max(MIN_EVAL_TOKENS, 3 * EVALUATION_SHARE * outlook.tokens / count))
    values = {
        "tokens_per_step": outlook.tokens_per_step,
        "eval_interval": round_down(outlook.steps / count),
        "eval_tokens": None if tokens >= facts.val_tokens else tokens,
        "log_interval": min(50, round_down(outlook.steps / 50)),
    }
    reasons = {
        "tokens_per_step": "grows with the square root of the run's tokens",
        "eval_interval": f"{count} evaluations or some more",
        "eval_tokens": f"evaluations take about {EVALUATION_SHARE:.0%} of the time at most",
        "log_interval": "fifty lines or some more",
    }
    return values, reasons


def _length(
    facts: Facts, outlook: Outlook, epochs: float, given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """What ends the run, where that is not the time or a number of steps alone. Of the options that are given, a time
    budget that is longer than the text allows is replaced."""
    values, reasons = dict[str, Any](), dict[str, str]()
    if "patience" not in given and (_is_patient(given) or epochs > FEW_EPOCHS):
        values["patience"], reasons["patience"] = PATIENCE, "the run ends where its val loss has stopped falling"
    has_patience = {**values, **given}.get("patience") is not None
    minutes, seconds = given.get("budget_minutes"), outlook.seconds
    if seconds is None or (minutes is not None and seconds > 0.9 * 60 * minutes):
        return values, reasons
    is_open = _is_patient(given) and has_patience and given.get("schedule", "wsd") in OPEN_SCHEDULES
    is_open = is_open and not given.get("teachers")  # whose last steps would only memorize
    values |= {"max_steps": None if is_open else outlook.steps, "budget_minutes": None}
    most = f"{_max_epochs(outlook.shape, facts, given):g} epochs: with more, a model memorizes its text"
    why = "patience ends it" if is_open else most
    return values, reasons | dict.fromkeys(("max_steps", "budget_minutes"), why)


def _max_epochs(shape: Shape, facts: Facts, given: Mapping[str, Any]) -> float:
    if _is_large(shape, facts):
        return LARGE_EPOCHS
    return FIRST_EPOCHS if given.get("teachers") else MAX_EPOCHS


def _is_large(shape: Shape, facts: Facts) -> bool:
    """Whether trained weights are many for the text."""
    return facts.fine_tuning and facts.cost.block_parameters(shape) > LARGE * facts.train_tokens


def _is_patient(given: Mapping[str, Any]) -> bool:
    """Whether only the val loss ends the run."""
    return given.get("budget_minutes") is None and given.get("max_steps") is None


def round_down(number: float) -> int:
    """1, 2, 5, 10, 20, 50 …: the last one up to `number`, at least 1."""
    power = 10 ** math.floor(math.log10(max(1, number)))
    return next(power * first for first in (5, 2, 1) if power * first <= max(1, number))


def _optimization(
    facts: Facts, outlook: Outlook, epochs: float, given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    has_adapters = given.get("lora_rank") is not None
    optimizer, steps = given.get("optimizer", "adamw" if has_adapters else "muon"), outlook.steps
    rate, why = LEARNING_RATE[optimizer], f"usual for {optimizer}"
    width = outlook.shape.n_embd
    if optimizer == "muon" and width > WIDE:
        rate, why = rate * math.sqrt(WIDE / width), "falls as 1/√width"
    if facts.fine_tuning and optimizer == "adamw":
        rate, why = FINE_TUNING_RATE / width, "low, since the weights are trained already; falls as 1/width"
    elif facts.fine_tuning:
        rate, why = rate * FINE_TUNING, "a third, since the weights are trained already"
    if has_adapters:
        rate, why = LEARNING_RATE[optimizer], "usual for adapters"
    rate = max(float(f"{rate:.1e}"), given.get("min_learning_rate", 0.0))
    warmup = 10 * max(1, min(10, round(steps / 300)))
    beta2 = max(MIN_BETA2, round(0.5 ** (outlook.tokens_per_step / BETA2_HALF_LIFE), 4))
    dropout, decay = regularization(epochs)
    values = {"optimizer": optimizer, "muon_steps": 3, "schedule": "wsd", "learning_rate": rate}
    values |= {"warmup_steps": warmup, "beta2": beta2, "dropout": dropout, "weight_decay": decay}
    values["ema_half_life"] = EMA_HALF_LIFE
    text = f"{epochs:.2g} epochs"
    fewest = "it trains adapters" if has_adapters else "fewest tokens to a loss"
    reasons = {"optimizer": fewest, "muon_steps": "3 are as good as 5 in small models"}
    reasons |= {"schedule": "its decay can begin at any step", "learning_rate": why, "dropout": text}
    reasons |= {"warmup_steps": "a thirtieth of the steps", "weight_decay": text}
    reasons["ema_half_life"] = "better than the weights themselves at nearly all lengths measured"
    reasons["beta2"] = f"{outlook.tokens_per_step:,} tokens a step"
    return values, reasons


def regularization(epochs: float) -> tuple[float, float]:
    """Dropout and weight decay for a number of epochs."""
    at = sorted(REGULARIZATION)
    if epochs >= at[-1]:
        return REGULARIZATION[at[-1]]
    low = max(number for number in at if number <= epochs)
    high = at[at.index(low) + 1]
    share = (epochs - low) / (high - low)
    (dropout, decay), (more_dropout, more_decay) = REGULARIZATION[low], REGULARIZATION[high]
    return round(dropout + share * (more_dropout - dropout), 2), round(decay + share * (more_decay - decay), 2)


def _without(values: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in given}
