"""Every layout of a public checkpoint, tiny and random, key by key as LLAVA.md 6 has it: transformers' logits."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from conftest import clip_config, llama_config, randomized
from drawn import draw, run_train
from safetensors.torch import load_file, save_file
from test_weights import IMAGE_ID, TEXT, WITH_PICTURE, close, edit_config, our_logits, picture, their_logits

from formats import layouts
from formats.checkpoint import open_checkpoint
from formats.files import list_names
from sample import generate
from weights import load, save, save_projector

transformers = pytest.importorskip("transformers")

START, END = "<im_start>", "<im_end>"


def projector_tensors(kind="mlp2x_gelu", width=24, hidden=32, seed=5):
    """{name inside the module: tensor}"""
    generator = torch.Generator().manual_seed(seed)
    names = {"linear": [""], "mlp2x_gelu": ["0.", "2."]}[kind]
    tensors = {}
    for name, size in zip(names, (width, hidden)):
        tensors[f"{name}weight"] = torch.randn(hidden, size, generator=generator) * size**-0.5
        tensors[f"{name}bias"] = torch.randn(hidden, generator=generator) * 0.1
    return tensors


def project(tensors, x):
    """What the original's projector computes."""
    linear = torch.nn.functional.linear
    if "weight" in tensors:
        return linear(x, tensors["weight"], tensors["bias"])
    x = linear(x, tensors["0.weight"], tensors["0.bias"])
    return linear(torch.nn.functional.gelu(x), tensors["2.weight"], tensors["2.bias"])


