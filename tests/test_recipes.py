"""training/recipes.py and training/flags.py: the published runs' settings, and the original's command lines."""

import json
import re
import shlex
from pathlib import Path

import pytest
from drawn import words

from training import flags

NEEDED = words(model_name_or_path="m", data_path="d", output_dir="o")


def parse(text):
    return flags.parse([*NEEDED, *shlex.split(text)])


# LLAVA.md 5.3: records per step, learning rate, epochs, template, projector, start and end, aspect, sharding, clipping
TABLE = {
    ("v0", "pretrain"): (128, 2e-3, 1, "template_v0", "linear", True, "square", "full_shard", 1),
    ("v0", "finetune"): (32, 2e-5, 3, "template_v0", "linear", True, "square", "full_shard", 1),
    ("lightning", "pretrain"): (128, 2e-3, 1, "template_v0", "linear", True, "square", "full_shard", 1),
    ("lightning", "finetune"): (128, 2e-5, 1, "template_v0", "linear", True, "square", "full_shard", 1),
    ("scienceqa", "pretrain"): (128, 2e-3, 1, "template_v0", "linear", None, "square", "full_shard", 1),
    ("scienceqa", "finetune"): (32, 2e-5, 12, "template_v0", "linear", None, "square", "full_shard", 1),
    ("v1.0", "pretrain"): (128, 2e-3, 1, "plain", "linear", None, "square", "zero2", 0),
    ("v1.0", "finetune"): (128, 2e-5, 1, "v1", "linear", None, "square", "zero2", 0),
    ("v1.5", "pretrain"): (256, 1e-3, 1, "plain", "mlp2x_gelu", None, "square", "zero2", 0),
    ("v1.5", "finetune"): (128, 2e-5, 1, "v1", "mlp2x_gelu", None, "pad", "zero3", 0),
    ("v1.5-task", "finetune"): (128, 2e-5, 1, "v1", None, None, "pad", "zero3", 0),
}


