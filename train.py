"""Train a LLaVA: stage 1 teaches the projector to translate (captions), stage 2 projector and LLM to answer.

    torchrun train.py --stage pretrain --model_name_or_path LLM --vision_tower CLIP --data_path captions.json …
    torchrun train.py --stage finetune --model_name_or_path STAGE1 --data_path conversations.json …

Plain `python train.py …` is the same on one process: a mesh of one. Flags carry LLaVA's names (training/flags.py).
"""

import gc
import json
import math
import os
import resource
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.data import DataLoader

import data
import weights
from formats import command
from model import IGNORE_INDEX
from training import evaluation, flags
from training.sampler import BatchOrder


def main(argv=None):
    """Flags -> model -> data -> the loop -> a folder that sample.py and transformers load."""
    args = flags.parse(argv)
    device, mesh = start_distributed(args)
    try:
        interrupted = run(args, device, mesh)
        dist.barrier()  # rank 0 may still be writing
        return 130 if interrupted else 0
    finally:
        gc.collect()  # what is sharded must be gone before the group is, or gloo may abort the process at exit
        dist.destroy_process_group()


def run(args, device, mesh):
    """One whole run on this rank. -> whether Ctrl-C ended it"""
    say = print if mesh.get_rank() == 0 else lambda *_, **__: None
    prepare_output_dir(args)
    loaded = build_model(args, device)
    say(describe(loaded.model, args))
    records = data.Records(args.data_path.split(","), args.image_folder, loaded, args.version or loaded.conv_mode,
                           args.model_max_length, on_bad_record=args.on_bad_record)
    order = BatchOrder(len(records), args.per_device_train_batch_size, args.seed, mesh.get_rank(), mesh.size())
    judge = evaluation.Judge(args, loaded)
    shard(loaded.model, mesh, args)
    loop = Loop(args, loaded, records, order, build_optimizer(loaded.model, args), judge, mesh, device, say)
    loop.run()
    loop.save()
    if records.report():
        say(records.report())
    return loop.stopped


# --------------------------------------------------------------------------------------------------------- preparation


def start_distributed(args):
    """Join the ranks that torchrun started, or make a group of one. -> (device, one-dimensional mesh)"""
    cuda = torch.cuda.is_available() and not args.use_cpu
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = args.tf32
    backend = "nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device, init_device_mesh(device.type, (dist.get_world_size(),))


def prepare_output_dir(args):
    """Refuse to write over a finished run, and find out now, not after hours, whether the folder can be written."""
    if os.path.exists(os.path.join(args.output_dir, "config.json")) and not args.overwrite_output_dir:
        raise ValueError(f"{args.output_dir} already holds a model; give another --output_dir, or "
                         "--overwrite_output_dir")
    os.makedirs(args.output_dir, exist_ok=True)
    if not os.access(args.output_dir, os.W_OK):
        raise ValueError(f"{args.output_dir} cannot be written; give another --output_dir")


def build_model(args, device):
    """Load LLM, tower and projector, and decide what trains. Frozen parts are kept in the dtype of the computation,
    trained ones in float32."""
    loaded = weights.load(
        args.model_name_or_path, dtype="float32", device=device, vision_tower=args.vision_tower,
        pretrain_mm_mlp_adapter=args.pretrain_mm_mlp_adapter, mm_projector_type=args.mm_projector_type,
        mm_vision_select_layer=args.mm_vision_select_layer, mm_vision_select_feature=args.mm_vision_select_feature,
        image_aspect_ratio=args.image_aspect_ratio, mm_use_im_start_end=args.mm_use_im_start_end,
        projector_seed=args.seed)
    model = loaded.model.requires_grad_(False)
    if model.mm_projector is not None and not args.freeze_mm_mlp_adapter:
        model.mm_projector.requires_grad_(True)
    if not args.tune_mm_mlp_adapter:
        model.language_model.requires_grad_(True)
        if args.freeze_backbone:
            model.language_model.model.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("nothing is left to train: the flags freeze every part (--tune_mm_mlp_adapter needs a tower)")
    for p in model.parameters():
        if not p.requires_grad:
            p.data = p.data.to(torch.bfloat16 if args.bf16 else torch.float32)
    model.language_model.model.gradient_checkpointing = args.gradient_checkpointing
    loaded.config.tokenizer_model_max_length = args.model_max_length
    if args.version not in (None, "plain"):  # plain is no conversation: questions keep the model's own template
        loaded.conv_mode = loaded.config.conv_mode = args.version
    return loaded


def describe(model, args):
    """The table of what trains: part, parameters, bytes, learning rate."""
    lines = [f"{'part':16s} {'parameters':>14s} {'MB':>9s}   trained"]
    for name, part in (("vision_tower", model.vision_tower), ("mm_projector", model.mm_projector),
                       ("language_model", model.language_model)):
        if part is None:
            continue
        own = list(part.parameters())
        trained = sum(p.numel() for p in own if p.requires_grad)
        rate = args.mm_projector_lr if name == "mm_projector" and args.mm_projector_lr else args.learning_rate
        size = sum(p.numel() * p.element_size() for p in own) / 1e6
        lines.append(f"{name:16s} {sum(p.numel() for p in own):14,d} {size:9.1f}   "
                     + (f"{trained:,d} at learning rate {rate:g}" if trained else "frozen"))
    return "\n".join(lines)


