"""Text -> token ids and back: one `tokenizers` library tokenizer, and around it the rules that LLaVA's ids depend on.

A language model reads numbers. Its folder says how text becomes numbers: tokenizer.json holds the pieces and the
merges, tokenizer_config.json the manners (is a BOS put in front, which token ends a turn, ...). Two kinds occur in
the LLaMA family, told apart by what tokenizer.json holds:

* SentencePiece BPE (LLaMA 1 and 2, Vicuna, Mistral, TinyLlama). A space is the character U+2581 at the head of the
  word it precedes; what has no piece is spelled in bytes `<0x..>`. Text gets a *dummy prefix*: one more space in
  front, so that a word has the same piece at the beginning and in the middle. LLaVA was trained on the ids of the slow
  Python tokenizer of transformers 4.37, and its treatment of the text after a special token depends on the key
  `legacy` (LLAVA.md 2.4): legacy = every stretch between special tokens gets the prefix, otherwise only the first.
  tokenizer.json knows the legacy manner only, so prefix and split are done here and the library sees bare stretches.
* Byte-level BPE (LLaMA 3, SmolLM2): the library's own behaviour, nothing added.

    "USER: hi</s>USER: ho"    legacy: _US ER : _hi </s> _US ER : _ho    otherwise: _US ER : _hi </s> USER : _ho
"""

import json
import re
from pathlib import Path

import tokenizers

SPACE = "\u2581"  # how SentencePiece writes a space
IMAGE_TAG = "<image>"  # marks a picture's place in a text
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
         "chat_template.jinja")
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """Encodes and decodes as the original does.

    bos_token_id, eos_token_id, unk_token_id, pad_token_id: int, or None where the folder names no such token;
    special_tokens: {"bos_token": "<s>", …}; special_ids: what decode() leaves out; adds_bos: whether encode() puts a
    BOS in front; legacy: see the head of this file; chat_template: Jinja text or None; folder_files: {name: path} of
    the files it came from, to be copied into what we save.
    """

    def __init__(self, spec, config, folder_files):
        """spec: tokenizer.json with all added tokens, config: tokenizer_config.json, as `from_folder` prepares them."""
        self.folder_files = folder_files
        self.legacy = config.get("legacy") in (None, True)
        self.chat_template = config.get("chat_template")
        self.special_tokens = {name: _content(config[name]) for name in NAMES if config.get(name)}
        self._size = 1 + max([*_vocabulary(spec).values(), *(token["id"] for token in spec["added_tokens"])])
        added = {token["content"]: token for token in spec["added_tokens"]}
        if IMAGE_TAG in added:  # llava-hf has a token for a picture's place; to LLaVA the word is a mark or plain text
            added.pop(IMAGE_TAG)["content"] = IMAGE_TAG + "\0"  # keeps its id, no text spells it
        self.special_ids = {token["id"] for token in spec["added_tokens"] if token["special"]}
        self._is_llama = _is_llama(spec)
        if self._is_llama:
            spec.update(normalizer=None, pre_tokenizer=None, post_processor=None)
        spec.update(truncation=None, padding=None)
        self._library = tokenizers.Tokenizer.from_str(json.dumps(spec))
        for token in added.values():  # the library numbers them itself, in the order of the ids
            if self.token_to_id(token["content"]) != token["id"]:
                raise ValueError(f"{folder_files['tokenizer.json'].parent}: the tokenizer's added token "
                                 f"{token['content']!r} has id {token['id']}; expected ids without a gap")
        self._added = {content: token["id"] for content, token in added.items()}
        self._split = re.compile("|".join(_pattern(added[c]) for c in sorted(added, key=len, reverse=True)) or r"(?!)")
        self._named = {*self.special_tokens.values(), *map(_content, config["additional_special_tokens"])}
        for name in NAMES:
            setattr(self, f"{name}_id", self.token_to_id(self.special_tokens.get(name, "")))
        adds_bos = config.get("add_bos_token") is not False if self._is_llama else bool(self._library.encode("").ids)
        self.adds_bos = adds_bos and self.bos_token_id is not None

    @classmethod
    def from_folder(cls, folder, extra_tokens=()):
        """Read a folder's tokenizer files; ValueError if tokenizer.json is missing or no tokenizer.json.

        extra_tokens: special tokens that get the next ids where the folder has none of the name, as the original adds
        <im_start> and <im_end> before training (LLAVA.md 1.4).
        """
        folder = Path(folder)
        files = {name: folder / name for name in FILES if (folder / name).is_file()}
        if "tokenizer.json" not in files:
            found = "only tokenizer.model, which is not read yet" if "tokenizer.model" in files else "no tokenizer"
            raise ValueError(f"{folder}: expected tokenizer.json, found {found}; transformers' "
                             "AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes one")
        spec = _read_json(files["tokenizer.json"])
        if "model" not in spec:
            raise ValueError(f"{files['tokenizer.json']}: expected the `tokenizers` format, found no key 'model'")
        config = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if name in files:
                config |= {key: value for key, value in _read_json(files[name]).items() if value is not None}
        if "chat_template.jinja" in files:
            config["chat_template"] = files["chat_template.jinja"].read_text(encoding="utf-8")
        elif isinstance(config.get("chat_template"), list):  # several, named
            config["chat_template"] = {t["name"]: t["template"] for t in config["chat_template"]}.get("default")
        if _is_llama(spec):
            config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | config
        listed = _read_json(files["added_tokens.json"]) if "added_tokens.json" in files else {}
        _add_tokens(spec, config, listed, extra_tokens)
        return cls(spec, config, files)

    def __len__(self):
        """The number of ids: one more than the largest."""
        return self._size

    def token_to_id(self, token):
        """The id of one token's exact text, or None."""
        return self._library.token_to_id(token)

    def encode(self, text, bos=True):
        """Text -> list of ids; bos=False leaves out the BOS of a tokenizer that adds one."""
        return self.encode_with_spans(text, bos)[0]

    def encode_with_spans(self, text, bos=True):
        """Text -> (ids, spans), spans[i] = (start, end) of token i in the text.

        The BOS and a dummy prefix that is a token by itself have an empty span; the bytes that spell one character all
        have that character's.
        """
        if not self._is_llama:
            encoding = self._library.encode(text, add_special_tokens=bos)
            return encoding.ids, encoding.offsets
        ids, spans = ([self.bos_token_id], [(0, 0)]) if bos and self.adds_bos else ([], [])
        place = 0
        for mark in self._split.finditer(text):
            self._encode_stretch(text, place, mark.start(), ids, spans)
            if mark.start() == 0 and not self.legacy and mark[0] not in self._named:
                ids.append(self.token_to_id(SPACE))  # the original drops the prefix before <s>, not before <im_start>
                spans.append((0, 0))
            ids.append(self._added[mark[0].strip()])
            spans.append(mark.span())
            place = mark.end()
        self._encode_stretch(text, place, len(text), ids, spans)
        return ids, spans

    def _encode_stretch(self, text, start, end, ids, spans):
        """Append ids and spans of text[start:end], where no special token is, with the prefix if it is due."""
        if start == end:
            return
        prefix = SPACE if self.legacy or start == 0 else ""
        encoding = self._library.encode(prefix + text[start:end].replace(" ", SPACE))
        ids += encoding.ids
        shift = start - len(prefix)
        spans += [(max(a + shift, start), b + shift) for a, b in encoding.offsets]

    def decode(self, ids, skip_special_tokens=True):
        """Ids -> text. Bytes that form no character become U+FFFD."""
        return self._library.decode(ids, skip_special_tokens=skip_special_tokens)