def oracle(llm, tower, projector, ids=WITH_PICTURE, pixels=None):
    """Logits (T, V) of LLaVA put together from transformers' own parts; IMAGE_ID marks the picture's places."""
    ids, pixels = torch.tensor(ids), picture() if pixels is None else pixels
    with torch.no_grad():
        llm = transformers.AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32).eval()
        tower = transformers.CLIPVisionModel.from_pretrained(tower).eval()
        states = tower(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
        embeddings = llm.get_input_embeddings()(ids.masked_fill(ids == IMAGE_ID, 0))
        embeddings[ids == IMAGE_ID] = project(projector, states)
        return llm(inputs_embeds=embeddings[None]).logits[0]


@pytest.fixture
def original(tiny_llama, tiny_clip, tmp_path):
    """original(…) -> a folder in the original's layout: tiny_llama("gqa"), the projector, the tower if it is inside."""
    def make(projector=None, tower_inside=False, binary=False, extra=(), llm=None, **config):
        llm, out = llm or tiny_llama("gqa"), tmp_path / "original"
        shutil.copytree(llm, out, ignore=shutil.ignore_patterns("*.safetensors"))
        tensors = load_file(llm / "model.safetensors") | dict(extra)
        projector = projector_tensors() if projector is None else projector
        tensors |= {f"model.mm_projector.{name}": tensor for name, tensor in projector.items()}
        if tower_inside:
            tensors |= {f"model.vision_tower.vision_tower.vision_model.{name}": tensor
                        for name, tensor in load_file(tiny_clip / "model.safetensors").items()}
        edit_config(out, **{"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "mm_hidden_size": 24,
                            "mm_projector_type": "mlp2x_gelu", "mm_vision_tower": str(tiny_clip),
                            "mm_use_im_patch_token": False, "mm_vision_select_layer": -2} | config)
        if binary:
            torch.save(tensors, out / "pytorch_model.bin")
        else:
            save_file(tensors, out / "model.safetensors")
        return out
    return make


# ------------------------------------------------------------------------------------------------------------- original


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("kind, config", [
    ("linear", {"mm_projector_type": None}),  # v1.0 and before: no such key
    ("linear", {"mm_projector_type": "linear", "model_type": "llama"}),  # older still
    ("mlp2x_gelu", {}),
    ("mlp2x_gelu", {"model_type": "llava_llama"})])
def test_original_without_the_tower(original, tiny_llama, tiny_clip, kind, config, binary):
    projector = projector_tensors(kind)
    folder = original(projector, binary=binary, **config)
    loaded = load(folder)
    assert close(our_logits(loaded.model, WITH_PICTURE, picture()), oracle(tiny_llama("gqa"), tiny_clip, projector))
    assert loaded.config.mm_projector_type == kind and open_checkpoint(folder).layout == "llava"


@pytest.mark.parametrize("config", [{}, {"unfreeze_mm_vision_tower": True}, {"mm_vision_tower": "someone/clip"},
                                    {"mm_vision_tower": None, "vision_tower": "someone/clip"}])
def test_original_with_the_tower_inside(original, tiny_llama, tiny_clip, config, capsys):
    loaded = load(original(tower_inside=True, **config, vision_config=clip_config().to_dict()))
    expected = oracle(tiny_llama("gqa"), tiny_clip, projector_tensors())
    assert close(our_logits(loaded.model, WITH_PICTURE, picture()), expected)
    assert ("its own copy of the tower is taken" in capsys.readouterr().err) == ("someone/clip" in config.values())


@pytest.mark.parametrize("here", [False, True])
def test_a_trained_tower_inside_a_config_that_only_names_one(original, tiny_llama, tmp_path, here):
    """LLaVA 1.6's folders: the tower's numbers follow from its shapes, or from the folder that the config names."""
    clip = randomized(transformers.CLIPVisionModel(clip_config(hidden_size=128, num_attention_heads=2)))
    clip.save_pretrained(tmp_path / "own")
    named = clip_config(hidden_size=128, num_attention_heads=2)
    randomized(transformers.CLIPVisionModel(named)).save_pretrained(tmp_path / "named")
    tower = {f"model.vision_tower.vision_tower.vision_model.{name}": tensor + 1
             for name, tensor in load_file(tmp_path / "own/model.safetensors").items()}
    save_file({name.split("vision_model.")[1]: t for name, t in tower.items()}, tmp_path / "own/model.safetensors",
              {"format": "pt"})
    folder = original(projector_tensors(width=128), extra=tower, mm_hidden_size=128, mm_vision_tower_lr=2e-6,
                      mm_vision_tower=str(tmp_path / "named") if here else "openai/clip-vit-large-patch14-336")
    expected = oracle(tiny_llama("gqa"), tmp_path / "own", projector_tensors(width=128))
    assert close(our_logits(load(folder).model, WITH_PICTURE, picture()), expected)


def test_original_for_mistral(original, tiny_clip, tiny_tokenizer, tmp_path):
    values = llama_config(num_key_value_heads=2).to_dict()
    config = transformers.MistralConfig(**values | {"model_type": "mistral", "sliding_window": None})
    randomized(transformers.MistralForCausalLM(config)).save_pretrained(tmp_path / "mistral")
    for file in tiny_tokenizer.iterdir():
        shutil.copy(file, tmp_path / "mistral")
    folder = original(llm=tmp_path / "mistral", model_type="llava_mistral", sliding_window=10**6)
    loaded = load(folder)
    expected = oracle(tmp_path / "mistral", tiny_clip, projector_tensors())
    assert close(our_logits(loaded.model, WITH_PICTURE, picture()), expected)
    assert loaded.config.text.model_type == "mistral" and loaded.conv_mode == "mistral_instruct"


def test_a_config_without_a_tower_means_llavas_first(original, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = original(projector_tensors("linear", 1024), mm_vision_tower=None, mm_hidden_size=1024,
                      mm_projector_type=None)
    with pytest.raises(ValueError, match="openai/clip-vit-large-patch14 is no folder here"):
        load(folder)
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="has a projector but names no vision tower; name one with --vision_tower"):
        load(original(mm_vision_tower=None))


def test_stale_ids_of_llava_0(original):
    loaded = load(original(bos_token_id=0, eos_token_id=1, pad_token_id=-1))
    assert (loaded.config.text.bos_token_id, loaded.config.text.eos_token_id) == (1, 2)


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_there_and_back_again(original, kind, tmp_path):
    """original -> (llava-hf ->) original: identical logits, and where llava-hf can say it, equal to transformers'."""
    first = load(original(projector_tensors(kind), tower_inside=True, mm_projector_type=kind))
    expected = our_logits(first.model, WITH_PICTURE, picture())
    save(first, tmp_path / "second")
    save(load(tmp_path / "second"), tmp_path / "third", layout="llava")
    for folder, layout in (("second", "llava-hf" if kind == "mlp2x_gelu" else "llava"), ("third", "llava")):
        assert open_checkpoint(tmp_path / folder).layout == layout
        assert torch.equal(our_logits(load(tmp_path / folder).model, WITH_PICTURE, picture()), expected)
    if kind == "mlp2x_gelu":
        assert close(their_logits(tmp_path / "second", WITH_PICTURE, picture())[:, :400], expected)


def test_there_and_back_from_llava_hf(tiny_llava, tmp_path):
    save(load(tiny_llava), tmp_path / "second", layout="llava")
    save(load(tmp_path / "second"), tmp_path / "third")
    expected = our_logits(load(tiny_llava).model, WITH_PICTURE, picture())
    assert torch.equal(our_logits(load(tmp_path / "third").model, WITH_PICTURE, picture()), expected)
    assert close(their_logits(tmp_path / "third", WITH_PICTURE, picture()), expected)


# ----------------------------------------------------------------------------------------------------------- vocabulary


def rows(count, seed=11):
    return {name: torch.randn(count, 32, generator=torch.Generator().manual_seed(seed + i))
            for i, name in enumerate(("model.embed_tokens.weight", "lm_head.weight"))}


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("patch, start_end, new", [
    (None, True, ["<im_patch>", START, END]), (True, False, ["<im_patch>"]), (False, True, [START, END])])
def test_added_tokens_are_in_the_vocabulary(original, tiny_llama, patch, start_end, new, listed):
    """Their rows are in the file; the tokenizer lists them (LLaVA 0.x and Lightning do), or the config's flags do."""
    before = load_file(tiny_llama("gqa") / "model.safetensors")
    extra = {name: torch.cat([before[name], more]) for name, more in rows(len(new)).items()}
    folder = original(extra=extra, vocab_size=400 + len(new), mm_use_im_patch_token=patch,
                      mm_use_im_start_end=start_end)
    if listed:
        (folder / "added_tokens.json").write_text(json.dumps({token: 400 + i for i, token in enumerate(new)}))
    loaded = load(folder)
    assert [loaded.tokenizer.token_to_id(token) for token in new] == list(range(400, 400 + len(new)))
    assert loaded.silent_ids == [] and loaded.config.mm_use_im_start_end == start_end
    assert our_logits(loaded.model, TEXT).shape[1] == 400 + len(new)


def test_an_old_config_without_the_patch_tokens_row_has_no_such_token(original):
    loaded = load(original(mm_use_im_patch_token=None))
    assert loaded.tokenizer.token_to_id("<im_patch>") is None and len(loaded.tokenizer) == 400


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_new_start_and_end_tokens_are_the_mean_and_said(tiny_llama, tiny_clip, tmp_path, kind, capsys):
    loaded = load(tiny_llama("gqa"), vision_tower=tiny_clip, projector_seed=0, mm_projector_type=kind,
                  mm_use_im_start_end=True)
    assert "<im_start>, <im_end> get the rows 400-401, the mean of the others" in capsys.readouterr().err
    before = load_file(tiny_llama("gqa") / "model.safetensors")
    for ours, theirs in ((loaded.model.language_model.model.embed_tokens, "model.embed_tokens.weight"),
                         (loaded.model.language_model.lm_head, "lm_head.weight")):
        assert torch.equal(ours.weight[:400], before[theirs])
        assert torch.allclose(ours.weight[400:], before[theirs].mean(0).expand(2, -1))
    assert loaded.config.text.vocab_size == 402 and loaded.tokenizer.encode(f"{START}a{END}")[-1] == 401
    save(loaded, tmp_path / "out")  # linear: the original's layout, mlp2x_gelu: llava-hf's, with <image> behind them
    again = load(tmp_path / "out")
    assert again.tokenizer.encode(f"{START}a{END}") == loaded.tokenizer.encode(f"{START}a{END}")
    assert torch.equal(*(our_logits(one.model, WITH_PICTURE, picture()) for one in (again, loaded)))


@pytest.mark.parametrize("whole", [False, True])
def test_a_projector_brings_the_rows_of_start_and_end(tiny_llama, tiny_clip, tmp_path, whole, capsys):
    """LLaVA-Pretrained-Projectors: a bare file, linear, with the two rows or with all embeddings (LLAVA.md 1.4)."""
    new = rows(402 if whole else 2)["model.embed_tokens.weight"]
    projector = {f"model.mm_projector.{name}": tensor for name, tensor in projector_tensors("linear").items()}
    torch.save(projector | {"model.embed_tokens.weight": new}, tmp_path / "LLaVA-7b-pretrain.bin")
    options = {"vision_tower": tiny_clip, "pretrain_mm_mlp_adapter": tmp_path / "LLaVA-7b-pretrain.bin"}
    loaded = load(tiny_llama("gqa"), **options, mm_use_im_start_end=True)
    weight = loaded.model.language_model.model.embed_tokens.weight
    assert torch.equal(weight[400:], new[-2:]) and "as trained in" in capsys.readouterr().err
    head = loaded.model.language_model.lm_head.weight
    assert torch.allclose(head[400:], head[:400].mean(0).expand(2, -1))
    loaded = load(tiny_llama("gqa"), **options)  # without the tokens its rows are not needed, and that is said
    assert loaded.config.text.vocab_size == 400
    assert f"language_model of {tmp_path / 'LLaVA-7b-pretrain.bin'} (1 tensors)" in capsys.readouterr().err
    torch.save(projector | {"model.embed_tokens.weight": new[:1]}, tmp_path / "LLaVA-7b-pretrain.bin")
    with pytest.raises(ValueError, match=r"-pretrain.bin holds embeddings \(1, 32\) .*takes \(2, 32\) or \(402, 32"):
        load(tiny_llama("gqa"), **options, mm_use_im_start_end=True)


def test_stage_1_learns_and_keeps_start_and_end(tiny_llama, tiny_clip, tmp_path):
    """The whole input embedding trains, the head does not; mm_projector.bin carries it (LLAVA.md 1.4, 6.8)."""
    scenes = draw(tmp_path)
    run_train(tmp_path / "out", model_name_or_path=tiny_llama("gqa"), vision_tower=tiny_clip, version="v1", max_steps=2,
              mm_use_im_start_end=True, tune_mm_mlp_adapter=True, image_folder=scenes, data_path=scenes / "talks.json",
              learning_rate=1e-2, save_projector_only=True)
    saved = torch.load(tmp_path / "out/mm_projector.bin", weights_only=True)
    assert saved.keys() == {"model.mm_projector.weight", "model.mm_projector.bias", "model.embed_tokens.weight"}
    loaded = load(tmp_path / "out", model_base=tiny_llama("gqa"))
    weight = loaded.model.language_model.model.embed_tokens.weight
    assert torch.equal(weight[400:], saved["model.embed_tokens.weight"][400:]) and loaded.config.mm_use_im_start_end
    assert torch.equal(weight[:400], load(tiny_llama("gqa")).model.language_model.model.embed_tokens.weight)
    assert (weight[400] - weight[401]).abs().max() > 1e-3  # both began as the mean


def test_rows_without_a_token_are_never_sampled(tiny_llava, tmp_path, capsys):
    """llava-hf's 464 rows here are 400 tokens, <image> and padding; the padding's would win every time."""
    folder = shutil.copytree(tiny_llava, tmp_path / "x")
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"] += [{"id": 400 + i, "content": token, "special": True, "single_word": False, "lstrip": False,
                              "rstrip": False, "normalized": False} for i, token in enumerate(("<image>", "<pad>"))]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    head, norm = tensors["language_model.lm_head.weight"], tensors["language_model.model.norm.weight"]
    head[400:432], head[432:] = -9 * norm, 9 * norm
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    loaded = load(folder)
    assert "rows 402-463 of the vocabulary have no token and are never sampled" in capsys.readouterr().err
    assert loaded.silent_ids == [*range(400, 464)]
    logits = our_logits(loaded.model, WITH_PICTURE, picture())
    assert close(logits, their_logits(folder, WITH_PICTURE, picture())) and logits.shape[1] == 464
    requests = [{"messages": [("human", "What?")], "max_new_tokens": 8, "temperature": t, "seed": s}
                for t in (0, 5.0) for s in range(4)]
    assert all(set(answer.token_ids) <= set(range(400)) for answer in generate(loaded, requests))


