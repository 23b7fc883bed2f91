"""Train a LLaVA: stage 1 teaches the projector to translate (captions), stage 2 projector and LLM to answer.

    torchrun train.py --stage pretrain --model_name_or_path LLM --vision_tower CLIP --data_path captions.json …
    torchrun train.py --stage finetune --model_name_or_path STAGE1 --data_path conversations.json …

Plain `python train.py …` is the same on one process: a mesh of one. Flags carry LLaVA's names (training/flags.py).
"""

if __name__ == "__main__":  # Ctrl-C may end the imports, which take seconds, but without a traceback
    import sys
    sys.excepthook = lambda kind, *error: kind is KeyboardInterrupt or sys.__excepthook__(kind, *error)

import gc
import json
import math
import os
import resource
import signal
import sys
import time
from datetime import timedelta
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader

import data
import lora
import quant
import weights
from formats import command, files, hub, templates
from formats.layouts import read_pinpoints
from formats.records import find_files
from kernels import choice
from model import IGNORE_INDEX, Llava
from training import checkpoint, evaluation, features, flags, plan, trackers, work
from training.ranks import Watch
from training.sampler import BatchOrder

CODES_ARE_CUT = torch.__version__ >= (2, 13)  # FSDP2 of torch 2.11 takes every parameter for one that can be trained


def main(argv=None):
    """Flags -> model -> data -> the loop -> a folder that sample.py and transformers load."""
    args = flags.parse(argv)
    if args.plan:  # nothing is loaded
        with torch.device("meta"):
            model = Llava(plan.read_config(args))
        return plan.show(args, choose_trained(model, args))
    if args.plot:  # the drawing stands below training, which needs it for nothing else
        import_module("benches.plot").plot_runs([run.split(",") for run in args.plot], args.out)
        return print(f"{', '.join(args.plot)} drawn into {args.out}")
    device, mesh = start_distributed(args)
    watch = Watch()
    try:
        stopped = run(args, device, mesh, watch)
        dist.barrier()  # rank 0 may still be writing
        return 128 + stopped if stopped else 0
    except Exception as error:
        watch.blame(error)
        raise
    finally:
        gc.collect()  # what is sharded must be gone before the group is, or gloo may abort the process at exit
        dist.destroy_process_group()
        watch.stop()


def run(args, device, mesh, watch):
    """One whole run on this rank. -> the signal that ended it (Ctrl-C is 2, SIGTERM 15), or 0"""
    say = print if mesh.get_rank() == 0 else lambda *_, **__: None
    for paths in filter(None, (args.data_path, args.eval_data_path)):
        find_files(paths)  # before the model is loaded, which takes minutes
    if not os.path.isdir(args.image_folder):
        raise ValueError(f"check --image_folder {args.image_folder}: no such folder; pictures' paths start there")
    start, ended = checkpoint.on_first_rank(checkpoint.find, args)
    if ended:
        say(ended)
        return 0
    torch.manual_seed(args.seed + mesh.get_rank())  # of dropout, which is to differ from rank to rank
    loaded = build_model(args, device, mesh)
    say(f"{flags.describe(args)}\n{describe(loaded.model, args)}" + f"\n{choice.describe(device)}" * args.verbose)
    loop = Loop(args, loaded, mesh, device, say, watch)
    loop.begin(start)
    try:
        loop.run()
        loop.save()
    except Exception as error:  # what was reached is saved, where the ranks can still do that together
        together = mesh.size() == 1 or isinstance(error, checkpoint.OnAllRanks)
        if together and loop.mark and loop.mark[0]["step"] > 0:
            loop.save_checkpoint()
        raise
    loop.records.note((what, name) for notes in checkpoint.gather(loop.records.notes)
                      for what, ids in notes.items() for name in ids)
    if report := loop.records.report():
        say(report)
    return loop.stopped


# --------------------------------------------------------------------------------------------------------- preparation


