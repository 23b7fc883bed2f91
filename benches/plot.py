"""Two pictures of a training run: its loss, and whether the model looks at the picture.

    python -m benches.plot out.png runs/pretrain,runs/finetune      two stages, one after the other
    python -m benches.plot out.png runs/a runs/b                    two runs, compared
    python train.py --plot runs/a runs/b --out out.png              the same

Left: the loss of every step (faint), its course (bold), and that of held-out records (dashed). Right: the sight meter,
the share of held-out questions answered exactly with the true picture, with another record's picture (shuffled) and
with a blank one. Who answers from the words alone scores the same on all three; the gap between the lines is what the
model sees. Everything comes from log.jsonl and is drawn with Pillow: three times too large, then scaled down to smooth
the edges.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from formats import command

WIDTH, HEIGHT, ENLARGED = 1600, 640, 3
TOP, BOTTOM, LEFT, RIGHT = 164, 566, 72, 1320  # of the panels; the meter's labels stand right of them
PAPER, INK, QUIET, RULE = "#fcfbf8", "#24292f", "#6e7781", "#e3e1da"
RUNS = ["#1f5fd0", "#d9640d", "#2b8a5b", "#8a4fbf", "#c2334d"]  # one colour per run, where several are compared
PICTURES = {"eval_match": ("true picture", "#1f5fd0"), "eval_match_shuffled": ("shuffled", "#d9640d"),
            "eval_match_blank": ("blank", "#858b94")}


@dataclass
class Curve:
    """(n,) steps and values; `label` and the last value stand at its end, dots with values at the steps of `marks`."""

    steps: np.ndarray
    values: np.ndarray
    colour: str | tuple
    label: str | None = None
    width: float = 4
    dashed: bool = False
    marks: tuple = ()


def read_log(folder):
    """A run's folder -> ({step: loss}, {(evaluation set, step): row}); a step logged twice (a resumed run) counts once.

    Losses that were not finite (null) are left out. ValueError: no log, a line that is not JSON, no step to draw.
    """
    path, losses, evaluations = Path(folder) / "log.jsonl", {}, {}
    if not path.is_file():
        raise ValueError(f"{path}: no such file; to plot a run, name the --output_dir of its training")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            if row.get("loss") is not None:
                losses[row["step"]] = float(row["loss"])
            elif row.get("eval_loss") is not None or row.get("eval_match") is not None:
                evaluations[row.get("eval_set"), row["step"]] = row
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path}, line {number}: expected a JSON object with a step; remove the line") from None
    if not losses:
        raise ValueError(f"{path}: no step with a loss in it; plot the run after its first step")
    return dict(sorted(losses.items())), evaluations


def smooth(values):
    """(n,) -> (n,): a Gaussian mean over about a thirtieth of the run."""
    reach = max(1, len(values) // 20)
    bell = np.exp(-0.5 * (np.arange(-reach, reach + 1) / (reach / 2)) ** 2)
    return (np.convolve(values, bell) / np.convolve(np.ones(len(values)), bell))[reach:-reach]


def read_run(stages, name, colour):
    """A run's stages, end to end -> (loss curves, meter curves, [(last step, folder's name) of each stage]).

    Without a `name` the meter's colours tell the pictures apart; with one (several runs) they tell the runs apart. An
    evaluation set beside the main one, such as unseen combinations, is a dashed line that bears the set's name.
    """
    thin = tuple(round(0.22 * a + 0.78 * b) for a, b in zip(*map(ImageColor.getrgb, (colour, PAPER))))
    losses, answers, held_out, ends, begin = [], {}, {}, [], 0
    for folder in stages:
        loss, evaluations = read_log(folder)
        for (kind, step), row in evaluations.items():
            if row.get("eval_loss") is not None and kind == next(iter(evaluations))[0]:
                held_out[begin + step] = row["eval_loss"]
            for key in [key for key in PICTURES if row.get(key) is not None]:
                answers.setdefault((kind, key), {})[begin + step] = row[key]
        steps, values = begin + np.array(list(loss)), np.array(list(loss.values()))
        begin = int(steps[-1])
        ends.append((begin, Path(folder).resolve().name))
        losses += [Curve(steps, values, thin, width=2), Curve(steps, smooth(values), colour, marks=(begin,))]
    losses[-1].label, losses[-1].marks = name or "", ()
    if held_out:
        losses.append(Curve(*np.array(sorted(held_out.items())).T, colour, width=2.5, dashed=True))
    main, meter = None if any(kind is None for kind, _ in answers) else next(iter(answers), (None,))[0], []
    for (kind, key), points in answers.items():
        if kind == main or key == "eval_match":
            label, hue = PICTURES[key]
            curve = Curve(*np.array(sorted(points.items())).T, colour if name else hue, label if kind == main else kind)
            curve.dashed, curve.width = kind != main, 4 if key == "eval_match" else 2.5
            curve.marks = [end for end, _ in ends[:-1]] if curve.width == 4 and kind == main else ()
            meter.append(curve)
    return losses, meter, ends


class Panel:
    """A pair of axes on the sheet: steps from 0 to `last` across, values from 0 to `high` upwards."""

    def __init__(self, draw, left, right, last, high):
        self.draw, self.left, self.right, self.last, self.high = draw, left, right, last, high

    def place(self, step, value):
        """Steps and values -> x, y on the sheet; a value far above the panel is kept at its edge."""
        upward = np.minimum(value / self.high, 1.04)
        return self.left + (self.right - self.left) * step / self.last, BOTTOM - (BOTTOM - TOP) * upward

    def text(self, x, y, text, colour=QUIET, size=21, anchor="lm", bold=False):
        """Write `text`; `anchor` is Pillow's: l, m or r across. Bold is the same face with a thin stroke around it."""
        font = ImageFont.load_default(size * ENLARGED)
        self.draw.text((x * ENLARGED, y * ENLARGED), text, colour, font, anchor, stroke_width=int(bold))

    def stroke(self, xs, ys, colour, width, dashed=False):
        """A line through the points (n,), (n,) of the sheet; dashes are 14 long and 9 apart."""
        along = np.cumsum(np.hypot(np.diff(xs, prepend=xs[0]), np.diff(ys, prepend=ys[0])))  # length up to each point
        for begin in np.arange(0, along[-1] + 1e-6, 23) if dashed else [0]:
            end = min(begin + 14, along[-1]) if dashed else along[-1]
            at = np.array([begin, *along[(along > begin) & (along < end)], end])
            points = np.stack([np.interp(at, along, xs), np.interp(at, along, ys)], 1) * ENLARGED  # (m, 2)
            self.draw.line(points.flatten().tolist(), colour, round(width * ENLARGED), joint="curve")

    def axes(self, title, subtitle, ends):
        """Headings, rules with their values, steps below, and the stages' names on both sides of their dividers."""
        self.text(self.left - 44, 44, title, INK, 30, bold=True)
        self.text(self.left - 44, 80, subtitle)
        for tick in _ticks(self.high, 4):
            y = self.place(0, tick)[1]
            self.stroke([self.left, self.right], [y, y], RULE, 1.5)
            self.text(self.left - 14, y, f"{tick:g}", anchor="rm")
        for tick in _ticks(self.last, 5):
            self.text(self.place(tick, 0)[0], BOTTOM + 26, f"{tick:,g}", anchor="mm")
        self.text(self.right, BOTTOM + 56, "step", anchor="rm")
        for end, name in ends[:-1]:
            x = self.place(end, 0)[0]
            self.stroke([x, x], [TOP - 46, BOTTOM], QUIET, 1.5, dashed=True)
            self.text(x - 14, TOP - 34, name, INK, anchor="rm")
        if len(ends) > 1:
            self.text(x + 14, TOP - 34, ends[-1][1], INK)

    def curves(self, curves):
        """The lines, the values at their marks, and at the right last values and labels, pushed apart to be legible."""
        labelled = []
        for curve in sorted(curves, key=lambda curve: curve.label is not None):
            xs, ys = self.place(curve.steps, curve.values)
            self.stroke(xs, ys, curve.colour, curve.width, curve.dashed)
            marks = np.flatnonzero(np.isin(curve.steps, curve.marks)).tolist()
            labelled += [(ys[-1], curve)] if curve.label is not None else []
            for i in marks + [-1] * (curve.label is not None):
                self.draw.circle((xs[i] * ENLARGED, ys[i] * ENLARGED), 7 * ENLARGED, curve.colour)
            for i in marks:
                aside = 24 if ys[0] < ys[i] < BOTTOM - 36 else -22  # below a falling line with room for it
                self.text(xs[i] - 12, ys[i] + aside, f"{curve.values[i]:.2f}", curve.colour, anchor="rm", bold=True)
        labelled.sort(key=lambda label: label[0])
        heights = [y for y, _ in labelled]
        for i in [*range(1, len(heights))] * 50:  # neighbours nearer than 30 push each other away, a little at a time
            push = max(0, 30 - (heights[i] - heights[i - 1])) / 2
            heights[i - 1], heights[i] = heights[i - 1] - push, heights[i] + push
        for y, (_, curve) in zip(heights, labelled):
            self.text(self.right + 18, y, f"{curve.values[-1]:.2f}", curve.colour, 23, bold=True)
            self.text(self.right + 72, y, curve.label, curve.colour, 23)


