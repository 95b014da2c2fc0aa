"""training/report.py: a page and an image of any run, in any state; text from outside is escaped."""

import json
import subprocess
import sys
import warnings
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest

from errors import UserError
from tests.conftest import ROOT
from training.report import main, read_facts, read_metrics

OPTIONS = {"data": "notes", "max_steps": 50, "tokens_per_step": 512}
OPTIONS |= {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32}


def step(at, loss=3.0, seconds=None, **fields):
    timing = {"tokens_per_second": 50_000, "seconds": at / 10 if seconds is None else seconds, "memory_bytes": 1}
    values = {"loss": loss, "learning_rate": 0.01, "grad_norm": 0.5, "timing": timing}
    return {"event": "step", "step": at, **values, **fields}


def evaluation(at, val_loss=3.1, event="eval", error=0.02):
    scores = {
        "val_loss": val_loss,
        "standard_error": error,
        "perplexity": 22.2,
        "bits_per_byte": 1.5,
        "targets": 16_383,
    }
    return {"event": event, "step": at, **scores, "train_loss": None}


def skip(at):
    return {"event": "skip", "step": at, "loss": "nan", "grad_norm": "nan"}


def make_run(path, lines, tail="", samples=None, options=OPTIONS):
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail, encoding="utf-8")
    if samples is not None:
        (path / "samples.txt").write_bytes(samples)
    if options is not None:
        (path / "config.json").write_text(json.dumps({"format": "sprout-config", "options": options}), encoding="utf-8")
    return path


class Page(HTMLParser):
    """Tags, links and text of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.links, self.text = set(), [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def report(run):
    """Writes the report with warnings as errors, and returns the page."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main([str(run)]) == 0
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(run.glob("*.writing"))
    page = Page(run / "report.html")
    assert [link[:22] for link in page.links] == ["data:image/png;base64,"], "the page must be self-contained"
    return page


NORMAL = [
    evaluation(0, 5.4),
    step(10, 4.0),
    step(20),
    evaluation(25, 2.9),
    step(30),
    evaluation(50, 3.0),
    evaluation(50, 3.05, "final"),
]
NOISY = [step(at, 3 + np.sin(at) / 9) for at in range(10, 5000, 10)]


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param(NORMAL, id="finished"),
        pytest.param([step(10)], id="one step"),
        pytest.param([evaluation(0)], id="one evaluation"),
        pytest.param([skip(0)], id="only a skipped update"),
        pytest.param([step(10, float("nan")), evaluation(10, float("nan"))], id="nothing finite"),
        pytest.param(
            [
                *NOISY,
                step(5000, 1e300, grad_norm=float("inf")),
                step(5010, 1e5),
                evaluation(4000),
                evaluation(5000, 1e308),
            ],
            id="huge",
        ),
        pytest.param(
            [{"event": "step", "step": 5}, {"event": "eval", "step": 5}, {"event": "new", "step": 6}, [1]],
            id="fields missing",
        ),
    ],
)
@pytest.mark.parametrize("options", [OPTIONS, None], ids=["config", "no config"])
def test_every_state_of_a_run_has_a_report_without_warnings(tmp_path, lines, options):
    page = report(make_run(tmp_path / "run", lines, options=options))
    last = max(line["step"] for line in lines if isinstance(line, dict) and line["event"] != "new")
    assert (f"step {last:,} of 50" in page.text) == (options is not None)


def test_the_page_shows_the_results(tmp_path):
    text = report(make_run(tmp_path / "my run 1", NORMAL, samples=b"==== step 50 (eos) ====\nhello\n\n")).text
    for part in (
        "my run 1",
        "2.9000 ± 0.0200",
        "(step 25, 16,383 tokens)",
        "3.0500 ± 0.0200",
        "50 of 50",
        "25,600, 512 per",
        "notes",
        "hello",
    ):
        assert part in text
    assert "Time budget" not in text, "rows about unknown facts are omitted"


def test_a_loss_without_an_error_estimate_is_shown_without_one(tmp_path):
    lines = [step(10), evaluation(25, 2.9, error=None), evaluation(25, 2.8, "final", error=None)]
    run = make_run(tmp_path / "run", lines)
    text = report(run).text
    for loss in ("2.9000", "2.8000"):
        assert f"{loss} (no error estimate), 1.5000 bits per byte" in text
    assert "±" not in text