def shard(model, mesh, args):
    """FSDP2: every decoder layer is a unit, the rest of what trains another; frozen parts stay whole on every rank."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if args.bf16 else (
        MixedPrecisionPolicy())
    frozen = {p for p in model.parameters() if not p.requires_grad}
    for layer in model.language_model.model.layers:
        if any(p.requires_grad for p in layer.parameters()):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=frozen)
    for method in ("loss", "logits", "last_logits"):
        register_fsdp_forward_method(model, method)


def build_optimizer(model, args):
    """AdamW. Matrices decay, biases and norms do not; the projector may have its own rate (`base_lr` of its groups)."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            projector = args.mm_projector_lr is not None and name.startswith("mm_projector")
            decay = not name.endswith("bias") and "norm" not in name
            groups.setdefault((projector, decay), []).append(p)
    return torch.optim.AdamW(
        [{"params": parameters, "weight_decay": args.weight_decay if decay else 0.0,
          "base_lr": args.mm_projector_lr if projector else args.learning_rate}
         for (projector, decay), parameters in sorted(groups.items())],
        betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon, fused=True)


def learning_rate_factor(step, total, args):
    """The share of the peak rate used in `step` (0-based): a straight rise from 0, then the schedule's fall."""
    warmup = args.warmup_steps or math.ceil(args.warmup_ratio * total)
    if args.lr_scheduler_type == "constant":
        return 1.0
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    if args.lr_scheduler_type == "cosine":
        return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    if args.lr_scheduler_type == "linear":
        return max(0.0, 1 - progress)
    return 1.0  # constant_with_warmup


# ------------------------------------------------------------------------------------------------------------ the loop


