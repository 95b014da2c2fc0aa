"""config/: declarations, values, presets, flags, error messages, --help, saved configs, and the real sections."""

import copy
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Interval, Le, MultipleOf
from hypothesis import given
from hypothesis import strategies as st

import config
import sample as sample_script
import train as train_script
from checkpoint import open_latest, save_checkpoint
from common.option import Option, option_names, options_of, section_from
from common.signature import signed
from config.loader import NOT_PRESETS, Loader, Options, dump, replace
from errors import UserError
from model import GPTConfig
from tests.conftest import ROOT
from tests.test_train import TINY as TINY_RUN


@dataclass(frozen=True)
class Model:
    n_layer: Annotated[int, Ge(1)] = field(default=4, metadata={"resume": "fixed"})
    """Number of blocks."""
    n_embd: Annotated[int, Ge(1)] = 64
    """Channels."""
    n_head: Annotated[int, Ge(1)] = 4
    """Heads; divides n_embd.

    The help shows all of this text.
    """
    n_kv_head: Annotated[int, Ge(1)] | None = None
    """Key/value heads; none: as many as n_head."""
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    """Kind of normalization."""
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Share set to 0."""
    vocab_size: int = field(default=256, metadata={"derived": True})

    def problems(self) -> list[str]:
        return [f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}"] if self.n_embd % self.n_head else []


@dataclass(frozen=True)
class Train:
    data: str = "corpus"
    """A dataset, or a text."""
    run: str | None = None
    """Run directory."""
    resume: str | None = None
    """Run to resume."""
    max_steps: Annotated[int, Ge(0)] = 100
    """Updates in all."""
    learning_rate: Annotated[float, Gt(0)] = 1e-3
    """Peak step size."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the model."""
    micro_batch: Annotated[int, Le(64)] | Literal["auto"] = "auto"
    """Rows at once."""
    overwrite: bool = False
    """Replace what is there."""


@dataclass(frozen=True)
class Sampling:
    top_k: Annotated[int, Ge(1)] | None = None
    """Draw from the k likeliest tokens only."""
    prompt: str | None = None
    """Prompt."""
    stop: tuple[str, ...] = ()
    """Texts to end at."""


LOADER = Loader(
    {"training": Train, "model": Model, "sampling": Sampling},
    {"train.py": (Model, Train), "sample.py": (Sampling,)},
    {"train.py": "usage: python train.py", "sample.py": "usage: python sample.py"},
    Path(),
)
OPTIONS = LOADER.options


@pytest.fixture
def loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loader:
    """A toy project in an otherwise empty folder, which is the working directory too."""
    (tmp_path / "config").mkdir()
    monkeypatch.chdir(tmp_path)
    loader = copy.copy(LOADER)
    loader.root = tmp_path
    return loader


def write_preset(name: str, text: str) -> None:
    Path("config", f"{name}.py").write_text(text, encoding="utf-8")


def save_config(path: str, options: Any, auto: Any) -> None:
    Path(path).write_text(json.dumps({"format": "sprout-config", "version": 1, "options": options, "auto": auto}))


def load(loader: Loader, *argv: str) -> Options:
    return loader.load("train.py", argv)


def problems(loader: Loader, *argv: str) -> list[str]:
    """The lines of the error, without the heading and the closing line."""
    with pytest.raises(UserError) as caught:
        load(loader, *argv)
    *lines, last = str(caught.value).split("\n")
    assert last == "`python train.py --help` lists the options"
    if len(lines) == 1:
        return lines
    assert lines[0] == f"{len(lines) - 1} problems with the options"
    return [line.removeprefix("  ") for line in lines[1:]]


# ---- declarations


def test_declarations_are_read_from_the_source() -> None:
    assert [option.name for option in options_of(Model)] == [
        "n_layer",
        "n_embd",
        "n_head",
        "n_kv_head",
        "norm",
        "dropout",
    ]  # no derived
    assert OPTIONS["n_head"].help == "Heads; divides n_embd. The help shows all of this text."
    assert OPTIONS["n_layer"].fixed
    assert not OPTIONS["n_embd"].fixed