def test_text_is_escaped_and_only_the_last_steps_samples_are_shown(tmp_path):
    sample = "紅樓夢 <script>x</script> &amp;"
    samples = f"==== step 0 (length) ====\nold\n\n==== step 25 (length) ====\n{sample}\x00\x1b".encode() + b"\xe7\xb4"
    run = make_run(tmp_path / "夢 <i> & {name}", NORMAL, samples=samples, options={**OPTIONS, "data": "<script>{0}"})
    page = report(run)
    assert not page.tags & {"script", "i"}
    for part in ("夢 <i> & {name}", "<script>{0}", sample + "���"):
        assert part in page.text
    assert "old" not in page.text


def test_an_incomplete_last_line_is_ignored(tmp_path):
    run = make_run(tmp_path / "run", [step(10), step(20)], tail='{"event": "step", "step": 30, "lo')
    assert read_facts(run, read_metrics(run))["step"] == 20
    report(run)


def test_the_time_of_a_resumed_run_is_the_sum_of_its_sessions(tmp_path):
    seconds = {10: 100, 20: 200, 30: 50, 40: 160}
    run = make_run(tmp_path / "run", [step(at, seconds=value) for at, value in seconds.items()])
    assert read_facts(run, read_metrics(run))["time"] == "6:00 in 2 sessions"


def test_plan_and_skipped_updates_are_shown(tmp_path):
    plan = {"event": "plan", "step": 20, "max_steps": 40, "decay_steps": 10}
    text = report(make_run(tmp_path / "run", [step(10), skip(12), plan, step(20)])).text
    assert "skipped updates: 1" in text
    assert "plan corrected 1×, last to 40 steps" in text


def test_matplotlib_is_imported_lazily_and_its_settings_are_restored(tmp_path):
    before = dict(matplotlib.rcParams)
    report(make_run(tmp_path / "run", NORMAL))
    assert dict(matplotlib.rcParams) == before
    code = "import sys, training.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0, (
        "importing the module must not import matplotlib"
    )


def test_without_matplotlib_the_error_names_the_pip_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        main([str(make_run(tmp_path / "run", NORMAL))])


def test_a_path_that_is_not_a_run_raises_with_the_next_command(tmp_path):
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "silent", [])
    for name, problem in (
        ("missing", "no such directory"),
        ("empty", "not a run directory"),
        ("silent", "nothing has been logged"),
    ):
        with pytest.raises(UserError, match=rf"{name}.*{problem}.*python train\.py"):
            main([str(tmp_path / name)])
    with pytest.raises(UserError, match=r"python -m training\.report"):
        main([])
    command = [sys.executable, "-m", "training.report", str(tmp_path / "missing")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr[:7]) == (2, "error: ")


@pytest.mark.parametrize(("init_from", "best"), [(None, "7.0000"), ("runs/other", "6.0000")])
def test_random_weights_are_not_the_best_ones(tmp_path, init_from, best):
    lines = [evaluation(0, 6.0), step(10), evaluation(10, 7.0), evaluation(20, 7.5)]
    run = make_run(tmp_path / "run", lines, options=OPTIONS | {"init_from": init_from})
    text = report(run).text.replace("\n", "")
    assert f"Best val loss{best}" in text
    assert ("Initial weightsruns/other" in text) == (init_from is not None)


def test_lines_that_cannot_be_used_are_counted_and_left_out(tmp_path):
    odd = [
        {"event": "step", "step": "x"}, {"event": "eval", "step": 20, "val_loss": [1]}, {"step": 5}, [], 7, "text",
        {"event": ["step"], "step": 1}, {"event": "step", "step": 10**30}, {"event": "final", "step": 9, "targets": -1},
        {"event": "step", "step": 5, "timing": {"seconds": "<script>"}},
    ]  # fmt: skip
    run = make_run(tmp_path / "run", [step(20), *odd, step(10), {"event": "rollback", "step": 7}, *NORMAL])
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n{"event": "eval", "step": 3, "val_loss": 1e400}\n' + b"[" * 100_000 + b"\n{incompl")
    page = report(run)
    assert "Left out13 lines of metrics.jsonl that could not be used" in page.text.replace("\n", "")
    assert not page.tags & {"script"}
    lines = read_metrics(run)
    assert [line["step"] for line in lines["step"]] == [10, 10, 20, 20, 30], "in the order of the steps"
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/metrics.jsonl").write_bytes(b"\xff\n[]\n")
    with pytest.raises(UserError, match="but 2 lines that cannot be used"):
        main([str(tmp_path / "odd")])
