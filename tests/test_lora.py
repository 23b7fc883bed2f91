"""lora.py and formats/adapter.py: PEFT's numbers and files, the original's curve, adapters put on and merged."""

import copy
import doctest
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from drawn import draw, rows_of, run_train, words
from safetensors.torch import load_file, save_file
from test_weights import TEXT, WITH_PICTURE, close, our_logits, picture
from torch import nn
from torch.utils.checkpoint import checkpoint

import kernels.lora
import lora
import sample
import train
import training.checkpoint
from kernels.lora import left_out, lora_linear
from model import LlamaConfig, Llava, LlavaConfig
from weights import Blank, convert, load, merge, save

ROOT = Path(__file__).resolve().parent.parent
LEAVES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_lesson_is_right():
    assert doctest.testmod(lora).failed == 0 and doctest.testmod(lora).attempted > 5


# ------------------------------------------------------------------------------------------------------ one matrix


class Two(nn.Module):
    """Two linears that share an input."""

    def __init__(self):
        super().__init__()
        self.language_model = nn.ModuleDict({"q_proj": nn.Linear(24, 40, bias=False), "k_proj": nn.Linear(24, 8)})

    def forward(self, x):
        return sum(layer(x).square().sum() for layer in self.language_model.values())


@pytest.fixture
def pair():
    """-> (our model, PEFT's, {name: (our LoraLinear, PEFT's)}) of equal random numbers, rank-stabilised."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    ours = Two().requires_grad_(False)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj"], use_rslora=True)
    theirs = peft.get_peft_model(copy.deepcopy(ours), config)
    lora.inject(ours, "language_model", lora.LoraConfig(4, 8, 0.0, use_rslora=True), 0)
    wrapped = theirs.base_model.model.language_model
    layers = {name: (layer, wrapped[name]) for name, layer in ours.language_model.items()}
    for layer, other in layers.values():
        for mine, yours in ((layer.lora_A, other.lora_A), (layer.lora_B, other.lora_B)):
            yours["default"].weight.data = torch.randn(mine.shape)
            mine.data = yours["default"].weight.data.clone()
    return ours, theirs, layers


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype, apart", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_forward_and_backward_are_those_of_peft(pair, dtype, apart):
    ours, theirs, layers = pair[0].to(dtype), pair[1].to(dtype), pair[2]
    x = torch.randn(3, 7, 24, dtype=dtype)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for model, own in zip((ours, theirs), inputs):
        model(own).backward()
    found = [(inputs[0].grad, inputs[1].grad)]
    for layer, other in layers.values():
        found += [(layer(x), other(x)), (layer.lora_A.grad, other.lora_A["default"].weight.grad),
                  (layer.lora_B.grad, other.lora_B["default"].weight.grad)]
    for mine, yours in found:
        assert mine.dtype == dtype and (mine - yours).norm() < apart * yours.norm()
    assert all(p.grad is None for name, p in ours.named_parameters() if "lora_" not in name)


def test_what_is_kept_is_the_input_once(pair):
    ours, kept = pair[0], []
    x = torch.randn(7, 24, requires_grad=True)
    for layer in ours.language_model.values():
        layer.dropout = 0.5
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        outputs = [layer(x) for layer in ours.language_model.values()]
    own = {p.data_ptr() for p in ours.parameters()}
    assert {tensor.data_ptr() for tensor in kept} - own == {x.data_ptr()}
    for layer in ours.language_model.values():  # the frozen weight itself is used, not a copy
        assert layer.dense().data_ptr() == layer.weight.data_ptr() == layer.linear.weight.data_ptr()
    del outputs


def test_dropout_falls_on_the_way_to_A_alone_and_is_drawn_again_alike(pair):
    layer = pair[0].language_model["q_proj"]
    x = torch.randn(500, 24, requires_grad=True)
    y = lora_linear(x, layer.dense, None, layer.lora_A, layer.lora_B, 2.0, 0.3, 5)
    gone = left_out(x, 0.3, 5)
    mask = (~gone).float() / 0.7
    assert 0.28 < gone.float().mean() < 0.32 and torch.equal(gone, left_out(x, 0.3, 5))
    assert not torch.equal(gone, left_out(x, 0.3, 6)) and left_out(x[:1, :7], 0.3, 5).shape == (1, 7)
    again = [tensor.detach().clone().requires_grad_() for tensor in (x, layer.lora_A, layer.lora_B)]
    expected = again[0] @ layer.weight.t() + 2.0 * (again[0] * mask) @ again[1].t() @ again[2].t()
    assert torch.allclose(y, expected, atol=1e-5)
    weight = torch.randn_like(y)
    mine = torch.autograd.grad((y * weight).sum(), (x, layer.lora_A, layer.lora_B))
    for found, wanted in zip(mine, torch.autograd.grad((expected * weight).sum(), again)):
        assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_dropout_under_checkpointing_and_none_without_gradients(pair):
    layer = pair[0].language_model["q_proj"]
    layer.dropout, x = 0.5, torch.randn(9, 24, requires_grad=True)
    grads = []
    for call in (lambda: layer(x), lambda: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(call().square().sum(), (x, layer.lora_A, layer.lora_B)))
    assert all(torch.equal(one, two) for one, two in zip(*grads))
    assert not torch.equal(layer(x), layer(x))
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x))


def test_no_rows(pair):
    x = torch.randn(0, 24, requires_grad=True)
    y = pair[0].language_model["q_proj"](x)
    y.sum().backward()
    assert y.shape == (0, 40) and x.grad.shape == (0, 24)


def test_a_bias_is_added_and_can_be_learned(pair):
    layer = pair[0].language_model["k_proj"]
    names = [name for name, p in pair[0].named_parameters() for q in lora.trained(pair[0], "lora_only") if p is q]
    assert [name for name in names if "lora_" not in name] == ["language_model.k_proj.bias"]
    layer.bias.requires_grad_(True)
    x = torch.randn(5, 24)
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((8,), 5.0))


# ----------------------------------------------------------------------------------------------------- which matrices


@pytest.mark.parametrize("target, parts, leaves", [
    ("language_model", {"language_model"}, LEAVES), ("q_proj, v_proj", {"language_model"}, {"q_proj", "v_proj"}),
    ("vision_tower.q_proj", {"vision_tower"}, {"q_proj"}), ("mm_projector", {"mm_projector"}, {"0", "2"}),
    ("all-linear", {"language_model", "vision_tower", "mm_projector"}, LEAVES | {"out_proj", "fc1", "fc2", "0", "2"}),
    ("q_proj,", {"language_model"}, {"q_proj"}),
    ("layers.1", {"language_model"}, LEAVES), ("vision_tower,self_attn", {"language_model", "vision_tower"},
                                               {"q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "fc1", "fc2"})])
def test_targets_are_told_by_module(tiny_llava, target, parts, leaves):
    model = load(tiny_llava).model
    names = lora.targets(model, target)
    assert {name.split(".")[0] for name in names} == parts and {name.split(".")[-1] for name in names} == leaves
    if target == "layers.1":
        assert len(names) == 7
    before = list(model.state_dict())
    lora.inject(model, target, lora.LoraConfig(4), 1)
    after = list(model.state_dict())
    assert [name for name in after if "lora_" not in name] == before  # every weight under its own name
    assert len(after) == len(before) + 2 * len(names) and lora.adapted(model).keys() == names.keys()


def test_a_seed_decides_and_zeros_change_nothing(tiny_llava):
    models = [load(tiny_llava).model for _ in range(3)]
    expected = our_logits(models[0], [1, 5, 9])
    for model, seed in zip(models, (1, 1, 2)):
        torch.rand(seed)  # whatever was drawn before
        lora.inject(model, "language_model", lora.LoraConfig(4), seed)
        assert torch.equal(our_logits(model, [1, 5, 9]), expected)
    one, same, other = (next(iter(lora.adapted(model).values())).lora_A for model in models)
    assert torch.equal(one, same) and not torch.equal(one, other)
    bound = 32**-0.5  # Kaiming's uniform with a = sqrt 5, of 32 inputs
    assert one.abs().max() <= bound and one.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)


# ----------------------------------------------------------------------------------------------------------- training


def adapter_folder(folder, tensors, r, alpha, **config):
    """An adapter as PEFT writes it. tensors: {name behind base_model.model.: tensor}"""
    folder.mkdir(exist_ok=True)
    save_file({f"base_model.model.{name}": t.contiguous() for name, t in tensors.items()},
              folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": r, "lora_alpha": alpha} | config))
    return folder


def test_the_originals_curve(gold, tmp_path):
    """Loss, gradient norm and final weights of LLaVA's own LoRA run, from the matrices that it drew."""
    recorded = json.loads((gold / "train" / "lora_mha_lr1e-3.json").read_text())
    tensors = load_file(gold / "train" / "lora_mha_lr1e-3.safetensors")
    start, final = ({name.removeprefix(f"{when}.base_model.model.").replace(".default", ""): tensor
                     for name, tensor in tensors.items() if name.startswith(f"{when}.base_model.model.")}
                    for when in ("start", "final"))
    adapter_folder(tmp_path / "start", start, 8, 16)
    argv = [word.replace("@GOLD@/gold", str(gold)) for word in recorded["argv"]]
    assert train.main([*argv, *words(output_dir=tmp_path / "out", lora_weight_path=tmp_path / "start",
                                     log_samples=True)]) == 0
    rows = rows_of(tmp_path / "out")
    assert [row["ids"] for row in rows] == [step["ids"] for step in recorded["steps"]]
    for key in "loss", "grad_norm":
        assert [row[key] for row in rows] == pytest.approx([step[key] for step in recorded["steps"]], rel=1e-5), key
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    names = {name: f"base_model.model.{name.replace('model.', 'model.language_model.', 1)}" for name in final}
    lora_names = [name for name in final if "lora_" in name]
    assert len(lora_names) == len(found) == 42
    for name in lora_names:
        assert (found[names[name]] - final[name]).abs().max() < 1e-5, name
    beside = load_file(tmp_path / "out" / "non_lora_trainables.safetensors")
    for theirs, ours in (("0", "linear_1"), ("2", "linear_2")):
        for leaf in "weight", "bias":
            moved = beside[f"model.multi_modal_projector.{ours}.{leaf}"] - final[f"model.mm_projector.{theirs}.{leaf}"]
            assert moved.abs().max() < 1e-5


