"""Labels: ours, and `--strict_labels`, against the original's algorithm written down a second time (LLAVA.md 2.2-2.6).

`original` below follows the original step by step, on text and token counts only; it shares nothing with data.py but
the tokenizer and the table of templates. Hundreds of conversations are drawn for every template: many turns, many
scripts, empty texts, pictures anywhere, the template's own marks inside somebody's words.
"""

import json
import random

import pytest
from test_data import learned, talk
from test_templates import chat_tokenizer

import data
from formats import templates
from formats.strict_labels import loses_count
from model import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tokenizer import Tokenizer

WORDS = ["What", "color", "is", "the", "cat", "?", "a", "It", "stands", "left.", "USER", "ASSISTANT", "Human", "12",
         "3.50", "#", "##", "Ein Bär", "这是什么", "Что это", "😀👩\u200d👧", "naïve “x”", "\ttab", "  two", "end \n",
         "\n", "\n\n-", "▁", "é"]
MARKS = ["</s>", "<s>", " ASSISTANT: ", "### Human: x", "###", "<|im_end|>", "<|im_end|><|im_start|>assistant\n",
         "[/INST] ", "[INST]", "<unk>", "</s>USER: q"]


def draw(rng):
    """One record: 1 to 6 turns, with a picture or without."""
    marked = rng.random() < 0.2

    def text():
        parts = [rng.choice(WORDS + MARKS * marked) for _ in range(rng.choice([0, 1, 1, 2, 3, 5, 9]))]
        for _ in range(rng.choice([0, 0, 0, 1, 1, 2])):
            parts.insert(rng.randint(0, len(parts)), "<image>")
        return rng.choice(["", " ", "\n", " "]).join(parts)

    first = int(rng.random() < 0.1)
    turns = [{"from": ("human", "gpt")[(first + i) % 2], "value": text()}
             for i in range(rng.choice([1, 2, 2, 2, 3, 4, 6]))]
    if rng.random() < 0.03:
        rng.choice(turns)["from"] = rng.choice(["system", "human", "gpt"])
    return {"id": "x", "conversations": turns} | ({"image": "x.png"} if rng.random() < 0.6 else {})


# ------------------------------------------------------------------------------------------ the original, once more


