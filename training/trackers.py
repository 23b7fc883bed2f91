"""Trackers: the curves of log.jsonl in TensorBoard or Weights & Biases too, for `--report_to tensorboard wandb`.

Both are optional packages, imported only when asked for, and neither may cost a run: one that is missing or fails is
told of in a sentence and dropped. Numbers are named as HF's trainer names them (train/loss, eval/loss …). A resumed run
goes on in the same place and takes back the steps that it does again.
"""

import os
from pathlib import Path

import torch.distributed as dist

from formats.command import say


def start_tensorboard(args, step):
    """Event files in output_dir/runs. -> (send(numbers, step), close())"""
    from torch.utils.tensorboard import SummaryWriter  # needs the package tensorboard
    writer = SummaryWriter(os.path.join(args.output_dir, "runs"), purge_step=step + 1 if step else 0)

    def send(numbers, step):
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)
        writer.flush()  # a killed run must not lose what its checkpoint will not do again

    return send, writer.close


def start_wandb(args, step):
    """A run of the project WANDB_PROJECT; a resumed one is found by the id in output_dir. -> (send, close)"""
    import wandb
    path = Path(args.output_dir, "wandb_id.txt")
    if not step or not path.exists():
        path.write_text(os.urandom(4).hex())
    run = wandb.init(project=os.environ.get("WANDB_PROJECT", "pumice"), name=args.run_name or args.output_dir,
                     id=path.read_text(), resume="allow", dir=args.output_dir, config=vars(args))
    return lambda numbers, step: run.log(numbers, step=step), run.finish


STARTS = {"tensorboard": start_tensorboard, "wandb": start_wandb}


class Trackers:
    """What the first rank reports to. step: where the run begins."""

    def __init__(self, args, step):
        self.several, self.running = "," in (args.eval_data_path or ""), {}
        names = (args.report_to or []) if dist.get_rank() == 0 else []
        self.running |= {name: self.guard(name, STARTS[name], args, step) for name in names}

    def log(self, row):
        """Send the numbers of a row of log.jsonl; with several evaluation files their names say whose they are."""
        head = "train/" if "loss" in row else f"eval/{row['eval_set']}_" if self.several else "eval/"
        firsts = {key: value[0] if isinstance(value, list) and value else value for key, value in row.items()}
        numbers = {head + key.removeprefix("eval_"): value for key, value in firsts.items()
                   if isinstance(value, int | float) and key != "step"}
        for name in filter(self.running.get, self.running):
            self.guard(name, self.running[name][0], numbers, row["step"])

    def close(self):
        for name in filter(self.running.get, self.running):
            self.guard(name, self.running[name][1])

    def guard(self, name, function, *arguments):
        """Call into a tracker's package, and never again if it raises: training is worth more."""
        try:
            return function(*arguments)
        except Exception as error:
            missing = isinstance(error, ModuleNotFoundError)
            why = f"is not installed (pip install {name})" if missing else f"failed ({type(error).__name__}: {error})"
            say(f"--report_to {name}: {name} {why}; training goes on without it, and log.jsonl has every step")
            self.running[name] = None