@pytest.fixture(scope="module")
def flags(tiny_llama, tiny_clip, tmp_path_factory):
    """Six steps of a LoRA with dropout on a language model, with a tower and a new projector."""
    scenes = draw(tmp_path_factory.mktemp("scenes"), captions=8)
    return dict(model_name_or_path=tiny_llama("gqa"), vision_tower=tiny_clip, mm_projector_type="mlp2x_gelu",
                image_folder=scenes, data_path=scenes / "talks.json", version="v1", per_device_train_batch_size=2,
                learning_rate=1e-2, max_steps=6, model_max_length=128, lora_enable=True, lora_r=4, lora_alpha=8,
                lora_dropout=0.2, save_strategy="no", log_samples=True)


@pytest.fixture(scope="module")
def straight(flags, tmp_path_factory):
    """The folder of that run, undisturbed."""
    out = tmp_path_factory.mktemp("straight")
    run_train(out, **flags, mm_projector_lr=1e-3)
    return out


def curve(rows):
    return [(row["loss"], row["grad_norm"]) for row in rows]


def same(one, two):
    """The same tensors to the last bit in two folders' adapters."""
    for file in "adapter_model.safetensors", "non_lora_trainables.safetensors":
        a, b = load_file(one / file), load_file(two / file)
        if a.keys() != b.keys() or not all(torch.equal(a[name], b[name]) for name in a):
            return False
    return True


