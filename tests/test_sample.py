"""sample.py: company never changes an answer, draws follow the textbook, the command line keeps its promises."""

import dataclasses
import json

import pytest
import torch
from drawn import draw
from PIL import Image
from torch.nn.functional import one_hot

import data
import sample
from kernels.attention import Packing
from model import IMAGE_TOKEN_INDEX, Llava
from sample import Request, generate
from weights import load, pick_device


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("scenes"))


def ask(text, *images, **options):
    return Request([("human", text)], list(images), **{"max_new_tokens": 12} | options)


@pytest.fixture(scope="module")
def mixed(scenes):
    """Requests of every sort: text, one picture, two, short and long, stopping early and late, greedy and drawn."""
    a, b = scenes / "a.png", scenes / "b.png"
    return [
        ask("What color is the circle in the picture?", a),
        ask("How many squares? " * 8, max_new_tokens=1),
        ask("Compare.", a, b, max_new_tokens=30),
        ask("A first <image> and then <image> : which?", b, a),
        ask("Hi", max_new_tokens=25),
        ask("Hi", temperature=1.0, seed=3, max_new_tokens=25),
        ask("Describe.", Image.open(b), temperature=0.7, top_p=0.9, top_k=None, seed=4),
    ]


@pytest.fixture(scope="module")
def alone(loaded, mixed):
    return [generate(loaded, [request])[0] for request in mixed]


# ----------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("together", [True, False])
def test_greedy_answers_are_the_originals(gold, together):
    loaded = load(gold / "ckpt" / "lm_mha", vision_tower=gold / "ckpt" / "vision", image_aspect_ratio="pad",
                  pretrain_mm_mlp_adapter=gold / "ckpt" / "projector_mlp2x.bin", dtype="float32", device="cpu")
    recorded = json.loads((gold / "generate" / "greedy30.json").read_text())["results"]
    recorded = [case for case in recorded if case["model"] == "lm_mha"]
    requests = [ask(case["prompt"].split("USER: ")[1].removesuffix(" ASSISTANT:"),
                    *(gold / "data" / "images" / name for name in case["images"]), max_new_tokens=30)
                for case in recorded]
    answers = generate(loaded, requests, batch_size=8 if together else 1)
    assert [answer.prompt_ids for answer in answers] == [case["input_ids"] for case in recorded]
    assert [answer.token_ids for answer in answers] == [case["output_ids"][1:] for case in recorded]
    assert [answer.text for answer in answers] == [case["text"] for case in recorded]


@pytest.mark.parametrize("order", ["as they are", "reversed", "in twos"])
def test_company_changes_no_answer(loaded, mixed, alone, order):
    requests, expected = (mixed[::-1], alone[::-1]) if order == "reversed" else (mixed, alone)
    answers = generate(loaded, requests, batch_size=2 if order == "in twos" else 64)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
    assert [answer.text for answer in answers] == [answer.text for answer in expected]
    assert [answer.prompt_ids for answer in answers] == [answer.prompt_ids for answer in expected]


@pytest.fixture(scope="module")
def sixteen(scenes, mixed):
    """As a service meets them: all of the above, several times, with other lengths, settings and seeds."""
    a, b = scenes / "a.png", scenes / "b.png"
    return [*mixed,
            ask("Hi", temperature=1.0, seed=3, max_new_tokens=25),  # as one of the above
            ask("Why? " * 30, max_new_tokens=3), ask("And <image> this?", a, lookup=4, max_new_tokens=40),
            ask("Two.", b, a, temperature=1.2, min_p=0.1, seed=9), ask("Hi", repetition_penalty=1.3, max_new_tokens=30),
            ask("Where?", a, stop=["e"], max_new_tokens=20), ask("Hi there", logprobs=2, max_new_tokens=5),
            ask("Name it.", b, temperature=0.9, lookup=3, seed=7, max_new_tokens=33),
            ask("Once more: " * 12, repetition_penalty=0.8, temperature=0.5, top_k=5, max_new_tokens=18)]


