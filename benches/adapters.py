"""LoRA and QLoRA beside full fine-tuning: what was learned, and what it took; a row for each run that has ended.

    python -m benches.adapters runs/smollm2-finetune runs/smollm2-lora runs/smollm2-qlora

Sight and seconds are those of log.jsonl. Bytes are counted as `train.py --plan` counts them, from the run's flags:
weights and codes, gradients, AdamW's two moments. The figure under `peak` is the process's largest resident memory, in
which activations and the libraries are.
"""

import json
from pathlib import Path

import torch

import train
from benches.plot import read_log
from formats import command
from model import Llava
from training import flags, plan

COLUMNS = ("run", "true", "shuffled", "blank", "trained", "weights MB", "gradients MB", "moments MB", "s/step",
           "peak GB")


def row_of(folder):
    """A run's folder -> its cells, in the order of COLUMNS. ValueError: no log, no evaluation, no flags."""
    losses, evaluations = read_log(folder)
    if not evaluations or not (Path(folder) / "training_args.json").exists():
        raise ValueError(f"{folder}: expected the output_dir of a run with evaluations (--eval_data_path)")
    args = flags.build_parser().parse_args([])
    vars(args).update(json.loads((Path(folder) / "training_args.json").read_text()))
    with torch.device("meta"):
        model = train.choose_trained(Llava(plan.read_config(args)), args)
    held = plan.weights(model, plan.step_of(args, model.config)[0])
    rows = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    steps, last = [row for row in rows if "loss" in row], list(evaluations.values())[-1]
    kinds = ("gradients", "AdamW's two moments", "gathered weights")
    sizes = [sum(size for key, size in held.items() if key not in kinds), held[kinds[0]], held[kinds[1]]]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return (Path(folder).name, *(f"{last[f'eval_match{kind}']:.3f}" for kind in ("", "_shuffled", "_blank")),
            f"{trained:,}", *(f"{size / 1e6:.1f}" for size in sizes),
            f"{sum(row['seconds'] for row in steps) / len(steps):.2f}", f"{steps[-1]['memory_gb']:.2f}")


def main():
    """The command line at the head of this file."""
    parser = command.Parser(prog="python -m benches.adapters", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a run")
    for cells in (COLUMNS, ["---"] * len(COLUMNS), *map(row_of, parser.parse_args().runs)):
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    command.run(main)
