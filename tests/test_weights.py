"""weights.py: every layout of a checkpoint loads to the same model, what is saved loads again, mistakes are named."""

import json
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import clip_config, randomized
from PIL import Image
from safetensors.torch import load_file, save_file

import weights
from formats import files, layouts, processor
from model import IMAGE_TOKEN_INDEX
from weights import load, save, save_projector

transformers = pytest.importorskip("transformers")

IMAGE_ID, TOKENS = 400, 4  # of tiny_llava
TEXT = [1, 300, 17, 290, 5, 333]
WITH_PICTURE = [1, 300] + [IMAGE_ID] * TOKENS + [17, 290, 350]


def our_logits(model, ids, pixel_values=None):
    """Logits (T, V) of one sequence; IMAGE_ID marks picture places, as in llava-hf."""
    ids = torch.tensor(ids)
    batch = SimpleNamespace(
        input_ids=torch.where(ids == IMAGE_ID, IMAGE_TOKEN_INDEX, ids), position_ids=torch.arange(len(ids)),
        cu_seqlens=torch.tensor([0, len(ids)]), ids=["a"],
        pixel_values=torch.empty(0, 3, 28, 28) if pixel_values is None else pixel_values)
    with torch.no_grad():
        return model.logits(batch)


def their_logits(folder, ids, pixel_values=None, kind=transformers.LlavaForConditionalGeneration):
    with torch.no_grad():
        model = kind.from_pretrained(folder, dtype=torch.float32).eval()
        picture = {} if pixel_values is None else {"pixel_values": pixel_values}
        return model(torch.tensor([ids]), **picture).logits[0]


def picture(seed=0):
    return torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


def close(a, b):
    return a.shape == b.shape and (a - b).abs().max() < 5e-5