@pytest.mark.parametrize("batch_size", [16, 5])
def test_sixteen_requests_that_come_and_go(loaded, sixteen, batch_size, monkeypatch):
    """Rows leave and others take their places at once; all say what they say alone, bit for bit what the seeds drew."""
    together, read = [], Llava.last_logits
    monkeypatch.setattr(Llava, "last_logits", lambda self, batch, cache, stretches: (
        together.append(len(stretches)), read(self, batch, cache, stretches))[1])
    answers = generate(loaded, sixteen, batch_size=batch_size)
    assert len(answers) == 16 and sum(together) == 16
    assert together == [16] if batch_size == 16 else together[0] == 5 and len(together) > 4  # joined while others grew
    for request, answer in zip(sixteen, answers):
        alone = generate(loaded, [request])[0]
        assert (answer.token_ids, answer.text, answer.prompt_ids) == (alone.token_ids, alone.text, alone.prompt_ids)
        assert (answer.logprobs is None) == (request.logprobs is None)


def test_ended_answers_leave_their_cells(loaded):
    engine = sample.Engine(loaded, batch_size=2)
    for i in range(12):
        engine.add(ask("Hi " * (1 + i % 3), max_new_tokens=1 + i), i)
    ended = []
    while engine.waiting or engine.running:
        ended += [tag for tag, _ in engine.step()]
        assert len(engine.cache.stretches) == len(engine.running) <= 2
    assert sorted(ended) == list(range(12)) and len(engine.cache.keys[0]) < 2 * (len(engine.cache.keys) + 300)


def test_greedy_equals_reading_everything_anew_for_each_token(loaded, scenes):
    request = ask("Compare.", scenes / "a.png", scenes / "b.png")
    example = sample.encode(loaded, request)
    answer = generate(loaded, [request])[0]
    for token in answer.token_ids:
        example.labels = [-100] * len(example.ids)
        with torch.no_grad():
            logits = loaded.model.logits(data.pack([example], loaded.config))[-1]
        assert token == logits.argmax()
        example.ids = [*example.ids, token]


def test_the_end_token_ends_an_answer_and_is_kept_in_its_ids_only(loaded, scenes, monkeypatch):
    request, eos = ask("What color is it?", scenes / "a.png"), loaded.tokenizer.eos_token_id
    before = generate(loaded, [request])[0].token_ids
    rigged = loaded.model.language_model.lm_head.weight.clone()
    rigged[eos] = 1.01 * rigged[before[-1]]  # where the last token was likeliest, the end now is a little likelier
    monkeypatch.setattr(loaded.model.language_model.lm_head.weight, "data", rigged)
    answer = generate(loaded, [request])[0]
    cut = before.index(before[-1])
    assert cut > 0 and answer.token_ids == [*before[:cut], eos]
    assert answer.text == loaded.tokenizer.decode(before[:cut]).strip()


def test_answers_end_at_max_new_tokens(mixed, alone):
    assert [len(answer.token_ids) for answer in alone] == [request.max_new_tokens for request in mixed]


def test_the_context_limits_an_answer(loaded, monkeypatch):
    length = len(sample.encode(loaded, ask("Hi")).ids)
    monkeypatch.setattr(loaded.config.text, "max_position_embeddings", length + 3)
    assert len(generate(loaded, [ask("Hi", max_new_tokens=100)])[0].token_ids) == 3
    monkeypatch.setattr(loaded.config.text, "max_position_embeddings", length)
    with pytest.raises(ValueError, match=f"the prompt has {length} tokens, but the model reads {length} at most"):
        generate(loaded, [ask("Hi")])


def test_ids_beyond_the_tokenizer_are_never_chosen(tiny_llava, scenes):
    loaded = load(tiny_llava, device="cpu", dtype="float32")
    head = loaded.model.language_model.lm_head.weight.data
    words = len(loaded.tokenizer)
    if len(head) > words:
        head[words:] = 50 * head[:1]  # both signs happen: somewhere one of these rows would win
    answers = generate(loaded, [ask("Hi"), ask("Hi there", temperature=5.0, top_k=0)])
    assert all(token < words for answer in answers for token in answer.token_ids)


