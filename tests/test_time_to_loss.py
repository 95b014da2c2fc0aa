"""bench/time_to_loss.py: its arithmetic on known numbers; the measurement itself is run by hand."""

import json

import pytest

from bench import time_to_loss as bench
from errors import UserError


def peer_lines(evaluated=(0, 4), startup=2.0, step=0.1, evaluation=3.0, steps=5):
    """nanoGPT's output with the second of each line. It counts an evaluation in the time of the following iteration."""
    now, lines = startup, [(startup, "tokens per iteration will be: 768\n")]
    for number in range(steps):
        pause = evaluation if number in evaluated else 0.0
        if pause:
            lines.append((now + pause, f"step {number}: train loss 4.1, val loss {4 - number / 10:.4f}\n"))
        now += pause + step
        lines.append((now, f"iter {number}: loss 4.0000, time {1000 * (pause + step):.2f}ms, mfu -100.00%\n"))
    return lines


def test_the_peers_evaluations_are_not_counted_as_training_time():
    with_pauses = bench.peer_curve(peer_lines(), 768)
    assert [point["step"] for point in with_pauses] == [0, 4]
    assert [point["seconds"] for point in with_pauses] == pytest.approx([2.0, 2.4])  # the start, then four steps
    assert with_pauses[-1] == {"step": 4, "tokens": 4 * 768, "seconds": 2.4, "loss": 3.6}
    assert bench.peer_curve(peer_lines(evaluation=300.0), 768) == with_pauses


def test_several_pauses_add_up():
    assert [p["seconds"] for p in bench.peer_curve(peer_lines((0, 3, 6), steps=7), 1)] == pytest.approx([2.0, 2.3, 2.6])


def test_peer_output_without_losses_is_an_error():
    with pytest.raises(UserError, match="printed no losses as nanoGPT does"):
        bench.peer_curve([(0.1, "hello\n")], 768)


def test_our_curve_holds_the_evaluations_only():
    def event(kind, step, seconds):
        return json.dumps(
            {"event": kind, "step": step, "val_loss": 2.0, "loss": 2.0, "timing": {"train_seconds": seconds}}
        )

    log = "\n".join([event("eval", 0, 3.0), event("step", 5, 4.0), event("eval", 10, 5.0), event("final", 10, 5.0)])
    assert [(p["step"], p["tokens"], p["seconds"]) for p in bench.our_curve(log, 100)] == [(0, 0, 3.0), (10, 1000, 5.0)]


def run(side, *points):
    return {"side": side, "curve": [bench.point(step, 10, seconds, loss) for step, seconds, loss in points]}


def test_the_target_and_the_time_to_it():
    runs = [run(bench.PEER, (0, 1, 4.0), (100, end, loss)) for end, loss in ((100, 1.9), (90, 1.8), (120, 2.0))]
    runs += [run("Sprout", (0, 2, 4.0), (20, hit, 1.9), (40, 60, 1.5), (60, 130, 1.2)) for hit in (10, 20, 50)]
    summary = bench.summarise(runs)
    assert (summary["target"], summary["peer_seconds"], summary["peer_tokens"]) == (1.9, 100, 1000)
    ours = summary["sides"]["Sprout"]
    assert ours["reached_in"] == "3 of 3"
    assert (ours["seconds"], ours["step"], ours["tokens"]) == (20, 20, 200)
    assert (ours["times_sooner"], ours["times_fewer_tokens"]) == (5, 5)
    assert (ours["loss_in_equal_time"], ours["loss_at_end"], ours["seconds_to_end"]) == (1.5, 1.2, 130)


def test_a_target_that_most_runs_miss_is_not_reached():
    runs = [run(bench.PEER, (100, 100, 1.9)) for _ in range(3)]
    runs += [run("Sprout", (0, 2, 4.0), (20, 10, loss)) for loss in (1.8, 1.95, 1.95)]
    ours = bench.summarise(runs)["sides"]["Sprout"]
    assert (ours["reached_in"], ours["seconds"], ours["times_sooner"]) == ("1 of 3", None, None)
    bench.show(bench.summarise(runs))  # without the lines on the time to the target


