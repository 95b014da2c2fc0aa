"""sample.py --interactive: the lines of a session, its commands, and Ctrl-C at a real terminal."""

import os
import re
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from common.tokenizer import char_tokenizer
from errors import UserError
from generation.interactive import interact
from sample import changed
from tests.conftest import ROOT
from tests.test_generation import tiny_model
from tests.test_sample import save

TOKENIZER = char_tokenizer("abcdefghijklmnopqrstuvwxyz /")
ARGV = ["--temperature=1", "--max_new_tokens=12", "--stop_at_eos=false", "--seed=5"]


@pytest.fixture
def session(monkeypatch, capsys):
    """What a session with these lines prints on standard output and on standard error."""
    model = tiny_model(torch.float32, vocab_size=TOKENIZER.vocab_size, eos_id=TOKENIZER.eos_id, scale=4.0)

    def run(*lines, prompt="", argv=ARGV, tokenizer=TOKENIZER):
        rest = iter(lines)

        def typed(prompt):
            line = next(rest, EOFError)
            if isinstance(line, type):
                raise line
            return line

        monkeypatch.setattr("builtins.input", typed)
        assert interact(model, tokenizer, prompt, lambda flags: changed(argv, flags)) == 0
        return capsys.readouterr()

    run.model = model
    return run


def test_the_model_goes_on_from_each_line_and_an_empty_one_lets_it_write_on(session):
    argv = [*ARGV, "--temperature=0"]
    out, err = session("once ", "", "upon", "/text", argv=argv)
    first, second, third, text, end = out.split("\n") if out.count("\n") == 4 else pytest.fail(out)
    assert text == "once " + first + second + "upon" + third
    assert end == ""
    assert err.count("(length, 12 tokens)") == 3
    whole = session("/max_new_tokens 24", "once ", argv=argv).out
    assert whole == first + second + "\n"  # as if it had never stopped


def test_a_line_that_ends_with_a_backslash_goes_on_in_the_next(session):
    argv = [*ARGV, "--max_new_tokens=0"]
    assert session("//a", "b", "/text", argv=argv).out == "\n\n/ab\n"
    lines = char_tokenizer("onceup \n")
    assert session("once\\", "\\", "upon", "/text", argv=argv, tokenizer=lines).out == "\nonce\n\nupon\n"


def test_retry_draws_another_answer_and_undo_takes_it_back(session):
    out = session("once ", "/retry", "/retry", "/text").out.split("\n")
    assert len({*out[:3]}) == 3
    assert out[3] == "once " + out[2]
    out = session("once ", "upon", "/undo", "/text").out.split("\n")
    assert out[2] == "once " + out[0]
    out, err = session("/undo", "/retry")
    assert out == ""
    assert err.count("nothing was written yet") == 2


def test_commands_change_options_as_flags_do(session):
    out, err = session(
        "/temperature 0", "once ", "/options", "/seed 9", "/options", "/temperature -1", "/top_p", "/nonsense", "/help"
    )
    assert "temperature = 0.0" in err
    assert "seed = 5" in err
    assert "seed = 9" in err
    assert "--temperature=-1: expected a number >= 0" in err
    assert "/top_p: no such command, or its value is missing" in err
    assert "/nonsense: no such command; /help lists them" in err
    assert "Ctrl-C stops it" in err
    assert session("once ", argv=[*ARGV, "--temperature=0"]).out == out


def test_the_end_of_a_document_begins_a_new_one(session, monkeypatch):
    with torch.no_grad():
        session.model.head.weight[TOKENIZER.eos_id] += 5 * session.model.head.weight.abs().max()
    out, err = session("once ", "once ", argv=["--temperature=3", "--max_new_tokens=300", "--seed=1"])
    assert err.count("(end of sequence, ") == 2
    assert "(the document has ended; this begins a new one)" in err
    first, second, _ = out.split("\n")
    assert first == second


def test_new_begins_a_new_document_and_errors_leave_the_text_as_it_is(session):
    out, err = session("once ", "Ünknown", "/text", "/new", "/text", "once ")
    first, text, empty, again, end = out.split("\n")
    assert "the char tokenizer knows" in err
    assert (text, empty, again, end) == ("once " + first, "", first, "")
    with pytest.raises(UserError, match="the char tokenizer knows"):
        session(prompt="É")


def test_an_interrupt_at_the_prompt_stays_and_a_prompt_is_the_beginning(session):
    out, err = session("unfinished\\", KeyboardInterrupt, "/text", "/quit", "never read", prompt="once ")
    assert "(Ctrl-D leaves)" in err
    assert out.startswith("once ")
    assert out.split("\n")[1].startswith("once ")
    assert "unfinished" not in out


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
def test_ctrl_c_at_a_terminal_stops_the_answer_and_what_was_written_stays(tmp_path):
    """A real terminal: line editing (Ctrl-A, arrow up), Ctrl-C in the middle of an answer, Ctrl-D."""
    import pty

    save(tmp_path / "run", 5, TOKENIZER)
    options = "--interactive", "--max_new_tokens=1_000_000", "--stop_at_eos=false"
    command = [sys.executable, ROOT / "sample.py", f"--run={tmp_path / 'run'}", *options]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=partial(os.login_tty, theirs)
    )
    os.close(theirs)
    seen = ""

    def until(pattern):
        nonlocal seen
        deadline = time.monotonic() + 60
        while not re.search(pattern, seen, re.S):
            assert time.monotonic() < deadline, f"waiting for {pattern!r}, saw {seen[-500:]!r}"
            seen += os.read(ours, 65536).decode(errors="replace")
        found, seen = seen, ""
        return found

    try:
        until("> $")
        os.write(ours, b"pon a\x01u\x05 time\n")  # typed "pon a", to the start, "u", to the end, " time"
        until("[a-z /]{200}")
        os.write(ours, b"\x03")
        until(r"\(stopped, [0-9]+ tokens\).*> $")
        os.write(ours, b"/text\n")
        assert "upon a time" in until("> $")
        os.write(ours, b"/max_new_tokens 5\n\x1b[A\x1b[A\x1b[A\n")  # the first line again
        assert "upon a time" in until(r"\(length, 5 tokens\).*> $")
        os.write(ours, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
