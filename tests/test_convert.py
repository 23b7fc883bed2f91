"""weights.py's command line: inspect, convert, delta, extract. What is written is whole, read again, and refused where
something stands already; wrong input is one sentence."""

import json
import shutil
import weakref

import pytest
import torch
from conftest import copy_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel

import weights
from formats import delta, files, layouts
from formats.inspection import inspect
from weights import load, save, save_projector

transformers = pytest.importorskip("transformers")

EMBEDDING = "model.embed_tokens.weight"
NEW_ROWS = 3  # <im_patch>, <im_start>, <im_end>


@pytest.fixture
def run(run_main):
    """run(*arguments) -> (exit status, stdout, stderr) of `python weights.py …`; a refusal has no traceback."""
    def call(*arguments):
        code, out, err = run_main(weights, *arguments)
        assert "Traceback" not in err
        return code, out, err
    return call


@pytest.fixture
def refusal(run):
    """refusal(*arguments) -> the one sentence."""
    def call(*arguments):
        code, out, err = run(*arguments)
        assert code == 2 and out == "" and err.splitlines()[-1].split(": ")[0] in ("error", "python weights.py"), err
        return err.splitlines()[-1]
    return call


@pytest.fixture(scope="module")
def whole(tiny_llama, tiny_clip):
    """tiny_llama with tiny_clip and a two-layer projector, loaded."""
    return load(tiny_llama("gqa"), vision_tower=tiny_clip, mm_projector_type="mlp2x_gelu", projector_seed=3,
                device="cpu")


@pytest.fixture(scope="module")
def original(whole, tmp_path_factory):
    """The same in the original's layout."""
    folder = tmp_path_factory.mktemp("original") / "x"
    save(whole, folder, layout="llava")
    return folder


