"""Tokenizer: the slow LLaMA tokenizer's ids for both values of `legacy`, from tokenizer.json or from SentencePiece's
tokenizer.model; plain library behaviour for other kinds."""

import io
import json
import random
import re
import shutil

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tokenizer import MANNERS, TextStream, Tokenizer

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


# ----------------------------------------------------------------------------------- the slow tokenizer as a reference

SCRIPTS = [
    "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "äöüßéèçñøåłşžőı", "αβγδεζηθικλμνξοπρςστυφχψω",
    "абвгдежзийклмнопрстуфхцчшщыьэюя", "აბგდევზთიკლმნოპჟრსტუფქღყშჩც", "אבגדהוזחטיכלמנסעפצקרשת",
    "ابتثجحخدذرزسشصضطظعغفقكلمنهوي", "अआइईउऊएऐओऔकखगघचछजझटठडढतथदधनपफबभमयरलवशषसह\u093e\u093f\u0940\u0941",
    "กขคงจฉชซญดตถทธนบปผพฟมยรลวศสหอ\u0e31\u0e34", "가나다라마바사아자차카타파하한국어말글",
    "あいうえおかきくけこさしすせそアイウエオカキクケコ", "日本語中文字漢水火木金土人大小"]
EMOJI = ["🐻", "👩‍👧", "👍🏽", "🇩🇪", "❤️", "🤷🏿‍♂️"]
ODD = ["\0", "\x07", "\x1b", "\x7f", "\x85", "\u00a0", "\u0301", "e\u0301\u0323", "\u200b", "\u200f", "\u2028",
       "\u3000", "\ufeff", "\ufffd", "\uffff", "\U0010ffff", "▁", "▁▁", "<", "</", "s>", "<0x41>", ".", ",", "'", "|"]
MARKS = ["<s>", "</s>", "<unk>", "<im_start>", "<im_end>", "[PAD]", "<u>", "<u>>", "<c>", "<image>"]
WORDS = ["".join(random.Random(f"{script} {i}").choices(script, k=1 + i % 7)) for script in SCRIPTS for i in range(60)]


def corpus():
    """Lines in every script, with numbers and runs of spaces, to train a SentencePiece model on."""
    dice = random.Random("corpus")
    for _ in range(1500):
        words = dice.choices([*WORDS[::3], *map(str, range(0, 10**6, 9999))], k=9)
        yield " " * dice.choice([0, 0, 2, 4, 8]) + "".join(word + dice.choice([" ", " ", "  ", ", "]) for word in words)


def multilingual(count, words=WORDS):
    """Texts put together from words, special tokens, white space, emoji, digits, controls and any characters at all."""
    dice = random.Random("texts")
    spaces = [*(" " * n for n in (1, 1, 1, 1, 2, 3, 7, 17, 40)), "\n", "\n\n", "\t", "\r\n", " \n "]
    characters = [chr(dice.choice([dice.randrange(0xD800), dice.randrange(0xE000, 0x110000)])) for _ in range(count)]
    numbers = [str(dice.randrange(10 ** n)) for n in range(1, 10)]
    parts = [words] * 4 + [spaces] * 3 + [MARKS] * 2 + [numbers, characters, EMOJI, ODD]
    drawn = ("".join(dice.choice(dice.choice(parts)) for _ in range(dice.randint(1, 16))) for _ in range(count))
    return ["", " ", "▁", "\0", *MARKS, *(mark + " x" for mark in MARKS), *drawn]


