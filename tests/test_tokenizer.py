"""Tokenizer: the slow LLaMA tokenizer's ids for both values of `legacy`, plain library behaviour for the others."""

import json
import random
import re
import shutil

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tokenizer import TextStream, Tokenizer

TEXTS = ["USER: hi</s>USER: ho", "", " ", "  two  spaces ", "</s>", "<s>x", "a\n\n\tb", "Bär 🐻👩‍👧 日本",
         "x</s> y<unk>z ", "▁a ▁"]


def copy(source, folder, **changes):
    """A copy of a tokenizer's folder with other keys in tokenizer_config.json (None: without the key)."""
    folder.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory):
    """A folder with a byte-level tokenizer, as SmolLM2's: no BOS is added."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    folder = tmp_path_factory.mktemp("byte_level")
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|end|>", "eos_token": "<|end|>"}))
    return folder


# ------------------------------------------------------------------------------------------------------- encoding


def test_the_original_s_ids_after_an_end_of_turn(gold, tmp_path):
    """LLAVA.md 2.4: the header after </s> is `USER` or `_US ER`, by `legacy`; a missing key means True."""
    source = gold / "ckpt/lm_mha"
    expected = {False: [2, 11889, 29901], True: [2, 3148, 1001, 29901], None: [2, 3148, 1001, 29901]}
    for legacy, ids in expected.items():
        tokenizer = Tokenizer.from_folder(copy(source, tmp_path / str(legacy), legacy=legacy))
        assert tokenizer.encode("hi</s>USER:") == [1, 7251, *ids]
        assert tokenizer.encode("hi</s>USER:", bos=False) == [7251, *ids]


@pytest.mark.parametrize("legacy", [True, False])
def test_equals_sentencepiece_with_the_slow_tokenizer_s_rules(gold, tmp_path, legacy):
    """SentencePiece itself on Meta's pieces, wrapped as transformers 4.37 does, on 400 random texts."""
    sentencepiece = pytest.importorskip("sentencepiece")
    proto = (gold / "ckpt/lm_mha/tokenizer.model").read_bytes()
    if not legacy:
        proto += b"\x1a\x02\x18\x00"  # protobuf merges what comes twice: normalizer_spec {add_dummy_prefix: false}
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    tokenizer = Tokenizer.from_folder(copy(gold / "ckpt/lm_mha", tmp_path / "t", legacy=legacy))
    special = {"<unk>": 0, "<s>": 1, "</s>": 2}

    def slow(text):
        text = text if legacy or not text else "▁" + text.replace("▁", " ")
        ids = []
        for part in re.split("(<unk>|<s>|</s>)", text):
            ids += [special[part]] if part in special else model.encode(part)
        orphan = not legacy and ids[:1] == [29871] and len(ids) > 1 and ids[1] in special.values()
        return [1, *(ids[1:] if orphan else ids)]

    words = ["USER", " ", "  ", "▁", "</s>", "<s>", "<unk>", "\n", "é", "日本", "🐻", "12", ".", "hello", "<image>"]
    dice = random.Random(0)
    for _ in range(400):
        text = "".join(dice.choices(words, k=dice.randrange(9)))
        assert tokenizer.encode(text) == slow(text), repr(text)


def test_legacy_is_what_tokenizer_json_does_by_itself(tiny_tokenizer, tmp_path):
    ours = Tokenizer.from_folder(copy(tiny_tokenizer, tmp_path / "t", legacy=True))
    library = tokenizers.Tokenizer.from_file(str(tiny_tokenizer / "tokenizer.json"))
    for text in TEXTS:
        assert ours.encode(text, bos=False) == library.encode(text).ids, text


def test_only_the_first_stretch_has_the_prefix_without_legacy(tiny_tokenizer):
    ours = Tokenizer.from_folder(tiny_tokenizer)
    space, a = ours.token_to_id("▁"), ours.token_to_id("a")
    assert ours.encode("</s>a") == [1, 2, a]  # neither an orphaned prefix nor one before the a
    assert ours.encode("a</s>a") == [1, space, a, 2, a]
    assert ours.encode(" </s>") == [1, space, space, 2]