def test_a_broken_request_fails_alone(loaded, scenes, tmp_path, monkeypatch):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    monkeypatch.setattr(loaded.config.text, "max_position_embeddings", 100)
    requests = [ask("Hi"), ask("What?", tmp_path / "broken.png"), ask("What?", tmp_path / "missing.png"),
                ask("<image>" * 2, scenes / "a.png"), ask("Hi " * 200), ask("What?", scenes / "a.png")]
    ended = []
    answers = generate(loaded, requests, errors="keep", on_answer=lambda i, answer: ended.append((i, answer)))
    assert [bool(answer.error) for answer in answers] == [False, True, True, True, True, False]
    for answer, words in zip(answers[1:5], ("broken.png", "missing.png", "1 pictures for 2", "the model reads 100")):
        assert words in answer.error and not answer.text and "\n" not in answer.error
    assert sorted(ended, key=lambda one: one[0]) == list(enumerate(answers))
    assert answers[0].token_ids == generate(loaded, requests[:1])[0].token_ids
    with pytest.raises(ValueError, match=r"broken\.png"):
        generate(loaded, requests)


# -------------------------------------------------------------------------------------------- guesses and long memories


def lap(loaded, request):
    """-> (Answer, how often the model was called)"""
    calls, logits = [], loaded.model.logits
    loaded.model.logits = lambda *args: (calls.append(1), logits(*args))[1]
    try:
        return generate(loaded, [request])[0], len(calls)
    finally:
        del loaded.model.logits


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "seed": 3}, {"repetition_penalty": 1.1}])
def test_lookup_changes_no_answer(loaded, scenes, options):
    for text in ("A red circle and a red circle and a red", "one two three one two three one", "Hi"):
        request = ask(text, scenes / "a.png", max_new_tokens=60, **options)
        plain, calls = lap(loaded, request)
        ahead, calls_ahead = lap(loaded, dataclasses.replace(request, lookup=5))
        assert ahead.token_ids == plain.token_ids and calls_ahead <= calls == len(plain.token_ids) - 1


def test_lookup_saves_steps(loaded, monkeypatch):
    """A model that counts to five again and again."""
    def count(self, batch, cache, stretches):
        cache.begin(Packing(batch.cu_seqlens), stretches)
        rows = batch.input_ids if len(batch.input_ids) < 9 else batch.input_ids[-1:]
        return one_hot(30 + (rows + 1) % 5, self.config.text.vocab_size).float()

    for name in ("logits", "last_logits"):
        monkeypatch.setattr(Llava, name, count)
    plain, calls = lap(loaded, ask("Hi", max_new_tokens=60))
    ahead, fewer = lap(loaded, ask("Hi", max_new_tokens=60, lookup=5))
    assert plain.token_ids[:6] == [*plain.token_ids[:5], plain.token_ids[0]] and calls == 59
    assert ahead.token_ids == plain.token_ids and fewer < 20


def test_guesses_are_what_followed_before(loaded):
    growing = sample.Growing(loaded, ask("Hi", lookup=3, max_new_tokens=50), 0, "cpu")
    growing.read_ids, growing.token_ids = [1, 2, 3, 9, 8, 2, 3, 4, 5, -200, -200, 7, 1, 2], [3]
    assert growing.guess() == [9, 8, 2]
    growing.read_ids[-2:] = [3, 4]
    growing.token_ids = [5]
    assert growing.guess() == []  # a picture follows
    growing.token_ids = [6]
    assert growing.guess() == []  # never before
    growing.read_ids, growing.token_ids, growing.room = [1, 2, 3, 9, 8, 7, 1, 2], [3], 3
    assert growing.guess() == [9]  # no more than may still come


@pytest.mark.parametrize("drawn", [False, True])
def test_a_conversation_reads_only_what_is_new(loaded, scenes, drawn):
    past, options = sample.Past(), {"temperature": 0.8, "seed": 5} if drawn else {}
    messages, images, lengths = [("human", "<image>\nWhat is it?")], [scenes / "a.png"], []
    for question in ("Its color?", "<image>\nAnd this one?", "Thanks."):
        request = Request(list(messages), list(images), max_new_tokens=9, **options)
        answer, alone = generate(loaded, [request], past=past)[0], generate(loaded, [request])[0]
        assert answer.token_ids == alone.token_ids
        lengths.append((past.reused, len(past.read_ids)))
        images += [scenes / "b.png"] * question.count("<image>")
        messages += [("gpt", answer.text), ("human", question)]
    assert lengths[0][0] == 0 and all(after[0] > before[1] - 12 for before, after in zip(lengths, lengths[1:]))


