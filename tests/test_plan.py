"""training/plan.py: what it counts is what a run allocates, and the plan of a command line."""

import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import clip_config, copy_tokenizer, llama_config
from drawn import draw, record, rows_of, words, write
from torch.profiler import ProfilerActivity, profile, record_function

import lora
import train
import weights
from formats import published
from formats.files import read_json
from model import IGNORE_INDEX, IMAGE_TOKEN_INDEX, LlamaConfig, Llava, LlavaConfig
from training import flags, plan
from vision import ClipVisionConfig

MHA, GQA = (LlamaConfig(600, 256, 688, 3, 4), LlamaConfig(600, 240, 500, 4, 5, 1, tie_word_embeddings=True))
TOWER = ClipVisionConfig(96, 256, 3, 3, 3, 112, 14)  # 64 tokens a picture


def model_of(text, device="cpu", **changes):
    with torch.device(device):
        return Llava(LlavaConfig(text, TOWER, "mlp2x_gelu", **changes)).requires_grad_(False)


def batch_of(lengths):
    """A packed batch of sequences with one picture each, of which the last 30 tokens are learned."""
    ids = [[5] + [IMAGE_TOKEN_INDEX] * 64 + [7] * (n - 65) for n in lengths]
    labels = [[IGNORE_INDEX] * (n - 30) + [7] * 30 for n in lengths]
    return SimpleNamespace(
        input_ids=torch.tensor(sum(ids, [])), labels=torch.tensor(sum(labels, [])), ids=[""],
        position_ids=torch.cat([torch.arange(n) for n in lengths]), image_sizes=[(112, 112)] * len(lengths),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0), pixel_values=torch.randn(len(lengths), 3, 112, 112))


def measure(work):
    """-> (bytes allocated when `marked` work inside ends, at the end, at most), against the beginning"""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        result = work()
    events = run.profiler.kineto_results.events()
    marked = [e.end_ns() for e in events if e.name() == "marked"]
    now = peak = middle = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
        middle = now if marked and event.start_ns() <= marked[0] else middle
    return middle, now, peak, result


# ------------------------------------------------------------------------------------------------ against what is so


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("text, lengths", [(MHA, (210, 210)), (GQA, (250, 170, 200)), (GQA, (300, 100, 100, 100)),
                                           (MHA, (420,))], ids=["even", "padded", "one by one", "products no more"])
@pytest.mark.parametrize("trained", [("mm_projector",), ("mm_projector", "language_model"),
                                     ("vision_tower", "mm_projector", "language_model"), ("mm_projector", 8)], ids=str)
def test_activations_are_counted(trained, text, lengths, dtype, checkpointing):
    model, rank = model_of(text).to(getattr(torch, dtype)), trained[-1] if trained[-1] == 8 else 0
    if rank:
        lora.inject(model, "language_model", lora.LoraConfig(rank, lora_dropout=0.1), 0)
        model.to(getattr(torch, dtype))
        for p in lora.trained(model.requires_grad_(False), "none"):
            p.requires_grad_(True)
    for part in trained[:-1] if rank else trained:
        getattr(model, part).requires_grad_(True)
    model.language_model.model.gradient_checkpointing = checkpointing
    batch = batch_of(lengths)
    _, kept, _, loss = measure(lambda: model.loss(batch))
    step = plan.Step(lengths, 30 * len(lengths), len(lengths), dtype=dtype, checkpointing=checkpointing, lora_r=rank,
                     cuda=False)
    assert sum(plan.activations(model, step).values()) == pytest.approx(kept, rel=0.03)  # without indices and seeds
    del loss


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_tokenizer):
    """Where a language model, a tower and data lie."""
    transformers = pytest.importorskip("transformers")
    root = draw(tmp_path_factory.mktemp("plan"))
    text = llama_config(hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_key_value_heads=2)
    transformers.LlamaForCausalLM(text).save_pretrained(root / "llm")
    copy_tokenizer(tiny_tokenizer, root / "llm")
    transformers.CLIPVisionModel(clip_config(hidden_size=64, image_size=112)).save_pretrained(root / "clip")
    (root / "clip" / "preprocessor_config.json").write_text(json.dumps({"size": 112, "crop_size": 112}))
    caption = "a circle in the picture " * 15
    write(root / "data.json", [record(f"{i}", "a.png", ("human", "<image>\nDescribe."), ("gpt", caption[i * 40:]))
                               for i in range(8)])
    return root


