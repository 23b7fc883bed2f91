"""Text -> token ids and back: one `tokenizers` library tokenizer, and around it the rules that LLaVA's ids depend on.

A language model reads numbers. Its folder says how text becomes numbers: tokenizer.json (or SentencePiece's older
tokenizer.model) holds the pieces and the merges, tokenizer_config.json the manners (is a BOS put in front, which token
ends a turn, …), and added_tokens.json what was added later. Two kinds occur in the LLaMA family:

* SentencePiece BPE (LLaMA 1 and 2, Vicuna, Mistral, Yi). A space is the character U+2581 at the head of the word that
  follows it; what has no piece is spelled in bytes `<0x..>`. Text gets a *dummy prefix*: one more space in front, so
  that a word has the same piece at the beginning and in the middle. LLaVA was trained on the ids of the slow Python
  tokenizer of transformers 4.37, and its treatment of the text after a special token depends on the key `legacy`
  (LLAVA.md 2.4): legacy = every stretch between special tokens gets the prefix, otherwise only the whole text.
  tokenizer.json knows the legacy manner only, so prefix and split are done here and the library sees bare stretches.
* Byte-level BPE (LLaMA 3, SmolLM2): the library's own behaviour, nothing added.

    "USER: hi</s>USER: ho"    legacy: _US ER : _hi </s> _US ER : _ho    otherwise: _US ER : _hi </s> USER : _ho
"""

import codecs
import io
import json
import re
import struct
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, processors