def test_a_conversation_notices_what_changed(loaded, scenes):
    """Another picture, another first question, a prompt that is shorter or the same: what is read is what is asked."""
    past = sample.Past()
    for text, name in (("Hello", "a"), ("Hello", "b"), ("Hello", "b"), ("Hello you there", "b"), ("Hello", "b"),
                       ("Good day", "b"), ("Good day", None)):
        request = ask(text, *[scenes / f"{name}.png"] * (name is not None))
        assert generate(loaded, [request], past=past)[0].token_ids == generate(loaded, [request])[0].token_ids
    assert 0 < past.reused < len(past.read_ids)


def test_a_conversation_goes_on_when_the_model_begins_to_learn(loaded, scenes):
    """What was read of a frozen model, in inference mode, cannot be written to in any other."""
    learning = [p for p in loaded.model.parameters() if p.requires_grad]
    try:
        for first in (False, True):
            past = sample.Past()
            for text, learns in (("Hello", first), ("Hello you", not first)):
                loaded.model.requires_grad_(learns)
                request = ask(text, scenes / "a.png")
                assert generate(loaded, [request], past=past)[0].token_ids == generate(loaded, [request])[0].token_ids
    finally:
        loaded.model.requires_grad_(False)
        for p in learning:
            p.requires_grad_(True)


def test_a_conversation_that_was_interrupted_goes_on(loaded, scenes):
    """Ctrl-C anywhere: in the reading of the prompt, or after some tokens."""
    past, pieces, request = sample.Past(), [], ask("Describe.", scenes / "a.png", max_new_tokens=20)

    def stop(_, piece):
        pieces.append(piece)
        if len(pieces) == 4:
            raise KeyboardInterrupt

    def stop_at_once(*_):
        raise KeyboardInterrupt

    handle = loaded.model.language_model.model.layers[-1].register_forward_pre_hook(stop_at_once)
    with pytest.raises(KeyboardInterrupt):
        generate(loaded, [request], past=past)
    handle.remove()
    with pytest.raises(KeyboardInterrupt):
        generate(loaded, [request], stop, past=past)
    longer = Request([*request.messages, ("gpt", "".join(pieces)), ("human", "Go on.")], request.images, 12)
    assert generate(loaded, [longer], past=past)[0].token_ids == generate(loaded, [longer])[0].token_ids
    assert past.reused > 20


# ---------------------------------------------------------------------------------------------------------------- draws


def reference(scores, temperature, top_k, top_p):
    """The probabilities (V,) that the textbook draws from, one token after another."""
    chances = [float(x) for x in (torch.tensor(scores, dtype=torch.float64) / temperature).softmax(0)]
    order = sorted(range(len(chances)), key=lambda i: -chances[i])[: top_k or None]
    whole, kept, held = sum(chances[i] for i in order), [], 0.0
    for i in order:
        if held / whole >= (top_p or 2):
            break
        kept.append(i)
        held += chances[i]
    return torch.tensor([chances[i] / held if i in kept else 0.0 for i in range(len(chances))])


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, None, None), (0.5, None, None), (1.0, 3, None), (1.0, 100, None), (2.0, None, 0.5), (1.0, None, 0.01),
    (1.5, 8, 0.7), (1.0, 1, 0.9), (1.0, 0, 1.0)])
def test_draws_follow_the_textbook(loaded, temperature, top_k, top_p):
    scores = (2 * torch.randn(20, generator=torch.Generator().manual_seed(5))).tolist()
    request = ask("Hi", temperature=temperature, top_k=top_k, top_p=top_p)
    growing = sample.Growing(loaded, request, 0, "cpu")
    drawn = torch.tensor([growing.draw(torch.tensor(scores)) for _ in range(4000)])
    found, expected = drawn.bincount(minlength=20) / 4000, reference(scores, temperature, top_k, top_p)
    assert torch.equal(found > 0, expected > 0) or expected[found == 0].max() < 2e-3 and not found[expected == 0].any()
    assert (found - expected).abs().max() < 0.03