class Original:
    """The original's way from a record to ids and labels, for one template and tokenizer."""

    def __init__(self, name, tokenizer, start_end=False, limit=None):
        self.name, self.template, self.tokenizer = name, templates.TEMPLATES[name], tokenizer
        self.start_end, self.limit = start_end, limit or 10**9
        self.pad = tokenizer.unk_token_id

    def pieces(self, text):
        """tokenizer_image_token: piece by piece with BOS, which only the whole keeps."""
        chunks = [self.tokenizer.encode(chunk) for chunk in text.split("<image>")]
        offset = int(bool(chunks[0]) and chunks[0][0] == self.tokenizer.bos_token_id)
        ids = chunks[0][:offset]
        for number, chunk in enumerate(chunks):
            ids += [IMAGE_TOKEN_INDEX] * (number > 0) + chunk[offset:]
        return ids

    def prepare(self, text):
        """preprocess_multimodal, for a record with a picture."""
        if "<image>" in text:
            text = ("<image>\n" + text.replace("<image>", "").strip()).strip()
            if "mmtag" in self.name:
                text = text.replace("<image>", "<Image><image></Image>")
        return text.replace("<image>", "<im_start><image><im_end>") if self.start_end else text

    def __call__(self, record):
        """-> (prompt, ids, labels, whether it warned); KeyError and AssertionError as they come."""
        seen = "image" in record
        turns = [(t["from"], self.prepare(t["value"]) if seen else t["value"]) for t in record["conversations"]]
        if self.template.style == "plain":
            assert len(turns) == 2 and "<image>" in turns[0][1]
            prompt = "<image>" + turns[1][1] + "\n"
            ids = self.pieces(prompt)
            masked = len(self.pieces("<image>"))
            return prompt, ids, [IGNORE_INDEX] * masked + ids[masked:], False
        encode = self.pieces if seen else self.tokenizer.encode
        if self.template.style == "single":
            return self.lines(turns, encode, seen)
        prompt = self.prompt(turns)
        ids = encode(prompt) if seen else encode(prompt)[:self.limit]
        return prompt, ids, *self.mask(prompt, ids, encode)

    def prompt(self, turns):
        """Conversation.get_prompt."""
        row, names = self.template, {"human": 0, "gpt": 1}
        if names[turns[0][0]] != 0:
            turns = turns[1:]
        text = "" if row.style == "llama_2" else row.system + row.sep
        for i, (who, message) in enumerate(turns):
            assert names[who] == i % 2
            if row.style == "two":
                text += f"{row.roles[i % 2]}:" + (f" {message}{[row.sep, row.sep2][i % 2]}" if message else "")
            elif row.style == "mpt":
                text += row.roles[i % 2] + message + row.sep if message else row.roles[i % 2]
            else:
                assert message or i
                if i == 0 and row.system:
                    message = f"<<SYS>>\n{row.system}\n<</SYS>>\n\n{message}"
                if message:
                    text += f" {message} {row.sep2}" if i % 2 else f"{row.sep}[INST] {message} [/INST]"
        return text.lstrip(row.sep) if row.style == "llama_2" else text

    def mask(self, prompt, ids, encode):
        """preprocess_v1, preprocess_llama_2, and preprocess_mpt as it was in 1.1. -> (labels, warned)"""
        row, labels, style = self.template, list(ids), self.template.style
        total = len([token for token in ids if token != self.pad])
        if style == "mpt":
            parts = prompt.split(row.sep)
            found = [row.sep.join(parts[:3])]
            for i in range(3, len(parts), 2):
                found.append(row.sep.join(parts[i:i + 2]))
            split_at, cur = row.sep + row.roles[1], 0
        else:
            found = prompt.split(row.sep2)
            split_at, cur = " ASSISTANT: " if style == "two" else "[/INST] ", 1
        labels[:cur] = [IGNORE_INDEX] * cur
        for i, text in enumerate(found):
            halves = text.split(split_at)
            if text == "" or len(halves) != 2:
                break
            if style == "mpt":
                whole, asked = len(encode(text)) + len(encode(row.sep)), len(encode(halves[0] + split_at))
            else:
                correction = int(style == "two" and i != 0 and not self.tokenizer.legacy)
                whole = len(encode(text)) - correction
                asked = len(encode(halves[0] + split_at)) - 2 - correction
            labels[cur:cur + asked] = [IGNORE_INDEX] * len(labels[cur:cur + asked])
            cur += whole
        labels[cur:] = [IGNORE_INDEX] * len(labels[cur:])
        if cur < self.limit and cur != total:
            return [IGNORE_INDEX] * len(ids), True
        return labels, False

    def lines(self, turns, encode, seen):
        """preprocess's last branch: LLaVA v0."""
        names = {"human": "Human", "gpt": "Assistant"}
        texts = [self.template.system + "\n\n"]
        texts += [f"### {names.get(who.lower(), 'unknown')}: {message}\n" for who, message in turns]
        prompt = "".join(texts) + "### "
        ids = encode(prompt) if seen else encode(prompt)[:self.limit]
        lengths = [len(encode(text)) if seen else len([t for t in encode(text)[:self.limit] if t != self.pad])
                   for text in texts]
        labels, cur = list(ids), lengths[0]
        labels[:cur] = [IGNORE_INDEX] * len(labels[:cur])
        for (who, _), length in zip(turns, lengths[1:]):
            if who == "human":
                labels[cur + 2:cur + length] = [IGNORE_INDEX] * len(labels[cur + 2:cur + length])
            cur += length
        return prompt, ids, labels, False


