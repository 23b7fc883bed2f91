"""The flags of train.py: LLaVA's names and meaning (Model-, Data- and TrainingArguments), HF's for the rest.

Each row: name, type (or the values that there are), default, help. `--stage`, `--recipe` and a few more change defaults
(training/recipes.py); what is given on the command line wins.
"""

import math
import os
import shlex

import lora
import quant
from formats import command, files, hub, templates
from training import plan, recipes, trackers

ON, OFF = True, False
WHEN, BEST = ("no", "steps", "epoch"), ("eval_loss", "eval_match", "loss", "match")
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")

FLAGS = {
    "what to run": [
        ("stage", tuple(recipes.STAGES), None, "projector only, on captions; or projector and LLM; sets defaults"),
        ("recipe", tuple(recipes.RECIPES), None, "a published run's settings, with --stage"),
        ("model", ("7b", "13b"), None, "what the recipe starts from, for model_name_or_path and vision_tower"),
        ("output_dir", str, None, "where model, log.jsonl and config.json go"),
        ("overwrite_output_dir", bool, OFF, "begin anew in an output_dir that holds a run or a model"),
        ("seed", int, 42, "of everything random: a new projector, the order of the records"),
        ("plot", list, None, "only draw these runs, each an output_dir, or its stages' joined by commas, into --out"),
        ("out", str, "loss.png", "with --plot: the picture to write"),
        ("plan", bool, OFF, "only tell what memory the run would need, and what to change if it does not fit"),
        ("gpus", str, None, "the devices to plan for, like 8x80GB; None: those that are here"),
        ("plan_tokens", int, None, "with --plan: tokens of each record, pictures included; None: model_max_length"),
        ("use_cpu", bool, OFF, "train on the CPU even where there is a GPU"),
        ("bf16", bool, OFF, "compute in bfloat16; trained weights keep float32 masters"),
        ("fp16", bool, OFF, "compute in float16, with a loss scale that follows the gradients; masters as with bf16"),
        ("tf32", bool, OFF, "allow TF32 products on the GPU in float32 runs"),
    ],
    "model": [
        ("model_name_or_path", str, None, "the LLM (a LLaMA-family folder or hub id), or a whole LLaVA to go on from"),
        ("vision_tower", str, None, "a CLIP folder or hub id; not needed when the model brings its own"),
        ("version", str, None, "conversation template: plain, v1, template_v0, chat_template …; None: the model's own"),
        ("mm_projector_type", str, None, "linear, mlp2x_gelu or identity; None: what the model or the file has"),
        ("pretrain_mm_mlp_adapter", str, None, "stage 1's mm_projector.bin, a .safetensors, or the folder of either"),
        ("mm_vision_select_layer", int, None, "the tower's hidden state that is used; None: the model's, else -2"),
        ("mm_vision_select_feature", ("patch", "cls_patch"), None, "patch, or cls_patch to keep the class token"),
        ("mm_use_im_start_end", bool, None, "wrap pictures in <im_start> and <im_end>; None: as the model does"),
        ("mm_use_im_patch_token", bool, OFF, "add LLaVA 0.x's token <im_patch>, which no text holds any more"),
        ("mm_patch_merge_type", str, None, "how anyres joins tiles: flat, spatial, spatial_unpad (its default)"),
        ("image_grid_pinpoints", str, None, "anyres's canvases, [[width, height], …]; None: LLaVA 1.6's"),
        ("bits", int, 16, "hold the LLM's frozen matrices in 8 bits or 4 (quant.py); with lora_enable this is QLoRA"),
        ("double_quant", bool, ON, "with 4 bits, hold their scales in 8"),
        ("quant_type", ("nf4", "fp4"), "nf4", "what the 4 bits mean"),
        ("quant_also", str, "", "lm_head: quantise it, too, as the original does in training; mm_projector"),
        ("mpt_attn_impl", str, None, "without effect: there is one attention"),
        ("sep_image_conv_front", bool, OFF, "not built yet"),
        ("image_token_len", int, None, "without effect: the tower decides how many tokens a picture takes"),
        ("cache_dir", str, None, "where hub downloads are kept"),
    ],
    "what is trained": [
        ("tune_mm_mlp_adapter", bool, OFF, "train the projector only"),
        ("freeze_mm_mlp_adapter", bool, OFF, "keep the projector as it is"),
        ("freeze_backbone", bool, OFF, "keep the LLM's layers as they are"),
        ("unfreeze_mm_vision_tower", bool, OFF, "train the vision tower too, as LLaVA 1.6 did"),
        ("lora_enable", bool, OFF, "in place of the LLM, learn a low-rank correction to its matrices (lora.py)"),
        ("lora_r", int, None, "the correction's rank; None: 64, or lora_weight_path's"),
        ("lora_alpha", float, None, "it is scaled by lora_alpha / lora_r; None: 16, or lora_weight_path's"),
        ("lora_dropout", float, 0.05, "chance of each input to be left out on its way to the correction"),
        ("lora_bias", lora.BIASES, "none", "biases to train: none, lora_only (of what is adapted), all (of that part)"),
        ("lora_target", str, "language_model", "also vision_tower, mm_projector, all-linear, or names like q_proj"),
        ("use_rslora", bool, OFF, "scale by lora_alpha / sqrt(lora_r)"),
        ("lora_weight_path", str, None, "an adapter to go on from, in place of a new one"),
        ("lora_shard_base", bool, OFF, "divide the frozen weights of the layers among the ranks, too"),
        ("force", bool, OFF, "take lora_weight_path although it was trained on another base"),
    ],
    "data": [
        ("data_path", list, None, "LLaVA's JSON or JSONL, one file or several; a.json:0.5 is half of its records"),
        ("image_folder", str, ".", "where the records' `image` paths start"),
        ("image_aspect_ratio", str, None, "pad (to a square), square (crop) or anyres (tiles); None: the model's"),
        ("model_max_length", int, 512, "longest sequence in tokens, places of pictures included"),
        ("strict_labels", bool, OFF, "count tokens as the original does, and learn nothing of a record that disagrees"),
        ("on_bad_record", ("stop", "skip"), "stop", "at a record with nothing to learn"),
        ("on_bad_image", ("stop", "skip"), "stop", "at a missing or broken picture; skip: the next record stands in"),
        ("cache_features", str, None, "a folder for what a frozen tower says of the pictures; for several epochs"),
        ("dataloader_num_workers", int, 0, "processes that read pictures ahead"),
        ("is_multimodal", bool, OFF, "without effect: a model with a tower is multimodal"),
        ("lazy_preprocess", bool, OFF, "without effect: records are always prepared when needed"),
        ("remove_unused_columns", bool, OFF, "without effect: records have no columns"),
    ],
    "steps": [
        ("num_train_epochs", float, 3.0, "how often every record is seen"),
        ("max_steps", int, -1, "stop after so many optimiser steps; overrides num_train_epochs"),
        ("per_device_train_batch_size", int, 8, "records per micro-batch and device"),
        ("gradient_accumulation_steps", int, 1, "micro-batches per optimiser step"),
        ("group_by_modality_length", bool, OFF, "batches of similar length, with pictures or without"),
        ("sample_order", ("seed", "accelerate"), "seed", "that of one process, or of the original's several ranks"),
        ("loss_average", ("microbatch", "tokens"), "microbatch", "the mean of micro-batches' means, or of all tokens"),
        ("deepspeed", str, None, "zero2.json, zero3.json, zero3_offload.json or a file of yours: how ranks share"),
        ("fsdp", str, None, "the same in HF's words: full_shard or shard_grad_op, offload, auto_wrap"),
        ("fsdp_transformer_layer_cls_to_wrap", str, None, "without effect: every decoder layer is a unit"),
        ("fsdp_replicas", int, 1, "rows of ranks, nodes say, that share a model each (HSDP); 1: all share one"),
        ("local_rank", int, None, "without effect: the launcher's environment says it, too"),
        ("ddp_timeout", int, 1800, "seconds after which a rank that waits for another one gives up"),
        ("gradient_checkpointing", bool, None, "compute activations again in backward; None: where memory is short"),
    ],
    "optimiser": [
        ("learning_rate", float, 5e-5, "peak learning rate"),
        ("mm_projector_lr", float, None, "the projector's own peak learning rate"),
        ("mm_vision_tower_lr", float, None, "the vision tower's own peak learning rate"),
        ("weight_decay", float, 0.0, "AdamW's, on matrices only"),
        ("warmup_ratio", float, 0.0, "share of the steps in which the rate rises from 0"),
        ("warmup_steps", int, 0, "the same as a number of steps; overrides warmup_ratio"),
        ("lr_scheduler_type", SCHEDULES, "linear", "how the learning rate falls after its rise"),
        ("max_grad_norm", float, 1.0, "gradients are scaled down to this norm; 0: never"),
        ("skip_nonfinite", int, 0, "pass over so many steps whose loss or gradient is not finite, then stop"),
        ("optim", ("adamw_torch", "adamw_torch_fused"), "adamw_torch", "both are the same here"),
        ("adam_beta1", float, 0.9, "AdamW's first beta"),
        ("adam_beta2", float, 0.999, "AdamW's second beta"),
        ("adam_epsilon", float, 1e-8, "AdamW's epsilon"),
    ],
    "log and evaluation": [
        ("logging_steps", int, 1, "print every so many steps; log.jsonl has every step"),
        ("verbose", bool, OFF, "say which kernels compute: Triton's or the references (kernels/choice.py)"),
        ("log_samples", bool, OFF, "write the ids of each step's records into log.jsonl"),
        ("report_to", list, None, "tensorboard, wandb or all: show the curves there too, every logging_steps"),
        ("run_name", str, None, "the run's name in Weights & Biases; None: output_dir"),
        ("eval_data_path", str, None, "files in the training format, comma-separated; each is evaluated apart"),
        ("evaluation_strategy", WHEN, None, "when to evaluate; None: steps with eval_steps, else at the end only"),
        ("eval_steps", int, None, "evaluate every so many steps"),
        ("eval_generate", int, 0, "ask the first N records of each evaluation file and compare the answers"),
        ("eval_pictures", str, "true", "what to ask with: true, shuffled (another record's), blank; comma-separated"),
        ("load_best_model_at_end", bool, OFF, "at the end, write the best evaluated checkpoint, not the last step"),
        ("metric_for_best_model", BEST, "eval_loss", "what is best: eval_loss, or eval_match of --eval_generate N"),
        ("greater_is_better", bool, None, "whether more of it is better; None: of eval_match, yes, of eval_loss, no"),
        ("early_stopping_patience", int, None, "end after so many evaluations in a row that are no better"),
        ("per_device_eval_batch_size", int, 8, "records per evaluation batch; answers are decoded so many at a time"),
    ],
    "saving": [
        ("save_projector_only", bool, OFF, "with tune_mm_mlp_adapter: write mm_projector.bin without the whole model"),
        ("max_shard_size", command.file_size, "5GB", "of one weight file, like 5GB or 200MB"),
        ("save_strategy", WHEN, "steps", "when to write checkpoint-N, all that resuming needs"),
        ("save_steps", int, 500, "a checkpoint every so many steps; also at Ctrl-C, SIGTERM and most errors"),
        ("save_total_limit", int, None, "keep so many checkpoints, the newest; None: all"),
        ("resume", str, "auto", "auto: from the newest complete checkpoint in output_dir; never; or a checkpoint-N"),
        ("resume_anyway", bool, OFF, "resume although flags have changed"),
    ],
}