def test_equal_time_takes_the_last_evaluation_within_it():
    curve = run("Sprout", (0, 2, 4.0), (20, 10, 1.5), (40, 20, 1.6))["curve"]
    assert [bench.last_within(curve, seconds)["loss"] for seconds in (1, 9, 10, 19, 99)] == [4.0, 4.0, 1.5, 1.5, 1.6]


def test_each_length_is_a_run_of_its_own():
    plans = bench.plan_runs(["shakespeare_char_cpu", "--dropout=0.1"], "40,500", evaluations=10)
    short, long = plans.values()
    assert short["arguments"] == ["shakespeare_char_cpu", "--dropout=0.1", "--max_steps=40"]
    assert [plan["eval_interval"] for plan in (short, long)] == [4, 50]
    assert bench.plan_runs(["speedrun_char_cpu"], "", 10)["Sprout speedrun_char_cpu"]["steps"] == 1300
    command = bench.our_command(long, seed=1338, targets=999)
    assert {"--seed=1338", "--eval_interval=50", "--eval_tokens=1000", "--max_steps=500"} <= set(command)


def test_recipes_are_separated_by_a_plus():
    plans = bench.plan_runs(["speedrun_char_cpu", "--max_ngram=1", "+", "debug", "--seed=2"], "7", evaluations=10)
    assert list(plans) == [
        "Sprout speedrun_char_cpu --max_ngram=1 --max_steps=7",
        "Sprout debug --seed=2 --max_steps=7",
    ]
    exportable, own = bench.plan_runs([], "", 10)
    assert exportable.startswith("Sprout qwen3_char_cpu")
    assert own.startswith("Sprout speedrun_char_cpu")


def test_the_curves_are_drawn_as_a_small_png(tmp_path):
    runs = [run(bench.PEER, (0, 1, 4.2), (100, 100, 1.9)), run("Sprout", (0, 2, 4.2), (20, 10, 1.8))] * 3
    bench.draw(runs, bench.summarise(runs), "tëxt.txt", tmp_path / "new folder" / "plot.png")
    picture = (tmp_path / "new folder" / "plot.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 100_000


def test_each_mistake_is_one_clear_line(tmp_path):
    peer = tmp_path / "a peer"
    peer.mkdir()
    text = tmp_path / "a text é.txt"
    text.write_text("to be or not to be\n")
    with pytest.raises(UserError, match=r"no train\.py there; expected a checkout of nanoGPT"):
        bench.main(["--peer", str(peer)])
    (peer / "train.py").touch()
    with pytest.raises(UserError, match=r"input\.txt: no such file; give a text"):
        bench.main(["--peer", str(peer)])
    with pytest.raises(UserError, match="--sprout_steps=4,x: expected numbers of steps"):
        bench.main(["--peer", str(peer), "--text", str(text), "--sprout_steps=4,x"])
    with pytest.raises(UserError, match="must be at least 1"):
        bench.main(["--peer", str(peer), "--text", str(text), "--rounds=0"])
    with pytest.raises(UserError, match="n_layers"):
        bench.main(["--peer", str(peer), "--text", str(text), "--", "debug", "--n_layers=3"])
    with pytest.raises(UserError, match=r"quickstart: plans its length by measuring speed.*--sprout_steps=N"):
        bench.main(["--peer", str(peer), "--text", str(text), "--", "quickstart"])


def test_rounds_measured_in_pieces_are_joined_where_text_and_peer_agree(tmp_path):
    earlier = {"text": {"sha256": "a"}, "peer": "1", "runs": [run(bench.PEER, (0, 1, 4.0))]}
    path = tmp_path / "first.json"
    path.write_text(json.dumps(earlier), encoding="utf-8")
    assert bench.earlier_runs([path, path], {"text": {"sha256": "a"}, "peer": "1"}) == earlier["runs"] * 2
    for other in ({"text": {"sha256": "b"}, "peer": "1"}, {"text": {"sha256": "a"}, "peer": "2"}):
        with pytest.raises(UserError, match="its text or its peer is another one"):
            bench.earlier_runs([path], other)
