"""sample.py end to end on small checkpoints: output, prompts, and errors."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

import sample
from checkpoint import save_checkpoint
from common.tokenizer import Tokenizer, bytes_tokenizer, char_tokenizer
from common.weights import export_weights
from errors import UserError
from generation.prompts import has_trailing_space, print_texts
from generation.text import Piece, load_model, sample_texts
from model import GPT, GPTConfig
from tests.conftest import ROOT

CONFIG = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16)
CPU = torch.device("cpu")


def save(run, step, tokenizer, seed=0, val_loss=None, **changes):
    config = replace(CONFIG, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id, **changes)
    model = GPT(config, seed=seed)
    state = {} if val_loss is None else {"val_loss": val_loss}
    path = save_checkpoint(
        run,
        step,
        model=export_weights(model),
        config=config.to_dict(),
        tokenizer=tokenizer.to_dict(),
        optimizer={},
        state=state,
    )
    return path, model


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs/bytes with three checkpoints (the second is the best), runs/char with one."""
    home = tmp_path_factory.mktemp("文 und Leerzeichen")
    for step, loss in ((10, 2.5), (20, 1.25), (30, 1.5)):
        save(home / "runs" / "bytes", step, bytes_tokenizer(), seed=step, val_loss=loss)
    save(home / "runs" / "char", 5, char_tokenizer("abc \n世"))
    (home / "runs" / "empty").mkdir()
    return home / "runs"


def start(capsys, *argv):
    assert sample.main(list(argv)) == 0
    return capsys.readouterr()


def text_of(model_folder, prompt, **values):
    model, tokenizer = load_model(model_folder, CPU)
    defaults = {"num_samples": 1, "max_new_tokens": 30, "temperature": 0.8, "seed": 1337}
    return sample_texts(model, tokenizer, prompt, **(defaults | values))


def test_quantize_int8_generates_in_float32_on_a_cpu_only(runs, capsys):
    flags = [f"--run={runs / 'char'}", "--quantize=int8", "--max_new_tokens=9", "--stop_at_eos=false"]
    assert "9 tokens" in start(capsys, *flags).err
    with pytest.raises(UserError, match="--quantize=int8 works on a CPU in float32"):
        sample.main([*flags, "--dtype=bfloat16"])


# ---- output


def test_the_best_checkpoint_of_a_run_is_the_default(runs, capsys):
    out, err = start(capsys, f"--run={runs / 'bytes'}", "--prompt=Once ", "--max_new_tokens=30")
    (text, reason), *_ = text_of(runs / "bytes/checkpoints/step-00000020/model", "Once ")
    assert out == text + "\n"
    assert "step-00000020 (step 20, best, val loss 1.2500)" in err
    assert "device cpu" in err
    assert re.search(rf"sample 1: {reason}, \d+ tokens\n\d+ tokens in [\d.]+ s: [\d.]+ tokens/s\n$", err)


@pytest.mark.parametrize(("which", "step"), [("latest", 30), ("step-10", 10), ("best", 20)])
def test_checkpoints_by_name(runs, capsys, which, step):
    _, err = start(capsys, f"--run={runs / 'bytes'}", f"--checkpoint={which}", "--max_new_tokens=1")
    label = "" if which == "step-10" else f" {which},"
    assert f"(step {step},{label} val loss" in err


def test_run_may_be_a_checkpoint_or_a_model_folder_and_defaults_to_the_newest_run(runs, capsys, tmp_path, monkeypatch):
    checkpoint = runs / "bytes/checkpoints/step-00000030"
    shutil.copytree(checkpoint / "model", tmp_path / "exported")
    outputs = [
        start(capsys, f"--run={path}", "--max_new_tokens=20")
        for path in (checkpoint, checkpoint / "model", tmp_path / "exported")
    ]
    assert outputs[0].out == outputs[1].out == outputs[2].out
    assert all("(step 30, val loss 1.5000)" in output.err for output in outputs[:2])
    assert f"model folder {tmp_path / 'exported'}" in outputs[2].err
    monkeypatch.chdir(runs.parent)
    assert "runs/char/checkpoints/step-00000005 (step 5, latest, no val loss)" in start(
        capsys, "--max_new_tokens=2"
    ).err.replace("\\", "/")


