"""The flags of train.py: LLaVA's names and meaning (Model-, Data- and TrainingArguments), HF's for the rest.

Each row: name, type, default, help. `--stage` and `--recipe` change defaults (training/recipes.py); what is given on
the command line wins over both.
"""

from formats import command
from training import recipes

ON, OFF = True, False

FLAGS = {
    "what to run": [
        ("stage", str, None, "pretrain (projector only, captions) or finetune (projector and LLM); sets defaults"),
        ("recipe", str, None, f"a published run's settings, with --stage: {', '.join(recipes.RECIPES)}"),
        ("output_dir", str, None, "where model, log.jsonl and config.json go"),
        ("overwrite_output_dir", bool, OFF, "allow an output_dir that already holds a finished run"),
        ("seed", int, 42, "of everything random: a new projector, the order of the records"),
        ("use_cpu", bool, OFF, "train on the CPU even where there is a GPU"),
        ("bf16", bool, OFF, "compute in bfloat16; trained weights keep float32 masters"),
        ("tf32", bool, OFF, "allow TF32 products on the GPU in float32 runs"),
    ],
    "model": [
        ("model_name_or_path", str, None, "the LLM (a LLaMA-family folder or hub id), or a whole LLaVA to go on from"),
        ("vision_tower", str, None, "a CLIP folder or hub id; not needed when the model brings its own"),
        ("version", str, None, "conversation template: plain, v1, chat_template …; None: what the model says"),
        ("mm_projector_type", str, None, "linear, mlp2x_gelu or identity; None: what the model or the file has"),
        ("pretrain_mm_mlp_adapter", str, None, "stage 1's mm_projector.bin, a .safetensors, or the folder of either"),
        ("mm_vision_select_layer", int, None, "the tower's hidden state that is used; None: the model's, else -2"),
        ("mm_vision_select_feature", str, None, "patch, or cls_patch to keep the class token"),
        ("mm_use_im_start_end", bool, None, "wrap pictures in <im_start> and <im_end>; None: as the model does"),
        ("mm_use_im_patch_token", bool, OFF, "LLaVA 0.x's <im_patch> token"),
        ("mm_patch_merge_type", str, "flat", "how the tiles of a picture are joined"),
        ("cache_dir", str, None, "where hub downloads are kept"),
    ],
    "what is trained": [
        ("tune_mm_mlp_adapter", bool, OFF, "train the projector only"),
        ("freeze_mm_mlp_adapter", bool, OFF, "keep the projector as it is"),
        ("freeze_backbone", bool, OFF, "keep the LLM's layers as they are"),
    ],
    "data": [
        ("data_path", str, None, "LLaVA's JSON, or JSONL"),
        ("image_folder", str, ".", "where the records' `image` paths start"),
        ("image_aspect_ratio", str, None, "pad (to a square) or square (crop to one); None: the model's, else square"),
        ("model_max_length", int, 512, "longest sequence in tokens, places of pictures included"),
        ("on_bad_record", str, "stop", "stop or skip at a record with nothing to learn"),
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
        ("gradient_checkpointing", bool, OFF, "compute activations again in backward instead of keeping them"),
    ],
    "optimiser": [
        ("learning_rate", float, 5e-5, "peak learning rate"),
        ("mm_projector_lr", float, None, "the projector's own peak learning rate"),
        ("weight_decay", float, 0.0, "AdamW's, on matrices only"),
        ("warmup_ratio", float, 0.0, "share of the steps in which the rate rises from 0"),
        ("warmup_steps", int, 0, "the same as a number of steps; overrides warmup_ratio"),
        ("lr_scheduler_type", str, "linear", "cosine, linear, constant or constant_with_warmup"),
        ("max_grad_norm", float, 1.0, "gradients are scaled down to this norm; 0: never"),
        ("optim", str, "adamw_torch", "only AdamW is built"),
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
        ("evaluation_strategy", str, None, "no, steps or epoch; None: steps with eval_steps, else at the end only"),
        ("eval_steps", int, None, "evaluate every so many steps"),
        ("eval_generate", int, 0, "ask the first N records of each evaluation file and compare the answers"),
        ("eval_pictures", str, "true", "what to ask with: true, shuffled (another record's), blank; comma-separated"),
        ("per_device_eval_batch_size", int, 8, "records per evaluation batch; answers are decoded so many at a time"),
    ],
    "saving": [
        ("save_projector_only", bool, OFF, "with tune_mm_mlp_adapter: write mm_projector.bin without the whole model"),
        ("save_strategy", str, "no", "the model is written at the end and on Ctrl-C"),
        ("save_steps", int, 500, "without effect while the model is written at the end only"),
        ("save_total_limit", int, None, "without effect while the model is written at the end only"),
    ],
}