def test_runs_repeat_and_learn(flags, straight, tmp_path, capsys):
    again = run_train(tmp_path / "again", **flags, mm_projector_lr=1e-3)
    said = capsys.readouterr().out
    assert curve(again) == curve(rows_of(straight)) and same(straight, tmp_path / "again")
    assert "LoRA of rank 4 on 21 matrices" in said and "frozen" in said and "at learning rate 0.001" in said
    numbers = sum(t.numel() for t in load_file(straight / "adapter_model.safetensors").values())
    assert f"{numbers:,d} at learning rate 0.01" in said
    other = run_train(tmp_path / "other", **flags | {"seed": 7}, mm_projector_lr=1e-3)
    assert curve(other) != curve(again) and again[-1]["loss"] < again[0]["loss"]


def test_a_killed_run_goes_on_to_the_last_bit(flags, straight, tmp_path, monkeypatch):
    report = train.Loop.report

    def and_stop(loop, row):
        report(loop, row)
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    flags = flags | {"save_strategy": "steps", "mm_projector_lr": 1e-3}
    with monkeypatch.context() as patch:
        patch.setattr(train.Loop, "report", and_stop)
        assert train.main(words(use_cpu=True, output_dir=tmp_path, **flags)) == 130
    run_train(tmp_path, **flags)
    assert curve(rows_of(tmp_path)) == curve(rows_of(straight)) and same(tmp_path, straight)
    held = training.checkpoint.Reader(tmp_path / "checkpoint-3").read_metadata().state_dict_metadata
    assert len(held) == 4 * (42 + 4) and all("lora_" in name or "mm_projector" in name for name in held)


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"bf16": True}, {"lora_shard_base": True}],
                         ids=str)
def test_the_same_run_another_way(flags, straight, tmp_path, monkeypatch, options):
    loops, save_model = [], train.Loop.save
    monkeypatch.setattr(train.Loop, "save", lambda loop: (loops.append(loop), save_model(loop)))
    rows = run_train(tmp_path, **flags, **options, mm_projector_lr=1e-3)
    weight = loops[0].model.language_model.model.layers[0].mlp.up_proj.weight
    assert hasattr(weight, "full_tensor") == ("lora_shard_base" in options) and not weight.requires_grad
    assert weight.dtype == (torch.bfloat16 if "bf16" in options else torch.float32)
    near = dict(rel=0.05, abs=0.05) if "bf16" in options else dict(rel=1e-5)
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in rows_of(straight)], **near)