def edit_config(folder, **changes):
    """Set keys of config.json; None removes one."""
    file = folder / "config.json"
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def same_tensors(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --------------------------------------------------------------------------------------------------- layouts, llava-hf

GENERATIONS = {  # replacements in transformers 5.23's file names, which have no inner `vision_model.`
    "published": [("vision_tower.", "vision_tower.vision_model.")],
    "transformers 5 file": [],
    "in memory of 4.52": [("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head."),
                          ("vision_tower.", "model.vision_tower.vision_model."),
                          ("multi_modal_projector.", "model.multi_modal_projector.")],
    "in memory of 5": [("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head."),
                       ("vision_tower.", "model.vision_tower."),
                       ("multi_modal_projector.", "model.multi_modal_projector.")],
}
ORIGINAL = [("language_model.model.", "model."), ("language_model.lm_head.", "lm_head."),
            ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
            ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
            ("vision_tower.", "model.vision_tower.vision_tower.vision_model.")]


def renamed(folder, replacements):
    """The tensors of a folder under other prefixes."""
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        old, new = next(((old, new) for old, new in replacements if name.startswith(old)), ("", ""))
        tensors[new + name[len(old):]] = tensor
    return tensors


@pytest.fixture
def copy_of(tmp_path):
    """copy_of(folder) -> a copy that a test may spoil."""
    return lambda folder: shutil.copytree(folder, tmp_path / f"copy-of-{folder.name}")


@pytest.mark.parametrize("generation", GENERATIONS)
def test_llava_hf_of_every_generation_equals_transformers(tiny_llava, copy_of, generation):
    folder = copy_of(tiny_llava)
    save_file(renamed(tiny_llava, GENERATIONS[generation]), folder / "model.safetensors", {"format": "pt"})
    loaded = load(folder)
    assert close(our_logits(loaded.model, WITH_PICTURE, picture()), their_logits(tiny_llava, WITH_PICTURE, picture()))
    assert len(loaded.model.vision_tower.vision_model["encoder"]["layers"]) == 2
    assert loaded.config.image_tokens == TOKENS


def as_original(folder, out, tower, **changes):
    """Rewrite a tiny_llava folder in the original's layout with the original's config.json."""
    values = json.loads((folder / "config.json").read_text())
    out.mkdir()
    config = {**values["text_config"], "model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu",
              "mm_vision_select_layer": -2, "mm_hidden_size": 24, "mm_vision_tower": str(tower), **changes}
    (out / "config.json").write_text(json.dumps(config))
    return renamed(folder, ORIGINAL)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_original_layout_single_and_sharded(tiny_llava, tmp_path, kind, shards):
    tensors = as_original(tiny_llava, tmp_path / "x", tmp_path, unfreeze_mm_vision_tower=True,
                          vision_config=json.loads((tiny_llava / "config.json").read_text())["vision_config"])
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names = [f"{stem}.{kind}"] if shards == 1 else [f"{stem}-{i}.{kind}" for i in range(shards)]
    where = {name: names[i % shards] for i, name in enumerate(sorted(tensors))}
    for file in names:
        part = {name: tensors[name] for name in tensors if where[name] == file}
        save_file(part, tmp_path / "x" / file) if kind == "safetensors" else torch.save(part, tmp_path / "x" / file)
    if shards > 1:
        (tmp_path / "x" / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": where}))
    loaded = load(tmp_path / "x")
    assert close(our_logits(loaded.model, WITH_PICTURE, picture()), their_logits(tiny_llava, WITH_PICTURE, picture()))
    assert loaded.config.image_aspect_ratio == "square" and loaded.config.mm_projector_type == "mlp2x_gelu"


def test_original_layout_prefers_the_tower_its_config_names(tiny_llava, tiny_clip, tmp_path):
    tensors = as_original(tiny_llava, tmp_path / "x", tiny_clip)
    save_file(tensors, tmp_path / "x" / "model.safetensors")
    frozen = load(tmp_path / "x")
    edit_config(tmp_path / "x", unfreeze_mm_vision_tower=True, mm_vision_tower=None,
                vision_config=clip_config().to_dict())
    trained = load(tmp_path / "x")
    expected = load_file(tiny_clip / "model.safetensors")["encoder.layers.0.mlp.fc1.weight"]
    assert torch.equal(frozen.model.vision_tower.vision_model["encoder"]["layers"][0].mlp.fc1.weight, expected)
    assert close(our_logits(trained.model, WITH_PICTURE, picture()), their_logits(tiny_llava, WITH_PICTURE, picture()))


def test_tower_config_from_shapes_alone(tiny_llava):
    shapes = {layouts.our_name(name): tuple(t.shape) for name, t in load_file(tiny_llava / "model.safetensors").items()
              if name.startswith("vision_tower")}
    found = layouts.vision_config_of_shapes(shapes)
    assert (found.hidden_size, found.intermediate_size, found.num_hidden_layers) == (24, 40, 3)
    assert (found.image_size, found.patch_size) == (28, 14)


def test_names_that_belong_together():
    for theirs, ours in {
        "model.norm.weight": "language_model.model.norm.weight",
        "model.language_model.layers.3.mlp.up_proj.weight": "language_model.model.layers.3.mlp.up_proj.weight",
        "lm_head.weight": "language_model.lm_head.weight",
        "model.mm_projector.weight": "mm_projector.weight",
        "vision_model.pre_layrnorm.bias": "vision_tower.vision_model.pre_layrnorm.bias",
        "pre_layrnorm.bias": "vision_tower.vision_model.pre_layrnorm.bias",
        "transformer.wte.weight": None,
    }.items():
        assert layouts.our_name(theirs) == ours
    for name in ("text_model.embeddings.position_ids", "logit_scale", "visual_projection.weight",
                 "text_model.encoder.layers.0.mlp.fc1.bias", "model.layers.31.self_attn.rotary_emb.inv_freq"):
        assert layouts.unused(name)


# ------------------------------------------------------------------------------------------- language models and towers


@pytest.mark.parametrize("kind", ["mha", "gqa", "tied"])
def test_language_models_equal_transformers(tiny_llama, tmp_path, kind):
    folder = tiny_llama(kind)
    loaded = load(folder)
    expected = their_logits(folder, TEXT, kind=transformers.LlamaForCausalLM)
    assert close(our_logits(loaded.model, TEXT), expected)
    assert loaded.model.vision_tower is None and loaded.config.image_tokens == 0 and loaded.conv_mode == "v1"
    language = loaded.model.language_model
    assert (language.lm_head.weight is language.model.embed_tokens.weight) == (kind == "tied")
    save(loaded, tmp_path / "out")
    assert close(their_logits(tmp_path / "out", TEXT, kind=transformers.AutoModelForCausalLM), expected)
    assert same_tensors(load(tmp_path / "out").model, loaded.model)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()


def test_the_head_of_a_tied_file_is_left_out_and_named(tiny_llama, copy_of, capsys):
    folder = copy_of(tiny_llama("tied"))
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    assert same_tensors(load(folder).model, load(tiny_llama("tied")).model)
    assert "the tied head (1 tensors)" in capsys.readouterr().err


def test_dtypes(tiny_llama, copy_of, tmp_path):
    assert load(tiny_llama()).model.language_model.lm_head.weight.dtype == torch.float32
    half = load(tiny_llama(), dtype="bfloat16")
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    save(half, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert load(tmp_path / "out", dtype="stored").model.language_model.lm_head.weight.dtype == torch.bfloat16
    assert load(tmp_path / "out").model.language_model.lm_head.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="int3"):
        load(tiny_llama(), dtype="int3")


def test_changing_a_loaded_model_leaves_the_file_alone(tiny_llama):
    before = (tiny_llama() / "model.safetensors").read_bytes()
    with torch.no_grad():
        load(tiny_llama()).model.language_model.lm_head.weight.zero_()
    assert (tiny_llama() / "model.safetensors").read_bytes() == before


def test_whole_clip_as_tower(tiny_llama, tiny_clip, tmp_path, capsys):
    text = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config=clip_config().to_dict())
    clip = randomized(transformers.CLIPModel(config))
    clip.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"vision_model.embeddings.position_ids": torch.arange(5)}, tmp_path / "model.safetensors")
    loaded = load(tiny_llama(), vision_tower=tmp_path, projector_seed=0)
    with torch.no_grad():
        expected = clip.vision_model(picture(), output_hidden_states=True).hidden_states[-2]
        assert close(loaded.model.vision_tower(picture()), expected)
    said = capsys.readouterr().err
    assert "CLIP's text half" in said and "position_ids (1 tensors)" in said and "behind the selected one (18" in said
    assert loaded.image_processor.crop_size == 28