def test_samples_are_printed_in_order_and_do_not_depend_on_their_number(runs, capsys):
    flags = [f"--run={runs / 'bytes'}", "--prompt=x", "--temperature=2", "--max_new_tokens=200"]
    out, err = start(capsys, *flags, "--num_samples=4")
    texts = [
        text
        for text, _ in text_of(
            runs / "bytes/checkpoints/step-00000020/model", "x", num_samples=4, max_new_tokens=200, temperature=2
        )
    ]
    assert out == "\n---\n".join(texts) + "\n"
    assert re.findall(r"^sample (\d): (?:end of sequence|length), \d+ tokens$", err, re.M) == ["1", "2", "3", "4"]
    assert start(capsys, *flags).out == texts[0] + "\n"
    assert start(capsys, *flags, "--seed=1").out != texts[0] + "\n"


def test_the_first_unfinished_sample_is_streamed_and_later_ones_wait(capsys):
    def pieces():
        for sample_, text, reason, printed in [
            (0, "a", None, "P a"),
            (1, "b", None, "P a"),
            (1, "", "length", "P a"),
            (2, "c", None, "P a"),
            (0, "d", None, "P ad"),
            (0, "!", "length", "P ad!\n---\nP b\n---\nP c"),
            (2, "e", None, "P ad!\n---\nP b\n---\nP ce"),
            (2, "", "end of sequence", "P ad!\n---\nP b\n---\nP ce\n"),
        ]:
            yield Piece(sample_, text, () if reason else (None,), reason)
            shown.append(capsys.readouterr().out)
            assert "".join(shown) == printed

    shown = []
    assert print_texts(pieces(), ["P "] * 3) == 5


def test_prompts_from_a_file_and_from_standard_input(runs, capsys, tmp_path, monkeypatch):
    (tmp_path / "ein Brief é.txt").write_bytes(b"\xef\xbb\xbfabc \xe4\xb8\x96\n")
    flags = [f"--run={runs / 'char'}", "--max_new_tokens=5"]
    expected = start(capsys, *flags, "--prompt=abc 世\n").out
    assert expected.startswith("abc 世\n")
    assert start(capsys, *flags, f"--prompt_file={tmp_path / 'ein Brief é.txt'}").out == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("abc 世\n".encode())))
    assert start(capsys, *flags, "--prompt_file=-").out == expected


