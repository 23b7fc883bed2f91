"""benches/plot.py: the curves are where the log says, and bad input is one sentence."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

import train
from benches import plot

BLUE, ORANGE, GREY = plot.RUNS[0], plot.PICTURES["eval_match_shuffled"][1], plot.PICTURES["eval_match_blank"][1]


def write_run(folder, loss=2.0, match=0.75, steps=100, unseen=True):
    """A run whose loss and answers are constant, so that every curve is a level line; -> its folder."""
    folder.mkdir()
    rows = [{"step": step, "loss": loss} for step in range(1, steps + 1)]
    for step in (steps // 2, steps) if match is not None else ():
        meter = {"eval_loss": 0.4, "eval_match": match, "eval_match_shuffled": 0.25, "eval_match_blank": 0.125}
        rows.append({"step": step, **meter})
        if unseen:
            rows.append({"step": step, "eval_set": "unseen", **meter, "eval_match": 0.5, "eval_loss": 1.5})
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def share(png, colour, box):
    """The share of columns of `box` (left, top, right, bottom) in which a pixel is near to `colour`."""
    pixels = np.asarray(Image.open(png).convert("RGB").crop(box), dtype=int)  # (H, W, 3)
    near = np.abs(pixels - ImageColor.getrgb(colour)).max(2) < 40
    return near.any(0).mean()


def height(value, high=1.0):
    """The row of the sheet on which a panel draws `value`."""
    return round(plot.BOTTOM - (plot.BOTTOM - plot.TOP) * value / high)


def band(value, left, right, high=1.0):
    """A box five pixels high around a value."""
    return left, height(value, high) - 2, right, height(value, high) + 3


def test_one_run(tmp_path):
    png = tmp_path / "plot.png"
    plot.plot_runs([write_run(tmp_path / "run")], png)
    assert Image.open(png).size == (plot.WIDTH, plot.HEIGHT)
    assert png.stat().st_size < 300_000
    assert share(png, BLUE, band(2.0, 80, 610, 1.08 * 2)) == 1  # the loss, from the first step to the last
    assert share(png, BLUE, band(1.0, 80, 610, 1.08 * 2)) == 0
    assert 0.4 < share(png, BLUE, band(0.4, 360, 610, 1.08 * 2)) < 0.9  # held out, dashed
    assert share(png, BLUE, band(0.4, 80, 330, 1.08 * 2)) == share(png, BLUE, band(1.5, 80, 610, 1.08 * 2)) == 0
    begin, end = 1100, plot.RIGHT - 10  # the evaluations stand at half of the steps and at the last
    assert share(png, BLUE, band(0.75, begin, end)) == 1
    assert 0.4 < share(png, BLUE, band(0.5, begin, end)) < 0.9  # the unseen set is dashed
    assert share(png, ORANGE, band(0.25, begin, end)) == 1
    assert share(png, GREY, band(0.125, begin, end)) == 1
    assert share(png, BLUE, band(0.75, 870, 1070)) == 0  # no line before the first evaluation
    label = (plot.RIGHT + 18, height(0.25) - 15, plot.RIGHT + 170, height(0.25) + 15)
    assert share(png, ORANGE, label) > 0.3


def test_stages_follow_one_another(tmp_path):
    png = tmp_path / "plot.png"
    first = write_run(tmp_path / "pretrain", loss=4.0, match=0.25, steps=100)
    second = write_run(tmp_path / "finetune", loss=1.0, steps=300)
    plot.plot_runs([[first, second]], str(png))
    divider = plot.LEFT + (620 - plot.LEFT) // 4
    high = 1.08 * 4
    assert share(png, BLUE, band(4.0, plot.LEFT + 10, divider - 10, high)) == 1
    assert share(png, BLUE, band(4.0, divider + 12, 600, high)) == 0
    assert share(png, BLUE, band(1.0, divider + 10, 600, high)) == 1
    assert share(png, plot.QUIET, (divider - 3, plot.TOP, divider + 4, plot.BOTTOM)) > 0


def test_two_runs_have_two_colours(tmp_path):
    png = tmp_path / "plot.png"
    plot.plot_runs([write_run(tmp_path / "a", loss=2.0), write_run(tmp_path / "b", loss=1.0)], png)
    assert share(png, plot.RUNS[0], band(2.0, 80, 610, 1.08 * 2)) == 1
    assert share(png, plot.RUNS[1], band(1.0, 80, 610, 1.08 * 2)) == 1


def test_without_evaluations_the_loss_takes_the_sheet(tmp_path):
    png = tmp_path / "plot.png"
    plot.plot_runs([write_run(tmp_path / "run", match=None)], png)
    assert share(png, BLUE, band(2.0, 90, plot.RIGHT - 10, 1.08 * 2)) == 1


def test_a_log_as_training_leaves_it(tmp_path):
    """A resumed run repeats steps, a loss that was not finite is null, an evaluation without answers has no match."""
    rows = [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 8.0}, {"step": 2, "loss": 7.0}, {"step": 3, "loss": None},
            {"step": 3, "eval_loss": 1.0, "eval_match": None}, {"step": 3, "eval_loss": 1.0}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert plot.read_log(tmp_path) == ({1: 9.0, 2: 7.0}, {(None, 3): rows[-1]})
    plot.plot_runs([tmp_path], tmp_path / "plot.png")


def test_smooth_keeps_a_level_and_calms_the_rest():
    assert np.allclose(plot.smooth(np.full(50, 3.0)), 3.0)
    assert np.allclose(plot.smooth(np.array([5.0])), 5.0)
    noise = np.random.default_rng(0).normal(size=400)
    assert plot.smooth(noise).std() < 0.5 * noise.std() and len(plot.smooth(noise)) == 400


@pytest.mark.parametrize("high, expected", [
    (1, [0, 0.25, 0.5, 0.75, 1]), (6.5, [0, 2, 4, 6]), (850, [0, 250, 500, 750])])
def test_ticks_are_round(high, expected):
    assert np.allclose(plot._ticks(high, 4), expected)


@pytest.mark.parametrize("text, sentence", [
    (None, "no such file"), ("", "no step with a loss"), ('{"step": 1, "eval_match": 0.5}\n', "no step with a loss"),
    ('{"step": 1, "loss": 2.0}\n{"step": 2, "lo', "line 2: expected a JSON object"), ("[1]\n", "line 1: expected")])
def test_bad_input_is_one_sentence(tmp_path, text, sentence):
    if text is not None:
        (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(ValueError, match=sentence) as caught:
        plot.plot_runs([tmp_path], tmp_path / "plot.png")
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "plot.png").exists()


def test_no_run_or_too_many(tmp_path):
    for count in (0, 6):
        with pytest.raises(ValueError, match=f"{count} runs to plot"):
            plot.plot_runs([tmp_path] * count, tmp_path / "plot.png")


def test_command_line(tmp_path):
    first, second, png = write_run(tmp_path / "a"), write_run(tmp_path / "b"), tmp_path / "plot.png"
    command = [sys.executable, "-m", "benches.plot", str(png)]
    root = Path(__file__).resolve().parent.parent
    assert subprocess.run([*command, f"{first},{second}"], cwd=root).returncode == 0 and png.exists()
    refused = subprocess.run([*command, str(tmp_path / "none")], cwd=root, capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "no such file" in refused.stderr


def test_train_draws_runs_of_different_lengths(tmp_path, monkeypatch, capsys):
    short, long = write_run(tmp_path / "a", match=None, steps=50), write_run(tmp_path / "b", loss=1.0, steps=200)
    monkeypatch.chdir(tmp_path)
    assert not train.main(["--plot", str(short), str(long), "--out", "two.png"])
    assert f"{short}, {long} drawn into two.png" in capsys.readouterr().out
    quarter = plot.LEFT + (620 - plot.LEFT) // 4
    assert share("two.png", plot.RUNS[0], band(2.0, 80, quarter - 8, 1.08 * 2)) == 1  # it ends after a quarter
    assert share("two.png", plot.RUNS[0], band(2.0, quarter + 12, 600, 1.08 * 2)) == 0
    assert share("two.png", plot.RUNS[1], band(1.0, 80, 610, 1.08 * 2)) == 1
    assert share("two.png", plot.RUNS[1], band(0.75, 1100, plot.RIGHT - 10)) == 1  # its meter
    train.main(["--plot", f"{long},{short}"])
    assert (tmp_path / "loss.png").exists()


def test_train_says_what_it_cannot_draw(tmp_path):
    root = Path(__file__).resolve().parent.parent
    refused = subprocess.run([sys.executable, root / "train.py", "--plot", "none"], cwd=tmp_path, capture_output=True,
                             text=True)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "none/log.jsonl: no such file; to plot a run, name the --output_dir of its training" in refused.stderr