SPACE = "\u2581"  # how SentencePiece writes a space
IMAGE_TAG = "<image>"  # marks a picture's place in a text
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
         "chat_template.jinja")
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")  # stands for one byte of UTF-8
PAD = "[PAD]"  # the padding token of LLaVA's first models
MANNERS = {"content": "", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece's kinds of pieces

codecs.register_error("replace_each", lambda error: ("\ufffd" * (error.end - error.start), error.end))  # byte by byte


class Tokenizer:
    """Encodes and decodes as the original does. bos_token_id, eos_token_id, …: int, or None where the folder names no
    such token; special_tokens: {"bos_token": "<s>", …}; special_ids: what decode() leaves out; adds_bos: whether
    encode() puts a BOS in front; legacy: see the head of this file; chat_template: Jinja text or None."""

    def __init__(self, spec, config, files):
        """Made by `from_folder`, which then adds tokens. spec: tokenizer.json with every added token; config:
        tokenizer_config.json, whose added_tokens_decoder lists the tokens that split a text; files: {name: bytes}."""
        self.spec, self.config, self.files = spec, config, files
        self.rewrite = "tokenizer.json" not in files  # or once spec and config hold more than the files

    @classmethod
    def from_folder(cls, folder, extra_tokens=()):
        """Read a folder's tokenizer files; extra_tokens: for `add_tokens`. ValueError: missing, broken, unlike."""
        folder = Path(folder)
        files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
        read = {name: _read_json(folder / name, data) for name, data in files.items() if name.endswith(".json")}
        config, names = ({key: value for key, value in read.get(name, {}).items() if value is not None}
                         for name in ("tokenizer_config.json", "special_tokens_map.json"))
        if "added_tokens_decoder" not in config:  # which since transformers 4.34 lists the added tokens, too
            config |= names
        if "tokenizer.json" in files:
            spec = {"added_tokens": []} | read["tokenizer.json"]
            if "model" not in spec:
                raise ValueError(f"{folder / 'tokenizer.json'}: expected the `tokenizers` format, found no key 'model'")
        elif "tokenizer.model" in files:
            spec = read_sentencepiece(files["tokenizer.model"], folder / "tokenizer.model")
            config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True,
                      "added_tokens_decoder": {}} | config  # its user-defined pieces do not split a text
        else:
            raise ValueError(f"{folder}: expected tokenizer.json or tokenizer.model, found no tokenizer")
        if _llama_prefix(spec) is not None:
            usual = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
            config = {name: token for name, token in usual.items() if token in _vocabulary(spec)} | config
        _gather_tokens(spec, config, read, files, folder)
        tokenizer = cls(spec, config, files)
        tokenizer.add_tokens([*_named(config), *extra_tokens])
        return tokenizer

    def add_tokens(self, tokens):
        """Give tokens that the tokenizer does not have the next ids, in this order, the original's for `<im_patch>` and
        the like (LLAVA.md 1.4) -> how many those are. `[PAD]` becomes the padding token of a tokenizer without one."""
        spec, config = self.spec, self.config
        if PAD in tokens:
            config.setdefault("pad_token", PAD)
        added = {token["id"]: token for token in spec["added_tokens"]}
        ids = _vocabulary(spec) | {token["content"]: i for i, token in added.items()}
        splitting = {token["content"] for token in config["added_tokens_decoder"].values()}
        before, named = len(ids), _named(config)
        for content in dict.fromkeys(tokens):
            if content not in splitting:
                token, token_id = MANNERS | {"content": content, "special": True}, ids.setdefault(content, len(ids))
                config["added_tokens_decoder"][str(token_id)] = token
                added[token_id] = {"id": token_id} | token
                if content not in named:
                    config["additional_special_tokens"] = [*config.get("additional_special_tokens", []), content]
        spec["added_tokens"] = [added[i] for i in sorted(added)]
        self.rewrite |= len(ids) > before
        self._ids, self._size = ids, len(ids)
        self._build()
        return self._size - before

    def _build(self):
        """Set everything else that follows from spec and config."""
        spec, config = self.spec, self.config
        self.legacy = config.get("legacy") in (None, True)
        template = config.get("chat_template")
        if isinstance(template, list):  # several, with names
            template = {t["name"]: t["template"] for t in template}.get("default")
        own = self.files.get("chat_template.jinja")
        self.chat_template = template if own is None else own.decode()
        self.special_tokens = {name: _content(config[name]) for name in NAMES if config.get(name)}
        self._named = {*_named(config)}
        self.special_ids = {token["id"] for token in spec["added_tokens"]
                            if token["special"] or token["content"] in self._named}
        self._ids.pop(IMAGE_TAG, None)  # llava-hf has a token for a picture's place; to LLaVA it is a mark or mere text
        prefix = _llama_prefix(spec)
        self._is_llama = prefix is not None
        if self._is_llama:
            self._prefix = prefix if self.legacy else ""
            self._bytes = {i: bytes.fromhex(token[3:5]) if BYTE_PIECE.fullmatch(token) else
                           token.replace(SPACE, " ").encode() for token, i in self._ids.items()}
            self._manners = {token["content"]: token for token in config["added_tokens_decoder"].values()}
            kept = [token for token in spec["added_tokens"] if token["content"] not in self._manners]
            marks = sorted(self._manners.keys() - {IMAGE_TAG}, key=len, reverse=True)
            self._marks = re.compile(f"({'|'.join(map(re.escape, marks)) or '(?!)'})")
            spec = spec | dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor"))
        else:  # the library numbers added tokens itself, in this order: `<image>` stays, but so that no text spells it
            kept = [token | {"content": token["content"].replace(IMAGE_TAG, IMAGE_TAG + "\0")}
                    for token in spec["added_tokens"]]
        spec = spec | {"added_tokens": kept, "truncation": None, "padding": None}
        self._library = tokenizers.Tokenizer.from_str(json.dumps(spec))
        for name in NAMES:
            setattr(self, f"{name}_id", self.token_to_id(self.special_tokens.get(name)))
        adds_bos = config.get("add_bos_token") is not False if self._is_llama else bool(self._library.encode("").ids)
        self.adds_bos = adds_bos and self.bos_token_id is not None

    @property
    def folder_files(self):
        """{name: bytes} of a folder that is read back as this tokenizer, here and by transformers' AutoTokenizer."""
        if not self.rewrite:
            return dict(self.files)
        step, bos, bos_id = self.spec.get("post_processor"), self.special_tokens.get("bos_token"), self.bos_token_id
        if self.adds_bos and not step:  # the library's step that puts it in front, as tokenizer.json has it
            step = processors.TemplateProcessing([bos, "$A"], [bos, "$A", f"{bos}:1", "$B:1"], [(bos, bos_id)])
            step = json.loads(step.__getstate__())
        written = {
            "tokenizer.json": self.spec | {"post_processor": step},
            "tokenizer_config.json": self.config,
            "special_tokens_map.json": {key: self.config[key] for key in (*NAMES, "additional_special_tokens")
                                        if self.config.get(key)},
            "added_tokens.json": {token["content"]: token["id"] for token in self.spec["added_tokens"]
                                  if token["id"] >= len(_vocabulary(self.spec))}}
        return self.files | {name: json.dumps(values, ensure_ascii=False, indent=2).encode()
                             for name, values in written.items() if values}

    def __len__(self):
        """The number of ids: one more than the largest."""
        return self._size

    def token_to_id(self, token):
        """The id of one token's exact text, or None."""
        return self._ids.get(token)

    def encode(self, text, bos=True):
        """Text -> list of ids; bos=False leaves out the BOS of a tokenizer that adds one."""
        return self.encode_with_spans(text, bos)[0]

    def encode_with_spans(self, text, bos=True):
        """Text -> (ids, spans), spans[i] = (start, end) of token i in the text. The BOS and a dummy prefix that is a
        token by itself have an empty span; the bytes that spell one character all have that character's."""
        check_text(text)
        if not self._is_llama:
            encoding = self._library.encode(text, add_special_tokens=bos)
            return encoding.ids, encoding.offsets
        ids, spans = ([self.bos_token_id], [(0, 0)]) if bos and self.adds_bos else ([], [])
        place = 0
        if text and not self.legacy:  # one prefix for the whole text
            text, place = SPACE + text.replace(SPACE, " "), -1
        parts, before = self._marks.split(text), None  # stretch, mark, stretch, …, stretch
        for stretch, mark in zip(parts[::2], [*parts[1::2], None]):
            start, place = place, place + len(stretch)
            if before and self._manners[before]["rstrip"]:
                stretch = stretch.lstrip()
                start = place - len(stretch)
            if mark and self._manners[mark]["lstrip"]:
                stretch = stretch.rstrip()
            # The prefix with nothing behind it goes before <s> or another token with a name, but stays before others.
            if stretch and not (start < 0 and stretch == SPACE and mark in self._named):
                encoding = self._library.encode(self._prefix + stretch.replace(" ", SPACE))
                ids += encoding.ids
                shift = start - len(self._prefix)
                spans += [(max(a + shift, start, 0), b + shift) for a, b in encoding.offsets]
            if mark:
                ids.append(self._ids[mark])
                spans.append((place, place + len(mark)))
                place += len(mark)
            before = mark
        return ids, spans

    def decode(self, ids, skip_special_tokens=True):
        """Ids -> text, without the dummy prefix. A byte that belongs to no character becomes U+FFFD."""
        if not self._is_llama:
            return self._library.decode(ids, skip_special_tokens=skip_special_tokens)
        skipped = self.special_ids if skip_special_tokens else ()
        text = b"".join(self._bytes.get(i, b"") for i in ids if i not in skipped)
        return text.decode("utf-8", "replace_each").removeprefix(" ")