def test_incomplete_declarations_are_refused() -> None:
    @dataclass
    class NoHelp:
        size: int = 1

    @dataclass
    class NoDefault:
        size: int
        """Size."""

    @dataclass
    class NoType:
        size: list | None = None
        """Size."""

    @dataclass
    class NotARange:
        size: Annotated[int, MultipleOf(2)] = 2
        """Size."""

    @dataclass
    class WrongDefault:
        size: Annotated[int, Ge(1)] = 0
        """Size."""

    for section, message in [
        (NoHelp, "no help text"),
        (NoDefault, "no default"),
        (NoType, "no type"),
        (NotARange, "no type"),
    ]:
        with pytest.raises(AssertionError, match=message):
            assert all(option.help for option in options_of(section))
    with pytest.raises(ValueError, match="expected a whole number >= 1"):
        list(options_of(WrongDefault))


def test_names_are_unique_over_all_sections() -> None:
    with pytest.raises(AssertionError, match="n_layer is declared twice"):
        Loader({"a": Model, "b": Model}, {}, {}, Path())


# ---- values


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("n_layer", "1_000", 1000),
        ("n_layer", "1e3", 1000),
        ("n_layer", "5.0", 5),
        ("max_steps", str(2**63 - 1), 2**63 - 1),
        ("dropout", "0", 0.0),
        ("learning_rate", "1", 1.0),
        ("learning_rate", "1e-3", 1e-3),
        ("learning_rate", "1_0.5", 10.5),
        ("overwrite", "TRUE", True),
        ("overwrite", "False", False),
        ("compile", "auto", "auto"),
        ("compile", "true", True),
        ("micro_batch", "auto", "auto"),
        ("micro_batch", "64", 64),
        ("n_kv_head", "None", None),
        ("run", "NONE", None),
        ("data", "none", "none"),  # None is not allowed, so this is text
        ("data", "a=b=c d", "a=b=c d"),
        ("data", "", ""),
        ("data", "1e3", "1e3"),
        ("data", "数据/ü", "数据/ü"),
        ("norm", "layernorm", "layernorm"),
    ],
)
def test_text_becomes_a_value_of_the_declared_type(loader: Loader, name: str, text: str, value: object) -> None:
    options = load(loader, f"--{name}={text}")
    assert options.flat()[name] == value
    assert type(options.flat()[name]) is type(value)
    assert options.origin[name] == "flag"


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--n_layer=0", "a whole number >= 1"),
        ("--n_layer=2.5", "a whole number >= 1"),
        ("--n_layer=", "a whole number >= 1"),
        ("--n_layer=true", "a whole number >= 1"),
        ("--n_layer=none", "a whole number >= 1"),
        ("--n_layer=1e400", "a whole number >= 1, and below 2**63: the 64 bits of an integer"),
        ("--n_layer=" + "9" * 50, "a whole number >= 1, and below 2**63: the 64 bits of an integer"),
        ("--max_steps=" + str(2**63), "a whole number >= 0, and below 2**63: the 64 bits of an integer"),
        ("--n_kv_head=0", "a whole number >= 1 or none"),
        ("--micro_batch=65", "a whole number <= 64 or auto"),
        ("--dropout=1", "a number with 0 <= x < 1"),
        ("--dropout=-0.1", "a number with 0 <= x < 1"),
        ("--dropout=nan", "a number with 0 <= x < 1"),
        ("--learning_rate=inf", "a number > 0, and below 1.8e308"),
        ("--learning_rate=0", "a number > 0"),
        ("--learning_rate=fast", "a number > 0"),
        ("--overwrite=1", "true or false"),
        ("--overwrite=yes", "true or false"),
        ("--compile=always", "true, false or auto"),
        ("--norm=RMSnorm", "layernorm or rmsnorm; did you mean rmsnorm?"),
    ],
)
def test_a_wrong_value_is_answered_with_what_was_expected(loader: Loader, flag: str, expected: str) -> None:
    assert problems(loader, flag) == [f"{flag}: expected {expected}"]


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("n_layer", 1e3, 1000),
        ("dropout", 0, 0.0),
        ("learning_rate", 1, 1.0),
        ("compile", True, True),
        ("n_kv_head", None, None),
    ],
)
def test_python_values_pass_the_same_check(loader: Loader, name: str, given: object, value: object) -> None:
    checked = loader.check(name, given)
    assert (checked, type(checked)) == (value, type(value))