POSITIVE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "logging_steps",
            "save_steps", "save_total_limit", "eval_steps", "model_max_length", "plan_tokens", "fsdp_replicas",
            "early_stopping_patience", "ddp_timeout")
LEAST = dict.fromkeys(POSITIVE, 1) | dict.fromkeys(
    ("dataloader_num_workers", "warmup_steps", "eval_generate", "skip_nonfinite", "seed"), 0)
BELOW = {"adam_beta1": 1, "adam_beta2": 1, "warmup_ratio": 1, "num_train_epochs": 10**6, "seed": 2**63}
NEEDS = {  # one of these -> what does nothing without any
    ("eval_data_path",): ("evaluation_strategy", "eval_steps", "eval_generate"),
    ("lora_enable",): ("lora_r", "lora_alpha", "lora_dropout", "lora_bias", "lora_target", "use_rslora"),
    ("unfreeze_mm_vision_tower", "lora_enable"): ("mm_vision_tower_lr",)}


def parse(argv=None):
    """The command line -> a namespace with every flag of FLAGS, defaults of `--stage` and `--recipe` filled in."""
    parser = build_parser()
    first = parser.parse_args(argv)
    if first.plot:
        return first
    defaults = recipes.defaults(first.stage, first.recipe, first.model)
    if first.deepspeed or first.fsdp:  # the one takes the other's place
        defaults |= {"deepspeed": first.deepspeed, "fsdp": first.fsdp}
    if first.fp16:
        defaults |= {"bf16": False, "tf32": False}
    defaults |= recipes.sharding(defaults.get("deepspeed"), defaults.get("fsdp"))
    records = defaults.pop("records_per_step", None)
    parser.set_defaults(**defaults, **{"gradient_accumulation_steps": None} if records else {})
    args = parser.parse_args(argv)
    check(args, {name for name, value in vars(args).items() if value != parser.get_default(name)})
    if args.gradient_accumulation_steps is None:
        ranks = plan.devices_of(args)[0] if args.plan else int(os.environ.get("WORLD_SIZE", 1))
        at_once = args.per_device_train_batch_size * ranks
        if records % at_once:
            raise ValueError(f"--recipe {args.recipe} takes {records} records per step, no multiple of {at_once} on "
                             f"{ranks} ranks; give --per_device_train_batch_size or --gradient_accumulation_steps")
        args.gradient_accumulation_steps = records // at_once
    return args