def test_json_lines_in_and_out(runs, capsys, tmp_path, monkeypatch):
    path = tmp_path / "my prompts.jsonl"
    path.write_text('"abc"\n\n{"prompt": "世\\n", "id": {"row": 7}}\n{"prompt": ""}\n', encoding="utf-8")
    flags = [f"--run={runs / 'char'}", "--max_new_tokens=40", "--num_samples=2", "--temperature=1.5", "--output=jsonl"]
    out, err = start(capsys, *flags, f"--prompts={path}", "--logprobs=2")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["prompt"], line["sample"], line.get("id")) for line in lines] == [
        ("abc", 0, None),
        ("abc", 1, None),
        ("世\n", 0, {"row": 7}),
        ("世\n", 1, {"row": 7}),
        ("", 0, None),
        ("", 1, None),
    ]
    tokenizer = char_tokenizer("abc \n世")
    for line in lines:  # the same as with its prompt alone
        texts = text_of(
            runs / "char/checkpoints/step-00000005/model",
            line["prompt"],
            num_samples=2,
            max_new_tokens=40,
            temperature=1.5,
        )
        text, reason = texts[line["sample"]]
        assert (line["prompt"] + line["text"], line["finish_reason"]) == (text, reason)
        assert tokenizer.decode(line["ids"]) == line["text"]
        assert (tokenizer.eos_id in line["ids"][-1:]) == (reason == "end of sequence")
        assert tokenizer.eos_id not in line["ids"][:-1]
        assert len(line["ids"]) == len(line["logprobs"]) == len(line["top_logprobs"])
        for logprob, top in zip(line["logprobs"], line["top_logprobs"], strict=True):
            assert logprob <= top[0]["logprob"] + 1e-6 <= 0.000001
            assert [alternative["text"] for alternative in top] == [
                tokenizer.decode([alternative["id"]]) for alternative in top
            ]
    assert "end of sequence" in {line["finish_reason"] for line in lines}
    assert f"{sum(len(line['ids']) for line in lines)} tokens in" in err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    assert start(capsys, *flags, "--prompts=-", "--logprobs=2").out == out
    without = [json.loads(line) for line in start(capsys, *flags, f"--prompts={path}").out.splitlines()]
    assert without == [{key: value for key, value in line.items() if "logprobs" not in key} for line in lines]
    texts = start(capsys, *flags[:-1], f"--prompts={path}").out
    assert texts == "\n---\n".join(line["prompt"] + line["text"] for line in lines) + "\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'"a"\n{"prompt": 5}\n', r", line 2: no prompt text; expected a string, or an object with .prompt."),
        (b'"a"\n{"text": "b"}\n', r", line 2: no prompt text"),
        (b'{"prompt": "b", "n": 2}\n', r", line 1: unknown key 'n'"),
        (b"a\n", r", line 1: not JSON .*expected a line like"),
        (b"[" * 100_000, r", line 1: not JSON"),
        (b'{"prompt": "a", "id": NaN}', r", line 1: not JSON .NaN is not a JSON number"),
        (b"null\n", r", line 1: no prompt text"),
        (b" \n\n", r"the file has no prompts"),
        (b'"a"\n"\\ud800"\n', r", line 2: the text is not valid Unicode"),
        (b'"a"\n"z"\n', r", line 2: the char tokenizer knows .* but not 'z'"),
        (b'"\xff"\n', r"not UTF-8: byte 0xff at offset 1"),
    ],
    ids=[
        "a number",
        "no prompt",
        "unknown key",
        "not JSON",
        "deep",
        "NaN",
        "null",
        "empty",
        "surrogate",
        "unknown character",
        "not UTF-8",
    ],
)
def test_bad_files_of_prompts(runs, capsys, tmp_path, content, message):
    (tmp_path / "p q.jsonl").write_bytes(content)
    flags = f"--run={runs / 'char'}", f"--prompts={tmp_path / 'p q.jsonl'}"
    assert re.search(r"--prompts=.*p q\.jsonl.*" + message, bad(capsys, *flags))


def test_has_trailing_space_depends_on_the_vocabulary():
    words = Tokenizer("made up", "gpt2", [b"a", b" ", b" a", None], 3)
    assert has_trailing_space(words, "a ")
    assert not any(has_trailing_space(words, prompt) for prompt in ("", "a", " a", "a  "))
    assert not has_trailing_space(bytes_tokenizer(), "a ")
    assert not has_trailing_space(char_tokenizer("a "), "a ")


def test_options_that_contradict_each_other(capsys):
    assert "--prompt and --prompts each set the prompt" in bad(capsys, "--prompt=a", "--prompts=b")
    assert "--interactive reads from the keyboard" in bad(capsys, "--interactive", "--prompt_file=-")
    assert "--interactive shows one sample" in bad(capsys, "--interactive", "--num_samples=2")
    assert "--min_new_tokens=9 is more than --max_new_tokens=5" in bad(
        capsys, "--min_new_tokens=9", "--max_new_tokens=5"
    )
    assert "--stop= is empty" in bad(capsys, "--stop=")


def test_stop_strings_of_the_command_line_are_unescaped(runs, capsys):
    flags = [f"--run={runs / 'char'}", "--temperature=1.5", "--max_new_tokens=300", "--stop_at_eos=false", "--prompt=a"]
    whole = start(capsys, *flags).out.removesuffix("\n")
    out, err = start(capsys, *flags, r"--stop=\n", "--stop=ba")
    expected = "a" + re.split("\n|ba", whole[1:])[0]
    assert len(expected) < len(whole)
    assert out == expected + "\n"
    assert f"sample 1: stop string, {len(expected) - 1} tokens" in err


def test_no_new_tokens_prints_the_prompt(runs, capsys):
    out, err = start(capsys, f"--run={runs / 'char'}", "--prompt=abc", "--max_new_tokens=0")
    assert out == "abc\n"
    assert "sample 1: length, 0 tokens" in err


