"""Two pictures of a training run: its loss, and whether the model looks at the picture.

    python -m training.plot out.png runs/pretrain,runs/finetune      two stages, one after the other
    python -m training.plot out.png runs/a runs/b                    two runs, compared

Left: the loss of every step (faint) and its course (bold). Right: the sight meter, the share of held-out questions
answered exactly when asked with the true picture, with another record's picture (shuffled) and with a blank one. A model
that answers from the words alone scores the same on all three; the gap between the lines is what it sees.

Everything comes from `log.jsonl` and is drawn with Pillow alone: three times too large, then scaled down, which makes
the edges smooth.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from formats import command

WIDTH, HEIGHT, ENLARGED = 1600, 640, 3
TOP, BOTTOM, LEFT, RIGHT = 164, 566, 72, 1350  # of the panels; the meter's labels stand right of them
PAPER, INK, QUIET, RULE = "#fcfbf8", "#24292f", "#6e7781", "#e3e1da"
RUNS = ["#1f5fd0", "#d9640d", "#2b8a5b", "#8a4fbf", "#c2334d"]  # one colour per run, where several are compared
PICTURES = {"eval_match": ("true picture", "#1f5fd0"), "eval_match_shuffled": ("shuffled", "#d9640d"),
            "eval_match_blank": ("blank", "#858b94")}


@dataclass
class Curve:
    """Points (step, value); `label` and the last value are written at its end, dots and values at the steps of `marks`."""

    points: list
    colour: str
    label: str | None = None
    width: float = 4
    dashed: bool = False
    marks: tuple = ()


def read_log(folder):
    """A run's folder -> ({step: loss}, {evaluation set: {step: row}}); of a step logged twice (resumed) the last counts.

    ValueError when there is no log, a line of it is not JSON, or no step has been trained.
    """
    path, losses, evaluations = Path(folder) / "log.jsonl", {}, {}
    if not path.is_file():
        raise ValueError(f"{path}: no such file; to plot a run, name the --output_dir of its training")
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(text)
            if "loss" in row:
                losses[row["step"]] = math.nan if row["loss"] is None else float(row["loss"])
            elif row.get("eval_match") is not None:
                evaluations.setdefault(row.get("eval_set"), {})[row["step"]] = row
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path}, line {number}: expected a JSON object with a step; remove the line") from None
    if not losses:
        raise ValueError(f"{path}: no training step in it; plot the run after its first step")
    return losses, evaluations


def smooth(values):
    """(n,) -> (n,): a Gaussian mean over about a thirtieth of the run; NaN (a loss that was not finite) is left out."""
    reach = max(1, len(values) // 20)
    bell = np.exp(-0.5 * (np.arange(-reach, reach + 1) / (reach / 2)) ** 2)
    known = ~np.isnan(values)
    weight = np.convolve(known, bell)[reach:-reach]
    total = np.convolve(np.where(known, values, 0), bell)[reach:-reach]
    return np.divide(total, weight, out=np.full(len(values), np.nan), where=weight > 0)


def read_run(stages, name=None, colour=RUNS[0]):
    """A run's stages, end to end -> (loss curves, meter curves, [(last step, folder's name) of each stage]).

    Without a `name` the meter's colours tell the pictures apart; with one (several runs) they tell the runs apart. An
    evaluation set beside the main one, such as unseen combinations, is a dashed line that bears the set's name.
    """
    losses, rows, ends, start = [], {}, [], 0
    for folder in stages:
        loss, evaluations = read_log(folder)
        steps = np.array(sorted(loss))
        values = np.array([loss[step] for step in sorted(loss)])
        end = start + int(steps[-1])
        losses.append(Curve(list(zip(start + steps, values, strict=True)), _faint(colour), width=2))
        losses.append(Curve(list(zip(start + steps, smooth(values), strict=True)), colour, marks=(end,)))
        for kind, found in evaluations.items():
            rows.setdefault(kind, {}).update({start + step: row for step, row in found.items()})
        ends.append((end, Path(folder).resolve().name))
        start = end
    losses[-1].label, losses[-1].marks = name or "", ()
    main = None if None in rows else next(iter(rows), None)
    meter = []
    for kind, found in rows.items():
        for key in PICTURES if kind == main else ["eval_match"]:
            points = [(step, row[key]) for step, row in sorted(found.items()) if row.get(key) is not None]
            label, hue = PICTURES[key]
            label = label if kind == main else str(kind)
            curve = Curve(points, colour if name else hue, f"{name} {label}" if name else label, dashed=kind != main)
            if key != "eval_match":
                curve.width = 2.5
            elif kind == main:
                curve.marks = tuple(end for end, _ in ends[:-1])
            meter += [curve] if points else []
    return losses, meter, ends


def _faint(colour, part=0.22):
    """A colour thinned with paper."""
    pairs = zip(bytes.fromhex(colour[1:]), bytes.fromhex(PAPER[1:]), strict=True)
    return "#" + bytes(round(part * a + (1 - part) * b) for a, b in pairs).hex()


class Panel:
    """One pair of axes on the sheet: steps from 0 to `last` across, values from 0 to `high` upwards."""

    def __init__(self, draw, left, right, last, high, title, subtitle):
        self.draw, self.left, self.right, self.last, self.high = draw, left, right, last, high
        self.text(left - 44, 44, title, INK, 30, bold=True)
        self.text(left - 44, 80, subtitle, QUIET, 21)

    def place(self, step, value):
        """(step, value) -> (x, y) on the sheet."""
        y = BOTTOM - (BOTTOM - TOP) * min(value / self.high, 1.04)
        return self.left + (self.right - self.left) * step / self.last, y

    def text(self, x, y, text, colour=QUIET, size=21, anchor="lm", bold=False):
        """Write `text`; `anchor` as in Pillow: l, m, r across and m down. Bold is the same face with a thin stroke."""
        font = ImageFont.load_default(size * ENLARGED)
        self.draw.text((x * ENLARGED, y * ENLARGED), text, colour, font, anchor, stroke_width=bold * 1)

    def stroke(self, points, colour, width, dashed=False):
        """A line with round joints and ends through points of the sheet."""
        points = [(x * ENLARGED, y * ENLARGED) for x, y in points]
        for piece in _dashes(points, 14 * ENLARGED, 9 * ENLARGED) if dashed else [points]:
            self.draw.line(piece, colour, round(width * ENLARGED), joint="curve")
            for x, y in (piece[0], piece[-1]):
                self.dot(x / ENLARGED, y / ENLARGED, width / 2, colour)

    def dot(self, x, y, radius, colour):
        """A filled circle."""
        box = [(x - radius) * ENLARGED, (y - radius) * ENLARGED, (x + radius) * ENLARGED, (y + radius) * ENLARGED]
        self.draw.ellipse(box, colour)

    def axes(self, ends):
        """Rules with their values, a few steps below, and the stages' names between dividers."""
        for tick in _ticks(self.high, 4):
            x, y = self.place(0, tick)
            self.stroke([(x, y), (self.right, y)], RULE, 1.5)
            self.text(x - 14, y, f"{tick:g}", anchor="rm")
        for tick in _ticks(self.last, 5):
            self.text(self.place(tick, 0)[0], BOTTOM + 26, f"{tick:,g}", anchor="mm")
        self.text(self.right, BOTTOM + 56, "step", anchor="rm")
        begin = 0
        for end, name in ends if len(ends) > 1 else []:
            x = self.place(end, 0)[0]
            self.text((self.place(begin, 0)[0] + x) / 2, TOP - 34, name, INK, 21, "mm")
            if end != self.last:
                self.stroke([(x, TOP - 46), (x, BOTTOM)], QUIET, 1.5, dashed=True)
            begin = end

    def curves(self, curves):
        """The lines with their marks; at the right their last values and labels, pushed apart where they would overlap."""
        labels = []
        for curve in sorted(curves, key=lambda curve: curve.label is not None):
            known = {step: value for step, value in curve.points if not math.isnan(value)}
            if not known:
                continue
            self.stroke([self.place(*point) for point in known.items()], curve.colour, curve.width, curve.dashed)
            for step in curve.marks:
                if step in known:
                    x, y = self.place(step, known[step])
                    self.dot(x, y, 7, curve.colour)
                    self.text(x - 12, y - 20, f"{known[step]:.2f}", curve.colour, 21, "rm", bold=True)
            if curve.label is not None:
                step, value = max(known.items())
                self.dot(*self.place(step, value), 7, curve.colour)
                labels.append((self.place(step, value)[1], value, curve))
        labels.sort(key=lambda label: label[0])
        heights = [y for y, _, _ in labels]
        for _ in range(100):  # neighbours nearer than 30 push each other away, a little at a time
            for i in range(1, len(heights)):
                push = max(0, 30 - (heights[i] - heights[i - 1])) / 2
                heights[i - 1], heights[i] = heights[i - 1] - push, heights[i] + push
        for y, (_, value, curve) in zip(heights, labels, strict=True):
            self.text(self.right + 18, y, f"{value:.2f}", curve.colour, 23, bold=True)
            self.text(self.right + 72, y, curve.label, curve.colour, 23)


