"""terminal.py: a terminal gets control characters as symbols from every script; files and pipes get the bytes."""

import ast
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from common.tokenizer import bytes_tokenizer, char_tokenizer
from terminal import visible
from tests.conftest import ROOT
from tests.test_floors import sources
from tests.test_sample import save

needs_pty = pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
HOSTILE = "red \x1b[31m bell \x07 shift \x0e back \b del \x7f C1 \x9b31m title \x1b]0;x\x07 \x90q bidi \u202e\u2066 \r."
SHOWN = r"red ␛[31m bell ␇ shift ␎ back ␈ del ␡ C1 \x9b31m title ␛]0;x␇ \x90q bidi \u202e\u2066 ␍."


def in_terminal(*command, feed=b"", **variables) -> tuple[int, str]:
    """Runs a command in a pseudo-terminal. Returns its exit code and all that the terminal got, without \\r\\n."""
    import pty

    master, slave = pty.openpty()
    environment = os.environ | variables
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment,
        preexec_fn=partial(os.login_tty, slave),
    )
    os.close(slave)
    os.write(master, feed)
    got, deadline = b"", time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            data = os.read(master, 65536)
        except OSError:  # the terminal was closed by its last process
            break
        if not data:
            break
        got += data
    os.close(master)
    return process.wait(timeout=60), got.decode(errors="surrogateescape").replace("\r\n", "\n")


def script(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("runs")
    save(home / "bytes", 5, bytes_tokenizer())
    save(home / "char", 5, char_tokenizer(HOSTILE))
    return home


# ---- The function ----------------------------------------------------------------------------------------------------


def test_every_control_character_has_a_symbol_and_other_text_stays():
    for code in (*range(0x3000), *range(0xD800, 0xE100), *range(0x1F300, 0x1F400)):
        char = chr(code)
        shown = visible(char)
        assert not CONTROL.search(shown)
        assert (shown != char) == bool(CONTROL.match(char)), (code, shown)
    assert visible(HOSTILE) == SHOWN
    assert visible("a\r\nb\tc\n") == "a\r\nb\tc\n"
    assert visible("\r\r\n\n\r") == "␍\r\n\n␍"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "gb18030", "utf-8"])
def test_the_symbols_fit_the_encoding(encoding):
    shown = visible(HOSTILE, encoding)
    assert not CONTROL.search(shown)
    shown.encode(encoding)
    assert ("␛" in shown) == (encoding in ("gb18030", "utf-8"))
    assert ("\\x1b[31m" in shown) == (encoding not in ("gb18030", "utf-8"))


# ---- Scripts at a terminal and at a pipe -----------------------------------------------------------------------------

SAMPLES = "--max_new_tokens=400", "--temperature=1.5", "--stop_at_eos=false", "--prompt=" + HOSTILE


@needs_pty
@pytest.mark.parametrize("output", ["text", "jsonl"])
def test_samples_are_shown_with_symbols_at_a_terminal_and_unchanged_in_a_pipe(runs, output):
    """Random bytes: escape sequences and UTF-8 characters split over tokens, and bytes that are not UTF-8."""
    command = script("sample.py", f"--run={runs / 'bytes'}", "--num_samples=2", f"--output={output}", *SAMPLES)
    piped = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    code, got = in_terminal(*command)
    assert code == 0
    assert not CONTROL.search(got)
    first = piped.partition("\n---\n")[0]  # of text: notes on standard error come between the samples
    assert len(CONTROL.findall(first)) > (30 if output == "text" else 2)
    assert visible(first).replace("\r\n", "\n") in got


@needs_pty
def test_an_interactive_session_shows_symbols(runs):
    options = "--interactive", "--prompt=" + HOSTILE, "--max_new_tokens=300", "--temperature=2", "--stop_at_eos=false"
    feed = b"a\n/text\n/retry\n/temperature \x0b\n/quit\n"
    code, got = in_terminal(*script("sample.py", f"--run={runs / 'char'}", *options), feed=feed, TERM="dumb")
    assert code == 0
    answers = got.partition(SHOWN)[2]
    assert answers
    assert not CONTROL.search(answers.replace("\r", ""))  # readline's own
    assert "␛" in answers


@needs_pty
@pytest.mark.parametrize(
    "arguments",
    [
        ("sample.py", "--run=no\x1b[31m\x9brun"),
        ("train.py", "no\x1b[31m\x9bpreset"),
        ("-m", "prepare_data", "text", "--input=no\x1b[31m\x9binput"),
        ("-m", "training.report", "no\x1b[31m\x9brun"),
    ],
    ids=lambda arguments: " ".join(arguments[:-1]),
)
def test_messages_that_quote_the_user_show_symbols(tmp_path, arguments):
    code, got = in_terminal(*script(*arguments))
    assert code == 2
    assert "[31m" in got
    assert not CONTROL.search(got)


@needs_pty
def test_a_dry_run_a_training_and_its_progress_bars_show_symbols(tmp_path):
    """The text, its file's name and the run's name hold control characters; the log files get them unchanged."""
    folder = tmp_path / "data"
    text = tmp_path / "a\x1b[31m\x9b.txt"
    text.write_text((HOSTILE + "\n") * 400, encoding="utf-8")
    code, got = in_terminal(
        *script("-m", "prepare_data", "text", f"--input={text}", "--tokenizer=char", "--dry_run=true")
    )
    assert code == 0
    assert SHOWN in got
    assert "␛[31m" in got
    assert not CONTROL.search(got.replace("\r", "").replace("\x1b[A", ""))  # tqdm's own
    run, plain = tmp_path / "r\x1b[31m", text.rename(tmp_path / "a.txt")
    options = f"--data={plain}", f"--run={run}", f"--data_dir={folder}", "--tokenizer=char", "--max_steps=1"
    sampling = "--eval_interval=1", "--sample_prompt=" + HOSTILE
    code, got = in_terminal(*script("train.py", "debug", *options, *sampling))
    assert code == 0, got
    assert not CONTROL.search(got.replace("\r", "").replace("\x1b[A", ""))
    samples = (run / "samples.txt").read_bytes().decode()
    assert CONTROL.search(samples)
    assert "␛" not in samples


@needs_pty
def test_a_terminal_without_the_symbols_gets_ascii(runs):
    command = script("sample.py", f"--run={runs / 'char'}", "--max_new_tokens=0", "--prompt=\x1b[31m\x07")
    code, got = in_terminal(*command, PYTHONIOENCODING="latin-1")
    assert code == 0
    assert r"\x1b[31m\x07" in got
    assert "?" not in got.partition(r"\x1b[31m")[2]


def test_nothing_else_moves_a_cursor():
    """A progress bar or a line that is rewritten must go through terminal.py: elsewhere \\r becomes a symbol."""
    for path in sources():
        if path.startswith(("tests/", "bench/")) or path == "terminal.py":
            continue
        tree = ast.parse((ROOT / path).read_text("utf-8"))
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {name for name in imported if name and name.partition(".")[0] == "tqdm"}, path