def describe(args):
    """What differs from the defaults, as a command line."""
    plain = vars(build_parser().parse_args([]))
    words = ([f"--{name}", *(value if isinstance(value, list) else [str(value)])] for name, value in vars(args).items()
             if name in plain and value != plain[name])
    return f"train.py {' '.join(map(shlex.join, words))}"


def build_parser():
    """The parser, its help grouped as FLAGS is."""
    parser = command.Parser(prog="train.py", description=(
        "Train a LLaVA: stage 1 teaches the projector on captions, stage 2 projector and LLM on conversations.\n\n"
        "  python train.py --stage pretrain --model_name_or_path LLM --vision_tower CLIP --data_path captions.json\n"
        "  torchrun train.py --stage finetune --model_name_or_path STAGE1 --data_path conversations.json"))
    for title, rows in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, kind, default, text in rows:
            if isinstance(kind, tuple):
                options = {"choices": kind}
            elif kind is list:
                options = {"nargs": "+", "metavar": "NAME"}
            else:
                options = command.SWITCH if kind is bool else {"type": kind, "metavar": kind.__name__.upper()}
            shown = "" if default is None else f" (default {default})"
            names = [f"--{name}"] + ["--eval_strategy"] * (name == "evaluation_strategy")  # HF's newer name
            group.add_argument(*names, default=default, help=text.replace("%", "%%") + shown, **options)
    return parser