class TextStream:
    """Text of ids that arrive one at a time: push() returns what is new and complete, never half a character.

    Each step decodes only a few ids: those of the last piece of text given out, as context (a leading space is dropped
    only at the very beginning), and those behind it.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.context, self.fresh = tokenizer, [], []

    def push(self, token_id):
        """One more id -> the text that it completes, possibly empty."""
        self.fresh.append(int(token_id))
        return self._take(final=False)

    def flush(self):
        """The rest: what still waits for bytes that never came."""
        return self._take(final=True)

    def _take(self, final):
        before = self.tokenizer.decode(self.context)
        text = self.tokenizer.decode(self.context + self.fresh)
        if len(text) <= len(before) or (text.endswith("\ufffd") and not final):
            return ""
        self.context, self.fresh = self.fresh, []
        return text[len(before):]


def _is_llama(spec):
    """Does this tokenizer.json describe SentencePiece BPE with a dummy prefix? The prefix stands in the normalizer of
    older files, in a Metaspace pre-tokenizer of newer ones."""
    steps = [step for key in ("normalizer", "pre_tokenizer") if spec.get(key)
             for step in spec[key].get("normalizers") or spec[key].get("pretokenizers") or [spec[key]]]
    prefixed = any(step.get("prepend") == SPACE or step.get("prepend_scheme") in ("first", "always") for step in steps)
    return spec["model"].get("type") == "BPE" and bool(spec["model"].get("byte_fallback")) and prefixed


def _add_tokens(spec, config, listed, extra):
    """Put tokens that only tokenizer_config.json or added_tokens.json (`listed`) knows, and new ones (`extra`), into
    tokenizer.json's own list."""
    tokens = {token["content"]: token for token in spec.get("added_tokens", [])}
    for token_id, token in config.get("added_tokens_decoder", {}).items():
        tokens.setdefault(token["content"], {"id": int(token_id), **token})
    vocabulary = _vocabulary(spec)
    named = {_content(config[name]) for name in NAMES if config.get(name)}  # slow tokenizers split at these anyway
    for content, token_id in (listed | {content: vocabulary[content] for content in named & vocabulary.keys()}).items():
        tokens.setdefault(content, {"id": token_id, "content": content, "special": True})
    new = [content for content in extra if content not in tokens]
    size = 1 + max([*vocabulary.values(), *(token["id"] for token in tokens.values())])
    tokens |= {content: {"id": size + i, "content": content, "special": True} for i, content in enumerate(new)}
    config["additional_special_tokens"] = [*config.get("additional_special_tokens", []), *new]
    manners = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    spec["added_tokens"] = sorted((manners | token for token in tokens.values()), key=lambda token: token["id"])


def _vocabulary(spec):
    """{piece: id} of tokenizer.json's model (Unigram lists [piece, score] pairs instead)."""
    vocabulary = spec["model"].get("vocab", {})
    return vocabulary if isinstance(vocabulary, dict) else {piece: i for i, (piece, _) in enumerate(vocabulary)}


def _pattern(token):
    """The regular expression of an added token; rstrip/lstrip tokens swallow the white space beside them."""
    return r"\s*" * token["lstrip"] + re.escape(token["content"]) + r"\s*" * token["rstrip"]


def _content(token):
    """A special token is written as a string or as {"content": ...}."""
    return token["content"] if isinstance(token, dict) else token


def _read_json(path):
    """The JSON object in a file; ValueError names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON ({error})") from None