def check_text(text):
    """ValueError for half a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text with half a surrogate pair: character {error.start} is {text[error.start]!r}, "
                         "which UTF-8 cannot hold; repair the file that it comes from") from None


class TextStream:
    """Text of ids that arrive one at a time: push() returns what is new and complete, never half a character. A step
    decodes the ids of the last text given out, as context (a leading space goes only at the beginning), and new."""

    def __init__(self, tokenizer):
        self.tokenizer, self.context, self.fresh = tokenizer, [], []

    def push(self, token_id):
        """One more id -> the text that it completes, possibly empty."""
        self.fresh.append(int(token_id))
        return self.flush(final=False)

    def flush(self, final=True):
        """The rest, with what still waits for bytes that never came; without them if it is not final."""
        before = self.tokenizer.decode(self.context)
        text = self.tokenizer.decode(self.context + self.fresh)
        if len(text) <= len(before) or (text.endswith("\ufffd") and not final):
            return ""
        self.context, self.fresh = self.fresh, []
        return text[len(before):]


# ----------------------------------------------------------------------------------------- several files, one tokenizer


def _read_json(path, data):
    """The JSON object in a file; ValueError names the file."""
    try:
        values = json.loads(data)
        if not isinstance(values, dict):
            raise ValueError(f"an object, not {str(values)[:40]}")
        return values
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON ({error})") from None


def _content(token):
    """The text of a special token, which is written as a string or as {"content": ...}."""
    return token["content"] if isinstance(token, dict) else token


def _named(config):
    """The tokens that the config gives a name or calls special, in transformers' order."""
    more = config.get("extra_special_tokens", [])  # transformers 5 calls them so, some as {name: token}
    more = [*config.get("additional_special_tokens", []), *(more.values() if isinstance(more, dict) else more)]
    return [_content(token) for token in [*(config[name] for name in NAMES if config.get(name)), *more]]