def compare(original, records, same_ids=True, same_labels=True):
    """Every record through both. -> how many (have equal labels, are lost by the original alone)"""
    agreed = mended = 0
    name, tokenizer, limit = original.name, original.tokenizer, original.limit
    for record in records:
        try:
            prompt, ids, labels, warned = original(json.loads(json.dumps(record)))
        except (AssertionError, KeyError):
            with pytest.raises(ValueError):
                data.render_record(record, tokenizer, name, original.start_end)
            continue
        roles = [turn["from"] for turn in record["conversations"]]
        if name == "plain" and ("image" not in record or roles != ["human", "gpt"]):
            continue  # the original does not look; here these are errors
        strict = data.render_record(record, tokenizer, name, original.start_end, limit, strict=True)
        assert (strict.prompt, strict.ids, strict.labels) == (prompt, ids, labels), record
        assert (data.MASKED in strict.notes) == warned
        ours = data.render_record(record, tokenizer, name, original.start_end, limit)
        assert ours.ids == ids or not same_ids, record
        unusual = "<unk>" in prompt and tokenizer.unk_token_id in ids  # counted as padding
        mimics = any(mark in json.dumps(record) for mark in ("</s>", "[/INST] ", " ASSISTANT: ", "<|im_end|>"))
        # After an empty answer, the original takes ChatML's next question for it.
        asked_as_answer = original.template.style == "mpt" and "empty answer" in ours.notes
        if warned:
            mended += 1
            assert mimics or loses_count(original.template, prompt, tokenizer) or not same_labels, record
            text = "".join(t["value"] for t in record["conversations"][1:] if t["from"] == "gpt")
            assert not text or set(ours.labels) != {IGNORE_INDEX} or not same_labels, record
        elif not (unusual or mimics or asked_as_answer) and same_labels:
            agreed += 1
            assert ours.labels == labels, record
            assert data.MENDED not in ours.notes
    return agreed, mended


def draw_many(seed, count=100):
    """Records of one seed."""
    rng = random.Random(seed)
    return [draw(rng) for _ in range(count)]


# -------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("version", ["v1", "plain"])
def test_every_recorded_conversation(gold, version):
    """--strict_labels is the original to the letter, its masked samples included."""
    tokenizer = Tokenizer.from_folder(gold / "ckpt/lm_mha")
    recorded = json.loads((gold / f"conversations/{version}__slow_legacy_false__2048.json").read_text())
    for record, sample in zip(data.read_records(gold / "data/conversations.json"), recorded["samples"]):
        if "error" not in sample:
            example = data.render_record(record, tokenizer, version, model_max_length=2048, strict=True)
            assert (example.ids, example.labels) == (sample["input_ids"], sample["labels"]), record["id"]
            assert (data.MASKED in example.notes) == ("warning" in sample) and data.MENDED not in example.notes


# LLAVA.md 2.6: what is said -> what the original learns of it (None: it masks the sample), what is learned here
EDGES = {
    "empty answer, the only one": (talk("q", ""), None, []),
    "empty answer, another round": (talk("q", "", "q2", "b"), [" b</s>"], [" b</s>"]),
    "empty question": (talk("", "a"), None, [" a</s>"]),
    "the end mark in a question": (talk("q </s>", "a"), None, [" a</s>"]),
    "the end mark in an answer": (talk("q", "a </s> b"), None, [" a </s> b</s>"]),
    "the header in an answer": (talk("q", "x ASSISTANT: y"), None, [" x ASSISTANT: y</s>"]),
    "the header in a question": (talk("x ASSISTANT: y", "a"), None, [" a</s>"]),
    "last turn from the human": (talk("q", "a", "q2"), None, [" a</s>"]),
    "the unknown token": (talk("q <unk>", "a"), None, [" a</s>"]),
    "nothing unusual": (talk("q", "a", "q2", " b"), [" a</s>", "  b</s>"], [" a</s>", "  b</s>"]),
}


@pytest.mark.parametrize("edge", EDGES)
def test_what_triggers_a_mismatch(llama_s, edge):
    record, theirs, ours = EDGES[edge]
    strict = data.render_record(record, llama_s[0], "v1", strict=True)
    assert learned(strict) == (theirs or []) and (data.MASKED in strict.notes) == (theirs is None)
    example = data.render_record(record, llama_s[0], "v1")
    assert learned(example) == ours and data.MASKED not in example.notes
    assert (data.MENDED in example.notes) == (theirs is None and ours != [])


def test_first_turn_from_gpt_and_two_of_one_speaker(llama_s):
    record = talk("q", "a")
    record["conversations"].insert(0, {"from": "gpt", "value": "hi"})
    for strict in (False, True):
        example = data.render_record(record, llama_s[0], "v1", strict=strict)
        assert learned(example) == [" a</s>"] and example.notes == ["first turn from gpt: it is left out"]
    record["conversations"][1]["from"] = "gpt"
    with pytest.raises(ValueError, match="two turns of one speaker"):
        data.render_record(record, llama_s[0], "v1", strict=True)


