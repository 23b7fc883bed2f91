"""Published settings by name: what `--stage` and `--recipe` put in place of the defaults (LLAVA.md 5.3, LLaVA 1.5)."""

COMMON = {
    "weight_decay": 0.0, "warmup_ratio": 0.03, "lr_scheduler_type": "cosine", "num_train_epochs": 1.0,
    "model_max_length": 2048,
}

STAGES = {  # LLaVA 1.5's scripts; the batch is what fits one 80 GB device
    "pretrain": COMMON | {
        "tune_mm_mlp_adapter": True, "version": "plain", "mm_projector_type": "mlp2x_gelu", "learning_rate": 1e-3,
        "per_device_train_batch_size": 32,
    },
    "finetune": COMMON | {
        "image_aspect_ratio": "pad", "learning_rate": 2e-5, "per_device_train_batch_size": 16,
    },
}

SIGHT = {"eval_generate": 1000, "eval_pictures": "true,shuffled,blank", "per_device_eval_batch_size": 130,
         "evaluation_strategy": "steps", "logging_steps": 20, "image_aspect_ratio": "pad"}

RECIPES = {
    "miniature": {  # four minutes on two cores: small models want large rates
        "pretrain": SIGHT | {"learning_rate": 5e-3, "max_steps": 800, "eval_steps": 200},
        "finetune": SIGHT | {"learning_rate": 1e-3, "max_steps": 550, "per_device_train_batch_size": 32,
                             "eval_steps": 110},
    },
    "miniature-smollm": {  # SmolLM2-135M on two cores: few steps, so stage 1 gets most of them
        "pretrain": SIGHT | {"learning_rate": 2e-3, "max_steps": 350, "per_device_train_batch_size": 16,
                             "evaluation_strategy": "no", "eval_generate": 120, "bf16": True},
        "finetune": SIGHT | {"learning_rate": 3e-4, "max_steps": 70, "per_device_train_batch_size": 8,
                             "evaluation_strategy": "no", "eval_generate": 120, "bf16": True, "logging_steps": 5},
    },
}


def defaults(stage, recipe):
    """The flags that a stage and a recipe set, as a dict."""
    if stage is not None and stage not in STAGES:
        raise ValueError(f"--stage {stage} is not known; use pretrain or finetune")
    if recipe is not None and recipe not in RECIPES:
        raise ValueError(f"--recipe {recipe} is not known; known are {', '.join(RECIPES) or 'none yet'}")
    if recipe is not None and stage is None:
        raise ValueError("--recipe needs --stage pretrain or --stage finetune beside it")
    return STAGES.get(stage, {}) | (RECIPES[recipe].get(stage, {}) if recipe else {})