def test_a_tokenizer_larger_than_the_embeddings(tiny_llama, tmp_path, capsys):
    folder = shutil.copytree(tiny_llama(), tmp_path / "x")
    (folder / "added_tokens.json").write_text('{"<pad>": 400}')  # LLaMA-2's, with 32000 rows
    loaded = load(folder)
    assert loaded.config.text.vocab_size == 400
    with pytest.raises(ValueError, match="token 400 has no row in the model's embeddings, which have 400; take it out"):
        generate(loaded, [{"messages": [("human", "What is <pad>?")]}])
    assert "have 400 rows and none for <pad>; keep such tokens out of texts" in capsys.readouterr().err
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["vocab"] |= {"zebra": 400, "yak": 401}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "added_tokens.json").unlink()
    with pytest.raises(ValueError, match="402 tokens, the embeddings have 400 rows, none for zebra, yak; copy"):
        load(folder)


# ------------------------------------------------------------------------------------- projectors, adapters and deltas


def test_projector_folders_and_files(original, tiny_llama, tiny_clip, tmp_path):
    whole = load(original())
    save_projector(whole, tmp_path / "stage1")
    expected = our_logits(whole.model, WITH_PICTURE, picture())
    alone = tmp_path / "alone" / "mm_projector.bin"
    alone.parent.mkdir()
    shutil.copy(tmp_path / "stage1" / "mm_projector.bin", alone)
    for given, options in ((tmp_path / "stage1", {}), (tmp_path / "stage1/mm_projector.bin", {}),
                           (alone, {"vision_tower": tiny_clip}), (alone.parent, {"vision_tower": tiny_clip})):
        assert open_checkpoint(given).layout == "projector"
        loaded = load(given, model_base=tiny_llama("gqa"), **options)
        assert torch.equal(our_logits(loaded.model, WITH_PICTURE, picture()), expected)