def _gather_tokens(spec, config, read, files, folder):
    """Make spec["added_tokens"] the list of all tokens beside the pieces, config["added_tokens_decoder"] that of the
    tokens that split a text, as transformers 4.37 finds them: what the config lists, or else what the others list."""
    vocabulary, own, given = _vocabulary(spec), spec["added_tokens"], config.get("added_tokens_decoder")
    listed = [{"id": i, "content": text, "special": True} for text, i in read.get("added_tokens.json", {}).items()]
    decoder = [token | {"id": int(i)} for i, token in (given or {}).items()]
    sources = {"tokenizer.json": own, "added_tokens.json": listed, "tokenizer_config.json": decoder}
    if _llama_prefix(spec) is not None and {"tokenizer.json", "tokenizer.model"} <= files.keys():
        pieces, _, _ = _parse_sentencepiece(files["tokenizer.model"], folder / "tokenizer.model")
        sources["tokenizer.model"] = [
            {"id": i, "content": piece} for i, (piece, _, kind) in enumerate(pieces) if kind == NORMAL]
    _check_ids(vocabulary, sources, folder)
    # If the config has a list, a piece that only tokenizer.json lists is user-defined: found by the library, no split.
    splitting = [*listed, *(t for t in own if given is None or t["content"] not in vocabulary), *decoder]
    config["added_tokens_decoder"] = {str(token["id"]): _manners(token) for token in splitting}
    everything = {token["id"]: {"id": token["id"]} | _manners(token) for token in [*own, *splitting]}
    spec["added_tokens"] = [everything[i] for i in sorted(everything)]


def _manners(token):
    """An added token as tokenizer_config.json lists it."""
    return {key: token.get(key, usual) for key, usual in MANNERS.items()}


def _check_ids(vocabulary, sources, folder):
    """ValueError if two files give a token two ids or an id two tokens, or if no token has some id."""
    ids, contents = dict(vocabulary), {i: piece for piece, i in vocabulary.items()}
    for name, tokens in sources.items():
        for content, i in ((token["content"], token["id"]) for token in tokens):
            known = ids.setdefault(content, i), contents.setdefault(i, content)
            if known != (i, content):
                other = f"it has {known[0]}" if known[0] != i else f"{i} is {known[1]!r}"
                raise ValueError(f"{folder / name}: token {content!r} has id {i}, but another file beside it says "
                                 f"{other}; copy all tokenizer files of one model")
    hole = min(set(range(len(contents))) - contents.keys(), default=None)
    if hole is not None:
        raise ValueError(f"{folder}: no token has id {hole}, but one has {max(contents)}; expected ids without a gap")


def _vocabulary(spec):
    """{piece: id} of tokenizer.json's model (Unigram lists [piece, score] pairs instead)."""
    vocabulary = spec["model"].get("vocab", {})
    return vocabulary if isinstance(vocabulary, dict) else {piece: i for i, (piece, _) in enumerate(vocabulary)}


def _llama_prefix(spec):
    """The dummy prefix of SentencePiece's BPE, which writes spaces as U+2581, or "" (Yi); None: another kind."""
    steps = json.dumps([spec.get("normalizer"), spec.get("pre_tokenizer")], ensure_ascii=False)
    if spec["model"].get("type") != "BPE" or SPACE not in steps:
        return None
    return SPACE if re.search(f'"prepend": "{SPACE}"|"prepend_scheme": "(first|always)"', steps) else ""


# --------------------------------------------------------------------------------------------------- tokenizer.model