# -------------------------------------------------------------------------------------------------------------- configs


def test_missing_fields_of_llava_hf_are_transformers_defaults():
    text = {"vocab_size": 32064, "rms_norm_eps": 1e-5}
    config = layouts.read_config({"model_type": "llava", "text_config": text}, {}, "x")
    assert (config.text.hidden_size, config.text.num_hidden_layers, config.text.intermediate_size) == (4096, 32, 11008)
    assert (config.vision.image_size, config.vision.hidden_size, config.image_tokens) == (336, 1024, 576)
    assert config.mm_projector_type == "mlp2x_gelu" and config.image_aspect_ratio == "pad"
    mistral = layouts.read_config(
        {"model_type": "llava", "text_config": {"model_type": "mistral", "sliding_window": None}}, {}, "x").text
    assert (mistral.num_key_value_heads, mistral.intermediate_size) == (8, 14336)


def test_missing_fields_of_the_original_are_its_defaults():
    config = layouts.read_config({"model_type": "llava", "hidden_size": 64}, {}, "x")
    assert config.mm_projector_type == "linear" and config.mm_vision_select_feature == "patch"
    assert config.image_aspect_ratio == "square" and config.tokenizer_model_max_length is None


def test_transformers_4_and_5_configs(tiny_llama, copy_of):
    folder = copy_of(tiny_llama())
    expected = our_logits(load(folder).model, TEXT)
    edit_config(folder, rope_parameters=None, dtype=None, rope_theta=10000.0, torch_dtype="float32", rope_scaling=None)
    assert torch.equal(our_logits(load(folder).model, TEXT), expected)
    edit_config(folder, rope_parameters={"rope_theta": 10.0, "rope_type": "default"})
    assert not torch.equal(our_logits(load(folder).model, TEXT), expected)


def test_a_top_level_tie_without_meaning(tiny_llava, copy_of):
    folder = copy_of(tiny_llava)
    edit_config(folder, tie_word_embeddings=True)
    assert same_tensors(load(folder).model, load(tiny_llava).model)