def train(**settings):
    """The bytes of a tokenizer.model, trained with LLaMA's settings on texts in every script."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=corpus(), model_writer=model, **{
        "model_type": "bpe", "byte_fallback": True, "split_digits": True, "normalization_rule_name": "identity",
        "allow_whitespace_only_pieces": True, "remove_extra_whitespaces": False, "vocab_size": 900, "num_threads": 1,
        "hard_vocab_limit": False, "minloglevel": 2} | settings)
    return model.getvalue()


def slow_tokenizer(model, legacy, marks, named):
    """encode(text) of transformers 4.37's LlamaTokenizer: SentencePiece for each stretch of text, and its rules around.

    model: the bytes of tokenizer.model; marks: {added token: (id, strips on its left, on its right)}; named: those with
    a name, such as bos_token. (LLAVA.md 2.4; checked against transformers 4.37.2 itself when this was written.)
    """
    if not legacy:
        model += b"\x1a\x02\x18\x00"  # protocol buffers merge: normalizer_spec {add_dummy_prefix: false}
    processor = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_proto=model)
    split = re.compile("(" + "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True)) + ")")

    def encode(text):
        parts = split.split(text if legacy or not text else "▁" + text.replace("▁", " "))
        for i in range(1, len(parts), 2):
            _, left, right = marks[parts[i]]
            parts[i - 1] = parts[i - 1].rstrip() if left else parts[i - 1]
            parts[i + 1] = parts[i + 1].lstrip() if right else parts[i + 1]
        if not legacy and parts[0] == "▁" and len(parts) > 1 and parts[1] in named:
            parts[0] = ""
        return [i for part in parts for i in ([marks[part][0]] if part in marks else processor.encode(part))]

    return encode


def model_folder(folder, model, config=None, **files):
    """A folder with tokenizer.model and the JSON files that are given."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model)
    for name, values in {"tokenizer_config": config, **files}.items():
        if values is not None:
            (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def saved(tokenizer, folder):
    """A folder with the files that belong to a tokenizer."""
    folder.mkdir()
    for name, content in tokenizer.folder_files.items():
        (folder / name).write_bytes(content)
    return folder


MODELS = {"small": {"vocab_size": 600}, "large": {"vocab_size": 3000}, "no_bytes": {"byte_fallback": False},
          "no_prefix": {"add_dummy_prefix": False},  # Yi
          "user_defined": {"user_defined_symbols": ["<u>", "<u>>", "▁▁▁", "\n"], "control_symbols": ["<c>"]}}


@pytest.fixture(scope="session")
def tokenizer_model(gold):
    """tokenizer_model(kind) -> bytes, trained once; "meta": LLaMA's own 32,000 pieces."""
    trained = {}

    def model_of(kind):
        if kind == "meta":
            return (gold / "ckpt/lm_mha/tokenizer.model").read_bytes()
        if kind not in trained:
            trained[kind] = train(**MODELS[kind])
        return trained[kind]

    return model_of


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("kind", ["meta", *MODELS])
def test_tokenizer_model_gives_the_slow_tokenizer_s_ids(tokenizer_model, tmp_path, kind, legacy):
    """On 2000 texts in 13 scripts, also when its files were written and read again; and decode() is SentencePiece's."""
    model = tokenizer_model(kind)
    processor = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_proto=model)
    size = processor.get_piece_size()
    added = {"<im_patch>": size, "<im_start>": size + 1, "<im_end>": size + 2}  # unnamed, as in LLaVA's first models
    folder = model_folder(tmp_path / "t", model, {"legacy": legacy}, added_tokens=added,
                          special_tokens_map={"pad_token": "[PAD]"})  # nobody's piece: it gets the next id
    ours = Tokenizer.from_folder(folder)
    again = Tokenizer.from_folder(saved(ours, tmp_path / "again"))
    named = {"<unk>": 0, "<s>": 1, "</s>": 2, "[PAD]": size + 3}
    marks = {content: (i, False, False) for content, i in (added | named).items()}
    slow = slow_tokenizer(model, legacy, marks, named)
    for text in multilingual(2000, [*WORDS, "USER", "ASSISTANT", "hello", "What is this"]):
        ids, spans = ours.encode_with_spans(text)
        assert ids == [1, *slow(text)] == again.encode(text), repr(text)
        assert {k for start, end in spans for k in range(start, end)} == set(range(len(text))), repr(text)
        plain = [i for i in ids if i not in ours.special_ids and not processor.is_control(i)]
        assert ours.decode(ids).strip() == processor.decode(plain).strip()
    assert len(ours) == len(again) == size + 4 and ours.pad_token_id == again.pad_token_id == size + 3