# Accepted by the original, not built yet: a value other than the one shown stops with a sentence.
NOT_BUILT = {
    "lora_enable": False, "bits": 16, "deepspeed": None, "fsdp": None, "fp16": False, "mm_use_im_patch_token": False,
    "mm_patch_merge_type": "flat", "group_by_modality_length": False,
}

SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")
POSITIVE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "logging_steps",
            "model_max_length")


def parse(argv=None):
    """The command line -> a namespace with every flag of FLAGS, defaults of `--stage` and `--recipe` filled in."""
    parser = build_parser()
    first = parser.parse_args(argv)
    defaults = recipes.defaults(first.stage, first.recipe)
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    args.defaults_from_recipe = {k: v for k, v in defaults.items() if getattr(args, k) == v}
    check(args)
    return args


def build_parser():
    """The parser, its help grouped as FLAGS is."""
    parser = command.Parser(prog="train.py", description=(
        "Train a LLaVA: stage 1 teaches the projector on captions, stage 2 projector and LLM on conversations.\n\n"
        "  python train.py --stage pretrain --model_name_or_path LLM --vision_tower CLIP --data_path captions.json\n"
        "  torchrun train.py --stage finetune --model_name_or_path STAGE1 --data_path conversations.json"))
    seen = set()
    for title, rows in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, kind, default, text in rows:
            options = command.SWITCH if kind is bool else {"type": kind, "metavar": kind.__name__.upper()}
            shown = "" if default is None else f" (default {default})"
            group.add_argument(f"--{name}", default=default, help=text.replace("%", "%%") + shown, **options)
            seen.add(name)
    for name, only in NOT_BUILT.items():
        if name not in seen:
            options = command.SWITCH if isinstance(only, bool) else {"type": type(only) if only else str}
            parser.add_argument(f"--{name}", default=only, help="not built yet", **options)
    return parser


def check(args):
    """Stop with one sentence at settings that contradict each other or are not built."""
    for name, only in NOT_BUILT.items():
        if getattr(args, name) != only:
            raise ValueError(f"--{name} {getattr(args, name)} is not built yet; leave it out (it means {only})")
    for name in ("model_name_or_path", "data_path", "output_dir"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name} is missing; python train.py --help shows what it means")
    if args.optim not in ("adamw_torch", "adamw_torch_fused"):
        raise ValueError(f"--optim {args.optim} is not known; adamw_torch is")
    if args.report_to != "none":
        print(f"--report_to {args.report_to} is not built yet: the run is logged to log.jsonl only")
        args.report_to = "none"
    if args.evaluation_strategy is None:
        args.evaluation_strategy = "steps" if args.eval_steps else "no"
    for name, allowed in (("stage", (None, "pretrain", "finetune")), ("evaluation_strategy", ("no", "steps", "epoch")),
                          ("on_bad_record", ("stop", "skip")), ("lr_scheduler_type", SCHEDULES)):
        if getattr(args, name) not in allowed:
            choices = ", ".join(str(a) for a in allowed if a)
            raise ValueError(f"--{name} {getattr(args, name)} is not known; use {choices}")
    for name in POSITIVE:
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} is too small; it is 1 or more")
    if args.tune_mm_mlp_adapter and args.freeze_mm_mlp_adapter:
        raise ValueError("--tune_mm_mlp_adapter trains the projector, --freeze_mm_mlp_adapter freezes it; drop one")