def lora_folder(llm, out, binary, prefix):
    """What LLaVA's LoRA training leaves: PEFT's own adapter, config.json, non_lora_trainables.bin."""
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(llm)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM",
                             base_model_name_or_path="lmsys/vicuna-7b-v1.5")
    peft.get_peft_model(base, config).save_pretrained(out)
    values = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(values | {"base_model_name_or_path": "lmsys/vicuna-7b-v1.5"}))
    if binary:
        torch.save(load_file(out / "adapter_model.safetensors"), out / "adapter_model.bin")
        (out / "adapter_model.safetensors").unlink()
    torch.save({prefix + name: t for name, t in projector_tensors().items()}, out / "non_lora_trainables.bin")
    (out / "config.json").write_text(json.dumps({"model_type": "llava_llama", "mm_hidden_size": 24}))
    return out


@pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own
@pytest.mark.parametrize("binary, prefix", [(True, "base_model.model.model.mm_projector."),
                                            (False, "base_model.model.mm_projector."), (False, "model.mm_projector.")])
def test_lora_folders_are_read_and_named(tiny_llama, tmp_path, binary, prefix):
    folder = lora_folder(tiny_llama("gqa"), tmp_path / "adapter", binary, prefix)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.layout == "lora" and set(checkpoint.tensors) == {f"mm_projector.{n}" for n in projector_tensors()}
    adapter = checkpoint.adapter
    assert (adapter.base, adapter.r, adapter.lora_alpha) == ("lmsys/vicuna-7b-v1.5", 4, 8)
    modules = {f"language_model.model.layers.{i}.{name}.weight" for i in range(3)
               for name in ("self_attn.q_proj", "mlp.down_proj")}
    assert adapter.modules.keys() == modules
    pair = adapter.modules["language_model.model.layers.2.mlp.down_proj.weight"]
    assert pair["lora_A"].shape == (4, 48) and pair["lora_B"].shape == (32, 4) and not pair["lora_B"].read().any()


