"""training/work.py: the operations counted are those that PyTorch counts, and the rate in the log follows from them."""

import re
from types import SimpleNamespace

import pytest
import torch
from drawn import draw, run_train
from test_plan import GQA, MHA, batch_of, model_of
from torch.utils.flop_counter import FlopCounterMode

from training import work

PARTS = ("vision_tower",), ("mm_projector",), ("mm_projector", "language_model"), ("language_model.lm_head",), (
    "vision_tower", "mm_projector", "language_model")


def half(found, lengths):
    """The products of the masked half of attention, which are done all the same."""
    text = found.config.text
    wide = text.num_hidden_layers * text.num_attention_heads * text.head_dim
    return 2 * sum(n * n for n in lengths) * wide * found.passes["language_model"]


def counted(model, batch):
    """PyTorch's own count of a step."""
    with FlopCounterMode(display=False) as counter:
        model.loss(batch).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("text, lengths", [(MHA, (200, 200)), (GQA, (250,)), (GQA, (90, 90, 90))])
@pytest.mark.parametrize("trained", PARTS, ids="+".join)
def test_operations_are_counted(trained, text, lengths):
    model = model_of(text).bfloat16()  # in which a CPU computes attention by products, so that they are counted
    for part in trained:
        model.get_submodule(part).requires_grad_(True)
    batch, found = batch_of(lengths), work.Work(model)
    learned, square = 30 * len(lengths), half(found, lengths)
    assert found.of(batch, learned) + square == pytest.approx(counted(model, batch), rel=0.01)


@pytest.mark.parametrize("size", ["float32", "bfloat16"])
def test_the_count_is_of_the_right_size_for_a_realistic_shape(size):
    """Attention and all: within a few per cent where it is small beside the layers."""
    model = model_of(MHA).to(getattr(torch, size)).requires_grad_(True)
    batch = batch_of((110, 110, 110))
    assert work.Work(model).of(batch, 90) == pytest.approx(counted(model, batch), rel=0.05)


def test_lora_counts_its_own_matrices_and_spares_those_beneath():
    from lora import LoraConfig, inject
    model = model_of(MHA)
    frozen = work.Work(model)
    inject(model, "language_model,mm_projector", LoraConfig(r=8, lora_dropout=0.0), 0)
    model.bfloat16()
    batch, found = batch_of((200, 200)), work.Work(model)
    numbers = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name and ".layers." in name)
    row, before = (each.flop["language_model"] for each in (found, frozen))
    assert row == pytest.approx(2 * before + 6 * numbers, rel=0.04)  # nothing learns before the first matrix
    assert found.of(batch, 60) + half(found, (200, 200)) == pytest.approx(counted(model, batch), rel=0.02)


def test_features_that_are_stored_cost_no_look():
    model = model_of(MHA)
    model.mm_projector.requires_grad_(True)
    batch, found = batch_of((100,)), work.Work(model)
    pixels = found.of(batch, 30)
    batch.pixel_values = torch.zeros(1, 64, 96)
    tower = 65 * 2 * sum(p.numel() for p in model.vision_tower.parameters() if p.dim() > 1 and len(p) != 65)
    assert pixels - found.of(batch, 30) == pytest.approx(tower + 4 * 65**2 * 96 * found.depth, rel=0.01)