@pytest.mark.parametrize("changes, sentence", [
    ({"model_type": "qwen2_vl"}, "'qwen2_vl' is not known"),
    ({"text_config": {"model_type": "gemma"}}, "text_config.model_type 'gemma'"),
    ({"vision_config": {"model_type": "siglip_vision_model"}}, "siglip_vision_model"),
    ({"projector_hidden_act": "relu"}, "relu"),
])
def test_unknown_families(tiny_llava, copy_of, changes, sentence):
    folder = copy_of(tiny_llava)
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=sentence):
        load(folder)


# ------------------------------------------------------------------------------------------------------------- assembly


@pytest.fixture(scope="session")
def assembled(tiny_llama, tiny_clip):
    """tiny_llama with tiny_clip and a new two-layer projector."""
    return load(tiny_llama("gqa"), vision_tower=tiny_clip, mm_projector_type="mlp2x_gelu", projector_seed=3)


def test_a_new_projector_is_seeded_said_and_only_made_when_asked(assembled, tiny_llama, tiny_clip, capsys):
    again = load(tiny_llama("gqa"), vision_tower=tiny_clip, mm_projector_type="mlp2x_gelu", projector_seed=3)
    assert "a new mlp2x_gelu one is made, untrained" in capsys.readouterr().err
    assert again.new_projector and same_tensors(again.model, assembled.model)
    torch.manual_seed(3)
    expected = torch.nn.Linear(24, 32)  # torch's own initialisation
    assert torch.equal(again.model.mm_projector[0].weight, expected.weight)
    other = load(tiny_llama("gqa"), vision_tower=tiny_clip, projector_seed=4)
    assert other.config.mm_projector_type == "linear" and other.model.mm_projector.weight.shape == (32, 24)
    with pytest.raises(ValueError, match="pretrain_mm_mlp_adapter"):
        load(tiny_llama("gqa"), vision_tower=tiny_clip)


def test_every_form_of_a_projector_file(assembled, tiny_llama, tiny_clip, tmp_path):
    save_projector(assembled, tmp_path / "stage1")
    keys = torch.load(tmp_path / "stage1" / "mm_projector.bin", weights_only=True)
    assert list(keys) == [f"model.mm_projector.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")]
    save_file({name: tensor.contiguous() for name, tensor in keys.items()}, tmp_path / "projector.safetensors")
    save(assembled, tmp_path / "whole")
    for adapter in ("stage1/mm_projector.bin", "projector.safetensors", "stage1", "whole"):
        loaded = load(tiny_llama("gqa"), vision_tower=tiny_clip, projector_seed=9,
                      pretrain_mm_mlp_adapter=tmp_path / adapter)
        assert same_tensors(loaded.model, assembled.model) and not loaded.new_projector
    config = json.loads((tmp_path / "stage1" / "config.json").read_text())
    assert config["model_type"] == "llava_llama" and config["mm_vision_tower"] == str(tiny_clip)
    by_base = load(tmp_path / "stage1", model_base=tiny_llama("gqa"))
    assert same_tensors(by_base.model, assembled.model) and by_base.tokenizer is not None
    with pytest.raises(ValueError, match="--model_base"):
        load(tmp_path / "stage1")
    with pytest.raises(ValueError, match="whole model"):
        load(tmp_path / "whole", model_base=tiny_llama("gqa"))


def test_parts_that_do_not_fit(assembled, tiny_llama, tiny_clip, tmp_path):
    save_projector(assembled, tmp_path / "stage1")
    adapter = tmp_path / "stage1" / "mm_projector.bin"
    with pytest.raises(ValueError, match="type mlp2x_gelu, not linear"):
        load(tiny_llama(), vision_tower=tiny_clip, pretrain_mm_mlp_adapter=adapter, mm_projector_type="linear")
    with pytest.raises(ValueError, match="needs a vision tower"):
        load(tiny_llama(), pretrain_mm_mlp_adapter=adapter)
    with pytest.raises(ValueError, match="holds no projector"):
        load(tiny_llama(), vision_tower=tiny_clip, pretrain_mm_mlp_adapter=tiny_llama())
    randomized(transformers.CLIPVisionModel(clip_config(hidden_size=32))).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="maps width 24 to 32, but the vision tower's width is 32"):
        load(tiny_llama(), vision_tower=tmp_path / "wide", pretrain_mm_mlp_adapter=adapter)
    with pytest.raises(ValueError, match="vision tower without a language model"):
        load(tiny_clip)
    with pytest.raises(ValueError, match="'llama' is not known"):
        load(tiny_llama(), vision_tower=tiny_llama(), projector_seed=0)