class Loop:
    """The training loop: what it holds on to, and what it writes."""

    def __init__(self, args, loaded, records, order, optimizer, judge, mesh, device, say):
        self.args, self.loaded, self.model, self.records, self.order = args, loaded, loaded.model, records, order
        self.optimizer, self.judge, self.mesh, self.device, self.say = optimizer, judge, mesh, device, say
        self.accumulate = min(args.gradient_accumulation_steps, len(order))  # a step never needs more than one epoch
        per_epoch = len(order) // self.accumulate
        self.total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
        self.epochs = math.ceil(self.total / per_epoch)
        self.step, self.interrupted, self.stopped, self.log, self.started = 0, False, False, None, time.perf_counter()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        batch = args.per_device_train_batch_size * self.accumulate * mesh.size()
        say(f"{len(records):,} records, template {records.conv_mode}; {self.total} steps of {batch} records "
            f"({args.per_device_train_batch_size} x {self.accumulate} accumulated x {mesh.size()} ranks), "
            f"{self.total / per_epoch:.2f} epochs, {'bfloat16' if args.bf16 else 'float32'}, seed {args.seed}")

    def run(self):
        """Run to the last step or to Ctrl-C (then the step under way is finished)."""
        previous = signal.signal(signal.SIGINT, self.interrupt)
        with open(os.path.join(self.args.output_dir, "training_args.json"), "w", encoding="utf-8") as file:
            json.dump(vars(self.args), file, indent=2)
        with open(os.path.join(self.args.output_dir, "log.jsonl"), "w", encoding="utf-8") as self.log:
            if self.args.evaluation_strategy != "no":
                self.evaluate()  # what the model can do before it learns
            accumulated, began = [], time.perf_counter()
            for micro_batch, epoch in self.micro_batches():
                accumulated.append(self.forward_backward(micro_batch))
                if len(accumulated) < self.accumulate:
                    continue
                self.report(self.optimizer_step(accumulated, epoch, began))
                self.stopped = self.total_of([self.interrupted]) > 0  # Ctrl-C may reach the ranks in different steps
                if self.stopped or self.step == self.total:
                    break
                if self.due_for_evaluation():
                    self.evaluate()
                accumulated, began = [], time.perf_counter()
            if not self.stopped:
                self.evaluate()
        signal.signal(signal.SIGINT, previous)

    def micro_batches(self):
        """(packed batch, epochs done after it), epoch after epoch."""
        for epoch in range(self.epochs):
            batches = self.order.epoch()
            loader = DataLoader(self.records, batch_sampler=batches, collate_fn=self.records.pack,
                                num_workers=self.args.dataloader_num_workers)
            for i, batch in enumerate(loader):
                for note, record_id in batch.notes:
                    self.records.note(note, record_id)
                yield batch.to(self.device), epoch + (i + 1) / len(batches)

    def forward_backward(self, batch):
        """Add the batch's gradient; -> (loss, learned tokens, tokens, record ids)."""
        loss, learned = self.model.loss(batch), int((batch.labels != IGNORE_INDEX).sum())
        if not learned:  # all was cut away or broken, as was reported: the mean over nothing is no number
            loss = loss.nan_to_num(0.0)
        if not torch.isfinite(loss):
            raise ValueError(f"step {self.step + 1}: the loss is {loss.item()} on records {', '.join(batch.ids)}; try "
                             "a lower --learning_rate, or look for what is odd about these records")
        (loss / self.accumulate).backward()
        return loss.detach(), learned, len(batch.input_ids), batch.ids

    def optimizer_step(self, accumulated, epoch, began):
        """Clip, step, and describe the step: the row of log.jsonl."""
        factor = learning_rate_factor(self.step, self.total, self.args)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        limit = self.args.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.trained, limit)
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        loss = self.mean([x[0] for x in accumulated])
        learned, tokens = (self.total_of([x[k] for x in accumulated]) for k in (1, 2))
        rates = [self.args.learning_rate * factor]
        if self.args.mm_projector_lr not in (None, self.args.learning_rate):
            rates.append(self.args.mm_projector_lr * factor)
        seconds = time.perf_counter() - began
        row = {"step": self.step, "epoch": round(epoch, 6), "loss": loss, "grad_norm": norm,
               "learning_rate": rates if len(rates) > 1 else rates[0], "learned_tokens": learned, "tokens": tokens,
               "seconds": seconds, "tokens_per_second": tokens / seconds, "memory_gb": peak_memory(self.device)}
        if self.args.log_samples:
            row["ids"] = self.gather_ids([x[3] for x in accumulated])
        return row

    # ------------------------------------------------------------------------------------------- across ranks

    def mean(self, losses):
        """The mean over micro-batches and ranks."""
        loss = torch.stack(losses).mean()
        dist.all_reduce(loss)
        return loss.item() / self.mesh.size()

    def total_of(self, counts):
        """The sum over micro-batches and ranks."""
        count = torch.tensor(sum(counts), device=self.device)
        dist.all_reduce(count)
        return count.item()

    def gather_ids(self, ids):
        """Record ids of every micro-batch, in (accumulation, rank) order."""
        every = [None] * self.mesh.size()
        dist.all_gather_object(every, ids)
        return [batch for together in zip(*every) for batch in together]

    # ------------------------------------------------------------------------------------- what a person sees

    def interrupt(self, *_):
        """Ctrl-C: finish this step, save, leave; a second one leaves at once."""
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        self.say("\nCtrl-C: finishing this step, then saving (again to leave at once)", flush=True)

    def report(self, row):
        """One dense line, and the row in log.jsonl."""
        self.write(row)
        if row["step"] % self.args.logging_steps and row["step"] != self.total:
            return
        left = (time.perf_counter() - self.started) / self.step * (self.total - self.step)
        rate = row["learning_rate"]
        self.say(f"step {self.step:>{len(str(self.total))}}/{self.total}  loss {row['loss']:.4f}  "
                 f"norm {row['grad_norm']:.3f}  lr {rate if isinstance(rate, list) else f'{rate:.2e}'}  "
                 f"{row['learned_tokens']} learned of {row['tokens']} tokens  {row['tokens_per_second']:,.0f} tok/s  "
                 f"{1000 * row['seconds']:.0f} ms  {row['memory_gb']:.2f} GB  ETA {duration(left)}", flush=True)

    def write(self, row):
        if self.mesh.get_rank() == 0:
            clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            self.log.write(json.dumps(clean) + "\n")
            self.log.flush()

    def due_for_evaluation(self):
        if self.args.evaluation_strategy == "steps":
            return self.step % (self.args.eval_steps or 500) == 0
        return self.args.evaluation_strategy == "epoch" and self.step % max(1, self.total // self.epochs) == 0

    def evaluate(self):
        for row in self.judge.rows(self.step):
            self.write(row)
            self.say(evaluation.line(row), flush=True)

    def save(self):
        """Write the model; in stage 1 also, or with --save_projector_only alone, its projector."""
        tensors = {name: p.full_tensor() if hasattr(p, "full_tensor") else p
                   for name, p in self.model.state_dict().items()}
        if self.mesh.get_rank() == 0:
            if self.args.tune_mm_mlp_adapter:
                weights.save_projector(self.loaded, self.args.output_dir, tensors)
            if not self.args.save_projector_only:
                weights.save(self.loaded, self.args.output_dir, tensors=tensors)
        state = f"stopped after step {self.step} of {self.total}" if self.stopped else f"{self.step} steps"
        self.say(f"{state} in {duration(time.perf_counter() - self.started)}; written to {self.args.output_dir}")


def peak_memory(device):
    """The most memory used so far, in 2^30 bytes: allocated on the GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def duration(seconds):
    """62 -> '1:02', 3725 -> '1:02:05'."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


if __name__ == "__main__":
    command.run(main)