def test_adapters_of_every_layout_name_the_same_module():
    ours = "language_model.model.layers.3.mlp.up_proj.weight"
    for name in ("model.layers", "language_model.model.layers", "model.language_model.layers"):
        assert layouts.our_name(f"base_model.model.{name}.3.mlp.up_proj.weight") == ours


@pytest.mark.filterwarnings("ignore")
def test_adapters_that_are_not_whole(tiny_llama, tmp_path):
    folder = lora_folder(tiny_llama("gqa"), tmp_path / "adapter", False, "model.mm_projector.")
    tensors = load_file(folder / "adapter_model.safetensors")
    half = {name: tensor.clone() for name, tensor in tensors.items() if "layers.1.mlp.down_proj.lora_B" not in name}
    save_file(half, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj.weight is lora_A \(4, 48\); expected lora_A"):
        open_checkpoint(folder)
    save_file({"base_model.model.h.0.attn.lora_A.weight": torch.ones(1, 1)}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="adapts a module that no known layout has"):
        open_checkpoint(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="has an adapter_config.json and no adapter_model.safetensors or"):
        open_checkpoint(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ValueError, match="an adapter of type IA3; only LoRA is supported"):
        open_checkpoint(folder)


def test_a_delta_is_no_model(original, tiny_llama, tmp_path):
    """LLaVA 0.x: differences to LLaMA, told from a model by the norm, which is near 0 instead of near 1."""
    base = load_file(tiny_llama("gqa") / "model.safetensors")
    noise = torch.Generator().manual_seed(0)
    delta = {name: torch.randn(tensor.shape, generator=noise) * 0.01 for name, tensor in base.items()}
    folder = original(projector_tensors("linear"), extra=delta, model_type="llama", mm_projector_type=None)
    assert open_checkpoint(folder).layout == "delta"
    with pytest.raises(ValueError, match="no model; make one with `python weights.py delta apply --base LLAMA --delta"):
        load(folder)


# --------------------------------------------------------------------------------------------------------------- towers

SIZES = {  # like the published ones: head dims 64, 64, 80, patches 32, 16, 14, laion's gelu
    "B/32": {"hidden_size": 128, "num_attention_heads": 2, "patch_size": 32, "image_size": 64, "projection_dim": 32},
    "B/16": {"hidden_size": 128, "num_attention_heads": 2, "patch_size": 16, "image_size": 64, "projection_dim": 32},
    "L/14": {"hidden_size": 64, "num_attention_heads": 1, "patch_size": 14, "image_size": 28, "projection_dim": 48},
    "H/14": {"hidden_size": 160, "num_attention_heads": 2, "patch_size": 14, "image_size": 42, "projection_dim": 64,
             "hidden_act": "gelu"},
}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_other_clips(tiny_llama, tmp_path, size, whole):
    config = clip_config(**SIZES[size])
    if whole:  # openai's folders: text half, projections, logit_scale beside the tower
        text = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2,
                "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
        config = transformers.CLIPConfig(text_config=text, vision_config=config.to_dict())
        theirs = randomized(transformers.CLIPModel(config))
    else:
        theirs = randomized(transformers.CLIPVisionModelWithProjection(config))
    theirs.save_pretrained(tmp_path)
    loaded = load(tiny_llama(), vision_tower=tmp_path, projector_seed=0)
    side = SIZES[size]["image_size"]
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
        assert close(loaded.model.vision_tower(pixels), expected)
    assert loaded.config.image_tokens == (side // SIZES[size]["patch_size"]) ** 2
    assert loaded.image_processor.crop_size == side


def test_files_of_2021_repeat_their_tower(tiny_clip):
    values = json.loads((tiny_clip / "config.json").read_text())
    twice = {"model_type": "clip", "vision_config": {"hidden_size": 7, "image_size": 28}, "vision_config_dict": values}
    assert layouts.read_vision_config(twice, "x") == layouts.read_vision_config(values, "x")


@pytest.mark.parametrize("prefix", [
    "model.vision_tower.vision_tower.vision_model.", "model.vision_tower.vision_tower.", "vision_tower.vision_model.",
    "vision_tower.", "model.vision_tower.vision_model.", "model.vision_tower.", "vision_model.", ""])
def test_towers_under_all_known_names(original, tiny_llama, tiny_clip, prefix):
    tower = {prefix + name: tensor for name, tensor in load_file(tiny_clip / "model.safetensors").items()}
    folder = original(extra=tower, unfreeze_mm_vision_tower=True, mm_vision_tower="someone/clip",
                      vision_config=clip_config().to_dict())
    expected = oracle(tiny_llama("gqa"), tiny_clip, projector_tensors())
    assert close(our_logits(load(folder).model, WITH_PICTURE, picture()), expected)


def test_towers_known_by_their_shapes():
    def shapes(width, layers, patch, patches):
        names = {f"encoder.layers.{i}.mlp.fc1.weight": (4 * width, width) for i in range(layers)}
        names |= {"embeddings.patch_embedding.weight": (width, 3, patch, patch),
                  "embeddings.position_embedding.weight": (patches + 1, width)}
        return layouts.vision_config_of_shapes({f"vision_tower.vision_model.{name}": s for name, s in names.items()})

    large, huge = shapes(1024, 24, 14, 576), shapes(1280, 32, 14, 256)
    assert (large.num_attention_heads, large.hidden_act, large.image_size) == (16, "quick_gelu", 336)
    assert (huge.num_attention_heads, huge.hidden_act, huge.image_size) == (16, "gelu", 224)
    assert (huge.num_hidden_layers, huge.intermediate_size) == (32, 5120)


# ------------------------------------------------------------------------------------------------------ what is refused


def test_quantised_files(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama(), tmp_path / "x")
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    up = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {up: tensors[up].to(torch.int8)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"tensor '{up}' is int8; expected float32, bfloat16 or float16"):
        load(folder)
    save_file(tensors | {up + ".absmax": torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"'{up}.absmax' is a quantised model's; load the one that"):
        load(folder)
    edit_config(folder, quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(ValueError, match="is quantised .awq.; only bitsandbytes is known: load the model that it was"):
        load(folder)


def test_mpt_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llava_mpt"}')
    torch.save({"transformer.wte.weight": torch.ones(2, 2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="'transformer.wte.weight' is an MPT model's, which is not supported"):
        load(tmp_path)


@pytest.mark.parametrize("changes, sentence", [
    ({"num_hidden_layers": 4}, "the num_hidden_layers is 4, but the tensors have 3"),
    ({"hidden_size": 64}, "the hidden_size is 64, but the tensors have 32"),
    ({"vocab_size": 32000}, "the vocab_size is 32000, but the tensors have 400"),
    ({"num_key_value_heads": 4}, "the num_key_value_heads is 4, but the tensors have 2"),
    ({"intermediate_size": 11008}, "the intermediate_size is 11008, but the tensors have 48"),
    ({"mm_projector_type": "linear"}, "of type mlp2x_gelu, not linear; correct mm_projector_type in config.json"),
    ({"vision_config": clip_config(image_size=42).to_dict()}, "the vision tower's image_size is 42, but the tensors"),
    ({"vision_config": clip_config(num_hidden_layers=5).to_dict()}, "the vision tower's num_hidden_layers is 5, but"),
    ({"vision_config": clip_config(patch_size=7).to_dict()}, "the vision tower's patch_size is 7, but the tensors")])
def test_a_config_that_contradicts_its_tensors(original, changes, sentence):
    folder = original(tower_inside=True, unfreeze_mm_vision_tower=True, **{"vision_config": clip_config().to_dict()}
                      | changes)
    with pytest.raises(ValueError, match=sentence) as error:
        load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_tower_that_is_not_whole_and_without_a_config(original, tiny_clip):
    tower = {f"model.vision_tower.vision_tower.vision_model.{name}": tensor
             for name, tensor in load_file(tiny_clip / "model.safetensors").items() if "patch_embedding" not in name}
    folder = original(extra=tower, mm_vision_tower="someone/clip", unfreeze_mm_vision_tower=True)
    with pytest.raises(ValueError, match=r"do not agree: .*missing: \S+\.embeddings\.patch_embedding\.weight"):
        load(folder)


def test_every_name_is_listed():
    names = [f"layers.{i}.{leaf}" for i in (0, 1, 2, 5, 11) for leaf in ("a", "b")] + ["norm", "layers.7.c"]
    assert list_names(names) == "layers.{0-2,5,11}.a, layers.{0-2,5,11}.b, layers.7.c, norm"