@pytest.mark.parametrize("value", [True, "5", 2.5, None, float("nan"), float("inf"), 10**400, [5], {}, -1])
def test_python_values_of_another_type_are_refused(loader: Loader, value: object) -> None:
    with pytest.raises(UserError, match=r"n_layer = .*: expected a whole number >= 1"):
        loader.check("n_layer", value)
    with pytest.raises(UserError, match=r"n_layr = .*: no such option; did you mean n_layer\?"):
        loader.check("n_layr", value)


@given(st.sampled_from(list(OPTIONS.values())), st.text() | st.from_regex(r"[-+]?[0-9_.eE]{1,9}", fullmatch=True))
def test_any_text_is_a_value_of_the_type_or_one_clear_error(option: Option, text: str) -> None:
    try:
        value = option.parse(text)
    except ValueError as error:
        assert str(error).startswith("expected ")  # noqa: PT017 (any text may be either)
    else:
        assert option.check(value) == value
        assert type(option.check(value)) is type(value)


@given(st.integers(1, 2**63 - 1), st.floats(0, 1, exclude_max=True))
def test_numbers_survive_being_written_and_read(integer: int, number: float) -> None:
    assert OPTIONS["n_layer"].parse(str(integer)) == OPTIONS["n_layer"].parse(f"{integer:_}") == integer
    assert OPTIONS["dropout"].parse(repr(number)) == number


# ---- flags


def test_the_last_value_wins_and_sections_are_built(loader: Loader) -> None:
    write_preset("small", "n_layer = 2\nn_embd = 32\ntop_k = 5\n")
    write_preset("tall", "n_layer = 9\n")
    options = load(loader, "--n_layer=1", "small", "--n_embd=16", "--n_embd=8", "tall")
    assert options.section(Model) == Model(n_layer=9, n_embd=8)
    assert options.presets == ["small", "tall"]
    assert (options.origin["n_layer"], options.origin["n_embd"], options.origin["dropout"]) == (
        "preset tall",
        "flag",
        "default",
    )
    assert list(options.flat()) == [option.name for section in (Model, Train) for option in options_of(section)]


def test_a_switch_alone_means_true(loader: Loader) -> None:
    assert load(loader, "--overwrite", "--max_steps=5").section(Train) == Train(overwrite=True, max_steps=5)
    assert load(loader, "--compile").section(Train).compile is True
    assert load(loader, "--overwrite", "--overwrite=false").section(Train).overwrite is False
    assert problems(loader, "--overwrite", "false") == ["--overwrite: write --overwrite=false"]


def test_repeated_flags_add_up_and_replace_a_preset_s_value(loader: Loader) -> None:
    def stop(*argv: str) -> tuple[str, ...]:
        return loader.load("sample.py", argv).section(Sampling).stop

    write_preset("two", "stop = ['a', 'b=c']\n")
    assert stop() == ()
    assert stop("--stop=a", "--top_k=3", "--stop=b=c", "--stop=a") == ("a", "b=c", "a")
    assert stop("two") == ("a", "b=c")
    assert stop("two", "--stop=x", "--stop=y") == ("x", "y")
    assert stop("--stop=x", "two") == ("a", "b=c")
    assert stop("--stop=x", "--stop=none", "--stop=y") == ("y",)
    write_preset("wrong", "stop = [1]\n")
    with pytest.raises(UserError, match=r"config/wrong.py:1: stop = \[1\]: expected a list of texts"):
        stop("wrong")
    with pytest.raises(UserError, match="--stop: write --stop=TEXT"):
        stop("--stop")