def start_distributed(args):
    """Join torchrun's ranks, or make a group of one. -> (device, mesh: ranks in --fsdp_replicas rows, or one)"""
    cuda = torch.cuda.is_available() and not args.use_cpu
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = args.tf32
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"  # what is offloaded is summed on the CPU
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    rows, ranks = args.fsdp_replicas, int(os.environ.get("WORLD_SIZE", 1))
    if ranks % rows:
        raise ValueError(f"--fsdp_replicas {rows} does not divide {ranks} ranks; give the number of nodes, say")
    dist.init_process_group(backend, timeout=timedelta(seconds=args.ddp_timeout), **alone)
    sizes = {"rows": rows, "shards": ranks // rows} if rows > 1 else {"shards": ranks}
    return device, init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def build_model(args, device, mesh=None):
    """Load all parts, decide what trains (in float32; the frozen in the computation's dtype), divide it by the mesh."""
    def prepare(model):
        """What weights.load does with the model before its numbers are read. -> the adapters' first numbers"""
        drawn = adapt(model, args)
        choose_trained(model, args)
        for p in model.parameters():
            if p.is_floating_point() and not p.requires_grad:
                p.data = p.data.to(getattr(torch, args.dtype))
        quant.compute_in(model, getattr(torch, args.dtype))
        if mesh:
            shard(model, mesh, args)
        return drawn

    hub.CACHE_DIR = args.cache_dir
    loaded = weights.load(
        args.model_name_or_path, dtype="float32", device=device, vision_tower=args.vision_tower,
        pretrain_mm_mlp_adapter=args.pretrain_mm_mlp_adapter, mm_projector_type=args.mm_projector_type,
        mm_vision_select_layer=args.mm_vision_select_layer, mm_vision_select_feature=args.mm_vision_select_feature,
        image_aspect_ratio=args.image_aspect_ratio, mm_patch_merge_type=args.mm_patch_merge_type,
        image_grid_pinpoints=read_pinpoints(args.image_grid_pinpoints), mm_use_im_start_end=args.mm_use_im_start_end,
        conv_mode=None if args.conv_mode == "plain" else args.conv_mode,  # plain is no conversation, and asks nothing
        pad_token=templates.PAD if args.version == "v0" else None, im_patch=args.mm_use_im_patch_token,
        projector_seed=args.seed, adapter=args.lora_weight_path, force=args.force, bits=args.bits,
        quant_type=args.quant_type, double_quant=args.double_quant, quant_also=args.quant_also, prepare=prepare,
        offload=args.offload)
    if loaded.lora and not args.lora_weight_path:
        raise ValueError(f"{args.model_name_or_path} is an adapter; give its base there, and the adapter as "
                         "--lora_weight_path, or merge the two with `python weights.py merge`")
    if loaded.model.image_newline is not None and loaded.config.image_aspect_ratio != "anyres":
        weights.say(f"WARNING: {args.model_name_or_path} has learned anyres, but trains with --image_aspect_ratio "
                    f"{loaded.config.image_aspect_ratio}: one view per picture, image_newline unused")
    if args.lora_enable:
        loaded.lora = lora_config(args)
    loaded.config.tokenizer_model_max_length = args.model_max_length
    return loaded


def choose_trained(model, args):
    """Set requires_grad as the flags say. -> model"""
    adapt(model, args)
    model.requires_grad_(False)
    llm, learned = model.language_model, [model.vision_tower] * args.unfreeze_mm_vision_tower
    whole = not any(name.startswith("mm_projector") for name in lora.adapted(model))
    learned += [model.mm_projector, model.image_newline] * (whole and not args.freeze_mm_mlp_adapter)
    if args.lora_enable:
        learned += lora.trained(model, args.lora_bias)
        for layer in lora.adapted(model).values():
            layer.dropout = args.lora_dropout
    elif args.tune_mm_mlp_adapter:  # <im_start> and <im_end> are new words, and all words share a matrix
        learned += [llm.model.embed_tokens] * model.config.mm_use_im_start_end
    else:
        learned += [llm.lm_head if args.freeze_backbone else llm]
    for part in learned:
        if isinstance(part, torch.nn.Module) and quant.quantised(part):
            keep = {model.mm_projector: "--freeze_mm_mlp_adapter True",
                    model.vision_tower: "--unfreeze_mm_vision_tower False"}.get(part, "--freeze_backbone True")
            raise ValueError("what is quantised cannot be trained; learn a correction to it with --lora_enable True "
                             f"--lora_target all-linear, or leave it as it is with {keep} or --quant_also ''")
        if part is not None:
            part.requires_grad_(True)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("nothing is left to train: the flags freeze every part (--tune_mm_mlp_adapter needs a tower)")
    return model


def adapt(model, args):
    """Give the model its adapters, unless one to go on from has done so. -> {name: first numbers} of new ones"""
    if not args.lora_enable or lora.adapted(model):
        return {}
    return lora.inject(model, args.lora_target, lora_config(args), args.seed)


def lora_config(args):
    """What the --lora_* flags say."""
    return lora.LoraConfig(args.lora_r, args.lora_alpha, args.lora_dropout, args.use_rslora)


def describe(model, args):
    """The table of what trains: part, parameters, bytes, learning rate."""
    lines = [f"{'part':16s} {'parameters':>14s} {'MB':>9s}   trained"]
    for name in dict.fromkeys(full.split(".")[0] for full, _ in model.named_parameters()):
        own = [p for full, p in model.named_parameters() if full.split(".")[0] == name]
        trained = sum(p.numel() for p in own if p.requires_grad)
        size = sum(p.numel() * p.element_size() for p in own) / 1e6
        adapted = sum(full.split(".")[0] == name for full in lora.adapted(model))
        lines.append(f"{name:16s} {quant.count(model, name):14,d} {size:9.1f}   "
                     + (f"{trained:,d} at learning rate {peak_rate(name, args):g}" if trained else "frozen")
                     + f" (LoRA of rank {args.lora_r} on {adapted} matrices)" * bool(adapted))
    return "\n".join(lines)


def shard(model, mesh, args):
    """FSDP2: every layer is a unit, the rest of what trains another; frozen parts stay whole on all ranks. With several
    rows (HSDP) each divides the model, gradients are summed over them. Backward gathers the next layer by itself."""
    offload = fsdp.CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if args.offload else fsdp.OffloadPolicy()
    policy = fsdp.MixedPrecisionPolicy(param_dtype=getattr(torch, args.dtype), reduce_dtype=torch.float32)
    how = {"mesh": mesh, "mp_policy": policy, "offload_policy": offload}
    layers = set(model.language_model.model.layers.parameters()) if args.lora_shard_base else set()
    if not CODES_ARE_CUT and not all(p.is_floating_point() for p in layers):
        raise ValueError(f"--lora_shard_base: torch {torch.__version__} cannot divide what is quantised among ranks;"
                         " torch 2.13 can, or leave the flag out")
    frozen = {p for p in model.parameters() if not p.requires_grad} - layers
    tower = model.vision_tower.vision_model["encoder"]["layers"] if model.vision_tower is not None else []
    units = [layer for layer in [*tower, *model.language_model.model.layers]
             if any(p.requires_grad for p in layer.parameters())]
    for layer in units:
        fsdp.fully_shard(layer, **how, reshard_after_forward=not args.keep_gathered, ignored_params=frozen)
    for layer, after in zip(units, units[1:]):
        layer.set_modules_to_forward_prefetch([after])
    fsdp.fully_shard(model, **how, ignored_params=frozen)
    for method in ("loss", "logits", "last_logits"):
        fsdp.register_fsdp_forward_method(model, method)


def peak_rate(name, args):
    """The peak learning rate of a parameter, or of a part: projector and tower may have their own."""
    own = {"mm_projector": args.mm_projector_lr, "vision_tower": args.mm_vision_tower_lr}.get(name.split(".")[0])
    return args.learning_rate if own is None else own


def build_optimizer(model, args):
    """AdamW. Matrices decay, biases and norms do not; each group's `base_lr` is its peak rate."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decay = 0.0 if name.endswith("bias") or "norm" in name else args.weight_decay
            groups.setdefault((peak_rate(name, args), decay), []).append(p)
    return torch.optim.AdamW(
        [{"params": own, "weight_decay": decay, "base_lr": rate} for (rate, decay), own in sorted(groups.items())],
        betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon, fused=True)


def learning_rate_factor(step, total, args):
    """The share of the peak rate used in `step` (0-based): a straight rise from 0, then the schedule's fall."""
    warmup = args.warmup_steps or math.ceil(args.warmup_ratio * total)
    if step < warmup and args.lr_scheduler_type != "constant":
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    fall = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress}
    return max(0.0, fall.get(args.lr_scheduler_type, 1.0))