def same_model(a, b):
    a, b = dict(a.model.named_parameters()), dict(b.model.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def edited(folder, out, **changes):
    """A copy of a folder with other keys in config.json; None removes one."""
    shutil.copytree(folder, out)
    values = json.loads((out / "config.json").read_text()) | changes
    (out / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return out


# ------------------------------------------------------------------------------------------------------------- convert


@pytest.mark.parametrize("to", ["llava-hf", "llava"])
def test_shards_of_any_size_are_loaded_back_the_same(run, whole, original, tmp_path, to):
    code, _, err = run("convert", original, tmp_path / "out", "--to", to, "--max-shard-size", "50KB")
    assert code == 0 and "read again and found equal" in err
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(file.stat().st_size < 60_000 for file in shards if len(load_file(file)) > 1)
    assert same_model(load(tmp_path / "out"), whole)
    if to == "llava-hf":
        model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
        theirs, ours = model.lm_head.weight[:400], whole.model.language_model.lm_head.weight
        assert torch.equal(theirs, ours)


def test_train_writes_shards_of_the_size_it_is_told(tmp_path):
    from training import flags
    words = ["--model_name_or_path", "x", "--data_path", "x", "--output_dir", "x"]
    assert flags.parse(words).max_shard_size == 5_000_000_000
    assert flags.parse([*words, "--max_shard_size", "200MB"]).max_shard_size == 200_000_000
    with pytest.raises(SystemExit):
        flags.parse([*words, "--max_shard_size", "large"])


def test_a_folder_that_holds_something_is_refused_and_left_as_it_was(run, refusal, original, tiny_llama, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for arguments in (("convert", original, out), ("extract", original, out),
                      ("delta", "make", "--base", tiny_llama("gqa"), "--target", original, "--delta", out)):
        assert f"{out} already holds something; name another folder, or add --over" in refusal(*arguments)
    assert [file.name for file in out.iterdir()] == ["thesis.txt"]
    assert run("convert", original, out, "--overwrite-output-dir")[0] == 0
    assert (out / "thesis.txt").read_text() == "years of work" and (out / "config.json").exists()
    assert "is a file; name a folder" in refusal("convert", original, out / "thesis.txt")


def test_no_room_on_the_disk_and_nothing_half_written(refusal, original, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda folder: 1000)
    for arguments in (("convert", original, tmp_path / "out"), ("extract", original, tmp_path / "out.bin"),
                      ("delta", "apply", "--base", tiny_llama("gqa"), "--delta", original, "--target",
                       tmp_path / "out")):
        assert " GB are to be written and 0.000 GB are free; make room" in refusal(*arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", ["compare", "write_tensors", "write_files"])
def test_a_conversion_that_breaks_off_leaves_nothing(refusal, original, tmp_path, monkeypatch, broken):
    def fail(*_):
        raise ValueError("the cable was pulled")
    monkeypatch.setattr(files, broken, fail)
    assert "the cable was pulled" in refusal("convert", original, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_gguf_becomes_a_folder_and_is_inspected(run, refusal, tmp_path):
    path = tiny_gguf(tmp_path / "x.gguf")
    report = json.loads(run("inspect", path, "--json")[1])
    assert report["layout"] == "gguf" and report["parts"]["language_model"]["dtypes"] == ["F32"]
    assert report["tensors"]["token_embd.weight"]["shape"] == [260, 32]
    code, _, err = run("convert", path, tmp_path / "out", "--max_shard_size", "20KB")
    assert code == 0 and "read again and found equal" in err
    loaded = load(tmp_path / "out")
    q = loaded.model.language_model.model.layers[0].self_attn.q_proj.weight
    assert q[:4, 0].tolist() == [0, 64, 128, 192] and len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert "leave --to and --bits out" in refusal("convert", path, tmp_path / "two", "--to", "llava")


def tiny_gguf(path):
    """A LLaMA of one layer with a byte-level tokenizer, as llama.cpp stores it; q_proj counts up row by row."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(260)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    pieces = ["<s>", "</s>", "<unk>", *sorted(ByteLevel.alphabet()), "ab"]
    writer.add_token_list(pieces)
    writer.add_token_types([3, 3, 3] + [1] * 257)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {"token_embd": (260, 32), "output_norm": (32,), "output": (260, 32), "blk.0.attn_norm": (32,),
              "blk.0.ffn_norm": (32,), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32),
              "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (48, 32), "blk.0.ffn_up": (48, 32),
              "blk.0.ffn_down": (32, 48)}
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        writer.add_tensor(f"{name}.weight", torch.arange(count, dtype=torch.float32).reshape(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ------------------------------------------------------------------------------------------------------------- inspect


def lora_folder(folder, base):
    """An adapter as the original's training writes it, without tokenizer files."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": str(base), "bias": "none",
        "target_modules": ["q_proj"]}))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    torch.save({prefix + "A.weight": torch.zeros(4, 32), prefix + "B.weight": torch.zeros(32, 4)},
               folder / "adapter_model.bin")
    torch.save({"base_model.model.model.mm_projector.0.weight": torch.zeros(32, 24),
                "base_model.model.model.mm_projector.0.bias": torch.zeros(32)}, folder / "non_lora_trainables.bin")
    return folder


def test_inspect_says_what_each_layout_is_and_what_it_lacks(
        run, whole, original, tiny_llava, tiny_llama, tiny_clip, tmp_path):
    save_projector(whole, tmp_path / "stage1")
    no_tokenizer = edited(tiny_llama("gqa"), tmp_path / "no_tokenizer")
    for file in no_tokenizer.glob("token*"):
        file.unlink()
    tensors = {name: tensor for name, tensor in load_file(original / "model.safetensors").items()
               if "vision_tower" not in name}
    towerless = edited(original, tmp_path / "towerless", mm_vision_tower="openai/clip-vit-large-patch14",
                       unfreeze_mm_vision_tower=None, vision_config=None)
    save_file(tensors, towerless / "model.safetensors")
    gone = edited(towerless, tmp_path / "gone", mm_vision_tower="/nowhere/clip")
    expected = {  # folder or file -> its layout, words that the text holds
        tiny_llava: ("llava-hf", ["4 tokens per picture", "template v1", "mlp2x_gelu, width 24 to 32",
                                  "3 layers of width 24, pictures of 28 pixels in patches of 14",
                                  "3 layers of width 32, 4 heads (2 of keys and values), 464 rows of vocabulary",
                                  "no part is missing"]),
        original: ("llava", ["no part is missing"]),
        towerless: ("llava", ["missing to run it: its vision tower, openai/clip-vit-large-patch14, which loading "
                              "fetches from Hugging Face"]),
        gone: ("llava", ["missing to run it: its vision tower, /nowhere/clip\n"]),
        tiny_llama("gqa"): ("llama", ["no part is missing"]),
        no_tokenizer: ("llama", ["missing to run it: a tokenizer"]),
        tiny_clip: ("clip", ["4 tokens per picture", "missing to run it: a language model and a projector"]),
        tmp_path / "stage1": ("projector", ["mlp2x_gelu, width 24 to 32", "its language model: --model_base"]),
        tmp_path / "stage1" / "mm_projector.bin": ("projector", ["its language model: --model_base"]),
        lora_folder(tmp_path / "lora", "lmsys/vicuna-7b-v1.5"): (
            "lora", ["rank 4, alpha 8, on 1 matrices", "the model that it was trained on, lmsys/vicuna-7b-v1.5"]),
    }
    for path, (layout, words) in expected.items():
        code, out, err = run("inspect", path)
        assert code == 0 and out.startswith(f"{path}: ") and f"({layout})" in out and err == "", out + err
        assert all(part in out for part in words), out
        report = json.loads(run("inspect", path, "--json")[1])
        assert report == json.loads(json.dumps(inspect(path))) and report["layout"] == layout
        assert sum(part["tensors"] for part in report["parts"].values()) == len(report["tensors"])
    out = run("inspect", tiny_llava, "--tensors")[1]
    assert "language_model.model.norm.weight  (32,) float32" in out


def test_inspect_a_line_end_beside_an_identity_projector(run, tiny_llama, tmp_path):
    folder = edited(tiny_llama("gqa"), tmp_path / "x", mm_projector_type="identity", model_type="llava_llama")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.image_newline": torch.ones(32)}, folder / "model.safetensors")
    code, out, _ = run("inspect", folder)
    assert code == 0 and "mm_projector" in out and "; identity\n" in out and "missing to run it: a vision tower" in out


def test_inspect_refuses_what_is_none(refusal, tmp_path):
    assert "nowhere does not exist" in refusal("inspect", tmp_path / "nowhere")
    (tmp_path / "x.bin").write_bytes(b"PK")
    assert "x.bin is truncated or no weight file" in refusal("inspect", tmp_path / "x.bin")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert "x.gguf cannot be read" in refusal("inspect", tmp_path / "x.gguf")


# --------------------------------------------------------------------------------------------------------------- delta


@pytest.fixture(scope="module")
def trained(tiny_llama, tiny_clip, tiny_tokenizer, tmp_path_factory):
    """A LLaVA 0.x grown out of tiny_llama: all numbers moved, three rows more, a linear projector; no tower inside."""
    folder, base = tmp_path_factory.mktemp("trained"), tiny_llama("gqa")
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        tensors[name] = tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
        if name in (EMBEDDING, "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], torch.randn(NEW_ROWS, 32, generator=generator)])
    tensors |= {"model.mm_projector.weight": torch.randn(32, 24, generator=generator),
                "model.mm_projector.bias": torch.randn(32, generator=generator)}
    save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {
        "model_type": "llava", "vocab_size": 400 + NEW_ROWS, "mm_vision_tower": str(tiny_clip), "mm_hidden_size": 24,
        "mm_use_im_patch_token": False, "dtype": "float32"}))
    copy_tokenizer(tiny_tokenizer, folder)
    (folder / "added_tokens.json").write_text("{}")
    return folder


@pytest.fixture
def made(run, trained, tiny_llama, tmp_path):
    """The delta of `trained`."""
    assert run("delta", "make", "--base", tiny_llama("gqa"), "--target", trained, "--delta", tmp_path / "delta")[0] == 0
    return tmp_path / "delta"


def test_a_delta_holds_what_the_original_would_write(made, trained, tiny_llama):
    base, target = load_file(tiny_llama("gqa") / "model.safetensors"), load_file(trained / "model.safetensors")
    found = load_file(made / "model.safetensors")
    assert found.keys() == target.keys() and {tensor.dtype for tensor in found.values()} == {torch.float16}
    for name, tensor in target.items():
        expected = tensor.clone()
        if name in (EMBEDDING, "lm_head.weight"):
            expected[:400] -= base[name].half()  # rows that the base does not have are absolute
        elif "mm_projector" not in name:
            expected -= base[name].half()
        assert torch.equal(found[name], expected), name
    config = json.loads((made / "config.json").read_text())
    assert len(config["delta_base_sha256"]) == 64 and config["torch_dtype"] == "float16" and "dtype" not in config
    assert {"tokenizer.json", "tokenizer_config.json", "added_tokens.json"} <= {file.name for file in made.iterdir()}
    assert inspect(made)["layout"] == "delta" and "delta apply --base LLAMA" in inspect(made)["missing"][0]


@pytest.mark.parametrize("shard", ["5GB", "10KB"])
def test_apply_undoes_make(run, made, trained, tiny_llama, tmp_path, shard):
    code, _, err = run("delta", "apply", "--base-model-path", tiny_llama("gqa"), "--delta-path", made,
                       "--target-model-path", tmp_path / "out", "--max_shard_size", shard)
    assert code == 0 and "read again and found equal" in err
    found, base = files.open_weights(tmp_path / "out"), load_file(tiny_llama("gqa") / "model.safetensors")
    difference = load_file(made / "model.safetensors")
    for name, target in load_file(trained / "model.safetensors").items():
        result = found[name].read()
        assert result.dtype == torch.float16 and (result - target).abs().max() < 4e-3  # float16's rounding
        expected = difference[name].clone()
        if name in base:
            expected[:len(base[name])] += base[name].half()
        assert torch.equal(result, expected), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "delta_base_sha256" not in config and config["vocab_size"] == 403
    loaded = load(tmp_path / "out")
    assert loaded.config.mm_projector_type == "linear" and loaded.config.text.vocab_size == 403


def test_a_delta_as_it_was_published(run, made, tiny_llama, tmp_path):
    """LLaVA-7b-delta-v0: .bin shards, the projector in a file of its own, a config of a plain llama, no checksum."""
    tensors = load_file(made / "model.safetensors")
    projector = {name: tensors.pop(name) for name in list(tensors) if "mm_projector" in name}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    old = edited(made, tmp_path / "old", model_type="llama", architectures=["LlamaForCausalLM"],
                 delta_base_sha256=None, mm_hidden_size=None)
    (old / "model.safetensors").unlink()
    where = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        torch.save({name: tensors[name] for name in tensors if where[name] == file}, old / file)
    (old / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    torch.save(projector, old / "mm_projector.bin")
    for folder, out in ((made, tmp_path / "new-x"), (old, tmp_path / "old-x")):
        assert run("delta", "apply", "--base", tiny_llama("gqa"), "--delta", folder, "--target", out)[0] == 0
    assert (tmp_path / "new-x" / "model.safetensors").read_bytes() == (
        tmp_path / "old-x" / "model.safetensors").read_bytes()
    config = json.loads((tmp_path / "old-x" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llava", ["LlavaLlamaForCausalLM"])
    assert same_model(load(tmp_path / "new-x"), load(tmp_path / "old-x"))


def test_a_delta_on_the_wrong_base(refusal, made, trained, tiny_llama, tmp_path):
    def refused(base):
        return refusal("delta", "apply", "--base", base, "--delta", made, "--target", tmp_path / "out")
    assert "shapes differ" in refused(tiny_llama("mha")) and "k_proj.weight (32, 32) and (16, 32)" in refused(
        tiny_llama("mha"))
    base = edited(tiny_llama("gqa"), tmp_path / "other")
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] + 0.5}, base / "model.safetensors")
    assert f"{base} has the shapes of the base that {made} was made from, but other numbers" in refused(base)
    fewer = {name: tensor for name, tensor in tensors.items() if "layers.2." not in name}
    save_file(fewer, base / "model.safetensors")
    assert "layers.2.input_layernorm.weight" in refused(base)
    wide = load_file(trained / "model.safetensors")
    wide["lm_head.weight"] = wide["lm_head.weight"].repeat(2, 1)
    save_file(wide, base / "model.safetensors")  # more rows than the delta
    assert "shapes differ: language_model.lm_head.weight (806, 32) and (403, 32)" in refused(base)
    assert not (tmp_path / "out").exists()


def test_the_checksum_does_not_mind_layout_files_or_dtype(made, tiny_llama, tmp_path):
    whole = json.loads((made / "config.json").read_text())["delta_base_sha256"]
    base = edited(tiny_llama("gqa"), tmp_path / "x")
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save({name.replace("model.", "model.language_model.", 1): tensor.half() for name, tensor in tensors.items()},
               base / "pytorch_model.bin")
    assert delta.checksum(weights.open_checkpoint(base)) == whole


def test_a_delta_is_streamed(run, made, tiny_llama, tmp_path, monkeypatch):
    """Two tensors of the files at a time, however many there are."""
    alive, most = set(), [0]
    real = files.mapped

    def counted(*arguments):
        tensor = real(*arguments)
        alive.add(id(tensor))
        weakref.finalize(tensor, alive.discard, id(tensor))
        most.append(len(alive))
        return tensor
    monkeypatch.setattr(files, "mapped", counted)
    assert run("delta", "apply", "--base", tiny_llama("gqa"), "--delta", made, "--target", tmp_path / "out")[0] == 0
    assert len(most) > 100 and max(most) <= 3  # two, and in the final comparison the one that was written


# ------------------------------------------------------------------------------------------------------------- extract


@pytest.mark.parametrize("out", ["x.bin", "x.safetensors", "folder"])
def test_a_projector_is_taken_out_of_every_layout(run, whole, original, tiny_llama, tiny_clip, tmp_path, out):
    save(whole, tmp_path / "hf")
    for i, source in enumerate((original, tmp_path / "hf")):
        place = tmp_path / f"{i}" / out
        code, _, err = run("extract", source, place)
        assert code == 0 and "model.mm_projector.0.weight" in err
        file = place / "mm_projector.bin" if out == "folder" else place
        keys = load_file(file) if out.endswith("safetensors") else torch.load(file, weights_only=True)
        assert set(keys) == {f"model.mm_projector.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")}
        loaded = load(tiny_llama("gqa"), vision_tower=tiny_clip, pretrain_mm_mlp_adapter=place)
        assert same_model(loaded, whole)
        if out == "folder":
            assert same_model(load(place, model_base=tiny_llama("gqa"), vision_tower=tiny_clip), whole)


def test_with_start_and_end_tokens_the_embeddings_come_along(run, trained, tmp_path):
    source = edited(trained, tmp_path / "x", mm_use_im_start_end=True)
    assert run("extract", source, tmp_path / "x.bin")[0] == 0
    tensors = torch.load(tmp_path / "x.bin", weights_only=True)
    assert tensors.keys() == {"model.mm_projector.weight", "model.mm_projector.bias", EMBEDDING}
    assert tensors[EMBEDDING].shape == (403, 32)


def test_nothing_to_extract(run, refusal, original, tiny_llama, tmp_path):
    assert "holds no projector" in refusal("extract", tiny_llama("gqa"), tmp_path / "x.bin")
    assert run("extract", original, tmp_path / "x.bin")[0] == 0
    assert "x.bin is there already; name another file, or add --overwrite_output_dir" in refusal(
        "extract", original, tmp_path / "x.bin")
    assert run("extract", original, tmp_path / "x.bin", "--overwrite_output_dir")[0] == 0
    assert [file.name for file in tmp_path.iterdir()] == ["x.bin"]


def test_names_of_the_original_layout_are_what_is_extracted():
    assert layouts.file_name("mm_projector.0.weight", "llava") == "model.mm_projector.0.weight"