def test_the_default_preset_is_taken_when_none_is_given(loader: Loader) -> None:
    write_preset("small", "n_layer = 2\n")
    write_preset("wide", "n_embd = 128\n")
    assert loader.load("train.py", ["--n_head=8"], default_preset="small").section(Model) == Model(n_layer=2, n_head=8)
    assert loader.load("train.py", ["wide"], default_preset="small").section(Model) == Model(n_embd=128)
    assert load(loader).presets == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--n_layr=5"], "--n_layr=5: no such option; did you mean --n_layer?"),
        (["--max-steps=5"], "--max-steps=5: write --max_steps=5"),
        (["-max_steps=5"], "-max_steps=5: write --max_steps=5"),
        (["--colour=red"], "--colour=red: no such option"),
        (["--top_k=5"], "--top_k=5: belongs to sample.py, not to train.py"),
        (["--vocab_size=5"], "--vocab_size=5: no such option"),  # derived
        (["--max_steps", "5"], "--max_steps: write --max_steps=5"),
        (["--max_steps", "small"], "--max_steps: write --max_steps=INT"),
        (["max_steps=5"], "max_steps=5: write --max_steps=5"),
        (["novel.txt"], "novel.txt: not a preset; write --data=novel.txt"),
        (["runs/one"], "runs/one: not a preset; write --resume=runs/one"),
        (["smal"], "smal: no such preset; did you mean small?"),
        (["config/smal.py"], "config/smal.py: no such preset; did you mean small?"),
        (["x" * 5000], "x" * 57 + "...: no such preset; there are small, wide"),
        (["--"], "--: no such option"),
        (["--n_head=3"], "n_embd=64 is not divisible by n_head=3"),
    ],
)
def test_a_wrong_argument_is_answered_with_what_to_write(loader: Loader, argv: list[str], message: str) -> None:
    write_preset("small", "n_layer = 2\n")
    write_preset("wide", "n_embd = 128\n")
    Path("novel.txt").write_text("Once")
    Path("runs/one").mkdir(parents=True)
    save_config("runs/one/config.json", {}, {})
    assert problems(loader, *argv) == [message]


def test_all_problems_are_reported_at_once(loader: Loader) -> None:
    write_preset("bad", "n_layer = 0\nn_hed = 2\nimport os\nlearning_rate = '1e-3'\n")
    assert problems(loader, "bad", "--max_steps=x", "--colour=red") == [
        "config/bad.py:3: expected name = value; a preset holds nothing else",
        "config/bad.py:1: n_layer = 0: expected a whole number >= 1",
        "config/bad.py:2: n_hed = 2: no such option; did you mean n_head?",
        "config/bad.py:4: learning_rate = '1e-3': expected a number > 0",
        "--max_steps=x: expected a whole number >= 0",
        "--colour=red: no such option",
    ]
    # A section's own rules are checked too, unless one of its values was refused or a preset could not be read.
    assert len(problems(loader, "--max_steps=x", "--n_head=3")) == 2
    assert len(problems(loader, "--n_layer=x", "--n_head=3")) == 1
    assert len(problems(loader, "nothing", "--n_head=3")) == 1