def test_a_stop_string_that_is_no_token(loaded):
    """LLaVA v0 ends with ###: it is never shown, nor is a part of it before it is known to be something else."""
    old = dataclasses.replace(loaded, conv_mode="llava_v0")
    growing, pieces = sample.Growing(old, ask("Hi", max_new_tokens=99), 0, "cpu"), []
    for token in loaded.tokenizer.encode("A # cat ## x ###Human: y", bos=False):
        if not growing.ended:
            pieces.append(growing.push(None, token))
    assert "".join(pieces).strip() == growing.text() == "A # cat ## x" and growing.ended
    assert not any(piece.endswith("#") for piece in pieces)
    short = sample.Growing(old, ask("Hi", max_new_tokens=3), 0, "cpu")
    pieces = [short.push(None, loaded.tokenizer.token_to_id(piece)) for piece in ("<0x23>", "<0x23>", "<0x41>")]
    assert pieces == ["", "", "##A"] and short.ended and short.text() == "##A"


@pytest.mark.parametrize("options", [
    {"repetition_penalty": 1.5}, {"repetition_penalty": 0.7}, {"min_p": 0.3, "temperature": 1.3},
    {"repetition_penalty": 1.2, "temperature": 0.6, "top_k": 9, "top_p": 0.8, "min_p": 0.05}])
def test_scores_are_processed_as_transformers_does(loaded, options, monkeypatch):
    """The chances that are drawn from are those of generate's own processors, in its own order."""
    transformers = pytest.importorskip("transformers")
    from transformers.generation import logits_process as theirs
    growing = sample.Growing(loaded, ask("Hi there", **options), 0, "cpu")
    growing.token_ids = [5, 17, 5, 300]
    logits = 3 * torch.randn(1, loaded.config.text.vocab_size, generator=torch.Generator().manual_seed(1))
    said, request = torch.tensor([growing.example.ids + growing.token_ids]), growing.request
    expected = theirs.RepetitionPenaltyLogitsProcessor(request.repetition_penalty)(said, logits.clone())
    ours = growing.penalise(logits[0].clone())
    assert torch.allclose(ours, expected[0], atol=1e-6) and transformers
    if not request.temperature:
        assert growing.draw(ours) == int(expected.argmax())
        return
    for processor in (theirs.TemperatureLogitsWarper(request.temperature), theirs.TopKLogitsWarper(request.top_k),
                      theirs.TopPLogitsWarper(request.top_p or 1.0), theirs.MinPLogitsWarper(request.min_p)):
        expected = processor(said, expected)
    monkeypatch.setattr(torch, "multinomial", lambda chances, *_, **__: (drawn.append(chances), 0)[1])
    drawn = []
    growing.draw(ours)
    assert torch.allclose(drawn[0], expected[0].softmax(-1), atol=1e-6)


def test_logprobs_are_the_models_own(loaded, scenes):
    request = ask("What?", scenes / "a.png", temperature=2.0, seed=1, logprobs=3, max_new_tokens=4)
    answer = generate(loaded, [request])[0]
    example = sample.encode(loaded, request)
    example.ids, example.labels = example.ids + answer.token_ids, [-100] * (len(example.ids) + 4)
    with torch.no_grad():
        scores = loaded.model.logits(data.pack([example], loaded.config))[-5:-1].log_softmax(-1)
    for told, row, token in zip(answer.logprobs, scores, answer.token_ids, strict=True):
        assert told["logprob"] == pytest.approx(row[token].item(), abs=1e-5)
        top = row.topk(3)
        assert list(told["top"]) == top.indices.tolist()
        assert list(told["top"].values()) == pytest.approx(top.values.tolist(), abs=1e-5)
    assert generate(loaded, [ask("What?", logprobs=0)])[0].logprobs[0]["top"] == {}


def test_scores_that_are_no_numbers_are_said(loaded, monkeypatch):
    norm = loaded.model.language_model.model.norm
    monkeypatch.setattr(norm.weight, "data", torch.full_like(norm.weight, float("nan")))
    with pytest.raises(ValueError, match=r"no numbers \(NaN\) in torch.float32"):
        generate(loaded, [ask("Hi")])


