"""train.py: the original's curves step by step, both stages on drawn pictures, and what the flags change."""

import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from drawn import draw, rows_of, run_train, words
from safetensors.torch import load_file

import sample
import train
from formats import command
from formats.layouts import our_name
from model import IMAGE_TOKEN_INDEX
from training import flags
from training.evaluation import Judge
from training.sampler import BatchOrder
from weights import load

ROOT = Path(__file__).resolve().parent.parent
ROW = ["step", "epoch", "loss", "grad_norm", "learning_rate", "learned_tokens", "tokens", "seconds",
       "tokens_per_second", "memory_gb", "tflops"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def parts(tiny_llama, tiny_clip, scenes):
    """The flags of a stage 1 run that starts from a language model and a tower."""
    return dict(model_name_or_path=tiny_llama("gqa"), vision_tower=tiny_clip, mm_projector_type="mlp2x_gelu",
                image_folder=scenes, data_path=scenes / "captions.json", version="plain", tune_mm_mlp_adapter=True,
                per_device_train_batch_size=2, learning_rate=1e-2)


@pytest.fixture(scope="module")
def stages(parts, scenes, tmp_path_factory):
    """Stage 1, then stage 2 from the folder it wrote, by the recipes' defaults. -> their two folders"""
    one, two = tmp_path_factory.mktemp("stage1"), tmp_path_factory.mktemp("stage2")
    common = dict(image_folder=scenes, per_device_train_batch_size=2, model_max_length=256)
    first = {key: parts[key] for key in ("model_name_or_path", "vision_tower", "data_path")}
    run_train(one, stage="pretrain", max_steps=4, **first, **common)
    run_train(two, stage="finetune", model_name_or_path=one, data_path=scenes / "talks.json", log_samples=True,
              num_train_epochs=2, learning_rate=1e-3, eval_data_path=scenes / "talks.json", eval_generate=3,
              eval_steps=2, eval_pictures="true,shuffled,blank", **common)
    return one, two


def build(out, **options):
    """The model that a command line would train."""
    return train.build_model(flags.parse(words(output_dir=out, **options)), torch.device("cpu"))


def tensors(model):
    """{name: tensor}, a copy."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed_parts(before, after):
    """The top-level parts in which some tensor differs."""
    assert before.keys() == after.keys()
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


# --------------------------------------------------------------------------------------------------------- the original


@pytest.mark.parametrize("name", ["stage1_mha", "stage2_mha_lr1e-3"])
def test_training_repeats_the_original_step_by_step(gold, tmp_path, name):
    recorded = json.loads((gold / "train" / f"{name}.json").read_text())
    argv = [word.replace("@GOLD@/gold", str(gold)) for word in recorded["argv"]]
    assert train.main([*argv, "--output_dir", str(tmp_path), "--log_samples"]) == 0
    rows, steps = rows_of(tmp_path), recorded["steps"]
    assert [row["ids"] for row in rows] == [step["ids"] for step in steps]
    assert [row["learning_rate"] for row in rows] == pytest.approx([step["lrs"][0] for step in steps], rel=1e-12)
    assert [row["loss"] for row in rows] == pytest.approx([step["loss"] for step in steps], rel=1e-5)
    assert [row["grad_norm"] for row in rows] == pytest.approx([step["grad_norm"] for step in steps], rel=1e-5)

    ours = {our_name(key): tensor for key, tensor in load_file(tmp_path / "model.safetensors").items()}
    final = load_file(gold / "train" / f"{name}.safetensors")
    final = {key.removeprefix("final."): tensor for key, tensor in final.items() if key.startswith("final.")}
    for key, tensor in final.items():
        found = ours[our_name(key.removesuffix(".rows"))]
        found = found[recorded["embedding_rows_stored"]] if key.endswith(".rows") else found
        assert (found - tensor).abs().max() < 1e-5, key


@pytest.mark.parametrize("total, warmup, factors", [
    (2181, 66, {0: 0, 1: 0.01515152, 65: 0.98484848, 66: 1, 67: 0.99999945, 1090: 0.52486996, 2180: 5.5e-7}),
    (5198, 156, {1: 0.00641026, 155: 0.99358974, 156: 1, 2599: 0.52429074})])
def test_cosine_schedule_of_the_published_runs(total, warmup, factors):
    by_ratio = flags.build_parser().parse_args(["--warmup_ratio", "0.03", "--lr_scheduler_type", "cosine"])
    by_steps = flags.build_parser().parse_args(["--warmup_steps", str(warmup), "--lr_scheduler_type", "cosine"])
    for args in by_ratio, by_steps:
        found = [train.learning_rate_factor(step, total, args) for step in factors]
        assert found == pytest.approx(list(factors.values()), abs=6e-9)


@pytest.mark.parametrize("kind", flags.SCHEDULES)
def test_schedules_are_those_of_transformers(kind):
    get_scheduler = pytest.importorskip("transformers").get_scheduler
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = get_scheduler(kind, optimizer, 3, 10)
    args = flags.build_parser().parse_args(["--warmup_steps", "3", "--lr_scheduler_type", kind])
    for step in range(10):
        assert train.learning_rate_factor(step, 10, args) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


# ----------------------------------------------------------------------------------------------------------- two stages


def test_stage_1_changes_the_projector_only(parts, stages, tmp_path):
    before = build(tmp_path, stage="pretrain", **parts).model
    assert changed_parts(tensors(before), tensors(load(stages[0]).model)) == {"mm_projector"}


def test_stage_2_changes_all_but_the_tower(stages):
    before, after = (tensors(load(folder).model) for folder in stages)
    assert changed_parts(before, after) == {"mm_projector", "language_model"}
    still = [name for name in before if "vision_tower" not in name and torch.equal(before[name], after[name])]
    assert still == []


def test_a_stage_writes_the_settings_it_was_given(stages):
    one, two = (load(folder) for folder in stages)
    assert (one.config.image_aspect_ratio, two.config.image_aspect_ratio) == ("square", "pad")
    assert one.conv_mode == two.conv_mode == "v1"  # plain is stage 1's alone
    assert two.config.tokenizer_model_max_length == 256


@pytest.mark.parametrize("flags, conv_mode, tokens", [
    ({"version": "llava_llama_2"}, "llava_llama_2", 400),
    ({"version": "v0"}, "v1", 401),  # [PAD]
    ({"recipe": "v0"}, "llava_v0", 402),  # <im_start>, <im_end>
])
def test_the_template_is_kept_with_the_model(parts, scenes, tmp_path, capsys, flags, conv_mode, tokens):
    """--version is saved as conv_mode and asked with; its new tokens have ids and rows."""
    given = {key: parts[key] for key in ("model_name_or_path", "vision_tower", "image_folder")}
    run_train(tmp_path, stage="finetune", max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=1,
              model_max_length=256, data_path=scenes / "talks.json", mm_projector_type="linear", **given, **flags)
    said = capsys.readouterr()
    assert ("WARNING: --version v0 trains the text of v1" in said.out) == (flags.get("version") == "v0")
    assert json.loads((tmp_path / "config.json").read_text())["conv_mode"] == conv_mode
    loaded = load(tmp_path)
    assert loaded.conv_mode == conv_mode and loaded.config.text.vocab_size == tokens
    named = {"v1": ["[PAD]"], "llava_v0": ["<im_start>", "<im_end>"], "llava_llama_2": []}[conv_mode]
    assert [loaded.tokenizer.token_to_id(token) for token in named] == list(range(400, tokens))
    assert loaded.config.mm_use_im_start_end == (conv_mode == "llava_v0")
    example = sample.encode(loaded, sample.Request([("human", "q")], [scenes / "a.png"]))
    asked = loaded.tokenizer.decode([i for i in example.ids if i != IMAGE_TOKEN_INDEX], skip_special_tokens=False)
    ends = {"v1": "q ASSISTANT:", "llava_v0": "<im_end>\nq###Assistant:", "llava_llama_2": "q [/INST]"}
    assert asked.replace("> \n", ">\n").endswith(ends[conv_mode])


def test_log_has_one_row_per_step_with_the_promised_fields(stages):
    one, two = map(rows_of, stages)
    assert [list(row) for row in one] == [ROW] * 4 and [row["step"] for row in one] == [1, 2, 3, 4]
    steps = [row for row in two if "eval_loss" not in row]
    assert [list(row) for row in steps] == [[*ROW, "ids"]] * 6 and [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in steps] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2], abs=1e-6)
    assert steps[0]["learning_rate"] == 0  # warm-up
    ids = sum((row["ids"] for row in steps), [])
    assert sorted(sum(ids[:3], [])) == sorted(sum(ids[3:], [])) == ["long", "one", "text", "turns", "two"]


def test_log_has_a_row_per_evaluation(stages):
    rows = [row for row in rows_of(stages[1]) if "eval_loss" in row]
    assert [row["step"] for row in rows] == [0, 2, 4, 6] and rows[0]["eval_loss"] > rows[-1]["eval_loss"]
    for row in rows:
        assert {"eval_match", "eval_match_shuffled", "eval_match_blank"} <= row.keys()
        assert row["eval_match_by_kind"].keys() == {"color", "text"}
        assert [answer["id"] for answer in row["eval_answers"]] == ["one", "turns", "text"]


def test_a_model_in_training_answers_as_the_one_it_writes(stages):
    """FSDP hands a method copies of its arguments that are dataclasses: a cache must not go by such."""
    told = [row for row in rows_of(stages[1]) if "eval_loss" in row][-1]["eval_answers"]
    args = SimpleNamespace(**json.loads((stages[1] / "training_args.json").read_text()))
    row, = Judge(args, load(stages[1], device="cpu", dtype="float32")).rows(6)
    assert row["eval_answers"] == told and any(len(answer["answer"].split()) > 1 for answer in told)


def test_what_a_stage_writes_can_be_loaded_by_transformers(stages):
    transformers = pytest.importorskip("transformers")
    for folder in stages:
        transformers.LlavaForConditionalGeneration.from_pretrained(folder)


def test_save_projector_only(parts, tmp_path):
    out = tmp_path / "stage1"
    run_train(out, max_steps=1, save_projector_only=True, **parts)
    names = {file.name for file in out.iterdir()}
    assert names == {"config.json", "mm_projector.bin", "log.jsonl", "training_args.json", "trainer_state.json"}
    assert load(out, model_base=parts["model_name_or_path"]).config.mm_projector_type == "mlp2x_gelu"


@pytest.mark.parametrize("form", ["file", "safetensors", "folder"])
def test_stage_2_takes_the_projector_as(form, parts, stages, tmp_path):
    one = stages[0]
    path = {"file": one / "mm_projector.bin", "safetensors": one / "model.safetensors", "folder": one}[form]
    if form == "safetensors":
        from safetensors.torch import save_file
        path = tmp_path / "any.safetensors"
        save_file(torch.load(one / "mm_projector.bin"), path)
    model = build(tmp_path, pretrain_mm_mlp_adapter=path, **parts).model
    assert torch.equal(model.mm_projector[0].weight, load(one).model.mm_projector[0].weight)


# ------------------------------------------------------------------------------------------ batches, steps and the rest


def test_accumulation_runs_on_across_the_end_of_an_epoch(parts, tmp_path):
    rows = run_train(tmp_path, num_train_epochs=4, gradient_accumulation_steps=2, log_samples=True, **parts)
    order = BatchOrder(5, 2, 42)
    expected = [[f"cap{i}" for i in batch] for _ in range(4) for batch in order.epoch()]
    assert len(rows) == 4  # an epoch has 3 batches, and a third of it is left over
    assert sum((row["ids"] for row in rows), []) == expected[:8]
    assert [row["epoch"] for row in rows] == pytest.approx([2 / 3, 4 / 3, 2, 8 / 3], abs=1e-6)


def test_accumulation_longer_than_an_epoch_takes_the_epoch(parts, tmp_path):
    rows = run_train(tmp_path, num_train_epochs=2, gradient_accumulation_steps=16, log_samples=True, **parts)
    assert [len(row["ids"]) for row in rows] == [3, 3] and [row["epoch"] for row in rows] == [1, 2]


@pytest.fixture(scope="module")
def all_parts(parts):
    """Two steps of four records each, the language model trained along."""
    return parts | {"tune_mm_mlp_adapter": False, "per_device_train_batch_size": 4, "max_steps": 2}


@pytest.fixture(scope="module")
def plain_run(all_parts, tmp_path_factory):
    """The rows that other ways to the same must repeat."""
    return run_train(tmp_path_factory.mktemp("plain"), **all_parts)


@pytest.mark.parametrize("options", [
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, {"gradient_checkpointing": True},
    {"dataloader_num_workers": 1}, {"logging_steps": 3}, {"deepspeed": "zero2.json", "max_grad_norm": 1.0},
    {"deepspeed": "zero3_offload.json"}])
def test_the_same_numbers_another_way(all_parts, plain_run, tmp_path, options):
    rows = run_train(tmp_path, **all_parts | {"max_steps": 1} | options)
    for key in "loss", "grad_norm", "learned_tokens", "tokens":
        assert rows[0][key] == pytest.approx(plain_run[0][key], rel=1e-5)


def test_the_norm_is_logged_before_clipping_which_can_be_off(all_parts, plain_run, tmp_path):
    rows = run_train(tmp_path, max_grad_norm=0, **all_parts)
    assert plain_run[0]["grad_norm"] > 1 and rows[0]["grad_norm"] == plain_run[0]["grad_norm"]
    assert rows[1]["grad_norm"] != plain_run[1]["grad_norm"]  # the clipped step was another one, if only by epsilon


def test_a_batch_without_anything_to_learn_changes_nothing_and_is_reported(parts, scenes, tmp_path, capsys):
    before = build(tmp_path, **parts).model
    short = parts | {"model_max_length": 3, "max_steps": 1}  # the picture does not fit
    rows = run_train(tmp_path, on_bad_record="skip", **short)
    assert (rows[0]["loss"], rows[0]["grad_norm"], rows[0]["learned_tokens"]) == (0, 0, 0)
    assert changed_parts(tensors(before), tensors(load(tmp_path).model)) == set()
    assert "nothing to learn is left" in capsys.readouterr().out


def test_bfloat16_trains_float32_masters(all_parts, plain_run, tmp_path):
    rows = run_train(tmp_path, bf16=True, **all_parts)
    assert rows[0]["loss"] == pytest.approx(plain_run[0]["loss"], rel=0.05) and rows[0]["loss"] != plain_run[0]["loss"]
    dtypes = {our_name(name).split(".")[0]: t.dtype for name, t in load_file(tmp_path / "model.safetensors").items()}
    assert dtypes == {"vision_tower": torch.bfloat16, "mm_projector": torch.float32, "language_model": torch.float32}
    assert load(tmp_path).model.mm_projector[0].weight.dtype == torch.float32


def test_float16_learns_with_a_loss_scale_that_falls_when_gradients_overflow(all_parts, plain_run, tmp_path, capsys):
    options = all_parts | {"fp16": True, "max_steps": 6, "save_steps": 3}
    rows, told = run_train(tmp_path / "out", **options), capsys.readouterr().out
    falls = told.count("overflow float16")
    assert falls == sum(row["grad_norm"] is None for row in rows) and 0 < falls < 6
    assert rows[0]["loss"] == pytest.approx(plain_run[0]["loss"], rel=0.01) and rows[-1]["loss"] < rows[0]["loss"]
    (tmp_path / "out" / "trainer_state.json").unlink()
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    again = run_train(tmp_path / "out", **options)  # from checkpoint-3, with its scale
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]


# ------------------------------------------------------------------------------------------------------ what is trained


def test_the_new_words_of_stage_1_reach_stage_2(parts, tmp_path):
    """<im_start> and <im_end>: with the projector all embeddings are trained, and stage 2 takes the two rows."""
    options = parts | {"mm_use_im_start_end": True, "version": "template_v0"}
    begin = build(tmp_path, **options).model.language_model.model.embed_tokens.weight
    run_train(tmp_path / "one", max_steps=3, save_projector_only=True, **options)
    saved = torch.load(tmp_path / "one" / "mm_projector.bin")["model.embed_tokens.weight"]
    assert saved.shape == begin.shape == (402, 32) and not torch.equal(saved[-2:], begin[-2:])
    after = build(tmp_path, pretrain_mm_mlp_adapter=tmp_path / "one", **options).model.language_model.model.embed_tokens
    assert torch.equal(after.weight[-2:], saved[-2:]) and torch.equal(after.weight[:-2], begin[:-2])


def test_the_patch_token_is_added_when_asked_for(parts, tmp_path):
    run_train(tmp_path, max_steps=1, mm_use_im_patch_token=True, **parts)
    loaded = load(tmp_path)
    assert loaded.tokenizer.token_to_id("<im_patch>") == 400 and loaded.config.text.vocab_size == 401




@pytest.mark.parametrize("options, trained", [
    ({}, {"mm_projector", "language_model.model", "language_model.lm_head"}),
    ({"tune_mm_mlp_adapter": True}, {"mm_projector"}),
    ({"freeze_backbone": True}, {"mm_projector", "language_model.lm_head"}),
    ({"freeze_mm_mlp_adapter": True}, {"language_model.model", "language_model.lm_head"}),
    ({"freeze_backbone": True, "freeze_mm_mlp_adapter": True}, {"language_model.lm_head"})])
def test_flags_choose_what_trains(parts, tmp_path, options, trained):
    model = build(tmp_path, **parts | {"tune_mm_mlp_adapter": False} | options).model
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {".".join(name.split(".")[:1 if name.startswith("mm") else 2]) for name in names} == trained


def groups_of(model, **options):
    """{parameter name: (weight decay, learning rate)} of the optimiser."""
    args = flags.build_parser().parse_args(words(learning_rate=1e-3, weight_decay=0.1, **options))
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: (group["weight_decay"], group["base_lr"])
            for group in train.build_optimizer(model, args).param_groups for p in group["params"]}


def test_matrices_decay_and_biases_and_norms_do_not(parts, tmp_path):
    model = build(tmp_path, **parts | {"tune_mm_mlp_adapter": False}).model
    for name, (decay, rate) in (groups := groups_of(model)).items():
        assert decay == (0.1 if model.get_parameter(name).dim() == 2 else 0) and rate == 1e-3
    assert groups.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


def test_several_rates_are_shown_as_one_is(parts, tmp_path, capsys):
    run_train(tmp_path, max_steps=2, mm_projector_lr=2.25e-4, mm_vision_tower_lr=7.5e-5, **parts)
    assert "lr 5.00e-03, 1.12e-04, 3.75e-05  " in capsys.readouterr().out  # of the second step of two


def test_the_projector_has_a_rate_of_its_own(parts, tmp_path):
    model = build(tmp_path, **parts | {"tune_mm_mlp_adapter": False}).model
    groups = groups_of(model, mm_projector_lr=1e-4)
    assert len(set(groups.values())) == 4
    assert all(rate == (1e-4 if name.startswith("mm_projector") else 1e-3) for name, (_, rate) in groups.items())
    rows = run_train(tmp_path, max_steps=2, warmup_steps=2, mm_projector_lr=1e-4, **parts)
    assert rows[1]["learning_rate"] == pytest.approx([5e-3, 5e-5])


def test_a_language_model_alone_trains_too(parts, scenes, tmp_path):
    records = [record for record in json.loads((scenes / "talks.json").read_text()) if record["id"] == "text"]
    (tmp_path / "text.json").write_text(json.dumps(records))
    out = tmp_path / "out"
    rows = run_train(out, model_name_or_path=parts["model_name_or_path"], data_path=tmp_path / "text.json", max_steps=2,
                     version="v1", eval_data_path=tmp_path / "text.json", eval_generate=1, eval_pictures="true,blank")
    assert math.isfinite(rows[0]["loss"]) and rows[-1]["eval_match_blank"] is None
    assert load(out).model.vision_tower is None


def test_every_flag_may_be_written_with_dashes():
    given = {int: ("3", 3), float: ("0.5", 0.5), str: ("x", "x"), bool: ("True", True), list: ("x", ["x"]),
             command.file_size: ("2GB", 2 * 10**9)}
    rows = [(name, given.get(kind) or kind[-1:] * 2) for group in flags.FLAGS.values() for name, kind, *_ in group]

    def parsed(mark):
        return flags.build_parser().parse_args([word for name, (text, _) in rows
                                                for word in (f"--{name.replace('_', mark)}", text)])

    dashed = parsed("-")
    assert vars(parsed("_")) == vars(dashed)
    assert {name: getattr(dashed, name) for name, _ in rows} == {name: value for name, (_, value) in rows}


def test_a_stage_only_sets_defaults():
    needed = words(model_name_or_path="m", data_path="d", output_dir="o")
    args = flags.parse(["--stage", "pretrain", "--learning-rate", "5e-4", *needed])
    assert args.learning_rate == 5e-4 and args.tune_mm_mlp_adapter and args.version == "plain"
    assert flags.parse(needed).learning_rate == 5e-5


# --------------------------------------------------------------------------------------------------- the command itself


def start(*command, out, **options):
    """Start train.py in a process of its own."""
    command = [sys.executable, *map(str, command), *words(use_cpu=True, output_dir=out, **options)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_ranks_do_what_one_does_that_accumulates_twice(parts, scenes, tmp_path):
    options = parts | {"tune_mm_mlp_adapter": False, "version": "v1", "data_path": scenes / "talks.json",
                       "max_steps": 3, "per_device_train_batch_size": 1, "log_samples": True}
    run = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "train.py", out=tmp_path / "two",
                **options)
    one = run_train(tmp_path / "one", gradient_accumulation_steps=2, **options)
    assert run.wait(60) == 0, run.stderr.read()
    two = rows_of(tmp_path / "two")
    assert ["text"] in two[0]["ids"] + two[1]["ids"]  # a rank without a picture beside one with some
    for ours, theirs in zip(one[:2], two[:2]):  # then the epoch's last record is left, and two ranks need two
        for key in "ids", "loss", "grad_norm", "learned_tokens", "tokens", "learning_rate":
            assert theirs[key] == (ours[key] if key == "ids" else pytest.approx(ours[key], rel=1e-5)), key
    assert two[2]["ids"] == [one[2]["ids"][0], two[0]["ids"][0]]
    load(tmp_path / "two")


def test_ctrl_c_finishes_the_step_and_saves(parts, tmp_path):
    run = start("train.py", out=tmp_path / "out", max_steps=100000, **parts)
    while not run.stdout.readline().lstrip("step ").startswith("2/100000"):
        assert run.poll() is None, run.stderr.read()
    run.send_signal(signal.SIGINT)
    said, errors = run.communicate(timeout=60)
    assert run.returncode == 130 and "Traceback" not in errors
    steps = len(rows_of(tmp_path / "out"))
    assert f"stopped after step {steps} of 100000" in said
    load(tmp_path / "out")