def test_dtype_bfloat16_on_a_cpu(runs, capsys):
    out, err = start(capsys, f"--run={runs / 'bytes'}", "--dtype=bfloat16", "--max_new_tokens=40")
    assert out
    assert "bfloat16" in err


# ---- bad input


def bad(capsys, *argv):
    with pytest.raises(UserError) as error:
        sample.main(list(argv))
    assert capsys.readouterr().out == "", "the error comes before any text"
    return str(error.value)


def test_missing_runs_and_checkpoints(runs, capsys, tmp_path, monkeypatch):
    assert re.search(r"runs.nowhere does not exist.*python train.py", bad(capsys, f"--run={runs / 'nowhere'}"))
    assert re.search(r"runs.empty has no checkpoint.*python train.py", bad(capsys, f"--run={runs / 'empty'}"))
    assert re.search(
        r"'step-11' is not in .*best, latest, step-10", bad(capsys, f"--run={runs / 'bytes'}", "--checkpoint=step-11")
    )
    assert "did you mean" in bad(capsys, "--temprature=1")
    monkeypatch.chdir(tmp_path)
    assert "no run with a checkpoint in runs" in bad(capsys)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "sprout_tokenizer.json"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:]]
)
def test_damaged_checkpoints(runs, capsys, tmp_path, name, damage):
    shutil.copytree(runs / "char", tmp_path / "run")
    path = next((tmp_path / "run").glob(f"checkpoints/*/model/{name}"))
    path.write_bytes(damage(path.read_bytes()))
    assert name in bad(capsys, f"--run={tmp_path / 'run'}")


def test_model_folders_with_files_of_two_models(runs, capsys, tmp_path):
    bytes_model, char_model = (
        runs / "bytes/checkpoints/step-00000010/model",
        runs / "char/checkpoints/step-00000005/model",
    )
    for name, message in {
        "sprout_tokenizer.json": "257 ids with end-of-sequence 256, its tokenizer 7 with 6",
        "model.safetensors": r"'embed.weight' has the shape \(7, 16\), this model has \(257, 16\)",
    }.items():
        shutil.copytree(bytes_model, tmp_path / "mixed")
        shutil.copy(char_model / name, tmp_path / "mixed")
        assert re.search(message, bad(capsys, f"--run={tmp_path / 'mixed'}"))
        shutil.rmtree(tmp_path / "mixed")
    shutil.copytree(bytes_model, tmp_path / "mixed")
    for text, message in {
        '{"n_layers": 1}': "unknown options",
        '{"n_layer": "1"}': "n_layer='1'",
        '{"n_embd": 7}': "not divisible",
    }.items():
        (tmp_path / "mixed/config.json").write_text(text)
        assert message in bad(capsys, f"--run={tmp_path / 'mixed'}")


def test_weights_that_are_not_finite(capsys, tmp_path):
    tokenizer = bytes_tokenizer()
    model = GPT(replace(CONFIG, vocab_size=257, eos_id=256))
    weights = {name: torch.full_like(tensor, torch.nan) for name, tensor in export_weights(model).items()}
    content = {"model": weights, "config": model.config.to_dict(), "tokenizer": tokenizer.to_dict()}
    save_checkpoint(tmp_path, 1, **content, optimizer={}, state={})
    for flag in ("--temperature=0", "--temperature=1"):
        assert "weights are not finite" in bad(capsys, f"--run={tmp_path}", flag)


def test_bad_prompts(runs, capsys, tmp_path, monkeypatch):
    flag = f"--run={runs / 'char'}"
    assert re.search("knows 6 characters, but not 'x', 'é'", bad(capsys, flag, "--prompt=abcéx"))
    assert "--prepend_eos=false" in bad(capsys, flag, "--prepend_eos=false")
    assert "--prompt_file" in bad(capsys, flag, "--prompt=a", "--prompt_file=-")
    assert "surrogate" in bad(capsys, f"--run={runs / 'bytes'}", "--prompt=a\udcff")
    assert re.search(
        "missing.txt cannot be read: No such file", bad(capsys, flag, f"--prompt_file={tmp_path / 'missing.txt'}")
    )
    (tmp_path / "gb.txt").write_bytes("abc世界".encode("gb18030"))
    assert re.search(
        r"gb.txt is not UTF-8: byte 0xca at offset 3.*GB18030",
        bad(capsys, flag, f"--prompt_file={tmp_path / 'gb.txt'}"),
    )
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert "offset 2" in bad(capsys, flag, "--prompt_file=-")


