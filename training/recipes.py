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

RECIPES = {}


def defaults(stage, recipe):
    """The flags that a stage and a recipe set, as a dict."""
    if stage is not None and stage not in STAGES:
        raise ValueError(f"--stage {stage} is not known; use pretrain or finetune")
    if recipe is not None and recipe not in RECIPES:
        raise ValueError(f"--recipe {recipe} is not known; known are {', '.join(RECIPES) or 'none yet'}")
    if recipe is not None and stage is None:
        raise ValueError("--recipe needs --stage pretrain or --stage finetune beside it")
    return STAGES.get(stage, {}) | (RECIPES[recipe].get(stage, {}) if recipe else {})