def plot_runs(runs, out_png):
    """Draw one or several runs into a PNG of 1600 x 640; a run is a folder with log.jsonl, or a list of its stages' folders.

    Stages share one x axis, each going on where the one before it ended. Runs without evaluations show the loss alone.
    ValueError: see `read_log`; also when there is no run, or more than the colours tell apart.
    """
    runs = [[run] if isinstance(run, str | Path) else list(run) for run in runs]
    if not 1 <= len(runs) <= len(RUNS):
        raise ValueError(f"{len(runs)} runs to plot; expected 1 to {len(RUNS)} folders, a run's stages joined by commas")
    several = len(runs) > 1
    names = [Path(run[-1]).resolve().name if several else None for run in runs]
    read = [read_run(*each) for each in zip(runs, names, RUNS, strict=False)]
    losses, meters = sum((loss for loss, _, _ in read), []), sum((meter for _, meter, _ in read), [])
    ends = max((ends for _, _, ends in read), key=lambda ends: ends[-1][0])
    bold = [value for curve in losses[1::2] for _, value in curve.points if not math.isnan(value)]

    sheet = Image.new("RGB", (WIDTH * ENLARGED, HEIGHT * ENLARGED), PAPER)
    draw = ImageDraw.Draw(sheet)
    panel = Panel(draw, LEFT, 620 if meters else RIGHT, ends[-1][0], 1.08 * max(bold, default=1) or 1,
                  "Training loss", "every step faint, its course bold")
    panel.axes(ends)
    panel.curves(losses)
    if meters:
        panel = Panel(draw, 860, RIGHT, ends[-1][0], 1, "The sight meter",
                      "held-out questions answered exactly, by the picture shown with them")
        panel.axes(ends)
        panel.curves(meters)
    sheet.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(out_png, optimize=True)


def _ticks(high, count):
    """About `count` round values from 0 to `high`."""
    rough = high / count
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.99)
    return [round(step * i, 10) for i in range(int(high / step * 1.001) + 1)]


def _dashes(points, on, off):
    """Cut a polyline into dashes of length `on` with gaps of `off`."""
    xs, ys = np.array(points).T
    along = np.concatenate([[0], np.cumsum(np.hypot(np.diff(xs), np.diff(ys)))])
    for begin in np.arange(0, along[-1] + 1e-6, on + off):
        end = min(begin + on, along[-1])
        at = np.concatenate([[begin], along[(along > begin) & (along < end)], [end]])
        yield list(zip(np.interp(at, along, xs), np.interp(at, along, ys), strict=True))


def main():
    """The command line at the head of this file."""
    parser = command.Parser(prog="python -m training.plot", description=__doc__)
    parser.add_argument("out", help="the PNG to write")
    parser.add_argument("runs", nargs="+", help="folders with log.jsonl; a run's stages joined by commas")
    args = parser.parse_args()
    plot_runs([run.split(",") for run in args.runs], args.out)


if __name__ == "__main__":
    command.run(main)
