"""What the command line answers to arguments that are almost right; paths with ~, escapes, limits; --help."""

import json
import shlex
from pathlib import Path

import pytest

import config
from checkpoint import find_checkpoint
from config.help_text import MAX_WIDTH, MIN_WIDTH
from config.hints import HINTS
from errors import UserError, quote
from prepare_data.__main__ import main as prepare_main


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))


def message_of(script: str, *argv: str) -> str:
    with pytest.raises(UserError) as caught:
        config.load(script, argv)
    return str(caught.value).removesuffix(f"\n`python {script} --help` lists the options")


# ---- names of other programs


@pytest.mark.parametrize("script", HINTS)
def test_hints_name_options_that_exist_and_no_hint_hides_one(script):
    own = set(config.load(script, []).flat())
    assert not own & set(HINTS[script])
    for hint in HINTS[script].values():
        for flag in [word.strip(",;:").lstrip("-").partition("=")[0] for word in hint.split() if word.startswith("--")]:
            assert flag in own, hint


@pytest.mark.parametrize(
    ("script", "flag", "advice"),
    [
        # nanoGPT
        ("train.py", "--out_dir=out", "write --run=out"),
        ("train.py", "--batch_size=12", "write --tokens_per_step=N, with N = batch_size × block_size × gradient"),
        ("train.py", "--gradient_accumulation_steps=40", "write --tokens_per_step=N, with N = batch_size ×"),
        ("train.py", "--max_iters=5000", "write --max_steps=5000"),
        ("train.py", "--eval_iters=200", "write --eval_tokens=N, with N = eval_iters × batch_size × block_size"),
        ("train.py", "--lr_decay_iters=5000", "write --max_steps=N"),
        ("train.py", "--min_lr=1e-4", "write --min_learning_rate=1e-4"),
        ("train.py", "--dataset=shakespeare_char", "write --data=shakespeare_char"),
        ("train.py", "--always_save_checkpoint=False", "leave it out"),
        ("train.py", "--wandb_log=True", "write --wandb=online"),
        ("sample.py", "--start=Once upon", 'write --prompt="Once upon"'),
        ("sample.py", "--out_dir=out", "write --run=out"),
        # nanochat, litgpt, llm.c, lightning
        ("train.py", "--device_batch_size=32", "write --micro_batch_size=N"),
        ("train.py", "--total_batch_size=524288", "write --tokens_per_step=524288"),
        ("train.py", "--max_seq_len=1024", "write --block_size=1024"),
        ("train.py", "--depth=12", "write --n_layer=12"),
        ("train.py", "--train.lr_warmup_steps=10", "write --warmup_steps=10"),
        # Hugging Face
        ("train.py", "--output_dir=out", "write --run=out"),
        ("train.py", "--per_device_train_batch_size=8", "write --micro_batch_size=N"),
        ("train.py", "--num_train_epochs=3", "write --max_steps=N, with N = epochs × tokens of the train split"),
        ("train.py", "--hidden_size=64", "write --n_embd=64"),
        ("train.py", "--num-hidden-layers=2", "write --n_layer=2"),
        ("train.py", "--lr=3e-4", "write --learning_rate=3e-4"),
        ("sample.py", "--max_length=50", "write --max_new_tokens=50"),
        ("sample.py", "--num_return_sequences=3", "write --num_samples=3"),
        # scripts of ours
        ("train.py", "--input=a.txt", "write --data=a.txt"),
        ("train.py", "--prompt=Once", "write --sample_prompt=Once"),
        ("sample.py", "--lr=1", "in train.py, write --learning_rate=1"),
        ("sample.py", "--precision=bf16", "write --dtype=bfloat16, float16 or float32"),
        ("sample.py", "--num_predict=5", "write --max_new_tokens=5"),
        ("sample.py", "--n_gpu_layers=5", "write --device=cpu, cuda or mps"),
        ("train.py", "--vocab=300", "did you mean --vocab_size?"),
    ],
)
def test_a_name_of_another_program_is_answered_with_ours(script, flag, advice):
    assert message_of(script, flag).startswith(f"{flag}: no such option; {advice}")


@pytest.mark.parametrize("flag", ["--ctx_size=5", "--ignore_eos=true", "--stream=true", "--length_penalty=1"])
def test_an_unknown_name_is_no_misspelling_of_a_distant_one(flag):
    assert "did you mean" not in message_of("sample.py", flag)