@pytest.mark.parametrize("recipe, stage", TABLE)
@pytest.mark.parametrize("ranks", [1, 8])
def test_recipes_are_the_published_ones(recipe, stage, ranks, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    args = parse(f"--recipe {recipe} --stage {stage}")
    sharding = (args.deepspeed or args.fsdp).split(".")[0].split()[0]
    records = args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks
    assert (records, args.learning_rate, args.num_train_epochs, args.version, args.mm_projector_type,
            args.mm_use_im_start_end, args.image_aspect_ratio, sharding, args.max_grad_norm) == TABLE[recipe, stage]
    assert args.bf16 and args.warmup_ratio == 0.03 and args.lr_scheduler_type == "cosine" and not args.weight_decay
    assert args.model_max_length == 2048 and args.tune_mm_mlp_adapter == (stage == "pretrain")
    assert args.group_by_modality_length == (recipe in ("v1.5", "v1.5-task") and stage == "finetune")


@pytest.mark.parametrize("recipe, expected", [
    ("v1.0-lora", (64, 16, 0.05, 2e-5, None, 16)), ("v1.0-qlora", (64, 16, 0.05, 2e-5, None, 4)),
    ("v1.5-lora", (128, 256, 0.05, 2e-4, 2e-5, 16)), ("v1.5-task-lora", (128, 256, 0.05, 2e-4, 2e-5, 16))])
def test_recipes_of_adapters(recipe, expected):
    args = parse(f"--recipe {recipe} --stage finetune")
    assert (args.lora_r, args.lora_alpha, args.lora_dropout, args.learning_rate, args.mm_projector_lr,
            args.bits) == expected and args.lora_enable and args.lora_bias == "none"


def test_any_flag_goes_before_a_recipe(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    args = parse("--recipe v1.5 --stage finetune --per_device_train_batch_size 4 --max_grad_norm 1 --learning_rate 0.1")
    assert (args.gradient_accumulation_steps, args.max_grad_norm, args.learning_rate) == (8, 1, 0.1)
    assert parse("--recipe v1.5 --stage finetune --gradient_accumulation_steps 2").gradient_accumulation_steps == 2
    args = parse("--recipe v1.0 --stage pretrain --fp16 True --fsdp full_shard")  # V100s know no bfloat16
    assert args.fp16 and not args.bf16 and not args.tf32 and args.deepspeed is None and args.max_grad_norm == 1
    with pytest.raises(ValueError, match="takes 128 records per step, no multiple of 12 on 4 ranks"):
        parse("--recipe v1.5 --stage finetune --per_device_train_batch_size 3")


@pytest.mark.parametrize("recipe, llm, tower", [
    ("v1.5", "lmsys/vicuna-13b-v1.5", "openai/clip-vit-large-patch14-336"),
    ("v1.5-task", "liuhaotian/llava-v1.5-13b", None),
    ("v1.0", "lmsys/vicuna-13b-v1.3", "openai/clip-vit-large-patch14")])
def test_model_names_the_recipes_beginning(recipe, llm, tower):
    args = flags.parse(f"--recipe {recipe} --stage finetune --model 13b --data_path d --output_dir o".split())
    assert (args.model_name_or_path, args.vision_tower) == (llm, tower)
    with pytest.raises(ValueError, match="--model 7b is known for the recipes v1.5-task, v1.5, v1.0"):
        parse("--recipe v0 --stage finetune --model 7b")


def test_the_configuration_is_a_command_line_that_repeats_the_run():
    args = parse("--recipe v1.5 --stage finetune --run_name 'two words' --data_path one.json:0.5 two.json")
    assert vars(flags.parse(shlex.split(flags.describe(args))[1:])) == vars(args)


# ------------------------------------------------------------------------------------------------------------- sharding


@pytest.mark.parametrize("flag, kept, offload, clip", [
    ("--deepspeed scripts/zero2.json", True, False, 0), ("--deepspeed zero3.json", False, False, 0),
    ("--deepspeed ./scripts/zero3_offload.json", False, True, 1), ("--fsdp 'full_shard auto_wrap'", False, False, 1),
    ("--fsdp shard_grad_op --max_grad_norm 2", True, False, 2), ("--fsdp 'full_shard offload'", False, True, 1),
    ("--deepspeed zero2.json --max_grad_norm 0.5", True, False, 0.5), ("", False, False, 1)])
def test_sharding_flags_are_mapped_and_said(flag, kept, offload, clip, capsys):
    args = parse(flag)
    assert (args.keep_gathered, args.offload, args.max_grad_norm) == (kept, offload, clip)
    said = capsys.readouterr().err
    assert ("FSDP2 divides" in said) == bool(flag) and ("no such file is here" in said) == ("deepspeed" in flag)


def test_a_deepspeed_file_of_ones_own(tmp_path, capsys):
    (tmp_path / "zero2.json").write_text(json.dumps({
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}, "gradient_clipping": 0.7,
        "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": "auto", "bf16": {"enabled": True}}))
    args = parse(f"--deepspeed {tmp_path}/zero2.json")  # the file itself goes before the published one of its name
    assert (args.keep_gathered, args.offload, args.max_grad_norm, args.bf16) == (False, True, 0.7, True)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (3, 1)
    assert "no such file" not in capsys.readouterr().err


@pytest.mark.parametrize("content, message", [
    ({"zero_optimization": 3}, "zero_optimization is 3; expected an object"),
    ({"zero_optimization": {"stage": "three"}}, "stage is 'three'; expected a whole number"),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": "cpu"}}, "offload_optimizer is 'cpu'; expected an object"),
    ({"gradient_clipping": "x"}, "gradient_clipping is 'x'; expected a number"),
    ({"train_micro_batch_size_per_gpu": 1.5}, "train_micro_batch_size_per_gpu is 1.5; expected a whole number"),
    ({"bf16": True}, "bf16 is True; expected an object"), (None, "no such file; give a ZeRO file")], ids=str)
def test_a_deepspeed_file_that_is_none(tmp_path, content, message):
    path = tmp_path / "ds.json"
    path.mkdir() if content is None else path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"^--deepspeed {path}: {message}"):
        parse(f"--deepspeed {path}")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_becomes_of_a_deepspeed_file_is_said_once(tmp_path, capsys, stage):
    (tmp_path / "ds.json").write_text(json.dumps({
        "optimizer": {"type": "Adam"}, "scheduler": {}, "gradient_clipping": None,
        "zero_optimization": {"stage": stage, "offload_optimizer": None}}))
    args, said = parse(f"--deepspeed {tmp_path}/ds.json"), capsys.readouterr().err
    assert (args.max_grad_norm, args.offload, args.keep_gathered) == (1, False, stage < 3)
    assert said.count("not followed: its optimizer and scheduler, the flags decide") == 1
    assert ("done as stage 2" in said) == (stage < 2)


