"""Published settings by name: what `--stage`, `--recipe`, `--model`, `--deepspeed`, `--fsdp` put in place of defaults
(LLAVA.md 5.3, 5.8). A recipe fixes the records per step: accumulation makes up for what the ranks do not hold at once.
"""

import os
from pathlib import Path

from formats.command import say
from formats.files import read_json

COMMON = {"weight_decay": 0.0, "warmup_ratio": 0.03, "lr_scheduler_type": "cosine", "num_train_epochs": 1.0,
          "model_max_length": 2048, "dataloader_num_workers": 4 if (os.cpu_count() or 1) >= 8 else 0}

STAGES = {  # LLaVA 1.5's scripts; the batch is what fits one 80 GB device
    "pretrain": COMMON | {"tune_mm_mlp_adapter": True, "version": "plain", "mm_projector_type": "mlp2x_gelu",
                          "learning_rate": 1e-3, "per_device_train_batch_size": 32},
    "finetune": COMMON | {"image_aspect_ratio": "pad", "learning_rate": 2e-5, "per_device_train_batch_size": 16},
}

SIGHT = {"eval_generate": 1000, "eval_pictures": "true,shuffled,blank", "per_device_eval_batch_size": 130,
         "evaluation_strategy": "steps", "logging_steps": 20, "image_aspect_ratio": "pad"}
SMOLLM = SIGHT | {"evaluation_strategy": "no", "bf16": True}

SCRIPT = {"bf16": True, "tf32": True, "save_total_limit": 1, "records_per_step": 128, "per_device_train_batch_size": 16}
LINEAR = SCRIPT | {"mm_projector_type": "linear", "image_aspect_ratio": "square"}  # with a tower of 224 pixels
V0 = LINEAR | {"version": "template_v0", "fsdp": "full_shard auto_wrap"}
V0_1, V0_4 = V0 | {"learning_rate": 2e-3}, V0 | {"records_per_step": 32, "per_device_train_batch_size": 4}
TAGS = {"mm_use_im_start_end": True}
V1 = LINEAR | {"version": "v1", "deepspeed": "zero2.json"}
TASK = SCRIPT | {"version": "v1", "deepspeed": "zero3.json", "group_by_modality_length": True}  # from LLaVA 1.5 itself
V1_5 = TASK | {"mm_projector_type": "mlp2x_gelu"}
LORA = {"lora_enable": True}
LORA_1_5 = LORA | {"lora_r": 128, "lora_alpha": 256, "learning_rate": 2e-4, "mm_projector_lr": 2e-5}

RECIPES = {  # scienceqa is v0's; v1.0's is v1.0 with --num_train_epochs 12, V100s' is v1.0 with --fp16
    "v0": {"pretrain": V0_1 | TAGS, "finetune": V0_4 | TAGS | {"num_train_epochs": 3.0}},
    "lightning": {"pretrain": V0_1 | TAGS, "finetune": V0 | TAGS},
    "scienceqa": {"pretrain": V0_1, "finetune": V0_4 | {"num_train_epochs": 12.0}},
    "v1.0": {"pretrain": V1 | {"version": "plain", "learning_rate": 2e-3}, "finetune": V1},
    "v1.0-lora": {"finetune": V1 | LORA}, "v1.0-qlora": {"finetune": V1 | LORA | {"bits": 4}},
    "v1.5": {"pretrain": SCRIPT | {"deepspeed": "zero2.json", "image_aspect_ratio": "square", "records_per_step": 256,
                                   "per_device_train_batch_size": 32}, "finetune": V1_5},
    "v1.5-lora": {"finetune": V1_5 | LORA_1_5},
    "v1.5-task": {"finetune": TASK}, "v1.5-task-lora": {"finetune": TASK | LORA_1_5},
    "miniature": {  # four minutes on two cores: small models want large rates
        "pretrain": SIGHT | {"learning_rate": 5e-3, "max_steps": 1200, "eval_steps": 300},
        "finetune": SIGHT | {"learning_rate": 1e-3, "max_steps": 600, "eval_steps": 150,
                             "per_device_train_batch_size": 32},
    },
    "miniature-smollm": {  # SmolLM2-135M on two cores: a frozen LLM wants large steps, and many small ones
        "pretrain": SMOLLM | {"learning_rate": 1e-2, "max_steps": 400, "per_device_train_batch_size": 8,
                              "eval_generate": 15},
        "finetune": SMOLLM | {"learning_rate": 3e-4, "mm_projector_lr": 1e-3, "max_steps": 130,
                              "per_device_train_batch_size": 8, "eval_generate": 120, "logging_steps": 5},
    },
}