def test_two_ranks_do_what_one_does(flags, tmp_path):
    """With the frozen base whole on both, and with its layers divided; the same adapter is written, too."""
    flags = flags | {"lora_dropout": 0.0, "max_steps": 2, "data_path": flags["image_folder"] / "captions.json"}
    two = {shard: subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py",
         *words(use_cpu=True, output_dir=tmp_path / str(shard), lora_shard_base=shard, **flags)],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for shard in (False, True)}
    one = run_train(tmp_path / "one", **flags, gradient_accumulation_steps=2)
    for shard, process in two.items():
        assert process.wait(200) == 0, process.stderr.read()
        rows = rows_of(tmp_path / str(shard))
        for key in "loss", "grad_norm":
            assert [row[key] for row in rows] == pytest.approx([row[key] for row in one], rel=1e-5)
        found, wanted = (load_file(tmp_path / out / "adapter_model.safetensors") for out in (str(shard), "one"))
        assert found.keys() == wanted.keys() and all((found[name] - wanted[name]).abs().max() < 1e-5 for name in found)


def test_going_on_from_an_adapter(flags, straight, tmp_path):
    """Step 0's loss is what the adapter had reached; rank and alpha come from its folder."""
    start = {name: value for name, value in flags.items() if name not in ("lora_r", "lora_alpha", "mm_projector_type")}
    rows = run_train(tmp_path, **start | {"lora_dropout": 0.0, "max_steps": 1, "lora_weight_path": straight})
    assert rows[0]["loss"] < rows_of(straight)[0]["loss"] - 1
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)


@pytest.mark.parametrize("sizes, count", [((32000, 4096, 11008, 32, 32), 319_815_680),
                                          ((32000, 5120, 13824, 40, 40), 500_695_040)], ids=["7B", "13B"])
def test_rank_128_has_as_many_numbers_as_the_originals(sizes, count):
    with torch.device("meta"), Blank():
        model = Llava(LlavaConfig(LlamaConfig(*sizes)))
    assert sum(lora.LoraConfig(128).r * (m.in_features + m.out_features)
               for m in lora.targets(model, "language_model").values()) == count


def test_the_plan_divides_the_base(flags, tmp_path, capsys):
    def planned(**options):
        train.main(words(plan=True, gpus="8x80GB", bf16=True, **flags, **options))
        lines = [line for line in capsys.readouterr().out.splitlines() if "language_model, frozen" in line]
        return lines[0]

    flags = {name: flags[name] for name in ("model_name_or_path", "vision_tower", "mm_projector_type", "lora_enable")}
    flags["model_name_or_path"] = "lmsys/vicuna-7b-v1.5"
    whole, layers = 13.48, 12.95  # GB of Vicuna 7B in bfloat16, and of its layers
    assert float(planned().split()[-1]) == pytest.approx(whole, abs=0.02)
    assert float(planned(lora_shard_base=True).split()[-1]) == pytest.approx(whole - layers * 7 / 8, abs=0.02)


@pytest.mark.parametrize("options, trained", [
    ({"lora_target": "q_proj,mm_projector"}, {"q_proj.lora_A", "q_proj.lora_B", "0.lora_A", "0.lora_B", "2.lora_A",
                                              "2.lora_B"}),
    ({"lora_target": "vision_tower.fc1", "freeze_mm_mlp_adapter": True}, {"fc1.lora_A", "fc1.lora_B"}),
    ({"lora_target": "vision_tower.fc1", "lora_bias": "lora_only", "freeze_mm_mlp_adapter": True},
     {"fc1.lora_A", "fc1.lora_B", "fc1.bias"}),
    ({"lora_target": "vision_tower.fc1", "lora_bias": "all", "freeze_mm_mlp_adapter": True},
     {"fc1.lora_A", "fc1.lora_B", "fc1.bias", "fc2.bias", "q_proj.bias", "k_proj.bias", "v_proj.bias", "out_proj.bias",
      "layer_norm1.bias", "layer_norm2.bias", "pre_layrnorm.bias"}),
    ({"lora_target": "layers.0.mlp", "unfreeze_mm_vision_tower": True, "mm_projector_type": "linear"}, None)],
    ids=lambda value: " ".join(sorted(value or [])))
def test_whatever_trains_comes_back(flags, tmp_path, monkeypatch, options, trained):
    """The folder alone, on the bare language model that it names, is the model as it was trained."""
    loops, save_model = [], train.Loop.save
    monkeypatch.setattr(train.Loop, "save", lambda loop: (loops.append(loop), save_model(loop)))
    run_train(tmp_path, **flags | {"max_steps": 2} | options)
    if trained:
        assert {".".join(name.split(".")[-2:]) for name in loops[0].trained} == trained
    again = dict(load(tmp_path).model.named_parameters())
    for name, p in loops[0].model.named_parameters():
        assert torch.equal(p.full_tensor() if hasattr(p, "full_tensor") else p, again.pop(name)), name
    assert not again


# -------------------------------------------------------------------------------------------------------- adapter files


@pytest.fixture(scope="module")
def worn(tiny_llava, tmp_path_factory):
    """-> (folder, model): an adapter as `weights.save` writes it, with every number random, and the model it is of."""
    loaded = load(tiny_llava)
    loaded.lora = lora.LoraConfig(4, 8, 0.1)
    lora.inject(loaded.model, "language_model", loaded.lora, 0)
    loaded.model.requires_grad_(False).mm_projector.requires_grad_(True)
    for p in lora.trained(loaded.model, "none"):
        p.requires_grad_(True)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in loaded.model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape))
    folder = tmp_path_factory.mktemp("adapter") / "circles"
    save(loaded, folder)
    return folder, loaded.model