def test_a_tower_of_another_picture_size_is_a_loud_warning(tiny_llava, tmp_path, capsys):
    randomized(transformers.CLIPVisionModel(clip_config(image_size=42))).save_pretrained(tmp_path)
    loaded = load(tiny_llava, vision_tower=tmp_path)
    said = capsys.readouterr().err
    assert "WARNING" in said and "28 pixels, 4 tokens" in said and "42 pixels, 9 tokens" in said
    assert "vision_tower of" in said  # the replaced one is counted
    assert loaded.config.image_tokens == 9 and loaded.image_processor.crop_size == 42


def test_settings_go_before_the_checkpoint(tiny_llava):
    loaded = load(tiny_llava, mm_vision_select_layer=-1, conv_mode="plain", image_aspect_ratio=None)
    assert len(loaded.model.vision_tower.vision_model["encoder"]["layers"]) == 3
    assert loaded.conv_mode == "plain" and loaded.config.image_aspect_ratio == "pad"


# --------------------------------------------------------------------------------------------------------------- saving


def test_llava_hf_folders_keep_every_tensor(tiny_llava, tmp_path):
    save(load(tiny_llava), tmp_path / "out")
    before = {layouts.our_name(name): t for name, t in load_file(tiny_llava / "model.safetensors").items()}
    saved = load_file(tmp_path / "out" / "model.safetensors")
    after = {layouts.our_name(name): t for name, t in saved.items()}
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert {"vision_tower.vision_model.post_layernorm.weight", "language_model.model.norm.weight",
            "multi_modal_projector.linear_1.weight", "language_model.lm_head.weight"} < saved.keys()
    theirs = their_logits(tmp_path / "out", WITH_PICTURE, picture())
    assert torch.equal(theirs, their_logits(tiny_llava, WITH_PICTURE, picture()))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["image_token_index"] == IMAGE_ID


def test_an_assembled_model_runs_in_transformers(assembled, tmp_path):
    save(assembled, tmp_path / "out")
    theirs = their_logits(tmp_path / "out", WITH_PICTURE, picture())
    ours = our_logits(assembled.model, WITH_PICTURE, picture())
    assert theirs.shape[1] == 448 and close(theirs[:, :400], ours)
    assert (theirs[:, 400:] <= ours.max(1, keepdim=True).values).all()  # a row of padding is never the best
    config = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert config.suppress_tokens == list(range(400, 448))
    again = load(tmp_path / "out")
    assert same_tensors(again.model, assembled.model) and again.conv_mode == "v1"
    assert torch.equal(our_logits(again.model, WITH_PICTURE, picture()), ours)
    assert again.tokenizer.encode("What <image> is") == assembled.tokenizer.encode("What <image> is")
    save(again, tmp_path / "twice")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_tied_llava_runs_in_transformers(tiny_llama, tiny_clip, tmp_path):
    loaded = load(tiny_llama("tied"), vision_tower=tiny_clip, mm_projector_type="mlp2x_gelu", projector_seed=0)
    save(loaded, tmp_path / "out")
    theirs = their_logits(tmp_path / "out", WITH_PICTURE, picture())
    assert close(theirs[:, :400], our_logits(loaded.model, WITH_PICTURE, picture()))
    assert same_tensors(load(tmp_path / "out").model, loaded.model)


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_the_processor_of_a_saved_folder(tiny_llama, tiny_clip, tmp_path, aspect):
    loaded = load(tiny_llama(), vision_tower=tiny_clip, mm_projector_type="mlp2x_gelu", projector_seed=0,
                  image_aspect_ratio=aspect)
    save(loaded, tmp_path / "out")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    pixels = Image.effect_noise((40, 30), 60).convert("RGB")
    said = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image"}]}]
    prompt = processor.apply_chat_template(said, add_generation_prompt=True)
    assert prompt.endswith("user's questions. USER: <image>\nWhat is it? ASSISTANT:")
    inputs = processor(images=pixels, text=prompt, return_tensors="pt")
    assert int((inputs.input_ids == 400).sum()) == loaded.config.image_tokens
    assert torch.allclose(inputs.pixel_values, loaded.image_processor(pixels, aspect), atol=1e-5)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).max() < 401


