"""sampling/beam.py: the answers that transformers' beam search finds, whatever ends them."""

import random

import pytest
import torch
from conftest import copy_tokenizer, llama_config
from drawn import draw

import sample
from model import IMAGE_TOKEN_INDEX
from sample import Past, Request, generate
from sampling import beam
from weights import load

transformers = pytest.importorskip("transformers")
QUESTIONS = ["Hi", "What color is the circle in the picture?", "Describe a triangle left of a star, 1 2 3 4."]


def ask(text, *images, **options):
    return Request([("human", text)], list(images), **{"max_new_tokens": 12, "num_beams": 3} | options)


def random_llama(folder, tokenizer, seed, ends):
    """Another model per seed, written into `folder`; ends {id: by how much its row of the head is raised}: what ends an
    answer. -> (ours, transformers')"""
    choice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    theirs = transformers.LlamaForCausalLM(llama_config(
        num_key_value_heads=choice.choice([1, 2, 4]), tie_word_embeddings=False, eos_token_id=[*ends])).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 1.5 * noise * parameter[0].numel() ** -0.5)
        for token, raised in ends.items():
            theirs.lm_head.weight[token] *= raised
    theirs.save_pretrained(folder)
    copy_tokenizer(tokenizer, folder)
    return load(folder, device="cpu", dtype="float32"), theirs


def expected(theirs, ids, request, ends, **options):
    """The ids that transformers' generate adds."""
    ids = torch.tensor([ids])
    out = theirs.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=request.num_beams,
        max_new_tokens=request.max_new_tokens, repetition_penalty=request.repetition_penalty, pad_token_id=0,
        eos_token_id=[*ends], **options)[0, ids.shape[1]:].tolist()
    stop = next((i + 1 for i, token in enumerate(out) if token in ends), len(out))
    return out[:stop]


ENDS = {"no end": {2: 0.1}, "early ends": {2: 2.5}, "many ends": {2: 2, **dict.fromkeys(range(250, 400), 1.3)}}


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("seed", range(10))
def test_beams_find_what_transformers_finds(tiny_tokenizer, tmp_path, seed, ends):
    ours, theirs = random_llama(tmp_path, tiny_tokenizer, seed, ENDS[ends])
    requests = [ask(QUESTIONS[seed % 3], num_beams=2 + (seed + i) % 3, repetition_penalty=penalty, max_new_tokens=room)
                for i, (penalty, room) in enumerate([(1.0, 12), (1.3, 5), (2.0, 20), (1.0, 1)])]
    answers = generate(ours, requests)
    assert [answer.token_ids for answer in answers] == [
        expected(theirs, answer.prompt_ids, request, ENDS[ends]) for answer, request in zip(answers, requests)]


def test_the_models_above_try_what_they_should(tiny_tokenizer, tmp_path):
    """Some answers end early and some do not, and beams find others than the greedy choice."""
    ended, differ = 0, 0
    for seed in range(6):
        ours, _ = random_llama(tmp_path / str(seed), tiny_tokenizer, seed, ENDS["early ends"])
        beams, greedy = generate(ours, [ask("Hi"), ask("Hi", num_beams=1)])
        ended, differ = ended + (beams.token_ids[-1] == 2), differ + (beams.token_ids != greedy.token_ids)
    assert 0 < ended < 6 and differ


@pytest.mark.parametrize("seed", range(4))
def test_a_stop_string_ends_a_beam(tiny_tokenizer, tmp_path, seed):
    ours, theirs = random_llama(tmp_path, tiny_tokenizer, seed, {2: 0.1})
    whole = generate(ours, [ask("Hi")])[0].text
    stop = next(pair for pair in map("".join, zip(whole[3:], whole[4:])) if pair.isascii())
    request, words = ask("Hi", stop=[stop]), transformers.AutoTokenizer.from_pretrained(tmp_path)
    answer = generate(ours, [request])[0]
    assert answer.token_ids == expected(
        theirs, answer.prompt_ids, request, {2: 0}, stop_strings=[stop], tokenizer=words)
    assert stop not in answer.text


@pytest.mark.parametrize("num_beams", [2, 3, 4])
@pytest.mark.parametrize("raised", [1, 3])
def test_beams_look_at_pictures(tiny_llava, tmp_path, num_beams, raised):
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tiny_llava, dtype=torch.float32).eval()
    theirs.lm_head.weight.data[2] *= raised
    theirs.save_pretrained(tmp_path)
    for name in "tokenizer.json", "tokenizer_config.json":
        (tmp_path / name).write_bytes((tiny_llava / name).read_bytes())
    ours, scenes = load(tmp_path, device="cpu", dtype="float32"), draw(tmp_path)
    request = ask("First <image> then <image> .", scenes / "a.png", scenes / "b.png", num_beams=num_beams)
    answer, example = generate(ours, [request])[0], sample.encode(ours, request)
    places = [[400] * ours.config.image_tokens if i == IMAGE_TOKEN_INDEX else [i] for i in answer.prompt_ids]
    assert answer.token_ids == expected(theirs, sum(places, []), request, {2: 0}, pixel_values=example.pixel_values,
                                        suppress_tokens=ours.silent_ids)


def test_company_and_a_past_change_nothing(tiny_llama):
    loaded = load(tiny_llama("gqa"), device="cpu")
    requests = [ask("Hi", num_beams=1), ask("Hi", num_beams=4), ask("What color?", num_beams=1), ask("Hi there")]
    alone, heard = [generate(loaded, [request])[0].token_ids for request in requests], {}
    answers = generate(loaded, requests, lambda i, piece: heard.update({i: heard.get(i, "") + piece}))
    assert [answer.token_ids for answer in answers] == alone
    assert [heard[i].strip() for i in range(4)] == [answer.text for answer in answers]
    past = Past()
    for question in [[("human", "Hi")], [("human", "Hi"), ("gpt", answers[1].text), ("human", "And?")]]:
        request = Request(question, num_beams=4, max_new_tokens=9)
        assert generate(loaded, [request], past=past)[0].token_ids == generate(loaded, [request])[0].token_ids
    assert past.reused > 10


def test_beams_leave_the_cache_as_it_was(tiny_llama, monkeypatch):
    """Also when they are interrupted."""
    loaded, seen = load(tiny_llama("gqa"), device="cpu"), []

    def watch(decoder, answer, *rest, search=beam.search):
        stretch, cache = answer.stretch, decoder.cache
        before = stretch.length, list(cache.stretches)
        found = search(decoder, answer, *rest)
        assert (stretch.length, cache.stretches) == before
        monkeypatch.setattr(decoder.model, "logits", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            search(decoder, answer, *rest)
        assert (stretch.length, cache.stretches) == before
        seen.append(before)
        return found

    monkeypatch.setattr(beam, "search", watch)
    generate(loaded, [ask("Hi")])
    assert seen


@pytest.mark.parametrize("odd, sentence", [
    ({"temperature": 0.5}, "temperature 0.5: expected 0 with num_beams"),
    ({"logprobs": 2}, "logprobs 2: expected none with num_beams")])
def test_what_beams_do_not_do_is_refused(odd, sentence):
    with pytest.raises(ValueError, match=sentence):
        ask("Hi", **odd)