def test_tokens_that_only_the_config_files_know(tiny_tokenizer, tmp_path):
    """<im_start> in added_tokens.json splits the text; the prefix stays alone before it, goes before named ones."""
    folder = copy(tiny_tokenizer, tmp_path / "t")
    (folder / "added_tokens.json").write_text(json.dumps({"<im_start>": 400, "<im_end>": 401}))
    ours = Tokenizer.from_folder(folder)
    assert (len(ours), ours.token_to_id("<im_end>")) == (402, 401)
    space, a = ours.token_to_id("▁"), ours.token_to_id("a")
    assert ours.encode("<im_start>a", bos=False) == [space, 400, a]
    assert ours.encode("a<im_end>", bos=False) == [space, a, 401]
    assert ours.decode([400, space, a]) == "a"
    new = Tokenizer.from_folder(tiny_tokenizer, ["<im_start>", "</s>"])  # added for training, as the original does
    assert (len(new), new.encode("<im_start>a</s>", bos=False)) == (401, [400, a, 2])
    (folder / "added_tokens.json").write_text(json.dumps({"<im_start>": 402}))
    with pytest.raises(ValueError, match="added token '<im_start>' has id 402; expected ids without a gap"):
        Tokenizer.from_folder(folder)


def test_the_picture_token_of_llava_hf_is_plain_text(tiny_tokenizer, tmp_path):
    folder = copy(tiny_tokenizer, tmp_path / "t")
    extra = {"400": {"content": "<image>", "special": True}, "401": {"content": "<pad>", "special": True}}
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"added_tokens_decoder": extra}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours, plain = Tokenizer.from_folder(folder), Tokenizer.from_folder(tiny_tokenizer)
    assert ours.encode("an <image> here") == plain.encode("an <image> here")
    assert ours.encode("<pad>", bos=False)[-1] == 401 and len(ours) == 402


def test_other_tokenizers_are_the_library_s(byte_level):
    ours = Tokenizer.from_folder(byte_level)
    library = tokenizers.Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    assert not ours.adds_bos and ours.bos_token_id == ours.eos_token_id == library.token_to_id("<|end|>")
    for text in [*TEXTS, "a<|end|>b"]:
        assert ours.encode(text) == library.encode(text).ids
        assert ours.encode_with_spans(text)[1] == library.encode(text).offsets


@pytest.mark.parametrize("kind", ["tiny_tokenizer", "byte_level"])
def test_spans_are_the_tokens_characters(kind, request):
    ours = Tokenizer.from_folder(request.getfixturevalue(kind))
    for text in TEXTS:
        ids, spans = ours.encode_with_spans(text)
        assert len(ids) == len(spans) and spans == sorted(spans)
        assert {k for start, end in spans for k in range(start, end)} == set(range(len(text)))  # none is left out
    if kind == "tiny_tokenizer":
        assert ours.encode_with_spans("a</s>é")[1] == [(0, 0), (0, 0), (0, 1), (1, 5), (5, 6), (5, 6)]


# ------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("kind", ["tiny_tokenizer", "byte_level"])
def test_a_stream_gives_whole_characters_and_in_the_end_the_whole_text(kind, request):
    ours = Tokenizer.from_folder(request.getfixturevalue(kind))
    for text in TEXTS:
        stream, ids = TextStream(ours), ours.encode(text, bos=False)
        pieces = [stream.push(i) for i in ids]
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces) + stream.flush() == ours.decode(ids)
    broken = ours.encode("🐻", bos=False)[:-1]
    stream = TextStream(ours)
    assert "".join(stream.push(i) for i in broken).strip() == "" and "\ufffd" in stream.flush()


def test_decode_and_special_tokens(tiny_tokenizer):
    ours = Tokenizer.from_folder(tiny_tokenizer)
    ids = ours.encode("The circle is red.</s>")
    assert ours.decode(ids) == "The circle is red."
    assert ours.decode(ids, skip_special_tokens=False).endswith("red.</s>")
    assert ours.special_ids == {0, 1, 2} and (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, None)


# -------------------------------------------------------------------------------------------------- files and mistakes


def test_where_a_chat_template_may_stand(tiny_tokenizer, tmp_path):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    folder = copy(tiny_tokenizer, tmp_path / "t", chat_template=named)
    assert Tokenizer.from_folder(folder).chat_template == "D"
    (folder / "chat_template.jinja").write_text("J")
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.chat_template == "J"
    assert set(tokenizer.folder_files) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def test_mistakes_name_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"expected tokenizer\.json, found no tokenizer"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"only tokenizer\.model, which is not read yet"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected JSON"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: .* no key 'model'"):
        Tokenizer.from_folder(tmp_path)