def test_stop_texts_end_an_answer(loaded, sentence):
    pieces = []
    request = ask("Hi", stop=["left", "never"], max_new_tokens=100)
    answer = generate(loaded, [request], lambda _, piece: pieces.append(piece))[0]
    assert answer.text == "".join(pieces).strip() == sentence.split("left")[0].strip()


def test_a_seed_repeats_an_answer_and_another_gives_another(loaded):
    first, again, other = generate(loaded, [ask("Hi", temperature=1.0, seed=seed) for seed in (1, 1, 2)])
    assert first.token_ids == again.token_ids != other.token_ids


def test_cold_draws_are_greedy(loaded):
    cold, greedy = generate(loaded, [ask("Hi", temperature=1e-4), ask("Hi")])
    assert cold.token_ids == greedy.token_ids


# --------------------------------------------------------------------------------------------------- prompts and pieces


@pytest.mark.parametrize("text, count, same_as", [
    ("What?", 1, "<image>\nWhat?"),
    ("What?", 2, "<image>\n<image>\nWhat?"),
    ("Here <image-placeholder> what?", 1, "Here <image> what?"),
    ("<image-placeholder><image-placeholder>\nWhat?", 2, "<image><image>\nWhat?")])
def test_pictures_stand_where_the_tags_are_and_otherwise_first(loaded, scenes, text, count, same_as):
    pictures = [scenes / "a.png", scenes / "b.png"][:count]
    ids = sample.encode(loaded, ask(text, *pictures)).ids
    assert ids.count(IMAGE_TOKEN_INDEX) == count
    assert ids == sample.encode(loaded, ask(same_as, *pictures)).ids


def test_pictures_go_before_the_first_question_of_a_conversation(loaded, scenes):
    messages = [("human", "What?"), ("gpt", "A circle."), ("human", "Its color?")]
    tagged = [("human", "<image>\nWhat?"), *messages[1:]]
    assert (sample.encode(loaded, Request(messages, [scenes / "a.png"])).ids
            == sample.encode(loaded, Request(tagged, [scenes / "a.png"])).ids)


def test_a_tag_without_a_picture_is_mere_text(loaded):
    assert IMAGE_TOKEN_INDEX not in sample.encode(loaded, ask("What is an <image> tag?")).ids


@pytest.mark.parametrize("tags, pictures", [(1, 2), (2, 1)])
def test_tags_and_pictures_must_agree(loaded, scenes, tags, pictures):
    with pytest.raises(ValueError, match=f"{pictures} pictures for {tags} <image> tags"):
        generate(loaded, [ask("<image>" * tags, *[scenes / "a.png"] * pictures)])


@pytest.fixture
def sentence(loaded, monkeypatch):
    """What every model now says, whatever it is asked; with characters that take several tokens of one byte each."""
    text = "The circle is d\u00e9j\u00e0 red, \u4f60\u597d left of 3 squares."
    ids = [*loaded.tokenizer.encode(text, bos=False), loaded.tokenizer.eos_token_id]

    def say(self, batch, cache, stretches):
        for stretch in stretches:
            stretch.said = 1 + getattr(stretch, "said", -1)
        return one_hot(torch.tensor([ids[stretch.said] for stretch in stretches]), self.config.text.vocab_size).float()

    monkeypatch.setattr(Llava, "last_logits", say)
    monkeypatch.setattr(Llava, "logits", say)
    return text


def test_pieces_join_to_the_text(loaded, sentence):
    pieces = {i: [] for i in range(5)}
    requests = [ask("Hi", max_new_tokens=limit) for limit in (100, 1, 4, 50, 20)]  # none of them within a character
    answers = generate(loaded, requests, lambda i, piece: pieces[i].append(piece), batch_size=3)
    assert ["".join(pieces[i]).strip() for i in range(5)] == [answer.text for answer in answers]
    assert answers[0].text == sentence and len(pieces[0]) > 5 and all(pieces[0])
    assert "\ufffd" not in "".join(pieces[0])  # never half a character


