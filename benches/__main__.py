"""How fast, and how small, beside the peers: every row runs both on the same inputs, in turn, and checks the numbers.

    python -m benches cpu [ROW …]       all rows, or those named
    python -m benches gpu [ROW …]       the same on a GPU
      --smoke                           small sizes, once: shows that the rows run, not how fast
      --json FILE --png FILE            the rows as JSON, as a picture

A row is a function `row(smoke) -> {ours, peer, peer_name, unit, error}` in the file of its theme. `ratio` is peer to
ours: above 1 we are faster or smaller; a peer that is not installed has neither. `error` is the largest difference
between both results. A row that fails is told, and the others go on; the exit status is 1 then.
"""

import json
import platform
import sys
import traceback

from PIL import Image, ImageDraw, ImageFont

from benches import decoding, gpu, gpu_models, loading, quantising, reading, training
from benches.plot import INK, PAPER, QUIET
from formats import command

ROWS = {
    "cpu": {"load": loading.load, "load_same_dtype": loading.load_same_dtype, "load_peak": loading.load_peak,
            "load_peak_same_dtype": loading.load_peak_same_dtype, "data_records": reading.records,
            "data_memory": reading.records_memory, "data_pictures": reading.pictures,
            "pipeline": reading.pipeline, "startup": reading.startup, "startup_700k": reading.startup_700k,
            "step_stage1": training.stage1,
            "step_stage1_bf16": training.stage1_bf16, "step_full": training.full,
            "step_full_bf16": training.full_bf16, "step_stage1_peak": training.stage1_peak,
            "step_full_peak": training.full_peak,
            "nf4_dequantise": quantising.dequantise, "nf4_dequantise_bf16": quantising.dequantise_bf16,
            "nf4_dequantise_7b": quantising.dequantise_7b, "nf4_load_peak": quantising.load_peak,
            "lora_step": quantising.lora_step, "lora_step_bytes": quantising.lora_step_bytes,
            "qlora_step": quantising.qlora_step, "qlora_step_bytes": quantising.qlora_step_bytes,
            "prefill": decoding.prefill, "decode_bf16": decoding.decode_bf16, "decode_int8": decoding.decode_int8,
            "decode_int4": decoding.decode_int4, "batch_16": decoding.batch_16, "first_token": decoding.first_token},
    "gpu": gpu.ROWS | gpu_models.ROWS,
}
OURS, THEIRS = "#1f5fd0", "#c9ccd1"
BEHIND = "#c2334d"
ENLARGED = 2


def main():
    """The command line at the head of this file."""
    parser = command.Parser(prog="python -m benches", description=__doc__)
    parser.add_argument("device", choices=ROWS)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="; ".join(f"{d}: {', '.join(ROWS[d])}" for d in ROWS))
    parser.add_switch("--smoke", help="small sizes, once: shows that the rows run, not how fast")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--png", metavar="FILE", help="draw them there")
    args = parser.parse_args()
    known = ROWS[args.device]
    if unknown := [name for name in args.rows if name not in known]:
        raise ValueError(f"no {args.device} row {', '.join(unknown)}; there are {', '.join(known) or 'none yet'}")
    versions = {"python": platform.python_version()} | {name: gpu.version(name) for name in ("torch", "transformers")}
    print(f"{machine()}; " + ", ".join(f"{name} {number}" for name, number in versions.items()), file=sys.stderr)
    if args.device == "gpu":
        gpu.device(args.smoke)  # or an error
        versions |= gpu.versions()
        print(gpu.describe(), file=sys.stderr)
    rows, names = [], args.rows or known
    for name in names:
        try:
            row = {"row": name, **known[name](args.smoke)}
        except Exception:  # whatever it is: the other rows have taken minutes, or will
            traceback.print_exc()
            print(f"{name:22s} failed", flush=True)
            continue
        rows.append(row | {"ratio": row["peer"] and row["peer"] / row["ours"], "versions": versions})
        print(line(rows[-1]), flush=True)
        if args.json:  # after each row, in case that the time is up
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump(rows, file, indent=2)
    if args.png:
        draw([row for row in rows if row["peer"]], args.png)
    return int(len(rows) < len(names))


def line(row):
    """A row of the table."""
    peer = (f"{row['peer_name']} {row['peer']:8.3f} {row['unit']:3s} {row['ratio']:6.2f}x" if row["peer"] else
            "and no peer here")
    return (f"{row['row']:22s} ours {row['ours']:8.3f} {row['unit']:3s} {peer}   error {row['error']:g}"
            + (f"   {row['share']:.0%} of the floor" if "share" in row else ""))


def machine():
    """The processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(text.split(":")[1].strip() for text in file if text.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def draw(rows, path):
    """Two bars for each row, ours and the peer's, both scaled by the longer one."""
    width, height = 1000, 60 + 76 * len(rows)
    sheet = Image.new("RGB", (width * ENLARGED, height * ENLARGED), PAPER)
    pen = ImageDraw.Draw(sheet)

    def text(x, y, words, colour=INK, size=18, anchor="lm"):
        pen.text((x * ENLARGED, y * ENLARGED), words, colour, ImageFont.load_default(size * ENLARGED), anchor)

    text(30, 30, "less is better; the figure at the right is how many times we are ahead", QUIET)
    for i, row in enumerate(rows):
        top, longer = 60 + 76 * i, max(row["ours"], row["peer"])
        text(30, top + 32, row["row"])
        bars = (("ours", "Pumice", OURS), ("peer", row["peer_name"], THEIRS))
        for y, (key, name, colour) in zip((top + 8, top + 36), bars):
            end = 280 + 380 * row[key] / longer
            pen.rectangle([x * ENLARGED for x in (280, y, end, y + 22)], colour)
            text(end + 10, y + 11, f"{row[key]:.3g} {row['unit']} {name}", QUIET, 15)
        text(970, top + 32, f"{row['ratio']:.2f}x", OURS if row["ratio"] >= 1 else BEHIND, 22, "rm")
    sheet.resize((width, height), Image.Resampling.LANCZOS).save(path, optimize=True)


if __name__ == "__main__":
    command.run(main)