CLIP = "openai/clip-vit-large-patch14"
MODELS = {  # a recipe's beginning: what its --model 7b or 13b starts from; Vicuna v0 was published as a delta only
    "v1.5-task": {"model_name_or_path": "liuhaotian/llava-v1.5-{}"},
    "v1.5": {"model_name_or_path": "lmsys/vicuna-{}-v1.5", "vision_tower": CLIP + "-336"},
    "v1.0": {"model_name_or_path": "lmsys/vicuna-{}-v1.3", "vision_tower": CLIP},
}

ZERO = {f"zero{stage}.json": {"zero_optimization": {"stage": stage}} for stage in (2, 3)}  # as LLaVA's, of what matters
ZERO["zero3_offload.json"] = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}},
                              "gradient_clipping": "auto"}
FROM_ZERO = {"train_micro_batch_size_per_gpu": "per_device_train_batch_size", "gradient_clipping": "max_grad_norm",
             "gradient_accumulation_steps": "gradient_accumulation_steps"}
KINDS = {"an object": dict, "a whole number": int, "a number": int | float}
FORMS = dict.fromkeys(("zero_optimization", "offload_optimizer", "offload_param", "bf16", "fp16"), "an object") | {
    **dict.fromkeys((*FROM_ZERO, "stage"), "a whole number"), "gradient_clipping": "a number"}


def defaults(stage, recipe, model):
    """The flags that a stage, a recipe and a model set, as a dict; `records_per_step` stands for an accumulation."""
    if recipe is not None and stage not in RECIPES[recipe]:
        raise ValueError(f"--recipe {recipe} needs --stage {' or --stage '.join(RECIPES[recipe])} beside it")
    parts = next((parts for start, parts in MODELS.items() if (recipe or "v1.5").startswith(start)), None)
    if model and parts is None:
        raise ValueError(f"--model {model} is known for the recipes {', '.join(MODELS)}; give --model_name_or_path")
    named = {flag: name.format(model) for flag, name in parts.items()} if model else {}
    return STAGES.get(stage, {}) | (RECIPES[recipe][stage] if recipe else {}) | named


def sharding(deepspeed, fsdp):
    """The two flags in FSDP2's words -> {keep_gathered, offload, and flags that a DeepSpeed file sets: value}; said.
    ZeRO stage 3 and full_shard gather a layer's weights when it computes and let go of them; stage 2 and shard_grad_op
    keep them from forward to backward. A file without `gradient_clipping`, as LLaVA's, means none."""
    if deepspeed and fsdp:
        raise ValueError(f"--deepspeed {deepspeed} and --fsdp {fsdp!r} both say how to divide the model; drop one")
    path, words, known = Path(deepspeed or ""), set((fsdp or "").split()), "full_shard shard_grad_op offload auto_wrap"
    if words - set(known.split()):
        raise ValueError(f"--fsdp {fsdp!r} is not known; its words may be {known}")
    found = {"keep_gathered": "shard_grad_op" in words, "offload": "offload" in words}
    if deepspeed and not path.is_file() and path.name not in ZERO:
        raise ValueError(f"--deepspeed {path}: no such file; give a ZeRO file, or {', '.join(ZERO)}")
    if deepspeed:
        values = {"gradient_clipping": 0.0} | (read_json(path) if path.is_file() else ZERO[path.name])
        values |= zero if isinstance(zero := values.get("zero_optimization"), dict) else {}
        values = {key: value for key, value in values.items() if value not in (None, "auto")}
        for key in FORMS.keys() & values.keys():
            if not isinstance(values[key], KINDS[FORMS[key]]):
                raise ValueError(f"--deepspeed {path}: {key} is {values[key]!r}; expected {FORMS[key]}")
        stage, ignored = values.get("stage", 0), [key for key in ("optimizer", "scheduler") if key in values]
        moved = [values.get(f"offload_{what}", {}).get("device", "none") for what in ("optimizer", "param")]
        found = {"keep_gathered": stage < 3, "offload": moved != ["none", "none"]}
        found |= {ours: values[key] for key, ours in FROM_ZERO.items() if key in values}
        found |= {kind: True for kind in ("bf16", "fp16") if values.get(kind, {}).get("enabled") is True}
    if deepspeed or fsdp:
        say((f"--fsdp {fsdp}" if fsdp else f"--deepspeed {path}, stage {stage}" + ", done as stage 2" * (stage < 2))
            + " (the published settings: no such file is here)" * (not fsdp and not path.is_file())
            + ": FSDP2 divides gradients and AdamW's state; a layer's weights "
            + ("stay gathered till backward" if found["keep_gathered"] else "are gathered when it computes")
            + "; all wait in the CPU's memory" * found["offload"]
            + (f"; not followed: its {' and '.join(ignored)}, the flags decide" if deepspeed and ignored else ""))
    return found