def test_errors_of_a_section_s_constructor_are_reported(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Strict:
        size: int = 1
        """Size."""

        def __post_init__(self) -> None:
            if self.size == 13:
                raise ValueError("size=13 brings bad luck; size=13 is odd")

    with pytest.raises(UserError, match="2 problems with the options\n  size=13 brings bad luck\n  size=13 is odd\n"):
        Loader({"strict": Strict}, {"train.py": (Strict,)}, {}, tmp_path).load("train.py", ["--size=13"])


# ---- presets


def test_a_preset_is_read_never_executed(loader: Loader) -> None:
    write_preset(
        "p",
        '"""Doc."""\n# comment\nn_layer = 2 ** 3 - -1 * 2\nlearning_rate = 6e-4 / 2\n'
        "n_embd = 7 // 2 * 10 % 64  # here\nrun = None\n",
    )
    options = load(loader, "p", "--n_head=1")
    assert options.section(Model) == Model(n_layer=10, n_embd=30, n_head=1)
    assert options.section(Train).learning_rate == 3e-4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("n_layer = 9**9**9", "n_layer: a power above 63 is too large"),
        ("n_layer = 10**60", "n_layer: arithmetic takes numbers below 2**63"),
        ("n_layer = 10**18 * 10", "n_layer: arithmetic takes numbers below 2**63"),
        ("n_layer = (-8) ** 0.5", "n_layer: arithmetic takes numbers below 2**63"),
        ("n_layer = 1 / 0", "n_layer: division by zero"),
        ("n_layer = 1 + True", "n_layer: arithmetic takes numbers below 2**63"),
        ("data = 'a' * 1000", "data: arithmetic takes numbers below 2**63"),
        ("n_layer = 1 << 2", "n_layer: expected a literal, or arithmetic on numbers with + - * / // % **"),
        ("n_layer = n_head", "n_layer: expected a literal, or arithmetic on numbers with + - * / // % **"),
        ("n_layer = int('2')", "n_layer: expected a literal, or arithmetic on numbers with + - * / // % **"),
        ("data = f'{1}'", "data: expected a literal, or arithmetic on numbers with + - * / // % **"),
        ("data = b'x'", "data: expected a literal, or arithmetic on numbers with + - * / // % **"),
        ("n_layer = [2]", "n_layer = [2]: expected a whole number >= 1"),
        ("n_layer = [int(2)]", "n_layer: expected a literal, or arithmetic on numbers with + - * / // % **"),
        ("n_layer = n_head = 2", "expected name = value; a preset holds nothing else"),
        ("n_layer: int = 2", "expected name = value; a preset holds nothing else"),
        ("n_layer += 2", "expected name = value; a preset holds nothing else"),
        ("print('hello')", "expected name = value; a preset holds nothing else"),
        ("import os", "expected name = value; a preset holds nothing else"),
        ("n_layer 2", "expected name = value (invalid syntax)"),
        ("n_layer = 2.5", "n_layer = 2.5: expected a whole number >= 1"),
        ("n_layer = True", "n_layer = True: expected a whole number >= 1"),
        ("learning_rate = 1e999", "learning_rate = inf: expected a number > 0, and below 1.8e308"),
        ("overwrite = 1", "overwrite = 1: expected true or false"),
        ("top_k = 0", "top_k = 0: expected a whole number >= 1 or none"),  # another script's option is checked too
        ("n_layr = 2", "n_layr = 2: no such option; did you mean n_layer?"),
    ],
)
def test_anything_else_in_a_preset_is_an_error_with_its_line(loader: Loader, line: str, message: str) -> None:
    write_preset("p", f"# a comment\n{line}\n")
    assert problems(loader, "p") == [f"config/p.py:2: {message}"]
    Path("elsewhere.py").write_text(f"# a comment\n{line}\n")
    assert problems(loader, "elsewhere.py") == [f"elsewhere.py:2: {message}"]


@pytest.mark.parametrize(
    "content", [b"n_layer = \xff", b"n_layer = 2\0", b"n_layer = " + b"(" * 5000, b"n_layer = " + b"-" * 20_000 + b"1"]
)
def test_an_unreadable_preset_is_one_line_of_error(loader: Loader, content: bytes) -> None:
    Path("config/p.py").write_bytes(content)
    (line,) = problems(loader, "p")
    assert line.startswith("config/p.py")