def _ticks(high, count):
    """About `count` round values from 0 to `high`."""
    unit = 10 ** np.floor(np.log10(high / count))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= high / count * 0.99)
    return np.arange(0, high * 1.0001, step)


def plot_runs(runs, out_png):
    """Draw runs into a PNG of 1600 x 640; a run is a folder with log.jsonl, or a list of its stages' folders.

    Stages share one x axis, each going on where the one before it ended. Runs without evaluations show the loss alone.
    ValueError: no run, more runs than colours tell apart, and what `read_log` says.
    """
    runs = [[run] if isinstance(run, str | Path) else list(run) for run in runs]
    if not 1 <= len(runs) <= len(RUNS):
        raise ValueError(f"{len(runs)} runs to plot; expected 1 to {len(RUNS)}, the stages of one run joined by commas")
    names = [Path(run[-1]).resolve().name if len(runs) > 1 else None for run in runs]
    losses, meters, ends = zip(*map(read_run, runs, names, RUNS))
    losses, meters, ends = sum(losses, []), sum(meters, []), max(ends, key=lambda ends: ends[-1][0])
    high = 1.08 * max(curve.values.max() for curve in losses if curve.width > 2) or 1

    sheet = Image.new("RGB", (WIDTH * ENLARGED, HEIGHT * ENLARGED), PAPER)
    panel = Panel(ImageDraw.Draw(sheet), LEFT, 620 if meters else RIGHT, ends[-1][0], high)
    dashed = ", held-out records dashed" if any(curve.dashed for curve in losses) else ""
    panel.axes("Training loss", "every step faint, its course bold" + dashed, ends)
    panel.curves(losses)
    if meters:
        panel = Panel(panel.draw, 860, RIGHT, ends[-1][0], 1)
        panel.axes("The sight meter", "held-out questions answered exactly, by the picture shown with them", ends)
        panel.curves(meters)
    sheet.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(out_png, optimize=True)


def main():
    """The command line at the head of this file."""
    parser = command.Parser(prog="python -m benches.plot", description=__doc__)
    parser.add_argument("out", help="the PNG to write")
    parser.add_argument("runs", nargs="+", help="folders with log.jsonl; a run's stages joined by commas")
    args = parser.parse_args()
    plot_runs([run.split(",") for run in args.runs], args.out)


if __name__ == "__main__":
    command.run(main)