@pytest.mark.parametrize("legacy", [True, False, None])
def test_both_files_and_one_of_them_are_the_same_tokenizer(gold, tmp_path, legacy):
    """Which file the pieces come from changes no id, `legacy` does."""
    both = copy(gold / "ckpt/lm_mha", tmp_path / "json", legacy=legacy)
    alone = model_folder(tmp_path / "model", (gold / "ckpt/lm_mha/tokenizer.model").read_bytes(), {"legacy": legacy})
    one, other = Tokenizer.from_folder(both), Tokenizer.from_folder(alone)
    assert one.legacy == other.legacy == (legacy is not False)
    for text in multilingual(500):
        assert one.encode_with_spans(text) == other.encode_with_spans(text)


@pytest.mark.parametrize("legacy", [True, False])
def test_added_tokens_that_swallow_the_space_beside_them(tokenizer_model, tmp_path, legacy):
    model = tokenizer_model("small")
    size = len(Tokenizer.from_folder(model_folder(tmp_path / "bare", model)))
    marks = {"<unk>": (0, False, False), "<s>": (1, False, False), "</s>": (2, False, True), "<c>": (size, True, False),
             "<u>": (size + 1, True, True), "<u>>": (size + 2, False, False), " <im_end>": (size + 3, False, False)}
    decoder = {i: MANNERS | {"content": content, "lstrip": left, "rstrip": right}
               for content, (i, left, right) in marks.items()}
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "additional_special_tokens": ["<u>"]}
    ours = Tokenizer.from_folder(model_folder(
        tmp_path / "t", model, {"legacy": legacy, "added_tokens_decoder": decoder} | names,
        special_tokens_map={"pad_token": "<nobody>"}))  # not read where the config lists the tokens
    slow = slow_tokenizer(model, legacy, marks, ["<s>", "</s>", "<unk>", "<u>"])
    for text in multilingual(1000):
        assert ours.encode(text) == [1, *slow(text)], repr(text)
    assert ours.pad_token_id is None


@pytest.mark.parametrize("legacy", [True, False])
def test_new_tokens_get_the_original_s_ids_and_are_written(tokenizer_model, tmp_path, legacy):
    """LLAVA.md 1.4: [PAD] 32000, then <im_patch>, <im_start>, <im_end>; transformers reads what we write."""
    transformers = pytest.importorskip("transformers")
    folder = model_folder(tmp_path / "t", tokenizer_model("meta"), {"legacy": legacy, "add_bos_token": True})
    ours = Tokenizer.from_folder(folder)
    assert ours.add_tokens(["[PAD]"]) == 1 and ours.pad_token_id == 32000
    assert ours.add_tokens(["<im_patch>", "</s>"]) == 1 and ours.add_tokens(["<im_start>", "<im_end>", "[PAD]"]) == 2
    assert [*map(ours.token_to_id, ("<im_patch>", "<im_start>", "<im_end>"))] == [32001, 32002, 32003]
    assert ours.encode("<im_start>a<im_end>") == [1, 32002, 263 if legacy else 29874, 32003] and len(ours) == 32004
    assert ours.decode(ours.encode("a<im_end>")) == "a"
    files = ours.folder_files
    assert files["tokenizer.model"] == tokenizer_model("meta")
    assert json.loads(files["added_tokens.json"]) == {
        "[PAD]": 32000, "<im_patch>": 32001, "<im_start>": 32002, "<im_end>": 32003}
    assert json.loads(files["special_tokens_map.json"])["pad_token"] == "[PAD]"
    theirs = transformers.AutoTokenizer.from_pretrained(saved(ours, tmp_path / "out"))
    again = Tokenizer.from_folder(tmp_path / "out")
    assert len(theirs) == 32004 and theirs.pad_token_id == 32000 and again.legacy == legacy
    for text in multilingual(300):
        assert again.encode(text) == ours.encode(text)
        if not text.startswith((" ", "▁")) and not any(mark in text for mark in MARKS):  # else transformers 5 differs
            assert theirs(text)["input_ids"] == ours.encode(text), repr(text)