def test_options_that_do_not_fit_the_model(runs, capsys):
    assert re.search("keep_head=16 .*block_size=16", bad(capsys, f"--run={runs / 'char'}", "--keep_head=16"))


# ---- the process


def process(runs, *flags, command=(sys.executable, sample.__file__), **kwargs):
    command = [*command, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": runs.parent} | kwargs
    return subprocess.Popen(command, **pipes)


def test_errors_are_one_line_and_exit_code_2(runs):
    child = process(runs, "--run=nowhere", text=True, encoding="utf-8")
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (2, "")
    assert re.fullmatch("error: .*nowhere does not exist.*\n", err)


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes and signals")
def test_a_closed_pipe_and_an_interrupt_end_without_traceback(runs):
    endless = ("--run=runs/bytes", "--max_new_tokens=1e9", "--stop_at_eos=false")
    piped, interrupted = process(runs, *endless), process(runs, *endless)
    for child in (piped, interrupted):
        assert child.stdout.read(3)
    piped.stdout.close()
    interrupted.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 30
    for child, code, last in ((piped, 0, "device"), (interrupted, 130, "interrupted")):
        assert child.wait(timeout=max(1, deadline - time.monotonic())) == code
        message = child.stderr.read().decode()
        assert last in message.splitlines()[-1]
        assert "Traceback" not in message
        child.stderr.close()
    interrupted.stdout.close()


def test_a_sample_imports_nothing_that_it_does_not_use(runs):
    """The first token waits for the imports: torch takes over a second, and nothing else should be noticed."""
    program = (
        "import sys, sample; sample.main(['--run=runs/char', '--max_new_tokens=1']);"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = process(runs, command=[sys.executable, "-c", program], env=environment, text=True)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    imported = set(out.splitlines()[-1].split())
    unused = {"anyio", "charset_normalizer", "filelock", "inspection", "matplotlib", "requests", "rustbpe", "starlette"}
    assert {"torch", "tiktoken"} <= imported
    assert not imported & (unused | {"sympy", "tensorboard", "trackio", "triton", "uvicorn", "wandb"})


@pytest.mark.parametrize("positions", ["learned", "rotary", "sinusoidal"])
def test_a_model_for_weights_is_built_without_the_compiler(positions):
    """torch's compiler and sympy take over a second to import; some operations on the meta device do so."""
    program = (
        "import sys; from common.weights import build_for_weights, export_weights; from model import GPT, GPTConfig;"
        f"config = GPTConfig(positions={positions!r}, n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=9,"
        "eos_id=8); build_for_weights(config, export_weights(GPT(config))); print('sympy' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, text=True, capture_output=True, check=True)
    assert done.stdout == "False\n"


def test_output_is_utf8_whatever_the_console_encoding(runs):
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    child = process(runs, "--run=runs/char", "--prompt=世", "--max_new_tokens=0", env=environment)
    out, _ = child.communicate(timeout=60)
    assert (child.returncode, out.decode().rstrip()) == (0, "世")


@pytest.mark.parametrize(
    ("place", "facts"),
    [
        ("", "step 20, best, val loss 1.2500"),
        ("checkpoints/step-00000030", "step 30, val loss 1.5000"),
        ("checkpoints/step-00000030/model", "step 30, val loss 1.5000"),
        ("checkpoints/step-00000030/model/config.json", "step 30, val loss 1.5000"),
    ],
)
def test_the_first_line_says_which_checkpoint_was_taken_and_why(runs, capsys, place, facts):
    first = start(capsys, f"--run={runs / 'bytes' / place}", "--max_new_tokens=1").err.splitlines()[0]
    assert f"({facts})" in first
    only = start(capsys, f"--run={runs / 'char'}", "--max_new_tokens=1").err.splitlines()[0]
    assert "(step 5, latest, no val loss)" in only
