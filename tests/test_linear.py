"""kernels/linear.py: packed matrices compute what they computed before, and come back as they were; int4's numbers."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import lora
import quant
import sample
from data import Batch
from kernels import linear, nf4
from model import Cache, LlamaConfig, Llava, LlavaConfig
from weights import load, save

KINDS = [kind for kind in linear.PRODUCTS if kind in linear._available()]
ROOT = Path(__file__).resolve().parents[1]
ROUNDING = 2**-7  # of the largest score, after some layers in bfloat16

pytestmark = pytest.mark.skipif(not KINDS, reason="this torch, or this processor, has no packed products")


def small(kind="bf16", tied=False, dtype=torch.bfloat16, **changes):
    """A random text model, its matrices in codes where kind says so."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied} | changes
    model = Llava(LlavaConfig(LlamaConfig(**sizes))).to(dtype)
    how = quant.Quantisation({"bf16": 16, "int8": 8, "int4": 4}[kind], "int4")
    for name, module in list(model.named_modules()):
        if how.wants(name, module):
            model.set_submodule(name, how.linear(module.weight.detach(), dtype))
    return model


@torch.no_grad()
def scores(model, lengths=(5, 40, 200), steps=2):
    """Of three prompts, and of some tokens behind each, (rows, V): few rows and many go through the products."""
    cache, found = Cache(model.config.text, torch.bfloat16, "cpu"), []
    stretches = [cache.open(length + steps) for length in lengths]
    counts, past = list(lengths), [0] * len(lengths)
    for step in range(1 + steps):
        ids = torch.cat([torch.arange(n) * 7 % 250 + step for n in counts])
        places = torch.cat([torch.arange(n) + begin for n, begin in zip(counts, past)])
        bounds = torch.tensor([0, *counts]).cumsum(0)
        batch = Batch(ids, None, places, bounds, torch.empty(0), [])
        found.append(model.last_logits(batch, cache, stretches))
        past, counts = [n + begin for n, begin in zip(counts, past)], [1] * len(counts)
    return torch.cat(found)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_scores_are_the_same_and_all_comes_back(kind, tied):
    model = small(kind, tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learns = {name: p.requires_grad for name, p in model.named_parameters()}
    eager = scores(model)
    assert linear.pack(model) == 15 and linear.pack(model) == 0
    assert not any(type(module) in (torch.nn.Linear, quant.QuantisedLinear) for module in model.modules())
    packed = scores(model)
    if kind == "bf16":
        assert packed.equal(eager)
    else:
        assert 0 < (packed - eager).abs().max() < ROUNDING * eager.abs().max()
    linear.unpack(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(after[name].equal(before[name]) for name in before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == learns
    language = model.language_model
    assert (language.lm_head.weight is language.model.embed_tokens.weight) == tied
    assert scores(model).equal(eager)
    assert not any(name in vars(m) for m in model.modules() for name in (*m._parameters, *m._modules))


@pytest.mark.parametrize("rows", [1, 7, 33, 161])
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_that_of_the_decoded_matrices(kind, rows, monkeypatch):
    """Joined ones of different widths, on both sides of the number of rows from which they are decoded, in pieces; in
    float64."""
    monkeypatch.setattr(linear, "PIECE", 128 * 100)
    monkeypatch.setattr(linear, "BLOCKS", 3)
    layer = small(kind).language_model.model.layers[0].self_attn
    names, x = ("q_proj", "k_proj", "v_proj"), torch.randn(rows, 128).bfloat16()
    dense = [getattr(layer, name).weight.detach().double().clone() for name in names]
    linear.pack(layer)
    for y, weight in zip(linear.together(x, *(getattr(layer, name) for name in names)), dense, strict=True):
        expected = x.double() @ weight.t()
        assert y.shape == expected.shape and (y - expected).abs().max() <= 2**-7 * expected.abs().max()
    assert layer.k_proj(x).equal(linear.together(x, *(getattr(layer, name) for name in names))[1])


def test_what_does_not_suit_stays(monkeypatch):
    """Other dtypes, a bias, adapters, widths that the functions cannot take, and a torch without them."""
    assert linear.pack(small(dtype=torch.float32)) == 0
    model = small()
    attention = model.language_model.model.layers[0].self_attn
    attention.o_proj = torch.nn.Linear(128, 128, bias=True).bfloat16()
    lora.inject(model, "layers.1.self_attn.q_proj", lora.LoraConfig(4), 0)
    model.bfloat16()
    eager = scores(model)
    assert linear.pack(model) == 15 - 1 - 3  # o_proj; q_proj, and with it k_proj and v_proj
    assert isinstance(model.language_model.model.layers[1].self_attn.q_proj, lora.LoraLinear)
    assert type(attention.o_proj) is torch.nn.Linear and scores(model).equal(eager)
    for kind, width in (("int8", 120), ("int4", 96)):
        odd = small(kind, intermediate_size=width)
        assert linear.pack(odd) == 15 - 2 * 3 if kind in KINDS else 0
    monkeypatch.setattr(linear, "_available", set)
    assert linear.pack(small()) == linear.pack(small("int8")) == linear.pack(small("int4")) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux's /proc")
def test_memory_does_not_double():
    """In a process of its own, with models of 67 million numbers. Without returning what is free, 0.7 of one stayed."""
    code = f"""
import torch
from benches.loading import memory, reset_peak
from kernels import linear
from tests.test_linear import small
torch.set_num_threads(1)
for kind in {KINDS}:
    linear.pack(small(kind))  # loads the functions, which take some megabytes themselves
    model = small(kind, hidden_size=512, intermediate_size=2048, num_hidden_layers=16)
    size, before = sum(p.numel() * p.itemsize for p in model.parameters()), reset_peak()
    linear.pack(model)
    print((memory("VmRSS") - before) / size, (memory("VmHWM") - before) / size)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert not ended.returncode, ended.stderr
    for line in ended.stdout.splitlines():
        kept, most = map(float, line.split())
        assert kept < 0.25 and most < 0.75, ended.stdout


# ---------------------------------------------------------------------------------------------------------------- int4


def test_numbers_of_int4():
    """One block by hand: steps of 0.5 from -4 to 3.5, and what lies between them; then a block without any range."""
    weight = torch.cat([torch.arange(16) / 2 - 4, torch.tensor([0.2, -3.8]), torch.zeros(46), torch.full((64,), 0.75)])
    codes, scales = nf4.quantise_groups(weight)
    assert scales.tolist() == [[0.5, 0.0], [0.0, 0.75]]
    assert nf4.halves(codes)[:18].tolist() == [*range(16), 8, 0]
    expected = torch.cat([weight[:16], torch.tensor([0.0, -4.0]), weight[18:]])
    assert nf4.decode("int4", *nf4.encode(weight, "int4"), torch.empty(128)).equal(expected)


@pytest.mark.parametrize("shape", [(1, 1), (7, 45), (300, 576), (2051, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4_is_the_nearest_step_of_each_block(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = nf4.decode("int4", *nf4.encode(weight, "int4"), torch.empty(shape))
    blocks = F.pad((found - weight).view(-1), (0, -weight.numel() % 64)).view(-1, 64)
    ranges = F.pad(weight.float().view(-1), (0, -weight.numel() % 64)).view(-1, 64)
    step = (ranges.amax(1) - ranges.amin(1)) / 15
    assert (blocks.abs().amax(1) <= 0.53 * step).all()  # half a step, and the rounding of scale and zero
    module, x = quant.Quantisation(4, "int4").linear(weight, dtype), torch.randn(2, shape[1]).to(dtype)
    assert module(x).equal(F.linear(x, found.to(dtype)))


def test_int4_loads_answers_and_is_not_saved(tiny_llama, tmp_path):
    loaded = load(tiny_llama(), dtype="bfloat16", bits=4, quant_type="int4")
    assert ", 21 matrices in int4, 4.500 bits a weight" in quant.describe(loaded.model)
    assert sample.generate(loaded, [sample.Request([("human", "What color is it?")], max_new_tokens=3)])[0].token_ids
    with pytest.raises(ValueError, match="int4 is made while a model is loaded"):
        save(loaded, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------ sample.py


def test_sample_packs_unless_told_not_to(tiny_llama, capsys, monkeypatch):
    """And says the same thing."""
    packed, texts = [], []
    monkeypatch.setattr(linear, "pack", lambda model, pack=linear.pack: packed.append(pack(model)))
    for words in ([], ["--eager"], ["--dtype", "float32"]):
        sample.main(["--model_name_or_path", str(tiny_llama()), "--prompt", "What color is the circle?", "--json",
                     "--max_new_tokens", "8", "--dtype", "bfloat16", *words])
        texts.append(capsys.readouterr().out.split('"token_ids": ')[1].split("]")[0])
    assert packed == [22 if "bf16" in KINDS else 0, 0] and texts[0] == texts[1]