def check(args, given):
    """Stop with one sentence at settings that contradict each other. Flags `given` without effect are said."""
    rows = [row for group in FLAGS.values() for row in group]
    for name, _, default, text in rows:
        if text == "not built yet" and getattr(args, name) != default and not args.plan:
            raise ValueError(f"--{name} {getattr(args, name)} is not built yet; leave it out (it means {default})")
    for name in ("model_name_or_path",) if args.plan else ("model_name_or_path", "data_path", "output_dir"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name} is missing; python train.py --help shows what it means")
    for name, value in vars(args).items():
        if isinstance(value, float) and not 0 <= value < math.inf:
            raise ValueError(f"--{name} is {value}; expected a number from 0 on")
        if value is not None and value < LEAST.get(name, value):
            raise ValueError(f"--{name} {value} is too small; it is {LEAST[name]} or more")
        if name in BELOW and value >= BELOW[name]:
            raise ValueError(f"--{name} {value} is too large; it is less than {BELOW[name]:,}")
    if args.max_steps == 0 or args.max_steps < 0 and args.num_train_epochs == 0:
        raise ValueError("nothing to do with --max_steps 0, or --num_train_epochs 0; give one that is more")
    args.dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    if args.image_aspect_ratio == "anyres" and args.mm_patch_merge_type is None:
        args.mm_patch_merge_type = "spatial_unpad"  # as in LLaVA 1.6
    idle = [f"--{name} is {text}" for name, _, default, text in rows
            if text.startswith("without effect") and getattr(args, name) != default]
    idle += [f"--{name} is without effect without --{needed[0]}" for needed, names in NEEDS.items() for name in names
             if name in given and getattr(args, name) != "no" and not any(getattr(args, flag) for flag in needed)]
    if idle:
        command.say("; ".join(idle))
    args.conv_mode, warning = templates.of_version(args.version) if args.version else (None, None)
    if warning:
        print(warning)
    names = {word for words in args.report_to or [] for word in words.split(",")} - {"none"}
    if names - {*trackers.STARTS, "all"}:
        raise ValueError(f"--report_to {' '.join(args.report_to)}: use {', '.join(trackers.STARTS)}, all or none")
    args.report_to = list(trackers.STARTS) if "all" in names else sorted(names) or None
    if args.evaluation_strategy is None:
        args.evaluation_strategy = "steps" if args.eval_steps else "no"
    if args.output_dir and os.path.isfile(args.output_dir):
        raise ValueError(f"--output_dir {args.output_dir} is a file; name a folder")
    for one, other in (("bf16", "fp16"), ("tune_mm_mlp_adapter", "freeze_mm_mlp_adapter"),
                       ("unfreeze_mm_vision_tower", "save_projector_only"), ("lora_enable", "tune_mm_mlp_adapter"),
                       ("lora_enable", "save_projector_only")):
        if getattr(args, one) and getattr(args, other):
            raise ValueError(f"--{one} and --{other} contradict each other; drop one")
    check_best(args)
    check_lora(args)
    if quant.Quantisation(args.bits, args.quant_type, args.double_quant, args.quant_also).kind and not (
            args.lora_enable or args.tune_mm_mlp_adapter or args.freeze_backbone):
        raise ValueError(f"--bits {args.bits} holds the LLM's matrices as they are; add --lora_enable True (QLoRA), or "
                         "train around them with --tune_mm_mlp_adapter True or --freeze_backbone True")