# ------------------------------------------------------------------------------------------------------------ the loop


class Loop:
    """The training loop: what it holds on to, and what it writes."""

    def __init__(self, args, loaded, mesh, device, say, watch):
        self.args, self.loaded, self.model = args, loaded, loaded.model
        self.mesh, self.device, self.say, self.watch = mesh, device, say, watch
        self.records = records = data.Records(
            args.data_path, args.image_folder, loaded, args.conv_mode or loaded.conv_mode, args.model_max_length,
            args.on_bad_record, args.strict_labels, args.on_bad_image, args.seed)
        self.order = order = BatchOrder(
            len(records), args.per_device_train_batch_size, args.seed, mesh.get_rank(), mesh.size(),
            records.words if args.group_by_modality_length else None, args.gradient_accumulation_steps,
            args.sample_order == "accelerate")
        self.judge = judge = evaluation.Judge(args, loaded)
        if args.cache_features:
            records.load = features.Features(args, loaded, records).put
        self.optimizer = build_optimizer(self.model, args)
        self.accumulate = min(args.gradient_accumulation_steps, len(order))  # a step never needs more than one epoch
        self.per_epoch = len(order) // self.accumulate
        self.total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * self.per_epoch)
        self.epochs = math.ceil(self.total / self.per_epoch)
        self.step, self.epoch, self.seen = 0, 0, 0  # done: steps; whole epochs; micro-batches of the epoch under way
        self.first, self.saved, self.skipped, self.mark = 0, None, 0, None  # see begin, save_checkpoint, worth_a_step
        self.interrupted, self.stopped, self.log, self.owed = 0, 0, None, args.evaluation_strategy != "no"
        self.best = None  # evaluation so far, as evaluation.rate describes it
        self.spent, self.eval_seconds = 0, 0  # in steps, in the last evaluation
        judge.pause, judge.gather = self.leave_if_stopped, checkpoint.gather
        judge.place = mesh.get_rank(), mesh.size()
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.checkpointing = plan.Checkpointing(args, self.model)
        self.scaler = torch.amp.GradScaler(device.type, growth_interval=1000, enabled=args.fp16)  # DeepSpeed's interval
        batch = args.per_device_train_batch_size * self.accumulate * mesh.size()
        say(f"{len(records):,} records, template {records.conv_mode}; {self.total} steps of {batch} records "
            f"({args.per_device_train_batch_size} x {self.accumulate} accumulated x {mesh.size()} ranks), "
            f"{self.total / self.per_epoch:.2f} epochs, {args.dtype}, seed {args.seed}, "
            f"gradients {f'clipped to a norm of {args.max_grad_norm:g}' if args.max_grad_norm else 'not clipped'}")
        self.work, (self.peak, line) = work.Work(self.model), work.peak(device, args)
        say(f"{self.checkpointing.line}\n{line}")
        if args.load_best_model_at_end or args.early_stopping_patience:
            say(f"{args.metric_for_best_model} of {next(iter(judge.sets))} decides which evaluation is best")
        self.facts = {"records": len(records), "records per step": batch, "steps": self.total}

    def begin(self, folder):
        """Make sure that all can be saved, and go on from a checkpoint if there is one."""
        if folder:
            state = checkpoint.read_state(folder)
            checkpoint.compare(folder, state["facts"], self.facts, self.args.resume_anyway)
            checkpoint.load(folder, self.trained, self.optimizer)
            self.step, self.epoch, self.skipped, self.owed = (state[k] for k in ("step", "epoch", "skipped", "owed"))
            self.seen = state["records"] // (self.args.per_device_train_batch_size * self.mesh.size())
            self.best = state.get("best")
            if self.mesh.get_rank() < len(state["random"]):
                checkpoint.set_random_state(state["random"][self.mesh.get_rank()], self.device)
            self.scaler.load_state_dict(state["scaler"])
            self.first = self.saved = self.step
            self.say(f"resumed from {folder}: {self.step} of {self.total} steps are done" + (
                f"; it is past --max_steps {self.total} already, and nothing is left to learn"
                if self.step > self.total else ""))
        left = sum(self.due("save", step) for step in range(self.step + 1, self.total + 1))
        self.say(checkpoint.rehearse(self.args, self.loaded, self.trained, self.device, self.step, left))
        checkpoint.on_first_rank(checkpoint.settle, self.args, self.step if folder else None, self.owed)
        self.trackers = trackers.Trackers(self.args, self.step)
        self.remember()

    def run(self):
        """Run to the last step or to Ctrl-C or SIGTERM (then the step under way is finished)."""
        self.started = time.perf_counter()
        previous = {number: signal.signal(number, self.interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with open(os.path.join(self.args.output_dir, "log.jsonl"), "a", encoding="utf-8") as self.log:
                if self.owed:
                    self.evaluate()  # what the model can do before it learns, or what Ctrl-C put off
                if not self.done and not self.stopped:
                    self.steps()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self.trackers.close()

    def steps(self):
        """Step after step: learn, log, save, evaluate."""
        accumulated, began = [], time.perf_counter()
        for micro_batch, epoch in self.micro_batches():
            accumulated.append(self.forward_backward(micro_batch))
            if len(accumulated) < self.accumulate:
                continue
            self.report(self.optimizer_step(accumulated, epoch, began))
            self.stopped = self.over_ranks(self.interrupted, dist.ReduceOp.MAX)  # it may reach them in different steps
            if self.stopped or self.due("save", self.step):
                self.save_checkpoint()
            if self.owed and not self.stopped:
                self.evaluate()
            if self.stopped or self.done:
                break
            accumulated, began = [], time.perf_counter()

    def micro_batches(self):
        """(packed batch, epochs done after it), epoch after epoch, from where the run stands."""
        for epoch in range(self.epochs):
            batches = self.order.epoch()  # drawn for past epochs, too: one epoch's order follows from the last one's
            if epoch < self.epoch:
                continue
            loader = DataLoader(self.records, batch_sampler=batches[self.seen:], collate_fn=self.records.pack,
                                num_workers=self.args.dataloader_num_workers, worker_init_fn=leave_signals,
                                generator=torch.Generator())  # or an epoch's start would draw from the global one
            try:
                for batch in loader:
                    self.records.note(batch.notes)
                    self.seen += 1
                    yield batch.to(self.device), epoch + self.seen / len(batches)
            except ValueError as error:  # a loader's process sends its traceback as text, of which this is the end
                error.__traceback__ = None  # it refers to the loader, which is to end its processes now
                raise ValueError(str(error).rsplit("ValueError: ", 1)[-1].strip()) from None
            self.epoch, self.seen = epoch + 1, 0

    def forward_backward(self, batch):
        """Add the batch's gradient. -> (its part of the step's loss, learned tokens, tokens, record ids, FLOP)"""
        self.watch.tell(step=self.step + 1, ids=batch.ids)
        self.model.language_model.model.gradient_checkpointing = self.checkpointing.of(batch)
        loss, learned = self.model.loss(batch), int((batch.labels != IGNORE_INDEX).sum())
        flop = self.work.of(batch, learned)
        if not learned:  # all was cut away or broken, as was reported: the mean over nothing is no number
            loss = loss.nan_to_num(0.0)
        loss = loss * (learned if self.args.loss_average == "tokens" else 1 / self.accumulate)
        self.scaler.scale(loss).backward()
        return loss.detach(), learned, len(batch.input_ids), batch.ids, flop

    def optimizer_step(self, accumulated, epoch, began):
        """Clip, step, and describe the step: the row of log.jsonl."""
        factor = learning_rate_factor(self.step, self.total, self.args)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        loss, learned, tokens, flop = (self.over_ranks(sum(x[k] for x in accumulated)) for k in (0, 1, 2, 4))
        ranks = self.mesh.size()
        self.scaler.unscale_(self.optimizer)
        if self.args.loss_average == "tokens":  # tokens were summed up, ranks were averaged
            loss *= ranks / max(1, learned)
            torch._foreach_mul_([p.grad for p in self.trained.values() if p.grad is not None], ranks / max(1, learned))
        loss /= ranks
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.args.max_grad_norm or math.inf)
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
        if self.worth_a_step(loss, norm, learned, accumulated):
            self.mark = None  # half of a step is nothing to go on from
            self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        self.owed = self.step == self.total or self.due("evaluation", self.step)
        self.remember()
        own = (self.args.mm_projector_lr, self.args.mm_vision_tower_lr)
        rates = [rate * factor for rate in dict.fromkeys((self.args.learning_rate, *own)) if rate is not None]
        seconds = time.perf_counter() - began
        row = {"step": self.step, "epoch": round(epoch, 6), "loss": loss, "grad_norm": norm,
               "learning_rate": rates if len(rates) > 1 else rates[0], "learned_tokens": learned, "tokens": tokens,
               "seconds": seconds, "tokens_per_second": tokens / seconds, "memory_gb": peak_memory(self.device),
               "tflops": flop / seconds / ranks / 1e12}
        if self.args.log_samples:
            row["ids"] = [ids for by_rank in zip(*checkpoint.gather([x[3] for x in accumulated])) for ids in by_rank]
        return row

    def worth_a_step(self, loss, norm, learned, accumulated):
        """Whether to learn from this step. OnAllRanks: nothing to learn, or loss or gradient is no number."""
        if learned and math.isfinite(loss) and math.isfinite(norm):
            return True
        if math.isfinite(loss) and learned and self.scaler.is_enabled() and self.scaler.get_scale() > 1:
            self.say(f"step {self.step + 1}: the gradients overflow float16 at a loss scale of "
                     f"{self.scaler.get_scale():g}; it is halved, and nothing is learned from this step")
            return False
        if not learned and self.args.on_bad_record == "skip":
            return False
        bad = accumulated if math.isfinite(loss) else [x for x in accumulated if not torch.isfinite(x[0])]
        ids = [name for x in bad for name in x[3]]
        why = [what for what, noted in self.records.notes.items() if noted.keys() & set(ids)]
        ids, why = (list(dict.fromkeys(x for own in checkpoint.gather(mine) for x in own)) for mine in (ids, why))
        if not learned:
            raise checkpoint.OnAllRanks(
                f"step {self.step + 1}: nothing to learn in records {', '.join(ids)} ({'; '.join(why) or 'no answer'});"
                " raise --model_max_length, leave them out, or pass over them with --on_bad_record skip")
        odd = f"gradient is {norm}" if math.isfinite(loss) else f"loss is {loss}"
        what = f"step {self.step + 1}: the {odd} on records {', '.join(ids)}"
        self.skipped += 1
        if self.skipped > self.args.skip_nonfinite:
            raise checkpoint.OnAllRanks(f"{what}; try a lower --learning_rate, look for what is odd about these "
                                        f"records, or pass over such steps with --skip_nonfinite {self.skipped}")
        self.say(f"WARNING: {what}; passed over, {self.skipped} of --skip_nonfinite {self.args.skip_nonfinite}")
        return False

    # ---------------------------------------------------------------------------------------------- checkpoints

    def remember(self):
        """Note what a checkpoint of this moment needs beside its tensors; taken when a step is done as a whole."""
        records = self.seen * self.args.per_device_train_batch_size * self.mesh.size()  # of all ranks, in this epoch
        self.mark = {"step": self.step, "epoch": self.epoch, "records": records, "skipped": self.skipped,
                     "owed": self.owed, "best": self.best, "scaler": self.scaler.state_dict(), "facts": self.facts,
                     "args": vars(self.args)}, checkpoint.random_state(self.device)

    @property
    def done(self):
        """Whether nothing is left to do: all steps are done, or evaluations have long not become better."""
        patience = self.args.early_stopping_patience
        return self.step >= self.total or bool(patience and self.best and self.best["since"] >= patience)

    def every(self, what):
        """After how many steps --save_strategy or --evaluation_strategy wants it done each time."""
        steps = self.args.save_steps if what == "save" else self.args.eval_steps or 500
        return {"steps": steps, "epoch": self.per_epoch, "no": math.inf}[getattr(self.args, f"{what}_strategy")]

    def due(self, what, step):
        """Whether it is to be done after a step; the run's end is an epoch's end, too."""
        ends = step == self.total and getattr(self.args, f"{what}_strategy") == "epoch"
        return ends or step % self.every(what) == 0

    def save_checkpoint(self):
        """Write checkpoint-N, or amend it by what was evaluated since. A full disk is said, and training goes on."""
        state, random_state = self.mark
        folder = os.path.join(self.args.output_dir, f"checkpoint-{state['step']}")
        if self.args.save_strategy == "no":
            return
        try:
            if self.saved == state["step"]:
                checkpoint.on_first_rank(checkpoint.amend, folder, state)
            else:
                checkpoint.save(folder, checkpoint.tensors_of(self.trained, self.optimizer), state, random_state)
                self.saved = state["step"]
                self.say(f"checkpoint written to {folder}", flush=True)
            checkpoint.on_first_rank(checkpoint.thin_out, self.args.output_dir, self.args.save_total_limit,
                                     self.args.load_best_model_at_end and self.best and self.best["step"])
        except checkpoint.OnAllRanks as error:
            self.say(f"WARNING: {error}; training goes on without it", flush=True)

    def over_ranks(self, number, how=dist.ReduceOp.SUM):
        """The sum, or else the greatest, of every rank's number."""
        number = torch.as_tensor(number, device=self.device)
        dist.all_reduce(number, how)
        return number.item()

    # ------------------------------------------------------------------------------------- what a person sees

    def interrupt(self, number, _):
        """Ctrl-C or SIGTERM: finish this step, save, leave; a second Ctrl-C leaves at once."""
        if self.interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.interrupted = number
        name, again = ("Ctrl-C", " (again to leave at once)") if number == signal.SIGINT else ("SIGTERM", "")
        self.say(f"\n{name}: finishing this step, then saving{again}", flush=True)

    def report(self, row):
        """One dense line, and the row in log.jsonl."""
        self.write(row)
        self.spent += row["seconds"]
        if row["step"] % self.args.logging_steps and row["step"] != self.total:
            return
        self.trackers.log(row)
        every, rates = self.every("evaluation"), row["learning_rate"]
        evaluations = self.total // every - self.step // every + (self.total % every > 0)  # to come, one at the end
        left = self.spent / (self.step - self.first) * (self.total - self.step) + self.eval_seconds * evaluations
        rates = ", ".join(f"{rate:.2e}" for rate in (rates if isinstance(rates, list) else [rates]))
        share = f" ({row['tflops'] / self.peak:.0%})" if self.peak else ""
        self.say(f"step {self.step:>{len(str(self.total))}}/{self.total}  loss {row['loss']:.4f}  "
                 f"norm {row['grad_norm']:.3f}  lr {rates}  "
                 f"{row['learned_tokens']} learned of {row['tokens']} tokens  {row['tokens_per_second']:,.0f} tok/s  "
                 f"{1000 * row['seconds']:.0f} ms  {row['tflops']:.3g} TFLOP/s{share}  {row['memory_gb']:.2f} GB  "
                 f"ETA {command.duration(left)}", flush=True)

    def write(self, row):
        """A row of log.jsonl."""
        if self.mesh.get_rank() == 0:
            clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            self.log.write(json.dumps(clean) + "\n")
            self.log.flush()

    def evaluate(self):
        """Evaluate every file, or to the next batch when a signal comes: then a resumed run begins with it."""
        kept = not self.args.load_best_model_at_end or self.step >= self.total or self.due("save", self.step)
        began = time.perf_counter()
        try:
            for number, row in enumerate(self.judge.rows(self.step)):
                self.write(row)
                self.trackers.log(row)
                self.say(evaluation.line(row), flush=True)
                if number == 0 and self.step and kept:  # the first file decides
                    self.best = checkpoint.gather(evaluation.rate(self.args, self.best, row))[0]
            self.owed, self.eval_seconds = False, time.perf_counter() - began
            self.remember()
        except evaluation.Left:
            self.best = self.mark[0]["best"]
        if self.step and (self.stopped or self.saved == self.step):
            self.save_checkpoint()

    def leave_if_stopped(self):
        """Between two batches of an evaluation: whether a signal has reached any rank."""
        self.stopped = self.over_ranks(self.interrupted, dist.ReduceOp.MAX)
        if self.stopped:
            raise evaluation.Left

    def put_best(self):
        """Put the weights of the best evaluated checkpoint in place of the last step's."""
        best, name = self.best, self.args.metric_for_best_model
        if best and best["step"] != self.step:
            folder = Path(self.args.output_dir, f"checkpoint-{best['step']}")
            if why := checkpoint.on_first_rank(checkpoint.what_is_wrong, folder):
                return self.say(f"WARNING: {folder} had the best {name}, but is {why}; the last step is written")
            checkpoint.load(folder, self.trained)
        self.say(f"the weights of step {best['step']} are written, of the best {name}, {best['value']:.4f}" if best else
                 f"WARNING: no evaluation told {name}; the last step is written")

    def save(self):
        """Write the model, and of stage 1 its projector. After SIGTERM time is short: the checkpoint is enough."""
        if self.stopped and not self.step or self.stopped == signal.SIGTERM and self.saved == self.step:
            return self.say(f"stopped after step {self.step} of {self.total}; the same command goes on from there")
        if self.args.load_best_model_at_end and self.done:
            self.put_best()
        tensors = {name: p for name, p in self.model.state_dict().items()
                   if not self.loaded.lora or name in self.trained}
        checkpoint.on_first_rank(self.write_model, tensors=tensors)
        state = f"stopped after step {self.step} of {self.total}" if self.stopped else f"{self.step} steps"
        if self.done and self.step < self.total:
            state += f" of {self.total}, since {self.best['since']} evaluations in a row were no better,"
        took = command.duration(time.perf_counter() - self.started)
        self.say(f"{state} in {took}; written to {self.args.output_dir}")

    def write_model(self, tensors):
        """What `save` does on rank 0, and a note for a restart how far the run came (trainer_state.json, as HF's)."""
        out = self.args.output_dir
        if self.args.tune_mm_mlp_adapter:
            weights.save_projector(self.loaded, out, tensors)
        if not self.args.save_projector_only:
            weights.save(self.loaded, out, tensors=tensors, max_shard_size=self.args.max_shard_size)
        files.write_files(out, {"trainer_state.json": {
            "global_step": self.step, "max_steps": self.step if self.done else self.total}})


def leave_signals(_):
    """For a loader's processes: signals are their parent's business, and the second SIGTERM is from their parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def peak_memory(device):
    """The most memory used so far, in 2^30 bytes: allocated on the GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


if __name__ == "__main__":
    command.run(main)