def test_files_that_nothing_was_added_to_stay_as_they_are(tiny_tokenizer, byte_level):
    for folder in (tiny_tokenizer, byte_level):
        files = Tokenizer.from_folder(folder, ["</s>"] if folder == tiny_tokenizer else []).folder_files
        assert files == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_new_tokens_of_a_byte_level_tokenizer(byte_level, tmp_path):
    ours = Tokenizer.from_folder(byte_level, ["<im_start>", "<im_end>"])
    size = len(Tokenizer.from_folder(byte_level))
    again = Tokenizer.from_folder(saved(ours, tmp_path / "t"))
    for tokenizer in (ours, again):
        assert len(tokenizer) == size + 2 and tokenizer.encode("a<im_end>")[-1] == size + 1
        assert tokenizer.decode(tokenizer.encode("<im_start>a")) == "a"


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
    with pytest.raises(ValueError, match=r"expected tokenizer\.json or tokenizer\.model, found no tokenizer"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected JSON"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected JSON \(an object, not \[1\]\)"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: .* no key 'model'"):
        Tokenizer.from_folder(tmp_path)


def test_a_broken_tokenizer_model(tokenizer_model, tmp_path):
    """Cut off anywhere, something else, or damaged: one sentence that names the file."""
    whole, path = tokenizer_model("small"), tmp_path / "tokenizer.model"
    dice = random.Random(0)
    cuts = [whole[:dice.randrange(len(whole) - 5)] for _ in range(60)]
    pointer = b"version https://git-lfs.github.com/spec/v1\n"  # a clone without its large files
    for content in [b"", b"\0", pointer, *map(dice.randbytes, range(1, 40)), *cuts]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer\.model: expected a SentencePiece model, found something else"):
            Tokenizer.from_folder(tmp_path)


def test_a_tokenizer_model_that_is_not_llama_s(tokenizer_model, tmp_path):
    def piece(text, kind):
        return b"\n" + bytes([len(text) + 4, 10, len(text)]) + text + bytes([24, kind])

    small = tokenizer_model("small")
    unknown = small.index(b"<unk>")
    no_unknown = small[:unknown] + small[unknown:].replace(b"\x18\x02", b"\x18\x01", 1)
    strange = {
        "kind Unigram": train(model_type="unigram"), "kind Word": train(model_type="word", byte_fallback=False),
        r"replaces characters \(nmt_nfkc\)": train(normalization_rule_name="nmt_nfkc"),
        "removes double spaces": train(remove_extra_whitespaces=True),
        "puts spaces behind words": train(treat_whitespace_as_suffix=True),
        "no piece for what is unknown": no_unknown, "a piece twice": small + piece(b"<s>", 3),
        "not in use": small + piece(b"unused", 5)}
    for what, model in strange.items():
        (tmp_path / "tokenizer.model").write_bytes(model)
        with pytest.raises(ValueError, match=rf"tokenizer\.model: .* {what}.*only LLaMA's sort"):
            Tokenizer.from_folder(tmp_path)


def test_files_that_contradict_each_other(tiny_tokenizer, tokenizer_model, tmp_path):
    folder = copy(tiny_tokenizer, tmp_path / "t")
    for added, message in (
            ({"<im_start>": 401}, "t: no token has id 400, but one has 401; expected ids without a gap"),
            ({"<im_start>": 5}, r"added_tokens\.json: token '<im_start>' has id 5, but .* says 5 is '<0x02>'"),
            ({"</s>": 400}, r"added_tokens\.json: token '</s>' has id 400, but another file beside it says it has 2")):
        (folder / "added_tokens.json").write_text(json.dumps(added))
        with pytest.raises(ValueError, match=message):
            Tokenizer.from_folder(folder)
    (folder / "added_tokens.json").unlink()
    (folder / "tokenizer.model").write_bytes(tokenizer_model("small"))
    with pytest.raises(ValueError, match=r"tokenizer\.model: token .* has id .*copy all tokenizer files of one model"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("kind", ["tiny_tokenizer", "byte_level"])
def test_half_a_surrogate_pair_is_refused(kind, request):
    with pytest.raises(ValueError, match="half a surrogate pair: character 2 is"):
        Tokenizer.from_folder(request.getfixturevalue(kind)).encode("ab\ud83d")