def check_best(args):
    """Stop with one sentence where the best model is asked for, and nothing says which it is or keeps it."""
    metric = args.metric_for_best_model = "eval_" + args.metric_for_best_model.removeprefix("eval_")
    if not args.load_best_model_at_end and not args.early_stopping_patience:
        return
    flag, every = "--load_best_model_at_end", args.eval_steps or 500
    if not args.eval_data_path or args.evaluation_strategy == "no":
        raise ValueError(f"{flag if args.load_best_model_at_end else '--early_stopping_patience'} goes by evaluations "
                         "while training; give --eval_data_path, and --eval_steps N or --evaluation_strategy epoch")
    if metric == "eval_match" and not (args.eval_generate and "true" in args.eval_pictures):
        raise ValueError("--metric_for_best_model eval_match counts answers to true pictures; give --eval_generate N, "
                         "and true among --eval_pictures")
    off = args.save_steps % every if args.save_strategy == args.evaluation_strategy == "steps" else 0
    if args.load_best_model_at_end and (off or args.save_strategy != args.evaluation_strategy):
        raise ValueError(f"{flag} chooses among checkpoints that are evaluated, too; give --save_strategy "
                         f"{args.evaluation_strategy}" + f" and a multiple of {every} for --save_steps" * bool(off))


def check_lora(args):
    """Fill in rank and alpha: what is given, else the adapter's that the run begins with, else LLaVA's."""
    adapter, before = args.lora_weight_path, {"r": 64, "lora_alpha": 16, "use_rslora": False}
    if adapter and (not args.lora_enable or args.lora_target != "language_model"):
        raise ValueError(f"--lora_weight_path {adapter} goes with --lora_enable True and without --lora_target")
    if adapter:
        before |= files.read_json(hub.find_folder(adapter) / "adapter_config.json")
    for flag, key in (("lora_r", "r"), ("lora_alpha", "lora_alpha"), ("use_rslora", "use_rslora")):
        given = getattr(args, flag)
        if adapter and given not in (None, before[key]) and given is not False:
            raise ValueError(f"--{flag} {given:g} does not match {adapter}, which has {before[key]}; leave it out")
        if args.lora_enable:
            setattr(args, flag, before[key] if adapter or given is None else given)
    if args.lora_enable:
        lora.LoraConfig(args.lora_r, args.lora_alpha, args.lora_dropout)