@given(content=st.binary(max_size=40) | st.from_regex(rb"n_(layer|embd) = [-0-9.+*/%()e ]{1,12}\n", fullmatch=True))
def test_any_bytes_are_a_preset_or_clear_errors(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("project") / "p.py"
    path.write_bytes(content)
    try:
        LOADER.load("train.py", [str(path)])
    except UserError as error:
        assert "p.py" in str(error) or "n_head" in str(error)  # noqa: PT017 (any bytes may be either)


def test_presets_are_found_by_name_by_path_and_from_another_folder(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_preset("small", "n_layer = 2\n")
    Path("other folder ü").mkdir()
    monkeypatch.chdir("other folder ü")
    Path("mine.py").write_text("n_layer = 3\n")
    for arg, n_layer in [("small", 2), ("config/small.py", 2), ("mine.py", 3), (str(Path("mine.py").resolve()), 3)]:
        options = load(loader, arg)
        assert options.section(Model).n_layer == n_layer
        assert options.origin["n_layer"] == f"preset {Path(arg).stem}"


def test_each_script_takes_its_own_part_of_a_preset(loader: Loader) -> None:
    write_preset("p", "n_layer = 2\ntop_k = 7\n")
    options = loader.load("sample.py", ["p"])
    assert options.flat() == {"top_k": 7, "prompt": None, "stop": ()}
    assert "top_k" not in load(loader, "p").flat()


# ---- a run's config.json


def test_a_saved_config_is_a_preset_without_the_options_of_that_run(loader: Loader) -> None:
    options = load(loader, "--n_layer=2", "--run=runs/one", "--max_steps=70", "--compile=true")
    saved = dump(options, {"compile": "CUDA is available"})
    assert saved == {
        "format": "sprout-config",
        "version": 1,
        "options": options.flat(),
        "auto": {"compile": "CUDA is available"},
    }
    Path("runs/one").mkdir(parents=True)
    Path("runs/one/config.json").write_text(json.dumps(signed(saved)))
    again = load(loader, "runs/one/config.json")
    assert again.section(Model) == options.section(Model)
    assert again.section(Train) == Train(max_steps=70)
    assert again.notes == [
        "runs/one/config.json: not taken over, because they belong to that run or were chosen automatically: "
        "run, compile"
    ]
    assert again.presets == ["one"]
    assert again.origin["max_steps"] == "preset one"
    assert loader.load("sample.py", ["runs/one/config.json"]).flat() == {"top_k": None, "prompt": None, "stop": ()}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON: Expecting property name"),
        ("[" * 100_000, "not valid JSON: "),
        ("[1]", 'not the config.json of a run: expected an object with "format": "sprout-config" and "version": 1'),
        ('{"n_layer": 2}', "not the config.json of a run"),
        ('{"format": "sprout-config", "version": 2, "options": {}, "auto": {}}', "not the config.json of a run"),
        (
            '{"format": "sprout-config", "version": 1, "options": [], "auto": {}}',
            'damaged: expected "options" and "auto" to be objects',
        ),
        (
            '{"format": "sprout-config", "version": 1, "options": {}, "auto": 3}',
            'damaged: expected "options" and "auto" to be objects',
        ),
        (
            '{"format": "sprout-config", "version": 1, "options": {"n_layer": "2"}, "auto": {}}',
            'n_layer = "2": expected a whole number >= 1',
        ),
        (
            '{"format": "sprout-config", "version": 1, "options": {"dropout": NaN}, "auto": {}}',
            "dropout = NaN: expected a number",
        ),
        (
            '{"format": "sprout-config", "version": 1, "options": {"n_layr": 2}, "auto": {}}',
            "n_layr = 2: no such option; did you mean n_layer?",
        ),
    ],
)
def test_an_invalid_saved_config_is_one_line_of_error(loader: Loader, content: str, message: str) -> None:
    Path("saved.json").write_text(content)
    (line,) = problems(loader, "saved.json")
    assert line.startswith(f"saved.json: {message}")