def test_a_model_folder_is_named_for_new_weights_not_for_resuming():
    folder = Path("copied")
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes(b"")
    assert message_of("train.py", "copied").startswith("copied: not a preset; write --init_from=copied")
    assert message_of("sample.py", "copied").startswith("copied: not a preset; write --run=copied")
    with pytest.raises(UserError, match=r"is a model folder, which cannot be resumed; .*--init_from=copied"):
        find_checkpoint(folder, "latest")


def test_a_name_of_another_program_in_a_preset_gets_the_same_answer():
    Path("nanogpt.py").write_text("# as in nanoGPT\nout_dir = 'out'\nmax_iters = 5000\nbatch_size = 12\n")
    lines = message_of("train.py", "nanogpt.py").splitlines()
    assert "nanogpt.py:2: out_dir = 'out': no such option; write run=out" in lines[1]
    assert "nanogpt.py:3: max_iters = 5000: no such option; write max_steps=5000" in lines[2]
    assert "write tokens_per_step=N, with N = batch_size" in lines[3]


# ---- the form of arguments


@pytest.mark.parametrize(
    ("script", "argv", "message"),
    [
        ("train.py", ["--max_steps", "5"], "--max_steps: write --max_steps=5"),
        ("train.py", ["--max_steps=", "5"], "--max_steps=: write --max_steps=5"),
        ("train.py", ["--max_steps", "=", "5"], "--max_steps: write --max_steps=5"),
        ("train.py", ["-max_steps=5"], "-max_steps=5: write --max_steps=5"),
        ("train.py", ["max_steps=5"], "max_steps=5: write --max_steps=5"),
        ("train.py", ["lr=5"], "lr=5: write --learning_rate=5"),
        ("train.py", ["--data", "my novel.txt"], '--data: write --data="my novel.txt"'),
        ("train.py", ["–data=a.txt"], "–data=a.txt: begins with –, not with two hyphens; write --data=a.txt"),
        ("train.py", ["—eval_only"], "—eval_only: begins with —, not with two hyphens; write --eval_only"),
        ("train.py", ["--eval-only"], "--eval-only: write --eval_only"),
        ("train.py", ["--no_bias"], "--no_bias: write --bias=false"),
        ("train.py", ["--data=“a.txt”"], "--data=“a.txt”: the quotes “ ” are part of the value; write --data=a.txt"),
        ("train.py", ["--max_steps='5'"], "--max_steps='5': the quotes ' ' are part of the value; write --max_steps=5"),
        ("sample.py", ["--presence_penalty", "-1"], "--presence_penalty: write --presence_penalty=-1"),
        ("sample.py", ["Once upon"], 'Once upon: not a preset; to continue this text, write --prompt="Once upon"'),
        ("sample.py", ["Once", "upon"], 'Once upon: not a preset; to continue this text, write --prompt="Once upon"'),
        (
            "sample.py",
            ["--prompt=“Once", "upon”"],
            "upon”: a shell does not take “ and ” as quotes; type straight ones",
        ),
        ("sample.py", ["a novel.txt"], 'a novel.txt: not a preset; write --prompt_file="a novel.txt"'),
        ("train.py", ["a novel.txt"], 'a novel.txt: not a preset; write --data="a novel.txt"'),
        ("train.py", ["a", "novel.txt"], 'a novel.txt: not a preset; write --data="a novel.txt"'),
        ("prepare_data", ["a novel.txt"], 'a novel.txt: not a preset; write --input="a novel.txt"'),
        ("train.py", ["b.txt"], "b.txt: no such preset or file; there are debug"),
    ],
)
def test_a_wrong_form_is_answered_with_the_right_one(script, argv, message):
    Path("a novel.txt").write_text("Once")
    assert message_of(script, *argv).startswith(message)


def test_prepare_data_names_the_form_for_a_path():
    Path("my novel.txt").write_text("Once")
    for argv, expected in (
        (["my novel.txt"], 'write python -m prepare_data text --input="my novel.txt"'),
        (["my", "novel.txt"], 'write python -m prepare_data text --input="my novel.txt"'),
        (["my novel.txt", "--name=x"], 'write python -m prepare_data text --input="my novel.txt" --name=x'),
        (["--input=a.txt"], "the source comes first: python -m prepare_data text --input=a.txt"),
        (["txt"], "no such source; did you mean text?"),
        (["book"], "no such source; expected one of text, shakespeare, python_stdlib, convert"),
    ):
        with pytest.raises(UserError) as caught:
            prepare_main(argv)
        assert str(caught.value).endswith(expected)


@pytest.mark.parametrize("text", ["Once upon", "don't", '"$HOME"', "a`b`", "a\\b", "!x", "$x", "ü", "", "a'\"b", "*"])
def test_suggestions_are_quoted_as_a_shell_reads_them(text):
    assert shlex.split(f"x --prompt={quote(text)}") == ["x", f"--prompt={text}"]