def test_what_llava_hf_cannot_say_goes_into_the_original_layout(tiny_llama, tiny_clip, tmp_path, capsys):
    loaded = load(tiny_llama(), vision_tower=tiny_clip, mm_projector_type="linear", projector_seed=0)
    save(loaded, tmp_path / "out")
    assert "written is the original's layout" in capsys.readouterr().err
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert {"model.mm_projector.weight", "model.norm.weight", "lm_head.weight",
            "model.vision_tower.vision_tower.vision_model.post_layernorm.bias"} < names
    assert same_tensors(load(tmp_path / "out").model, loaded.model)
    with pytest.raises(ValueError, match="no words for a projector of type linear"):
        save(loaded, tmp_path / "other", layout="llava-hf")
    assert not (tmp_path / "other").exists()


def test_large_models_are_written_in_shards(assembled, tmp_path):
    save(assembled, tmp_path / "out", max_shard_size=50_000)
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert same_tensors(load(tmp_path / "out").model, assembled.model)
    theirs = their_logits(tmp_path / "out", WITH_PICTURE, picture())
    assert close(theirs[:, :400], our_logits(assembled.model, WITH_PICTURE, picture()))
    save(assembled, tmp_path / "out")  # a folder that is written again keeps no shard of before
    assert [file.name for file in (tmp_path / "out").glob("model*")] == ["model.safetensors"]