def read_sentencepiece(data, path):
    """The bytes of SentencePiece's tokenizer.model -> the same tokenizer as a dict in tokenizer.json's format.

    SentencePiece gives every piece a score. Of all neighbours that would form a piece it joins those with the best
    score, the leftmost of equals, and so on. The library joins what stands first in a list of pairs; so each way to cut
    a piece in two is listed, by score. Equal scores occur among Meta's pieces of nothing but spaces: there, the
    leftmost pair has the longest left part. ValueError: a broken file, or what LLaMA's tokenizers do not do."""
    pieces, trainer, normalizer = _parse_sentencepiece(data, path)
    vocabulary = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    kinds = [kind for _, _, kind in pieces]
    algorithm = {1: "Unigram", 2: "BPE", 3: "Word", 4: "Char"}.get(trainer.get(3, 1))
    strange = {
        f"is of SentencePiece's kind {algorithm}": algorithm != "BPE",
        "has no piece for what is unknown": kinds.count(UNKNOWN) != 1,
        "has a piece twice": len(vocabulary) < len(pieces),
        "has pieces that are not in use": UNUSED in kinds,
        "puts spaces behind words": trainer.get(24, 0),
        f"replaces characters ({normalizer.get(1, b'').decode()})": normalizer.get(2, b""),
        "removes double spaces": normalizer.get(4, 1),
        "does not write spaces as U+2581": not normalizer.get(5, 1)}
    for what, found in strange.items():
        if found:
            raise ValueError(f"{path}: a tokenizer that {what}; only LLaMA's sort (BPE, text unchanged) is read from "
                             "this format, but transformers' AutoTokenizer may write tokenizer.json from it")
    normal = {piece for piece, _, kind in pieces if kind == NORMAL}
    merges = [(-score, -cut, piece[:cut], piece[cut:]) for piece, score, kind in pieces if kind == NORMAL
              for cut in range(1, len(piece)) if piece[:cut] in normal and piece[cut:] in normal]
    merges.sort(key=lambda merge: merge[:2])
    library = tokenizers.Tokenizer(models.BPE(
        vocabulary, [merge[2:] for merge in merges], unk_token=pieces[kinds.index(UNKNOWN)][0], fuse_unk=True,
        byte_fallback=bool(trainer.get(35, 0))))
    prepend, strip = ([normalizers.Prepend(SPACE)], [decoders.Strip(" ", 1, 0)]) if normalizer.get(3, 1) else ([], [])
    library.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    library.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    library.add_tokens([tokenizers.AddedToken(piece, normalized=False)
                        for piece, _, kind in pieces if kind == USER_DEFINED])
    return json.loads(library.to_str())


def _parse_sentencepiece(data, path):
    """-> ([(piece, score, kind)], trainer's and normalizer's settings by field number); ValueError if it is broken.
    sentencepiece_model.proto: a model has fields 1 = a piece (1 text, 2 score, 3 kind), often, 2 = trainer_spec (3
    model_type, 24 treat_whitespace_as_suffix, 35 byte_fallback), 3 = normalizer_spec (1 name, 2 precompiled_charsmap, 3
    add_dummy_prefix, 4 remove_extra_whitespaces, 5 escape_whitespaces)."""
    try:
        model = _fields(data)
        pieces = [dict(_fields(value)) for number, value in model if number == 1]
        pieces = [(p[1].decode(), struct.unpack("<f", p.get(2, bytes(4)))[0], p.get(3, NORMAL)) for p in pieces]
        trainer, normalizer = (dict(_fields(b"".join(v for n, v in model if n == number))) for number in (2, 3))
        if not (pieces and trainer and normalizer):
            raise ValueError("cut off")
    except Exception:  # of many kinds, as it is bytes of any kind that go wrong
        raise ValueError(f"{path}: expected a SentencePiece model, found something else or only a part of one; copy "
                         "the file anew") from None
    return pieces, trainer, normalizer


def _fields(data):
    """A message of protocol buffers -> [(field number, value)]: an int, or bytes. It is a row of fields, each a key (8
    * number + kind) and a value: kind 0 is an int, 1 eight bytes, 5 four bytes, 2 a length and as many bytes. Keys,
    ints and lengths have seven bits per byte, lowest first; 128 says that more come."""
    stream, fields = io.BytesIO(data), []

    def number():
        byte = stream.read(1)[0]
        return byte if byte < 128 else byte - 128 + 128 * number()

    while stream.tell() < len(data):
        field, kind = divmod(number(), 8)
        value = size = number() if kind in (0, 2) else {1: 8, 5: 4}[kind]
        if kind != 0:
            value = stream.read(size)
            if len(value) < size:
                raise ValueError("cut off")
        fields.append((field, value))
    return fields