# ---- values


def test_a_leading_tilde_is_the_home_directory_in_every_path_and_nowhere_else(tmp_path):
    home = str(tmp_path / "home")
    paths = {
        "train.py": {"data", "run", "resume", "init_from", "data_dir", "tokenizer"},
        "sample.py": {"run", "prompt_file", "prompts", "inspect"},
        "prepare_data": {"input", "data_dir", "tokenizer"},
    }
    for script, names in paths.items():
        declared = {name for name, option in config._loader.own(script).items() if option.path}
        assert names <= declared
        for name in names:
            options = config.load(script, [f"--{name}=~/a b.txt"])
            assert options.flat()[name] == f"{home}/a b.txt"
            assert config.load(script, [f"--{name}=./~"]).flat()[name] == "./~"
            assert "no home directory of that name" in message_of(script, f"--{name}=~nobody_here/a")
    Path("mine.py").write_text("data = '~/a.txt'\n")
    assert config.load("train.py", ["mine.py"]).flat()["data"] == f"{home}/a.txt"
    Path("~notes.txt").write_text("Once")  # such as an editor's copy
    assert config.load("train.py", ["--data=~notes.txt"]).flat()["data"] == "~notes.txt"
    assert config.load("sample.py", ["--prompt=~/", "--stop=~"]).flat()["prompt"] == "~/"


def test_all_texts_of_the_command_line_have_the_same_escapes():
    typed, meant = r"a\n\tb\\n\d", "a\n\tb\\n\\d"
    for script, name in (("sample.py", "prompt"), ("train.py", "sample_prompt"), ("prepare_data", "separator")):
        options = config.load(script, [f"--{name}={typed}"])
        assert options.flat()[name] == meant
        assert r"\n, \t and \\ are escapes" in config._loader.options[name].help
    assert config.load("sample.py", [f"--stop={typed}", r"--stop=\n"]).flat()["stop"] == (meant, "\n")
    Path("mine.py").write_text('prompt = "a\\\\n"\n')  # a preset has Python's escapes
    assert config.load("sample.py", ["mine.py"]).flat()["prompt"] == "a\\n"
    saved = {"format": "sprout-config", "version": 1, "options": {"sample_prompt": "a\\n"}, "auto": {}}
    Path("config.json").write_text(json.dumps(saved))
    assert config.load("train.py", ["config.json"]).flat()["sample_prompt"] == "a\\n"


def test_limits_are_shown():
    assert config.load("train.py", [f"--seed={2**63 - 1}"]).flat()["seed"] == 2**63 - 1
    assert message_of("train.py", f"--seed={2**63}").endswith("expected a whole number with 0 <= x < 2**63")
    assert "with 0 <= x <= 1_000_000_000" in message_of("train.py", "--max_steps=1e30")
    assert config.load("sample.py", ["--temperature=1e30"]).flat()["temperature"] == 1e30
    assert "below 1.8e308" in message_of("sample.py", "--temperature=1e400")
    assert "with -1000 <= x <= 1000" in message_of("sample.py", "--presence_penalty=1e30")
    assert "with 0.01 <= x <= 100" in message_of("sample.py", "--repetition_penalty=1e-30")


@pytest.mark.parametrize("flag", ["--logprobs=3", "--port=9000", "--host=localhost", "--api_token=12345678"])
def test_a_flag_without_effect_is_an_error(flag):
    assert "has no effect with" in message_of("sample.py", flag)
    assert config.load("sample.py", [flag, "--output=jsonl" if "logprobs" in flag else "--serve"])


# ---- --help


@pytest.mark.parametrize("columns", [30, 60, 80, 100, 200])
@pytest.mark.parametrize("script", config.SCRIPTS)
def test_help_shows_every_word_in_the_width_of_the_terminal(script, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        config.load(script, ["--help"])
    text = capsys.readouterr().out
    words = " ".join(text.split())
    for option in config._loader.own(script).values():
        assert option.help in words
    options = text.partition("\noptions")[2]
    cells = {f"  --{option.name}={option.usage()}" for option in config._loader.own(script).values()}
    lines = [line for line in options.splitlines() if line not in cells and line.strip()]
    assert max(map(len, lines)) < min(max(columns, MIN_WIDTH + 1), MAX_WIDTH + 1)


def test_help_without_a_terminal_has_a_plain_width(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    with pytest.raises(SystemExit):
        config.load("train.py", ["--help"])
    options = capsys.readouterr().out.partition("\noptions")[2]
    assert 90 < max(map(len, options.splitlines())) <= 100