# --------------------------------------------------------------------------------------------------------- command line


def test_llavas_words_mean_the_same():
    ours = "--model_name_or_path M --image x.jpg --prompt P --bits 4 --data_path q.jsonl --out a.jsonl"
    theirs = "--model-path M --image-file x.jpg --query P --load-4bit --question-file q.jsonl --answers-file a.jsonl"
    parse = sample.build_parser().parse_args
    assert parse(ours.split()) == parse(theirs.split())
    assert vars(parse([]))["bits"] == 16 and parse(["--image-file", "a", "b"]).image == ["a", "b"]


def say(folder, *words):
    """sample.py's command line, within this process."""
    assert sample.main(list(map(str, ["--model_name_or_path", folder, "--device", "cpu", *words]))) == 0


def test_json_is_all_of_stdout_with_exactly_these_keys(folder, loaded, scenes, capsys):
    say(folder, "--image", scenes / "a.png", scenes / "b.png", "--prompt", "Compare.", "--max-new-tokens", 5, "--json")
    said = json.loads(capsys.readouterr().out)
    assert said.keys() == {"text", "token_ids", "prompt_ids", "tokens_per_second", "seconds", "first_token_seconds",
                           "conv_mode"}
    expected = generate(loaded, [ask("Compare.", scenes / "a.png", scenes / "b.png", max_new_tokens=5)])[0]
    assert (said["text"], said["token_ids"]) == (expected.text, expected.token_ids)
    assert said["prompt_ids"] == expected.prompt_ids
    assert said["prompt_ids"].count(-200) == 2 and said["tokens_per_second"] > 0


def test_the_answer_is_all_of_stdout(folder, sentence, capsys):
    say(folder, "--prompt", "Hi")
    assert capsys.readouterr().out == sentence + "\n"


def test_settings_of_the_command_line_reach_the_answer(folder, loaded, capsys):
    say(folder, "--prompt", "Hi", "--max_new_tokens", 12, "--temperature", 0.8, "--top_k", 20, "--top_p", 0.9,
        "--seed", 5, "--json")
    expected = generate(loaded, [ask("Hi", temperature=0.8, top_k=20, top_p=0.9, seed=5)])[0]
    assert json.loads(capsys.readouterr().out)["token_ids"] == expected.token_ids


@pytest.mark.parametrize("odd", [{"temperature": float("nan")}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -3},
                                 {"seed": 2**64}, {"repetition_penalty": 1e-39}, {"repetition_penalty": 1e3}])
def test_numbers_that_cannot_draw_are_refused(odd):
    with pytest.raises(ValueError, match=f"{next(iter(odd))} {next(iter(odd.values()))}"):
        sample.Request([("human", "a")], **odd)


def test_a_temperature_of_almost_nothing_takes_the_likeliest(loaded):
    answers = generate(loaded, [ask("Hi", temperature=temperature) for temperature in (0, 1e-40, 1e-7)])
    assert answers[0].token_ids == answers[1].token_ids == answers[2].token_ids


@pytest.mark.parametrize("flag, found", [("--image", "image"), ("--image_file", "image"), ("--stop", "stop")])
def test_a_flag_for_several_may_also_be_repeated(flag, found):
    args = sample.read_flags(["--prompt", "Hi", flag, "a", "b", flag, "c"])
    assert getattr(args, found) == ["a", "b", "c"] and getattr(sample.read_flags(["--prompt", "Hi"]), found) == []


def test_a_device_that_is_not_here_is_refused():
    with pytest.raises(ValueError, match="--device tpu is not here; use auto or .*cpu"):
        pick_device("tpu")


@pytest.mark.parametrize("words, message", [
    (["--image", "nope.png"], "--image nope.png does not exist"),
    (["--image", __file__, "--attention", "nowhere/out.png"], "--attention nowhere/out.png: expected a name"),
    (["--image", __file__, "--attention", "out.mp3"], "--attention out.mp3: expected a name")])
def test_a_wrong_path_is_told_before_anything_is_loaded(words, message, monkeypatch):
    monkeypatch.setattr(sample, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        sample.main(["--prompt", "What is it?", *words])
