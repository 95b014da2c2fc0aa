"""sample.py --interactive: typed lines, commands, and Ctrl-C in a pseudo-terminal."""

import os
import re
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

import config
from common.tokenizer import char_tokenizer
from errors import UserError
from generation.interactive import interact
from sample import read_sampling
from tests.conftest import ROOT
from tests.test_generation import tiny_model
from tests.test_sample import save

TOKENIZER = char_tokenizer("abcdefghijklmnopqrstuvwxyz /")
ARGV = ["--temperature=1", "--max_new_tokens=12", "--stop_at_eos=false", "--seed=5"]


@pytest.fixture
def session(monkeypatch, capsys):
    """Runs a session with these lines and returns what it printed (out, err)."""
    model = tiny_model(torch.float32, vocab_size=TOKENIZER.vocab_size, eos_id=TOKENIZER.eos_id, scale=4.0)

    def run(*lines, prompt="", argv=ARGV, tokenizer=TOKENIZER):
        remaining = iter(lines)

        def read_line(prompt):
            line = next(remaining, EOFError)
            if isinstance(line, type):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read_line)
        assert (
            interact(model, tokenizer, prompt, lambda flags: read_sampling(config.load("sample.py", [*argv, *flags])))
            == 0
        )
        return capsys.readouterr()

    run.model = model
    return run


def test_the_model_continues_each_line_and_an_empty_line_continues_the_text(session):
    argv = [*ARGV, "--temperature=0"]
    out, err = session("once ", "", "upon", "/text", argv=argv)
    first, second, third, text, end = out.split("\n") if out.count("\n") == 4 else pytest.fail(out)
    assert text == "once " + first + second + "upon" + third
    assert end == ""
    assert err.count("(length, 12 tokens)") == 3
    whole = session("/max_new_tokens 24", "once ", argv=argv).out
    assert whole == first + second + "\n"  # the same text in one answer


def test_a_trailing_backslash_joins_two_lines(session):
    argv = [*ARGV, "--max_new_tokens=0"]
    assert session("//a", "b", "/text", argv=argv).out == "\n\n/ab\n"
    lines = char_tokenizer("onceup \n")
    assert session("once\\", "\\", "upon", "/text", argv=argv, tokenizer=lines).out == "\nonce\n\nupon\n"


def test_retry_replaces_the_answer_and_undo_removes_the_turn(session):
    out = session("once ", "/retry", "/retry", "/text").out.split("\n")
    assert len({*out[:3]}) == 3
    assert out[3] == "once " + out[2]
    out = session("once ", "upon", "/undo", "/text").out.split("\n")
    assert out[2] == "once " + out[0]
    out, err = session("/undo", "/retry")
    assert out == ""
    assert err.count("the text is empty") == 2


def test_commands_set_options_as_flags_do(session):
    out, err = session(
        "/temperature 0", "once ", "/options", "/seed 9", "/options", "/temperature -1", "/top_p", "/nonsense", "/help"
    )
    assert "temperature = 0.0" in err
    assert "seed = 5" in err
    assert "seed = 9" in err
    assert "--temperature=-1: expected a number >= 0" in err
    assert "/top_p: its value is missing; /help lists the commands" in err
    assert "/nonsense: unknown command; /help lists the commands" in err
    assert "Ctrl-C stops the model" in err
    assert session("once ", argv=[*ARGV, "--temperature=0"]).out == out


def test_after_end_of_sequence_the_next_line_starts_a_new_document(session, monkeypatch):
    with torch.no_grad():
        session.model.head.weight[TOKENIZER.eos_id] += 5 * session.model.head.weight.abs().max()
    out, err = session("once ", "once ", argv=["--temperature=3", "--max_new_tokens=300", "--seed=1"])
    assert err.count("(end of sequence, ") == 2
    assert "(the document has ended; this starts a new one)" in err
    first, second, _ = out.split("\n")
    assert first == second


def test_new_starts_a_new_document_and_errors_leave_the_text_unchanged(session):
    out, err = session("once ", "Ünknown", "/text", "/new", "/text", "once ")
    first, text, empty, again, end = out.split("\n")
    assert "the char tokenizer knows" in err
    assert (text, empty, again, end) == ("once " + first, "", first, "")
    with pytest.raises(UserError, match="the char tokenizer knows"):
        session(prompt="É")


def test_ctrl_c_at_the_prompt_drops_the_line_and_prompt_starts_the_text(session):
    out, err = session("unfinished\\", KeyboardInterrupt, "/text", "/quit", "never read", prompt="once ")
    assert "(Ctrl-D quits)" in err
    assert out.startswith("once ")
    assert out.split("\n")[1].startswith("once ")
    assert "unfinished" not in out


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
def test_ctrl_c_at_a_terminal_stops_the_answer_and_keeps_its_text(tmp_path):
    """Line editing (Ctrl-A, arrow up), Ctrl-C in the middle of an answer, Ctrl-D."""
    import pty

    save(tmp_path / "run", 5, TOKENIZER)
    options = "--interactive", "--max_new_tokens=1_000_000", "--stop_at_eos=false"
    command = [sys.executable, ROOT / "sample.py", f"--run={tmp_path / 'run'}", *options]
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, preexec_fn=partial(os.login_tty, slave)
    )
    os.close(slave)
    seen = ""

    def until(pattern):
        nonlocal seen
        deadline = time.monotonic() + 60
        while not re.search(pattern, seen, re.S):
            assert time.monotonic() < deadline, f"waiting for {pattern!r}, saw {seen[-500:]!r}"
            seen += os.read(master, 65536).decode(errors="replace")
        found, seen = seen, ""
        return found

    try:
        until("> $")
        os.write(master, b"pon a\x01u\x05 time\n")  # typed "pon a", to the start, "u", to the end, " time"
        until("[a-z /]{200}")
        os.write(master, b"\x03")
        until(r"\(stopped, [0-9]+ tokens\).*> $")
        os.write(master, b"/text\n")
        assert "upon a time" in until("> $")
        os.write(master, b"/max_new_tokens 5\n\x1b[A\x1b[A\x1b[A\n")  # the first line again
        assert "upon a time" in until(r"\(length, 5 tokens\).*> $")
        os.write(master, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)