# ---- what a script receives


def test_replace_checks_and_leaves_the_original_alone(loader: Loader) -> None:
    options = load(loader, "--n_layer=2")
    other = replace(options, n_embd=32, max_steps=1e3)
    assert (other.section(Model), other.section(Train).max_steps) == (Model(n_layer=2, n_embd=32), 1000)
    assert options.section(Model) == Model(n_layer=2)
    assert other.origin == options.origin
    with pytest.raises(UserError, match="n_embd=30 is not divisible by n_head=4"):
        replace(options, n_embd=30)
    with pytest.raises(UserError, match="max_steps = -1: expected a whole number >= 0"):
        replace(options, max_steps=-1)


# ---- help


def test_help_lists_presets_groups_values_ranges_and_meanings(
    loader: Loader, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "116")
    write_preset("small", '"""Two blocks.\n\nMore."""\nn_layer = 2\nlearning_rate = 5e-05\n')
    with pytest.raises(SystemExit) as stopped:
        load(loader, "--help", "nonsense")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: python train.py\n\npresets\n  small                      Two blocks.\n")
    assert re.search(r"\n\nmodel\n  --n_layer=INT +4 +Number of blocks. \(>= 1\)\n", text)
    assert re.search(r"\n  --n_head=INT +4 +Heads; divides n_embd. The help shows all of\s+this text. \(>= 1\)\n", text)
    assert re.search(r"\n  --norm=layernorm\|rmsnorm +rmsnorm +Kind of normalization.\n", text)
    assert re.search(r"\n  --compile=true\|false\|auto +auto +Compile the model.\n", text)
    assert re.search(r"\n  --dropout=FLOAT +0.0 +Share set to 0. \(0 <= x < 1\)\n", text)
    assert "top_k" not in text
    assert "vocab_size" not in text

    with pytest.raises(SystemExit):
        load(loader, "small", "--n_layer=oops", "-h")  # the values shown are the preset's
    text = capsys.readouterr().out
    assert re.search(r"\n  --n_layer=INT +2 +Number", text)
    assert re.search(r"\n  --learning_rate=FLOAT +5e-5 +Peak", text)
    assert "options, with the values of small\n" in text

    assert problems(loader, "smal", "--help") == ["smal: no such preset; did you mean small?"]


# ---- the real project


@pytest.mark.parametrize("script", config.SCRIPTS)
def test_the_help_of_each_script_is_complete_and_fits_a_screen(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        config.load(script, ["--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    assert set(re.findall(r"^  --(\w+)=", text, re.MULTILINE)) == set(config.load(script, []).flat())


@pytest.mark.parametrize("script", config.SCRIPTS)
@pytest.mark.parametrize("preset", sorted({path.stem for path in (ROOT / "config").glob("*.py")} - set(NOT_PRESETS)))
def test_every_preset_loads_for_every_script(script: str, preset: str) -> None:
    assert config.load(script, [preset]).presets == [preset]


WITHOUT_TORCH = """
import runpy, sys
sys.argv = {argv}
try:
    run = runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module
    run(sys.argv[0], run_name="__main__")
except SystemExit as stopped:
    assert "torch" not in sys.modules
    sys.exit(stopped.code)
"""


@pytest.mark.parametrize("script", config.SCRIPTS)
@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("--learning_rte=1", 2), ("no_such_preset", 2)])
def test_help_and_wrong_options_do_not_wait_for_torch(script: str, argument: str, code: int) -> None:
    """An import of torch takes over a second."""
    program = WITHOUT_TORCH.format(argv=[script, argument])
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.count("Traceback")) == (code, 0), ended.stderr