@pytest.mark.parametrize("flag, message", [
    ("--deepspeed zero1.json", "no such file; give a ZeRO file, or zero2.json, zero3.json"),
    ("--deepspeed zero2.json --fsdp full_shard", "drop one"), ("--fsdp hybrid_shard", "'hybrid_shard' is not known"),
    ("--bf16 --fp16", "--bf16 and --fp16 contradict each other"),
    ("--recipe v1.5-task --stage pretrain", "needs --stage finetune beside it"),
    ("--recipe v1.5", "needs --stage pretrain or --stage finetune"),
    ("--unfreeze_mm_vision_tower --save_projector_only", "contradict each other")])
def test_what_does_not_go_together(flag, message):
    with pytest.raises(ValueError, match=message):
        parse(flag)


# ----------------------------------------------------------------------------------------- the original's command lines


def test_flags_without_effect_are_said_to_be_so(capsys):
    parse("--lazy_preprocess True --fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer --mpt_attn_impl triton")
    said, = [line for line in capsys.readouterr().err.splitlines() if "without effect" in line]
    assert [word for word in said.split() if word.startswith("--")] == [
        "--mpt_attn_impl", "--lazy_preprocess", "--fsdp_transformer_layer_cls_to_wrap"]


@pytest.mark.parametrize("line, idle", [
    ("--eval_steps 7", ["eval_steps"]), ("--eval_strategy steps --eval_generate 5", [
        "evaluation_strategy", "eval_generate"]),
    ("--evaluation_strategy no", []), ("--eval_steps 7 --eval_data_path e.json", []),
    ("--mm_vision_tower_lr 2e-6", ["mm_vision_tower_lr"]),
    ("--mm_vision_tower_lr 2e-6 --unfreeze_mm_vision_tower", []),
    ("--lora_r 8 --lora_alpha 16 --lora_target all-linear --use_rslora", [
        "lora_r", "lora_alpha", "lora_target", "use_rslora"]),
    ("--lora_r 8 --lora_enable", []), ("--local_rank=0", ["local_rank"]),
    ("--recipe miniature --stage pretrain", []), ("--recipe v1.5-lora --stage finetune", [])])
def test_a_setting_that_does_nothing_is_said_to(line, idle, capsys):
    parse(line)
    said = "".join(line for line in capsys.readouterr().err.splitlines() if "without effect" in line)
    assert re.findall(r"--(\w+) is without effect", said) == idle


def test_newer_names_are_the_same():
    assert parse("--eval_strategy epoch --eval_data_path e.json").evaluation_strategy == "epoch"


def test_every_training_command_of_the_seed_documents_is_understood(capsys):
    folder = Path(__file__).resolve().parents[2] / "shared" / "reference"
    seeds = sorted(folder.glob("seed_*"))
    if not seeds:
        pytest.skip(f"the documents are not here ({folder})")
    commands = [(file.name, found[1].replace("\\\n", "")) for file in seeds for found in
                re.finditer(r"llava/train/train_mem\.py((?:[^\n]*\\\n)+[^\n]*)", file.read_text())]
    assert len(commands) >= 8
    for name, command in commands:
        args = flags.parse(shlex.split(command))
        assert args.max_grad_norm == (0 if args.deepspeed else 1), name
        assert args.keep_gathered == (args.deepspeed is not None) and args.bf16 and args.lr_scheduler_type == "cosine"


@pytest.mark.parametrize("words, message", [
    ("--dataloader_num_workers -1", "too small; it is 0 or more"), ("--save_steps 0", "too small; it is 1 or more"),
    ("--adam_beta1 2", "too large; it is less than 1"), ("--warmup_ratio 3", "too large; it is less than 1"),
    ("--save_total_limit 0", "too small; it is 1 or more"), ("--warmup_steps -5", "too small; it is 0 or more"),
    ("--eval_steps -1", "too small; it is 1 or more"), ("--eval_steps 0", "too small; it is 1 or more"),
    ("--eval_generate -3", "too small; it is 0 or more"), ("--skip_nonfinite -1", "too small; it is 0 or more"),
    ("--seed -1", "too small; it is 0 or more"), ("--plan --plan_tokens 0", "too small; it is 1 or more"),
    ("--per_device_train_batch_size 0", "too small; it is 1 or more"), (f"--seed {2**63}", "too large; it is less"),
    ("--num_train_epochs 1e300", "too large; it is less than 1,000,000"),
    (f"--output_dir {__file__}", "is a file; name a folder")])
def test_a_number_out_of_range_is_one_sentence(words, message):
    with pytest.raises(ValueError, match=message):
        parse(f"--recipe v1.5 --stage finetune {words}")