def command(root, out, **others):
    return words(model_name_or_path=root / "llm", vision_tower=root / "clip", data_path=root / "data.json", max_steps=2,
                 image_folder=root, use_cpu=True, output_dir=out, **{"per_device_train_batch_size": 4, **others})


def held(tensor):
    """Bytes of this rank's share of a tensor."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).nbytes


@pytest.mark.parametrize("others", [
    {"stage": "pretrain"}, {"stage": "pretrain", "bf16": True, "gradient_checkpointing": True}, {"stage": "finetune"},
    {"stage": "finetune", "gradient_checkpointing": True}, {"stage": "finetune", "bf16": True},
    {"stage": "finetune", "lora_enable": True, "lora_r": 8}, {"stage": "finetune", "lora_enable": True, "bf16": True}],
    ids=str)
def test_a_run_allocates_what_the_plan_says(folders, tmp_path, monkeypatch, others):
    """Weights, gradients, AdamW's moments, activations, and all of it at the fullest moment of the second step."""
    found, forward_backward = {}, train.Loop.forward_backward

    def measured(self, batch):
        loss = self.model.loss

        def marked(batch):
            with record_function("marked"):
                return loss(batch)

        self.model.loss = marked
        middle, end, peak, result = measure(lambda: forward_backward(self, batch))
        self.model.loss = loss
        moments = [x for state in self.optimizer.state.values() for x in state.values()]
        step = plan.replace(self.checkpointing.step, lengths=tuple(batch.cu_seqlens.diff().tolist()),
                            learned=int((batch.labels != IGNORE_INDEX).sum()))
        found.update(weights=sum(map(held, self.model.parameters())), moments=sum(map(held, moments)), gradients=end,
                     kept=middle, peak=peak, step=step, model=self.model)
        return result

    monkeypatch.setattr(train.Loop, "forward_backward", measured)
    assert train.main(command(folders, tmp_path, **others)) == 0
    parts, kept = plan.parts(found["model"], found["step"]), plan.activations(found["model"], found["step"])
    weights_of = sum(size for part, size in parts.items() if part.endswith(("float32", "bfloat16")))
    assert weights_of == found["weights"]
    assert parts["gradients"] == pytest.approx(found["gradients"], rel=0.02)
    assert parts["AdamW's two moments"] == pytest.approx(found["moments"], rel=0.02)
    assert sum(kept.values()) + parts["gathered weights"] == pytest.approx(found["kept"], rel=0.03)
    assert sum(parts.values()) == pytest.approx(found["weights"] + found["moments"] + found["peak"], rel=0.1)


def test_quantised_weights():
    model = model_of(LlamaConfig(600, 512, 1024, 2, 8), "meta")
    matrices = sum(p.numel() for n, p in model.named_parameters() if n.startswith(plan.LAYERS) and p.dim() == 2)
    for bits, double, expected in ((4, True, 4.126953125), (4, False, 4.5), (8, True, 8 + 32 / 585)):
        step = plan.Step((9,), 3, 1, bits=bits, double_quant=double)
        size = plan.weights(model, step)[f"language_model, codes of {bits} bits"]
        assert 8 * size / matrices == pytest.approx(expected, rel=1e-3)


# ------------------------------------------------------------------------------------------------------ a command line

SEVEN = ("--stage finetune --model_name_or_path lmsys/vicuna-7b-v1.5 --vision_tower openai/clip-vit-large-patch14-336 "
         "--mm_projector_type mlp2x_gelu --bf16 True --plan ")


def counts(line):
    """{part: parameters} of the model that a command line is about."""
    with torch.device("meta"):
        model = Llava(plan.read_config(flags.parse(line.split())))
    return {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}