def test_ids_that_llava_md_lists(llama_s):
    """The golden ids of LLAVA.md 2.5, for both values of legacy."""
    picture = talk("<image>\nWhat is this?", "A cat.", "Color?", "Black.", image="x.png")
    example = data.render_record(picture, llama_s[0], "v1")
    header = [3148, 1001, 29901] if llama_s[0].legacy else [11889, 29901]
    assert example.ids[-32 - llama_s[0].legacy:][:9] == [3148, 1001, 29901, 29871, -200, 29871, 13, 5618, 338]
    end = [319, 1799, 9047, 13566, 29901]
    place = len(example.ids) - len([*header, 10958, 29973, *end, 6054, 29889, 2])
    assert example.ids[place - 4: place] == [319, 6635, 29889, 2]
    assert example.ids[place: place + len(header)] == header and example.ids[-8:] == [*end, 6054, 29889, 2]
    assert [x for x in example.labels if x != IGNORE_INDEX] == [319, 6635, 29889, 2, 6054, 29889, 2]
    caption = data.render_record(talk("<image>", "a cat on a mat", image="x.png"), llama_s[0], "plain")
    assert caption.ids == [1, -200, 263, 6635, 373, 263, 1775, 13] and caption.labels[2:] == caption.ids[2:]
    first = data.render_record(talk("q", "a cat."), llama_s[0], "template_v0")
    taught = [x for x in first.labels if x != IGNORE_INDEX]
    pieces = [llama_s[0].decode([x]) for x in taught]
    assert pieces == ["##", "#", "##", "#", "Ass", "istant", ":", "a", "cat", ".", "\n", "##", "#", ""]


BY_COUNT = [name for name, row in templates.TEMPLATES.items() if row.style != "mpt"]


@pytest.fixture(scope="module", params=[False, True], ids=["legacy_false", "legacy_true"])
def llama_s(gold, request, tmp_path_factory):
    """LLaMA's tokenizer with one value of `legacy`: (as it is, with <im_start> and <im_end>)."""
    folder = tmp_path_factory.mktemp("llama")
    config = json.loads((gold / "ckpt/lm_mha/tokenizer_config.json").read_text()) | {"legacy": request.param}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes((gold / "ckpt/lm_mha/tokenizer.json").read_bytes())
    return Tokenizer.from_folder(folder), Tokenizer.from_folder(folder, templates.START_END)


@pytest.mark.parametrize("name", BY_COUNT)
def test_drawn_conversations_with_llama_s_tokenizer(llama_s, name):
    for start_end, tokenizer in enumerate(llama_s):
        agreed, mended = compare(Original(name, tokenizer, bool(start_end)), draw_many(f"{name} {start_end}"))
        assert agreed > 5 and (mended > 10 or templates.TEMPLATES[name].style in ("single", "plain"))
        compare(Original(name, tokenizer, bool(start_end), limit=60), draw_many(name, 20), same_labels=False)


@pytest.mark.parametrize("name", ["v1", "llava_llama_2", "llava_v0", "plain"])
def test_drawn_conversations_with_a_small_tokenizer(tiny_tokenizer, tmp_path, name):
    """Without the gold; legacy, since the correction for USER holds for LLaMA's own pieces only."""
    config = json.loads((tiny_tokenizer / "tokenizer_config.json").read_text()) | {"legacy": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_bytes((tiny_tokenizer / "tokenizer.json").read_bytes())
    compare(Original(name, Tokenizer.from_folder(tmp_path)), draw_many(name), same_labels=name == "plain")


@pytest.mark.parametrize("bos", ["<|endoftext|>", "<|im_start|>"])
@pytest.mark.parametrize("name", templates.TEMPLATES)
def test_drawn_conversations_with_a_byte_level_tokenizer(tmp_path, name, bos):
    """ChatML's labels as LLaVA 1.1 counts them. Where the prompt itself begins with the BOS, the original loses the
    token behind each picture: ours does so with --strict_labels only."""
    chat_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"bos_token": bos, "unk_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(tmp_path)
    chatml = templates.TEMPLATES[name].style == "mpt"
    agreed, mended = compare(Original(name, tokenizer), draw_many(name), chatml and bos == "<|endoftext|>",
                                chatml and bos == "<|endoftext|>")
    assert not chatml or bos == "<|im_start|>" or (agreed > 15 and mended > 10)
