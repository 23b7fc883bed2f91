"""The flags of train.py: LLaVA's names and meaning (Model-, Data- and TrainingArguments), HF's for the rest.

Each row: name, type (or the values that there are), default, help. `--stage`, `--recipe` and a few more change defaults
(training/recipes.py); what is given on the command line wins.
"""

import math
import os
import shlex

from formats import command, templates
from training import plan, recipes

ON, OFF = True, False
WHEN, SCHEDULES = ("no", "steps", "epoch"), ("cosine", "linear", "constant", "constant_with_warmup")

FLAGS = {
    "what to run": [
        ("stage", tuple(recipes.STAGES), None, "projector only, on captions; or projector and LLM; sets defaults"),
        ("recipe", tuple(recipes.RECIPES), None, "a published run's settings, with --stage"),
        ("model", ("7b", "13b"), None, "what the recipe starts from, for model_name_or_path and vision_tower"),
        ("output_dir", str, None, "where model, log.jsonl and config.json go"),
        ("overwrite_output_dir", bool, OFF, "begin anew in an output_dir that holds a run or a model"),
        ("seed", int, 42, "of everything random: a new projector, the order of the records"),
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
        ("mpt_attn_impl", str, None, "without effect: there is one attention"),
        ("image_token_len", int, None, "without effect: the tower decides how many tokens a picture takes"),
        ("cache_dir", str, None, "where hub downloads are kept"),
    ],
    "what is trained": [
        ("tune_mm_mlp_adapter", bool, OFF, "train the projector only"),
        ("freeze_mm_mlp_adapter", bool, OFF, "keep the projector as it is"),
        ("freeze_backbone", bool, OFF, "keep the LLM's layers as they are"),
        ("unfreeze_mm_vision_tower", bool, OFF, "train the vision tower too, as LLaVA 1.6 did"),
        ("lora_weight_path", str, None, "without effect, as in the original"),
    ],
    "data": [
        ("data_path", list, None, "LLaVA's JSON or JSONL, one file or several; a.json:0.5 is half of its records"),
        ("image_folder", str, ".", "where the records' `image` paths start"),
        ("image_aspect_ratio", str, None, "pad (to a square), square (crop) or anyres (tiles); None: the model's"),
        ("model_max_length", int, 512, "longest sequence in tokens, places of pictures included"),
        ("strict_labels", bool, OFF, "count tokens as the original does, and learn nothing of a record that disagrees"),
        ("on_bad_record", ("stop", "skip"), "stop", "at a record with nothing to learn"),
        ("on_bad_image", ("stop", "skip"), "stop", "at a missing or broken picture; skip: the next record stands in"),
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
        ("log_samples", bool, OFF, "write the ids of each step's records into log.jsonl"),
        ("report_to", str, "none", "none: log.jsonl only"),
        ("run_name", str, None, "without effect while report_to is none"),
        ("eval_data_path", str, None, "files in the training format, comma-separated; each is evaluated apart"),
        ("evaluation_strategy", WHEN, None, "when to evaluate; None: steps with eval_steps, else at the end only"),
        ("eval_steps", int, None, "evaluate every so many steps"),
        ("eval_generate", int, 0, "ask the first N records of each evaluation file and compare the answers"),
        ("eval_pictures", str, "true", "what to ask with: true, shuffled (another record's), blank; comma-separated"),
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

# Accepted by the original, not built yet: a value other than the one shown stops with a sentence.
NOT_BUILT = {
    "lora_enable": False, "bits": 16, "lora_r": 64, "lora_alpha": 16, "lora_dropout": 0.05, "lora_bias": "none",
    "double_quant": True, "quant_type": "nf4", "sep_image_conv_front": False,
}

POSITIVE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "logging_steps",
            "save_steps", "model_max_length")


def parse(argv=None):
    """The command line -> a namespace with every flag of FLAGS, defaults of `--stage` and `--recipe` filled in."""
    parser = build_parser()
    first = parser.parse_args(argv)
    defaults = recipes.defaults(first.stage, first.recipe, first.model)
    if first.deepspeed or first.fsdp:  # the one takes the other's place
        defaults |= {"deepspeed": first.deepspeed, "fsdp": first.fsdp}
    if first.fp16:
        defaults |= {"bf16": False, "tf32": False}
    defaults |= recipes.sharding(defaults.get("deepspeed"), defaults.get("fsdp"))
    records = defaults.pop("records_per_step", None)
    parser.set_defaults(**defaults, **{"gradient_accumulation_steps": None} if records else {})
    args = parser.parse_args(argv)
    if args.gradient_accumulation_steps is None:
        ranks = plan.devices_of(args)[0] if args.plan else int(os.environ.get("WORLD_SIZE", 1))
        at_once = args.per_device_train_batch_size * ranks
        if records % at_once:
            raise ValueError(f"--recipe {args.recipe} takes {records} records per step, no multiple of {at_once} on "
                             f"{ranks} ranks; give --per_device_train_batch_size or --gradient_accumulation_steps")
        args.gradient_accumulation_steps = records // at_once
    check(args)
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
                options = {"nargs": "+", "metavar": "FILE"}
            else:
                options = command.SWITCH if kind is bool else {"type": kind, "metavar": kind.__name__.upper()}
            shown = "" if default is None else f" (default {default})"
            group.add_argument(f"--{name}", default=default, help=text.replace("%", "%%") + shown, **options)
    for name, only in NOT_BUILT.items():
        options = command.SWITCH if isinstance(only, bool) else {"type": type(only)}
        parser.add_argument(f"--{name}", default=only, help="not built yet", **options)
    return parser


def check(args):
    """Stop with one sentence at settings that contradict each other or are not built."""
    for name, only in NOT_BUILT.items():
        if getattr(args, name) != only and not args.plan:
            raise ValueError(f"--{name} {getattr(args, name)} is not built yet; leave it out (it means {only})")
    for name in ("model_name_or_path",) if args.plan else ("model_name_or_path", "data_path", "output_dir"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name} is missing; python train.py --help shows what it means")
    for name, value in vars(args).items():
        if isinstance(value, float) and not 0 <= value < math.inf:
            raise ValueError(f"--{name} is {value}; expected a number from 0 on")
    if args.max_steps == 0 or args.max_steps < 0 and args.num_train_epochs == 0:
        raise ValueError("nothing to do with --max_steps 0, or --num_train_epochs 0; give one that is more")
    args.dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    if args.image_aspect_ratio == "anyres" and args.mm_patch_merge_type is None:
        args.mm_patch_merge_type = "spatial_unpad"  # as in LLaVA 1.6
    idle = [f"--{name} is {text}" for rows in FLAGS.values() for name, _, default, text in rows
            if text.startswith("without effect") and getattr(args, name) != default]
    if idle:
        command.say("; ".join(idle))
    args.conv_mode, warning = templates.of_version(args.version) if args.version else (None, None)
    if warning:
        print(warning)
    if args.report_to != "none":
        print(f"--report_to {args.report_to} is not built yet: the run is logged to log.jsonl only")
        args.report_to = "none"
    if args.evaluation_strategy is None:
        args.evaluation_strategy = "steps" if args.eval_steps else "no"
    for name in POSITIVE:
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} is too small; it is 1 or more")
    for one, other in (("bf16", "fp16"), ("tune_mm_mlp_adapter", "freeze_mm_mlp_adapter"),
                       ("unfreeze_mm_vision_tower", "save_projector_only")):
        if getattr(args, one) and getattr(args, other):
            raise ValueError(f"--{one} and --{other} contradict each other; drop one")