def test_public_models_have_their_published_sizes():
    assert counts(SEVEN) == {"vision_tower": 303507456 - 2048 - 12596224, "mm_projector": 20979712,
                             "language_model": 6738415616}
    assert counts("--plan --model_name_or_path llava-hf/llava-1.5-13b-hf") == {
        "vision_tower": 290909184, "mm_projector": 31467520, "language_model": 13015864320}
    for name, size in (("mistralai/Mistral-7B-Instruct-v0.2", 7241732096),
                       ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1100048384),
                       ("huggingfacetb/smollm2-135m-instruct", 134515008)):
        assert counts(f"--plan --model_name_or_path {name}") == {"language_model": size}
    for name, values in read_json(Path(published.__file__).with_name("public_models.json")).items():
        assert isinstance(values, dict) or name != values


def test_a_plan_that_fits(capsys, monkeypatch):
    monkeypatch.setattr(weights, "load", None)
    assert train.main((SEVEN + "--gpus 8x80GB").split()) == 0
    said = capsys.readouterr().out
    assert "= 128 a step" in said and "activation checkpointing on (without it" in said and "of 80.00: it fits" in said
    sizes = {line[:40].strip(): float(line[40:].split()[0]) for line in said.splitlines()[5:]}
    assert sizes["language_model, trained, float32"] == pytest.approx(4 * 6.738 / 8, abs=0.01)
    assert sizes.pop("together") == pytest.approx(sum(sizes.values()), abs=0.1)
    train.main((SEVEN + "--gpus 8x80GB --fsdp_replicas 2").split())  # four devices share a model
    assert f"{'language_model, trained, float32':40s} {4 * 6.738 / 4:8.2f}" in capsys.readouterr().out


def test_what_to_change_makes_it_fit(capsys):
    line = "--stage finetune --model_name_or_path liuhaotian/llava-v1.5-13b --bf16 True --gpus 24GB --plan "
    assert train.main(line.split()) == 1
    said = capsys.readouterr().out.split("what to change first")[1].splitlines()[1:]
    advised = [row.split("saves")[0] for row in said[:-1]]
    assert ["batch_size" in advised[0], "lora" in advised[1], "--bits 4" in advised[2]] == [True] * 3
    assert train.main((line + " ".join(advised)).split()) == 0
    larger = said[-1].split("also with ")[1].split(":")[0]
    assert train.main((line + " ".join(advised) + " " + larger).split()) == 0


def test_sharding_and_a_global_batch_that_stays(capsys):
    def need(text):
        train.main((SEVEN + text).split())
        return float(capsys.readouterr().out.split("together")[1].split()[0])

    assert need("--gpus 8x80GB") < need("--gpus 8x80GB --deepspeed zero2.json") < need("--gpus 1x80GB")
    assert need("--gpus 80GB --deepspeed zero3_offload.json") < need("--gpus 80GB") - 6.7 * 12
    assert need("--gpus 80GB --plan_tokens 700") < need("--gpus 80GB")
    half = plan.smaller(plan.Step((9,) * 6, 60, 6, accumulate=2))
    third = plan.smaller(half)
    assert [(len(s.lengths), s.learned, s.accumulate) for s in (half, third)] == [(3, 30, 4), (1, 10, 12)]


@pytest.mark.parametrize("line, words", [
    *((f"--plan --model_name_or_path lmsys/vicuna-7b-v1.5 --gpus={gpus}", "like 8x80GB")
      for gpus in ("many", "0x80GB", "-1x80GB", "-2x80GB --recipe v1.5 --stage finetune")),
    (SEVEN + "--gpus 8x80GB --fsdp_replicas 3", "--fsdp_replicas 3 does not divide 8 devices"),
    ("--plan", "--model_name_or_path is missing"),
    ("--plan --model_name_or_path openai/clip-vit-large-patch14", "--vision_tower")])
def test_mistakes(line, words):
    with pytest.raises(ValueError, match=words):
        train.main(line.split())


@pytest.mark.parametrize("change, words", [
    ({"hidden_size": "big"}, "hidden_size is 'big'"), ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"num_key_value_heads": 1.5}, "num_key_value_heads is 1.5"), ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x'"),
    ({"vocab_size": -4}, "vocab_size is -4"),
    ({"vision_config": {"patch_size": 0}, "model_type": "llava"}, "vision_config.patch_size is 0"),
    ({"text_config": {"head_dim": [1]}, "model_type": "llava"}, r"text_config.head_dim is \[1\]")], ids=str)