def test_the_folder_describes_itself(worn, tiny_llava):
    files = {file.name for file in worn[0].iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.json",
                     "non_lora_trainables.safetensors", "tokenizer_config.json"}
    config, peft = (json.loads((worn[0] / name).read_text()) for name in ("config.json", "adapter_config.json"))
    assert config["conv_mode"] == "v1" and len(config["base_fingerprint"]) == 16
    assert peft["base_model_name_or_path"] == str(tiny_llava) and (peft["r"], peft["lora_alpha"]) == (4, 8)
    assert type(peft["lora_alpha"]) is int and peft["bias"] == "none" and "modules_to_save" not in peft  # vLLM's terms
    named = set(load_file(worn[0] / "adapter_model.safetensors"))
    assert named == {f"base_model.model.model.language_model.layers.{i}.{part}.lora_{x}.weight" for i in range(3)
                     for x in "AB" for part in [f"self_attn.{x}_proj" for x in "qkvo"]
                     + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", ["language_model", "layers.1", "language_model,vision_tower.q_proj"])
def test_peft_puts_it_on_transformers_model(worn, tiny_llava, tmp_path, target):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    folder, model = worn
    if target != "language_model":
        loaded = load(tiny_llava)
        loaded.lora, model, folder = lora.LoraConfig(4, 8, use_rslora=True), loaded.model, tmp_path / "other"
        lora.inject(model, target, loaded.lora, 0)
        model.requires_grad_(False)
        for p in lora.trained(model, "none"):
            p.requires_grad_(True).data.normal_(std=0.1)
        save(loaded, folder)
    base = transformers.LlavaForConditionalGeneration.from_pretrained(tiny_llava, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    assert sum("lora_A" in name for name, _ in theirs.named_parameters()) == len(lora.adapted(model))  # and no others
    if (folder / "non_lora_trainables.safetensors").exists():
        rest = load_file(folder / "non_lora_trainables.safetensors")
        assert not base.load_state_dict(rest, strict=False).unexpected_keys
    with torch.no_grad():
        expected = theirs(torch.tensor([WITH_PICTURE]), pixel_values=picture()).logits[0]
    assert close(our_logits(model, WITH_PICTURE, picture()), expected)
    assert close(our_logits(load(tiny_llava, adapter=folder).model, WITH_PICTURE, picture()), expected)
    assert close(our_logits(load(folder).model, WITH_PICTURE, picture()), expected)  # its base is the one it names


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("prefix", ["base_model.model.model.mm_projector.", "model.model.mm_projector.",
                                    "model.mm_projector."])
def test_the_originals_folders_are_worn(tiny_llama, tiny_clip, tmp_path, prefix, binary):
    """PEFT's adapter of a plain LLaMA, with non_lora_trainables.bin and LLaVA's config.json; base by --model_base."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    folder = tmp_path / "llava-lora"
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama("gqa"), dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(base, config)
    theirs.save_pretrained(folder)
    if binary:
        torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()
    projector = nn.Linear(24, 32)
    torch.save({prefix + name: p.detach() for name, p in projector.named_parameters()},
               folder / "non_lora_trainables.bin")
    values = json.loads((tiny_llama("gqa") / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {
        "model_type": "llava_llama", "mm_vision_tower": str(tiny_clip), "mm_hidden_size": 24,
        "mm_projector_type": "linear", "image_aspect_ratio": "pad"}))
    loaded = load(folder, model_base=tiny_llama("gqa"))
    with torch.no_grad():
        assert close(our_logits(loaded.model, TEXT), theirs(torch.tensor([TEXT])).logits[0])
    assert torch.equal(loaded.model.mm_projector.weight, projector.weight)
    assert (loaded.config.image_aspect_ratio, loaded.conv_mode) == ("pad", "v1")


def test_another_base_is_refused_and_force_overrides(worn, tiny_llava, tmp_path, capsys):
    other = shutil.copytree(tiny_llava, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    save_file(tensors | {name: -tensors[name]}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"was trained on {tiny_llava}, and {other} has other weights.*--force"):
        load(other, adapter=worn[0])
    load(other, adapter=worn[0], force=True)
    assert "WARNING: " in capsys.readouterr().err
    with pytest.raises(ValueError, match="has other weights"):
        load(worn[0], model_base=other)


def test_a_fingerprint_knows_no_layout_and_no_dtype(tiny_llava, tmp_path):
    convert(tiny_llava, tmp_path / "original", "llava")
    loaded = load(tiny_llava)
    save(loaded, tmp_path / "half", dtype=torch.bfloat16)
    prints = {load(folder).fingerprint() for folder in (tiny_llava, tmp_path / "original", tmp_path / "half")}
    assert len(prints) == 1


def test_new_words_come_with_the_adapter(tiny_llama, tiny_clip, tmp_path):
    loaded = load(tiny_llama("gqa"), vision_tower=tiny_clip, mm_projector_type="linear", projector_seed=0,
                  mm_use_im_start_end=True)
    words = loaded.model.language_model.model.embed_tokens.weight
    words.data[-2:] += 1  # as stage 1 may have taught them
    loaded.lora = lora.LoraConfig(4)
    lora.inject(loaded.model.requires_grad_(False), "language_model", loaded.lora, 0)
    save(loaded, tmp_path / "adapter")
    again = load(tmp_path / "adapter")
    assert torch.equal(again.model.language_model.model.embed_tokens.weight, words) and len(words) == 402
    assert torch.equal(our_logits(again.model, [1, 400, 401, 7]), our_logits(loaded.model, [1, 400, 401, 7]))


def edited(folder, file, **changes):
    """Change keys of a JSON file; None: without the key."""
    values = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target, bias", [(["q_proj", "v_proj"], "none"), ("all-linear", "none"), (["q_proj"], "all"),
                                          (["q_proj", "fc1"], "lora_only")], ids=str)
def test_ordinary_adapters_of_peft_are_worn(tiny_llava, tmp_path, target, bias, capsys):
    """They adapt the tower's layers behind the selected one, too, which are counted and left out."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.LlavaForConditionalGeneration.from_pretrained(tiny_llava, dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=target, init_lora_weights=False, bias=bias)
    theirs = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.add_(0.1 * p.requires_grad * name.endswith("bias"))
    theirs.save_pretrained(tmp_path)
    loaded = load(tiny_llava, adapter=tmp_path)
    said = capsys.readouterr().err
    assert "not needed and left out: the adapter of tower layers behind the selected one" in said
    assert "has no config.json of ours, which would tell" in said
    with torch.no_grad():
        expected = theirs(torch.tensor([WITH_PICTURE]), pixel_values=picture()).logits[0]
    assert close(our_logits(loaded.model, WITH_PICTURE, picture()), expected)


UNSUPPORTED = {"lm_head": {"target_modules": ["lm_head"]}, "embed_tokens": {"target_modules": ["embed_tokens"]},
               "biases of its own": {"lora_bias": True}, "new rows": {"trainable_token_indices": [3, 5]}}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", UNSUPPORTED)
def test_adapters_of_other_kinds_are_one_sentence(tiny_llama, tmp_path, what):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama("gqa"), dtype=torch.float32)
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"]} | UNSUPPORTED[what])
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}/adapter_.* not supported; plain LoRA") as error:
        load(tiny_llama("gqa"), adapter=tmp_path)
    assert "\n" not in str(error.value)