def test_a_failing_save_leaves_nothing(assembled, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError("no space left on device")
    monkeypatch.setattr(files, "write_files", full_disk)
    with pytest.raises(OSError):
        save(assembled, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------- mistakes


def test_broken_folders(tiny_llama, copy_of, tmp_path):
    def raises(sentence, **options):
        with pytest.raises(ValueError, match=sentence) as error:
            load(folder, **options)
        assert "\n" not in str(error.value)

    folder = tmp_path / "nowhere"
    raises("nowhere does not exist")
    folder = copy_of(tiny_llama())
    raises("--bits 3", bits=3)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}  # the file will be spoilt
    file.write_bytes(whole[:-1000])
    raises("model.safetensors is truncated")
    save_file(tensors | {"model.layers.9.mlp.up_proj.weight": torch.ones(1)}, file)
    raises("no place in this model: language_model.model.layers.9.mlp.up_proj.weight$")
    save_file(tensors | {"transformer.wte.weight": torch.ones(1)}, file)
    raises("'transformer.wte.weight' is an MPT model's, which is not supported")
    save_file(tensors | {"h.0.attn.weight": torch.ones(1)}, file)
    raises("'h.0.attn.weight' is in no known layout")
    save_file(tensors | {"model.language_model.norm.weight": torch.ones(1)}, file)
    raises("a second time")
    save_file({name: t for name, t in tensors.items() if "norm" not in name}, file)
    layers = "language_model.model.layers.{0-2}."
    raises(f"missing: {layers}input_layernorm.weight, {layers}post_attention_layernorm.weight, "
           "language_model.model.norm.weight$")
    save_file(tensors | {"lm_head.weight": torch.ones(3, 32)}, file)
    raises(r"\(3, 32\), expected \(400, 32\): language_model.lm_head.weight$")
    file.unlink()
    raises("holds no weights; expected one of model.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "model-2.safetensors"}}')
    raises("files that are not there: model-2.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    torch.save({"lm_head.weight": SimpleNamespace()}, folder / "pytorch_model.bin")
    raises("pytorch_model.bin is truncated or no weight file")
    (folder / "config.json").write_text("{")
    raises("config.json: expected JSON")
    (folder / "config.json").write_text("[1]")
    raises(r"config.json: expected JSON \(an object, not \[1\]\)")
    (folder / "config.json").unlink()
    raises("config.json is missing")


# --------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def run(run_main):
    """run(*arguments) -> (exit status, stdout, stderr) of `python weights.py …`."""
    return partial(run_main, weights)


def test_inspect(run, tiny_llava, tiny_clip, tmp_path):
    answer = json.loads(run("inspect", tiny_llava, "--json")[1])
    assert answer["layout"] == "llava-hf" and answer["parts"]["mm_projector"]["tensors"] == 4
    assert answer["parts"]["language_model"]["dtypes"] == ["float32"]
    assert answer["image_tokens"] == TOKENS and answer["conv_mode"] == "v1"
    assert "a vision tower" in run("inspect", tiny_clip)[1]
    code, out, err = run("inspect", tmp_path)
    assert code == 2 and out == "" and err.count("\n") == 1 and "config.json is missing" in err


def test_convert_between_layouts(run, tiny_llava, tmp_path):
    assert run("convert", tiny_llava, tmp_path / "llava", "--to", "llava")[0] == 0
    assert json.loads(run("inspect", tmp_path / "llava", "--json")[1])["layout"] == "llava"
    assert same_tensors(load(tmp_path / "llava").model, load(tiny_llava).model)
    assert run("convert", tiny_llava, tmp_path / "x", "--to", "gptq")[0] == 2


def test_rows_for_the_image_token_come_and_go(run, assembled, tiny_llama, tmp_path):
    """original (400 rows) -> llava-hf (448) -> original, also from a folder that does not say what it had before."""
    save(assembled, tmp_path / "hf")
    edit_config(tmp_path / "hf", unpadded_vocab_size=None)
    assert load(tmp_path / "hf").config.text.vocab_size == 448
    run("convert", tmp_path / "hf", tmp_path / "original", "--to", "llava")
    back = load(tmp_path / "original")
    assert same_tensors(back.model, assembled.model) and len(back.tokenizer) == 400
    assert "<image>" not in (tmp_path / "original" / "tokenizer_config.json").read_text()


def test_published_tokenizer_files_lose_image_and_pad():
    added = [{"id": 0, "content": "<unk>"}, {"id": 3, "content": "<image>"}, {"id": 4, "content": "<pad>"}]
    spec = {"model": {"vocab": {"<unk>": 0, "a": 1, "b": 2}}, "added_tokens": added}
    config = {"pad_token": "<pad>", "unk_token": "<unk>", "added_tokens_decoder": {str(t["id"]): t for t in added}}
    files = {"tokenizer.json": json.dumps(spec).encode(), "tokenizer_config.json": json.dumps(config).encode(),
             "special_tokens_map.json": b'{"pad_token": {"content": "<pad>"}}', "added_tokens.json": b"{}"}
    assert processor.remove_image_token(files) == 3
    config = json.loads(files["tokenizer_config.json"])
    assert config.keys() == {"unk_token", "added_tokens_decoder"} and config["added_tokens_decoder"].keys() == {"0"}
    assert files.keys() == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert processor.remove_image_token(files) is None


def test_image_processors_of_transformers_4_and_5(assembled, tmp_path):
    values = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, "image_mean": [0.5, 0.5, 0.5]}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    assert weights.find_image_processor(tmp_path, assembled.config).image_mean == (0.5, 0.5, 0.5)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 28, "crop_size": 28}))
    assert weights.find_image_processor(tmp_path, assembled.config).shortest_edge == 28


def test_gold_checkpoints_and_logits(gold, tmp_path):
    """The original's own starting points, assembled, give the logits that it recorded."""
    loaded = load(gold / "ckpt/lm_mha", vision_tower=gold / "ckpt/vision",
                  pretrain_mm_mlp_adapter=gold / "ckpt/projector_mlp2x.bin")
    file = load_file(gold / "forward/lm_mha.safetensors")
    row = file["input_ids"][0][file["attention_mask_in"][0].bool()]
    slot = int((row == IMAGE_TOKEN_INDEX).nonzero()[0])
    ids = torch.cat([row[:slot], torch.full((16,), IMAGE_TOKEN_INDEX), row[slot + 1:]])
    batch = SimpleNamespace(input_ids=ids, position_ids=torch.arange(len(ids)), cu_seqlens=torch.tensor([0, len(ids)]),
                            ids=["0"], pixel_values=file["images"][:1])
    with torch.no_grad():
        logits = loaded.model.logits(batch)
    assert close(logits[:, ::128], file["logits_stride128"][0][: len(ids)])