def test_a_config_with_impossible_numbers_is_named(tmp_path, tiny_llama, change, words):
    folder = Path(shutil.copytree(tiny_llama("gqa"), tmp_path / "llm"))
    (folder / "config.json").write_text(json.dumps(read_json(folder / "config.json") | change))
    for start in (lambda: train.main(f"--plan --model_name_or_path {folder}".split()),
                  lambda: weights.load(folder, device="cpu")):
        with pytest.raises(ValueError, match=f"^{folder}/config.json: {words}; expected "):
            start()


def test_a_tower_with_impossible_numbers_is_named(tmp_path, tiny_llama, tiny_clip):
    folder = Path(shutil.copytree(tiny_clip, tmp_path / "clip"))
    (folder / "config.json").write_text(json.dumps(read_json(folder / "config.json") | {"image_size": "x"}))
    with pytest.raises(ValueError, match=f"^{folder}/config.json: image_size is 'x'; expected "):
        train.main(words(plan=True, model_name_or_path=tiny_llama("gqa"), vision_tower=folder))


@pytest.mark.parametrize("lora", ["", "--lora_enable True --lora_r 64 "])
def test_offloading_tells_what_the_host_must_hold(capsys, lora):
    train.main((SEVEN + lora + "--gpus 8x80GB --deepspeed zero3_offload.json").split())
    line, = [line for line in capsys.readouterr().out.splitlines() if "the machine's own memory" in line]
    trained = 20979712 + (64 * 32 * (8 * 4096 + 3 * (4096 + 11008)) if lora else 6738415616)
    assert float(line.split(" GB")[0].split()[-1]) == pytest.approx(16 * trained / 1e9, abs=0.01)
    train.main((SEVEN + lora + "--gpus 8x80GB").split())
    assert "own memory" not in capsys.readouterr().out


def test_checkpointing_where_memory_is_short(folders, tmp_path, capsys):
    """Only micro-batches that would not fit are computed twice, and the numbers stay."""
    options, rows = dict(stage="finetune", learning_rate=1e-3), []
    args = flags.parse(command(folders, tmp_path, **options))
    for memory, word in (("1TB", "off"), ("50MB", "where needed")):
        assert train.main(command(folders, tmp_path / word, gpus=memory, **options)) == 0
        assert f"activation checkpointing {word}: without it" in capsys.readouterr().out
        rows.append([(row["loss"], row["grad_norm"]) for row in rows_of(tmp_path / word)])
    assert rows[0] == rows[1]
    assert args.gradient_checkpointing is None
    model = model_of(MHA, "meta").requires_grad_(True)
    args.gpus, args.gradient_checkpointing = "90MB", None
    choice = plan.Checkpointing(args, model)
    assert [choice.of(batch_of(lengths)) for lengths in ((70,), (300, 300, 300, 300))] == [False, True]


def test_ranks_need_not_agree_on_checkpointing(folders, tmp_path):
    """Rank 0 computes its activations twice, rank 1 keeps them: the same curve as on one rank."""
    script = tmp_path / "differ.py"
    script.write_text("import os, sys, train\nfrom training import plan\n"
                      "plan.Checkpointing.of = lambda self, batch: os.environ['RANK'] == '0'\n"
                      "train.main(sys.argv[1:])\n")
    options = dict(stage="finetune", learning_rate=1e-3, save_strategy="no", per_device_train_batch_size=2)
    assert train.main(command(folders, tmp_path / "one", gradient_accumulation_steps=2, **options)) == 0
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script,
                    *command(folders, tmp_path / "two", **options)], check=True, timeout=300, capture_output=True,
                   env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(train.__file__).parent)})
    one, two = ([(row["loss"], row["grad_norm"]) for row in rows_of(tmp_path / out)] for out in ("one", "two"))
    assert [x for row in one for x in row] == pytest.approx([x for row in two for x in row], rel=1e-5)