BROKEN = {  # file -> what is changed in it (None: the file is gone), and words of the sentence
    "no adapter": ("adapter_model.safetensors", None, "adapter_config.json and no adapter_model.safetensors or"),
    "no config": ("adapter_config.json", None, "circles holds an adapter, and adapter_config.json is missing"),
    "no projector": ("non_lora_trainables.safetensors", None, "with 4 tensors trained beside .* and has 0; copy"),
    "fewer matrices": ("adapter_config.json", {"target_modules": ["q_proj", "layers.7.mlp.up_proj"]},
                       "adapter_config.json names layers.7.mlp.up_proj, the weights do not; copy"),
    "alpha in words": ("adapter_config.json", {"lora_alpha": "x"}, "adapter_config.json: --lora_alpha x: expected"),
    "alpha of nothing": ("adapter_config.json", {"lora_alpha": 0}, "adapter_config.json: --lora_alpha 0: expected"),
    "a rank in words": ("adapter_config.json", {"r": "8"}, "adapter_config.json: --lora_r 8: expected a rank"),
    "a base that is a number": ("adapter_config.json", {"base_model_name_or_path": 5}, "_path 5 is no name of a model"),
    "no rank": ("adapter_config.json", {"r": None}, "expected r and lora_alpha"),
    "another rank": ("adapter_config.json", {"r": 8}, r"lora_A and lora_B of \(4, .*rank 8 on this model"),
    "DoRA": ("adapter_config.json", {"use_dora": True}, "use_dora True is not supported"),
    "no base": ("adapter_config.json", {"base_model_name_or_path": None}, "names no base; name it with --model_base"),
    "a base that is gone": ("adapter_config.json", {"base_model_name_or_path": "./gone"}, "gone"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_folder_is_one_sentence(worn, tmp_path, what):
    file, change, words = BROKEN[what]
    folder = shutil.copytree(worn[0], tmp_path / "circles")
    if change is None:
        (folder / file).unlink()
    else:
        values = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=words) as error:
        load(folder)
    assert "\n" not in str(error.value)


WRONG = {
    "a target that names nothing": ({"lora_target": "qproj"}, "--lora_target 'qproj' names nothing"),
    "lm_head": ({"lora_target": "lm_head"}, "names nothing that can be adapted"),
    "dropout": ({"lora_dropout": 1.0}, "--lora_dropout 1.0: expected a chance from 0 on and below 1"),
    "negative dropout": ({"lora_dropout": -0.1}, "--lora_dropout is -0.1"),
    "rank": ({"lora_r": 0}, "--lora_r 0: expected a rank"),
    "alpha": ({"lora_alpha": 0}, "--lora_alpha 0.*: expected a number above 0"),
    "no target": ({"lora_target": " ,"}, "--lora_target ' ?,' is empty; name what to adapt"),
    "a rank that does not match": ({"lora_weight_path": "ADAPTER", "lora_r": 8}, "--lora_r 8 does not match .* has 4"),
    "an alpha that does not match": ({"lora_weight_path": "ADAPTER", "lora_r": None, "lora_alpha": 0},
                                     "--lora_alpha 0 does not match .* has 8"),
    "targets of its own": ({"lora_weight_path": "ADAPTER", "lora_target": "q_proj"}, "and without --lora_target"),
    "an adapter as the model": ({"model_name_or_path": "ADAPTER", "vision_tower": None}, "give its base there"),
    "LoRA in stage 1": ({"tune_mm_mlp_adapter": True}, "contradict each other"),
    "an adapter without LoRA": ({"lora_enable": False, "lora_weight_path": "ADAPTER"}, "goes with --lora_enable True"),
    "an adapter of another base": ({"lora_weight_path": "ADAPTER"}, "has other weights"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_run_is_one_sentence(worn, flags, tmp_path, what):
    changes, sentence = WRONG[what]
    changes = {name: worn[0] if value == "ADAPTER" else value for name, value in changes.items()}
    values = {name: value for name, value in (flags | changes).items() if value is not None}
    with pytest.raises(ValueError, match=sentence) as error:
        train.main(words(use_cpu=True, output_dir=tmp_path, **values))
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------- worn, and switched


def another(worn, folder):
    """The same adapter with other numbers, and another template."""
    shutil.copytree(worn[0], folder)
    for file in "adapter_model.safetensors", "non_lora_trainables.safetensors":
        save_file({name: -t for name, t in load_file(folder / file).items()}, folder / file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"conv_mode": "llava_v0"}))
    return folder


def test_a_chat_switches_adapters(worn, tiny_llava, tmp_path, monkeypatch, capsys):
    squares = another(worn, tmp_path / "squares")
    said = iter(["how many ?", "/adapter squares", "how many ?", "/adapter", "/adapter circles", "how many ?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    model = ["--model_name_or_path", str(tiny_llava), "--max_new_tokens", "8"]
    assert sample.main([*model, "--adapter", f"{worn[0]},{squares}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    answers = [line for line in lines[1:] if not line.startswith("[")]
    assert f"[{squares} answers from here on]" in lines
    assert any(line.startswith("[/adapter and one of") for line in lines)
    assert answers[0] == answers[2] != answers[1]
    alone = []
    for folder in worn[0], squares:
        assert sample.main([*model, "--adapter", str(folder), "--prompt", "how many ?"]) == 0
        alone.append(capsys.readouterr().out.strip())
    assert [answer.strip() for answer in answers[:2]] == alone


def test_adapters_that_do_not_train_the_same_parts_do_not_switch(worn, tiny_llava, tmp_path):
    folder = shutil.copytree(worn[0], tmp_path / "bare")
    (folder / "non_lora_trainables.safetensors").unlink()
    edited(folder, "config.json", trained_beside=None)
    with pytest.raises(ValueError, match=r"bare does not train the .* before it: mm_projector \(4 tensors\); start"):
        sample.main(["--model_name_or_path", str(tiny_llava), "--adapter", f"{folder},{worn[0]}", "--prompt", "a ?"])


# --------------------------------------------------------------------------------------------------------------- merged


@pytest.mark.parametrize("words", [",a", "a,,b", "a,"])
def test_a_comma_without_a_folder(words, tiny_llava):
    with pytest.raises(ValueError, match="--adapter '.*': beside a comma a folder is missing"):
        sample.main(["--model_name_or_path", str(tiny_llava), "--adapter", words, "--prompt", "a ?"])


def test_a_chat_with_one_adapter_asks_no_model_to_switch(worn, tiny_llava, monkeypatch, capsys):
    said = iter(["/adapter squares", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    assert sample.main(["--model_name_or_path", str(tiny_llava), "--adapter", str(worn[0])]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "[/adapter switches between the folders of --adapter A,B,…; here there are no two]"]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_merged_is_unmerged(worn, tiny_llava, tmp_path, dtype, capsys):
    merge(worn[0], tmp_path / "whole", tiny_llava, dtype=dtype)
    said = capsys.readouterr().err
    found = our_logits(load(tmp_path / "whole", dtype="float32").model, WITH_PICTURE, picture())
    expected = our_logits(worn[1], WITH_PICTURE, picture())
    assert "logits differ by" in said and "at 0 of 36 places" in said or dtype
    if dtype:
        assert "rounding to torch.bfloat16 takes 0." in said and "--dtype float32 keeps it all" in said
        assert (found - expected).abs().max() < 0.1 * expected.std()
    else:
        assert close(found, expected) and "keeps it all" not in said


@pytest.mark.parametrize("out", ["adapter", "base"])
def test_merging_spares_what_it_reads(worn, tiny_llava, tmp_path, out):
    places = {"adapter": shutil.copytree(worn[0], tmp_path / "adapter"), "base": shutil.copytree(
        tiny_llava, tmp_path / "base")}
    edited(places["adapter"], "adapter_config.json", base_model_name_or_path=str(places["base"]))
    before = {file.name: file.read_bytes() for file in places[out].iterdir()}
    with pytest.raises(ValueError, match="is the adapter or its base, which merging reads; name another"):
        merge(places["adapter"], tmp_path / "base" / ".." / out, overwrite=True)
    assert {file.name: file.read_bytes() for file in places[out].iterdir()} == before


def test_a_merge_is_compared_in_its_own_precision_and_warns_of_losses(worn, tiny_llava, tmp_path, capsys):
    save(load(tiny_llava), tmp_path / "half", dtype=torch.float16)
    with pytest.raises(ValueError, match="has other weights, or the same rounded to float16"):
        load(tmp_path / "half", adapter=worn[0])
    merge(worn[0], tmp_path / "whole", tmp_path / "half", dtype="float32", force=True)
    said = capsys.readouterr().err
    assert float(said.partition("logits differ by ")[2].split()[0]) < 1e-4 and "WARNING: rounding" not in said
    small = shutil.copytree(worn[0], tmp_path / "small")
    tensors = load_file(small / "adapter_model.safetensors")
    save_file({name: t * 1e-2 for name, t in tensors.items()}, small / "adapter_model.safetensors")
    merge(small, tmp_path / "rounded", tiny_llava, dtype="bfloat16")
    assert "WARNING: rounding to torch.bfloat16 takes" in capsys.readouterr().err


def test_merging_stops_at_another_model(worn, tiny_llava, tmp_path, monkeypatch):
    whole = kernels.lora.merge
    monkeypatch.setattr(kernels.lora, "merge", lambda weight, *rest: whole(-weight, *rest))
    with pytest.raises(ValueError, match="would be another model"):
        merge(worn[0], tmp_path / "whole", tiny_llava)
    assert not (tmp_path / "whole").exists()


@pytest.fixture(scope="module")
def of_nf4(flags, tmp_path_factory):
    """An adapter that was trained on a base in 4 bits."""
    out = tmp_path_factory.mktemp("qlora")
    run_train(out, **flags | {"max_steps": 3}, bits=4)
    return out


def test_merging_into_what_was_quantised_asks_into_which(of_nf4, flags, tmp_path, capsys):
    base = flags["model_name_or_path"]
    assert json.loads((of_nf4 / "config.json").read_text())["base_quantisation"] == {
        "bits": 4, "quant_type": "nf4", "double_quant": True}
    with pytest.raises(ValueError, match="was trained on a base that was quantised; say .*dequantised .*original "):
        merge(of_nf4, tmp_path / "no", base)
    for onto in "original", "dequantised":
        merge(of_nf4, tmp_path / onto, base, onto)
    assert capsys.readouterr().err.count("logits differ by") == 2
    found = {onto: load(tmp_path / onto).model for onto in ("original", "dequantised")}
    seen = load(base, adapter=of_nf4, bits=4).model
    assert close(our_logits(found["dequantised"], TEXT), our_logits(seen, TEXT))
    assert close(our_logits(found["original"], TEXT), our_logits(load(of_nf4).model, TEXT))
    assert not close(our_logits(found["original"], TEXT), our_logits(seen, TEXT))


def test_merging_into_a_folder_of_codes(of_nf4, flags, tmp_path):
    """There are no weights before that to merge into; and it is another base than the one that has them."""
    save(load(flags["model_name_or_path"], bits=4), tmp_path / "codes")
    for onto in None, "original":
        with pytest.raises(ValueError, match="say what to merge into: --onto dequantised is what it saw$"):
            merge(of_nf4, tmp_path / "no", tmp_path / "codes", onto, force=True)
    merge(of_nf4, tmp_path / "whole", tmp_path / "codes", "dequantised", force=True)
    seen = load(flags["model_name_or_path"], adapter=of_nf4, bits=4).model
    assert close(our_logits(load(tmp_path / "whole").model, TEXT), our_logits(seen, TEXT))


def test_the_command_line_merges(worn, tiny_llava, tmp_path):
    done = subprocess.run([sys.executable, "weights.py", "merge", worn[0], tmp_path / "whole", "--base", tiny_llava],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "merged and unmerged logits differ by" in done.stderr, done.stderr