def test_the_options_of_the_model_are_those_of_its_class() -> None:
    """The loader has a class of its own, made from the source of model.py."""
    assert config.ModelOptions.__doc__ == GPTConfig.__doc__
    for ours, original in zip(options_of(config.ModelOptions), options_of(GPTConfig), strict=True):
        assert (replace_fields(ours, section=GPTConfig), ours.help) == (original, original.help)
    options = config.load("train.py", ["--n_head=8", "--n_embd=64"])
    assert options.section(GPTConfig) == GPTConfig(**{name: options.flat()[name] for name in option_names(GPTConfig)})


def test_flags_of_another_script_are_named() -> None:
    with pytest.raises(UserError, match=r"--top_k=3: belongs to sample.py, not to train.py"):
        config.load("train.py", ["--top_k=3"])
    with pytest.raises(
        UserError, match=r"--n_layer=3: belongs to train.py, not to prepare_data\n`python -m prepare_data --help`"
    ):
        config.load("prepare_data", ["--n_layer=3"])
    with pytest.raises(UserError, match="n_embd=10 is not divisible by n_head=3"):
        config.load("train.py", ["--n_head=3", "--n_embd=10"])


def test_fixed_names() -> None:
    assert {"n_layer", "seed"} <= config.fixed_names()
    assert not {"max_steps", "run", "device", "dropout"} & config.fixed_names()


def test_a_stored_section_round_trips_and_an_invalid_one_is_refused():
    written = GPTConfig(n_layer=2, mlp="swiglu", vocab_size=40, eos_id=39)
    stored = written.to_dict()
    assert section_from(GPTConfig, stored) == written
    for change, message in (
        ({"n_layer": "4"}, "n_layer"),
        ({"__class__": 1}, "unknown"),
        ({"mlp": "evil"}, "mlp"),
        ({"bias": 1}, "bias"),
    ):
        with pytest.raises(ValueError, match=message):
            section_from(GPTConfig, {**stored, **change})


def test_removed_options_in_a_stored_section_or_config_are_left_out(tmp_path: Path) -> None:
    stored = GPTConfig(n_layer=2).to_dict()
    assert section_from(GPTConfig, {**stored, "zero_init": True}) == GPTConfig(n_layer=2)
    for value, notes in ((False, 0), (True, 1)):
        save_config(str(tmp_path / "config.json"), {"n_layer": 2, "zero_init": value}, {})
        options = config.load("train.py", [str(tmp_path / "config.json")])
        assert options.flat()["n_layer"] == 2
        assert "zero_init" not in options.flat()
        assert len(options.notes) == notes
        assert all("zero_init = true left out" in note for note in options.notes)
    with pytest.raises(UserError, match="--zero_init=true: this option was removed"):
        config.load("train.py", ["--zero_init=true"])


def test_a_run_of_an_earlier_version_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its checkpoint holds an option that was removed since."""
    monkeypatch.chdir(tmp_path)
    assert train_script.main([*TINY_RUN, f"--data={small_text}", "--run=run", "--max_steps=10"]) == 0
    new = open_latest(Path("run"))
    assert "zero_init" not in new.config
    save_checkpoint(
        Path("run"),
        new.step,
        model=new.model_tensors(),
        config={**new.config, "zero_init": True},
        tokenizer=new.tokenizer,
        optimizer=new.optimizer_tensors(),
        state={**new.state, "options": {**new.state["options"], "zero_init": True}},
    )
    assert train_script.main(["--resume=run", "--max_steps=12"]) == 0
    assert sample_script.main(["--run=run", "--max_new_tokens=1"]) in (None, 0)
    resumed = open_latest(Path("run"))
    assert resumed.step == 12
    assert "zero_init" not in resumed.config
    assert "zero_init" not in resumed.state["options"]
    assert "zero_init" not in capsys.readouterr().out


def test_a_removed_option_is_named_as_such(tmp_path):
    preset = tmp_path / "old.py"
    preset.write_text("zero_init = True\n")
    for argv in (["--zero_init=true"], [str(preset)]):
        with pytest.raises(UserError, match=r"zero_init.*: this option was removed; leave it out"):
            config.load("train.py", argv)