def test_the_published_7b_takes_what_others_have_computed():
    """LLaMA-7B, 600 tokens, forward: 7.77 TFLOP of products, 0.094 of attention; ViT-L/14-336: 366 GFLOP a picture."""
    from model import LlamaConfig, Llava, LlavaConfig
    from vision import ClipVisionConfig
    with torch.device("meta"):
        model = Llava(LlavaConfig(LlamaConfig(32000, 4096, 11008, 32, 32),
                                  ClipVisionConfig(1024, 4096, 24, 16, 3, 336, 14), "mlp2x_gelu")).requires_grad_(False)
    found, nothing = work.Work(model), torch.zeros(0, 3, 2, 2)
    text = SimpleNamespace(cu_seqlens=torch.tensor([0, 600]), pixel_values=nothing)
    assert found.of(text, 0) == pytest.approx(7.771e12 + 0.094e12, rel=1e-3)
    assert found.of(text, 600) - found.of(text, 0) == pytest.approx(0.157e12, rel=0.01)
    features = SimpleNamespace(cu_seqlens=torch.tensor([0, 600]), pixel_values=torch.zeros(1, 576, 1024))
    picture = SimpleNamespace(cu_seqlens=torch.tensor([0, 600]), pixel_values=torch.zeros(1, 3, 2, 2))
    assert found.of(features, 0) - found.of(text, 0) == pytest.approx(24.2e9, rel=0.01)
    assert found.of(picture, 0) - found.of(features, 0) == pytest.approx(366.0e9, rel=2e-3)
    model.mm_projector.requires_grad_(True)
    batch = SimpleNamespace(cu_seqlens=torch.tensor([0, 596]), pixel_values=torch.zeros(1, 3, 2, 2))
    assert work.Work(model).of(batch, 19) == pytest.approx(16.21e12, rel=0.01)  # per sample, all that a step needs


@pytest.mark.parametrize("name, dtype, tf32, expected", [
    ("NVIDIA H100 80GB HBM3", "bfloat16", False, 989), ("NVIDIA H100 PCIe", "bfloat16", False, 756),
    ("NVIDIA H200", "float32", True, 494), ("NVIDIA H200", "float32", False, 67), ("NVIDIA L4", "float16", False, 121),
    ("NVIDIA GH200 480GB", "float16", False, 989), ("NVIDIA A100-SXM4-80GB", "bfloat16", True, 312),
    ("NVIDIA A10G", "bfloat16", True, None), ("NVIDIA L40S", "bfloat16", True, 362),
    ("NVIDIA GeForce RTX 4090", "bfloat16", False, 165),
    ("NVIDIA GeForce RTX 3090 Ti", "bfloat16", False, None), ("Tesla V100-SXM2-16GB", "float16", False, 125),
    ("Tesla T4", "float16", False, 65), ("Quadro K600", "float32", False, None)])
def test_the_peak_of_a_gpu(name, dtype, tf32, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    best, line = work.peak(torch.device("cuda"), SimpleNamespace(dtype=dtype, tf32=tf32))
    assert best == expected and name in line and "\n" not in line


def test_the_peak_of_a_cpu_is_measured_without_touching_the_course_of_a_run():
    work.measure.cache_clear()
    before = torch.get_rng_state()
    best, line = work.peak(torch.device("cpu"), SimpleNamespace(dtype="float32", tf32=False))
    assert 1e-4 < best < 100 and "measured on 1 threads" in line and torch.equal(before, torch.get_rng_state())


def test_the_line_and_the_log_tell_the_rate(tiny_llama, tiny_clip, tmp_path, capsys):
    scenes = draw(tmp_path)
    rows = run_train(tmp_path / "out", model_name_or_path=tiny_llama("gqa"), vision_tower=tiny_clip, version="plain",
                     image_folder=scenes, data_path=scenes / "captions.json", per_device_train_batch_size=2,
                     max_steps=3, gradient_accumulation_steps=2, save_strategy="no")
    said = capsys.readouterr().out
    lines = re.findall(r"ms  ([\d.e-]+) TFLOP/s \((\d+)%\)", said)
    assert len(lines) == 3 and re.search(r"peak [\d.e-]+ TFLOP/s: float32 products, measured on", said)
    for row, (rate, _) in zip(rows, lines):
        assert float(rate) == pytest.approx(row["tflops"], rel=0.01)
        per_token = row["tflops"] * 1e12 * row["seconds"] / row["tokens"]
        assert 3e4 < per_token < 3e5  # about six operations for each of 0.03 M numbers
