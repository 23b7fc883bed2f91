"""Records -> batches: what is shown to the model, and which of its tokens it learns to write.

A record is LLaVA's JSON: {"id", "image", "conversations": [{"from": "human" | "gpt", "value": text}, …]}. Its way:

    render_record   the conversation becomes one prompt (formats/templates.py), the prompt ids; a label is the id itself
                    where the token belongs to an answer and -100 elsewhere; every picture is one -200
    Records         the same for a whole file, with the pictures as pixels, one Example per record
    pack            Examples are laid end to end: each -200 widens to the N places that the tower's features will take,
                    positions restart at 0, `cu_seqlens` says where each ends; no padding, it would be computed too

What a record holds that it should not is never passed over: it stops the run, or is counted and reported.

    python data.py show  --data_path F --image_folder D --model_name_or_path M [--version v1] [--index 0 2] [--json]
    python data.py check --data_path F --image_folder D --model_name_or_path M [--version v1] [--json]

Legend: n sequences, T tokens of all of them, P pictures, N places of one picture, S pixels of a picture's side.
"""

import json
import os
import sys
import time
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from formats import command, layouts, templates
from model import IGNORE_INDEX, IMAGE_TOKEN_INDEX, LlavaConfig
from tokenizer import IMAGE_TAG, Tokenizer
from vision import open_picture
from weights import find_folder, read_json

START_END = ("<im_start>", "<im_end>")  # around a picture's place, with mm_use_im_start_end
EMPTY_ANSWER = "empty answer"


@dataclass
class Example:
    """One record, rendered. ids, labels: with one -200 per picture; learned: the stretches of the prompt that carry
    labels; spans: each token's characters in the prompt; pictures: a file per -200; notes: what was odd about the
    record; pixel_values: (P, 3, S, S) float32, once they are loaded."""

    id: str
    ids: list
    labels: list
    prompt: str = ""
    learned: list = field(default_factory=list)
    spans: list = field(default_factory=list)
    pictures: list = field(default_factory=list)
    notes: list = field(default_factory=list)
    pixel_values: torch.Tensor = None


@dataclass
class Batch:
    """Sequences end to end. input_ids, labels, position_ids: (T,) int64; cu_seqlens: (n+1,) int32, where each begins
    and the last ends; pixel_values: (P, 3, S, S) float32 in the order of their places, N ids of -200 each; ids: the
    records'; notes: [(what was odd or cut, record id)]."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    pixel_values: torch.Tensor
    ids: list
    notes: list = field(default_factory=list)

    def to(self, device):
        """The same batch on another device."""
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return Batch(**{**vars(self), **moved})


# --------------------------------------------------------------------------------------------------- files -> records


def read_records(paths):
    """One path or several, each a JSON array or one JSON object per line -> list of records, in order."""
    return [record for path in _as_list(paths) for record in _read_file(path)]


def _as_list(paths):
    return [paths] if isinstance(paths, (str, Path)) else list(paths)


def _read_file(path):
    """The records of one file; ValueError names the file, and the line of a JSONL file."""
    expected = "expected a JSON array or one JSON object per line"
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; check --data_path") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); {expected}") from None
    whole = text.lstrip().startswith("[")
    records = []
    for number, part in enumerate([text] if whole else text.split("\n"), 1):
        try:
            records += json.loads(part) if whole else [json.loads(part)] if part.strip() else []
        except ValueError as error:
            raise ValueError(f"{path}{'' if whole else f', line {number}'}: {expected} ({error})") from None
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"{path}: record {number} is {str(record)[:40]!r}; expected an object")
        record.setdefault("id", str(number))
    if not records:
        raise ValueError(f"{path} holds no records; {expected}")
    return records


# ------------------------------------------------------------------------------------- a record -> prompt, ids, labels


def messages_of(record):
    """A record -> (messages [(role, text)], pictures, notes), its pictures and tags in the original's order.

    image, a string: each message with <image> has one, moved to its front (LLAVA.md 4.3), and all show this picture;
    pictures is that string. image, a list: nothing is moved; the k-th tag shows the k-th picture. No image: an <image>
    is mere text, pictures is None. ValueError for what is no conversation.
    """
    turns, image, notes = record.get("conversations"), record.get("image"), []
    if not isinstance(turns, list) or not turns:
        raise ValueError('no conversations: expected "conversations": [{"from": "human" or "gpt", "value": text}, …]')
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise ValueError(f"turn without text: turn {number} is {str(turn)[:60]}; expected from and value")
    messages = [(turn.get("from"), turn["value"]) for turn in turns]
    tags = sum(text.count(IMAGE_TAG) for _, text in messages)
    if not isinstance(image, str | None) and not (isinstance(image, list) and all(isinstance(x, str) for x in image)):
        raise ValueError(f"image is no file name: {str(image)[:60]}; expected a string or a list of strings")
    if isinstance(image, str):
        messages = [(role, _tag_to_front(text)) for role, text in messages]
        if tags != 1:
            notes.append("several <image> tags for one picture: it is shown once per message" if tags else
                         "a picture without an <image> tag: it is not shown")
    elif image is None and tags:
        notes.append("an <image> tag without a picture: it is plain text")
    if messages[0][0] == "gpt":
        notes.append("first turn from gpt: it is left out")
    if messages[-1][0] == "human":
        notes.append("last turn from human: it has no answer to learn")
    if any(role == "gpt" and not text for role, text in messages):
        notes.append(EMPTY_ANSWER)
    return messages, image, notes


def _tag_to_front(text):
    """Several <image> in one message become one, on a line of its own before everything else."""
    if IMAGE_TAG not in text:
        return text
    return f"{IMAGE_TAG}\n{text.replace(IMAGE_TAG, '').strip()}".strip()


def compose(record, conv_mode, tokenizer, mm_use_im_start_end=False):
    """A record -> (Rendered, pictures, notes); pictures: a file per <image> of the prompt, or None for a text-only
    record, where an <image> is mere text."""
    messages, image, notes = messages_of(record)
    if image is not None and mm_use_im_start_end:
        if None in map(tokenizer.token_to_id, START_END):
            raise ValueError("mm_use_im_start_end needs a tokenizer with the tokens <im_start> and <im_end>")
        messages = [(role, text.replace(IMAGE_TAG, IMAGE_TAG.join(START_END))) for role, text in messages]
    if image is None and conv_mode == "plain":
        raise ValueError("not for template plain: it takes pictures with captions, and this record has no `image`")
    rendered = templates.render(conv_mode, messages, tokenizer)
    tags = rendered.prompt.count(IMAGE_TAG)
    if isinstance(image, list) and len(image) != tags:
        raise ValueError(f"pictures and tags differ: `image` lists {len(image)}, the text has {tags} {IMAGE_TAG}")
    return rendered, [image] * tags if isinstance(image, str) else image, notes


def encode_prompt(prompt, tokenizer, bos=True):
    """A prompt with <image> tags -> (ids, spans), one -200 per tag (LLAVA.md 2.3).

    The text between tags is encoded piece by piece, as if each were a text of its own: with SentencePiece the text
    after a picture begins with another space. Only the whole has a BOS.
    """
    ids, spans, place = [], [], 0
    for piece in prompt.split(IMAGE_TAG):
        if place:
            ids.append(IMAGE_TOKEN_INDEX)
            spans.append((place - len(IMAGE_TAG), place))
        piece_ids, piece_spans = tokenizer.encode_with_spans(piece, bos=bos and not place)
        ids += piece_ids
        spans += [(place + start, place + end) for start, end in piece_spans]
        place += len(piece) + len(IMAGE_TAG)
    return ids, spans


def render_record(record, tokenizer, conv_mode, mm_use_im_start_end=False, model_max_length=None):
    """A record -> Example without pixels: prompt, ids and labels as training sees them before batches are made.

    A token is learned if its characters lie within a learned stretch of the prompt; so labels hold whatever the text
    says, where the original drops a whole sample whose token counts disagree (LLAVA.md 2.6). A text-only record is cut
    at model_max_length here, one with pictures when it is packed. ValueError: what is wrong, without the record's name.
    """
    conv_mode = templates.canonical(conv_mode)
    rendered, pictures, notes = compose(record, conv_mode, tokenizer, mm_use_im_start_end)
    if pictures is None:
        ids, spans = tokenizer.encode_with_spans(rendered.prompt, rendered.bos)
    else:
        ids, spans = encode_prompt(rendered.prompt, tokenizer, rendered.bos)
    begins = [begin for begin, _ in rendered.learned]
    labels = [IGNORE_INDEX] * len(ids)
    for i, (start, end) in enumerate(spans):
        k = bisect_right(begins, start) - 1  # the last stretch that begins at or before this token
        if k >= 0 and end <= rendered.learned[k][1]:
            labels[i] = ids[i]
    if pictures is None and model_max_length and len(ids) > model_max_length:
        ids, labels, spans = ids[:model_max_length], labels[:model_max_length], spans[:model_max_length]
        notes.append(_cut_note(labels))
    return Example(str(record.get("id")), ids, labels, rendered.prompt, rendered.learned, spans, pictures or [], notes)


def _cut_note(labels):
    learned = any(label != IGNORE_INDEX for label in labels)
    return "cut at model_max_length" if learned else "cut at model_max_length: nothing to learn is left"


# ------------------------------------------------------------------------------------------------- examples -> batches


def widen(example, image_tokens, model_max_length=None):
    """Give every picture its places -> (ids, labels, pictures left, note or None), cut at model_max_length.

    The original cuts ids, then features, wherever the limit falls, possibly within a picture. Here a picture that does
    not fit whole goes, and all behind it: attention is causal, so nothing that is left and learned depended on it.
    """
    ids, labels, pictures = [], [], 0
    for token, label in zip(example.ids, example.labels):
        is_picture = token == IMAGE_TOKEN_INDEX
        width = image_tokens if is_picture else 1
        if model_max_length and len(ids) + width > model_max_length:
            return ids, labels, pictures, _cut_note(labels)
        ids += [token] * width
        labels += [IGNORE_INDEX if is_picture else label] * width
        pictures += is_picture
    return ids, labels, pictures, None


def pack(examples, config, model_max_length=None):
    """Examples -> Batch; config: LlavaConfig. What is longer than model_max_length is cut, and noted."""
    input_ids, labels, positions, bounds, pixels, notes = [], [], [], [0], [], []
    for example in examples:
        row_ids, row_labels, pictures, cut = widen(example, config.image_tokens, model_max_length)
        input_ids += row_ids
        labels += [IGNORE_INDEX] * len(row_labels[:1]) + row_labels[1:]  # nothing predicts the first
        positions += range(len(row_ids))
        bounds.append(len(input_ids))
        if pictures:
            pixels.append(example.pixel_values[:pictures])
        notes += [(note, example.id) for note in [*example.notes, cut] if note]
    size = config.vision.image_size if config.vision else 0
    return Batch(
        torch.tensor(input_ids), torch.tensor(labels), torch.tensor(positions), torch.tensor(bounds, dtype=torch.int32),
        torch.cat(pixels) if pixels else torch.zeros(0, 3, size, size), [example.id for example in examples], notes)


def load_pictures(example, image_processor, aspect, image_folder="", exif=False):
    """Open the example's pictures and put their pixels into it (each file once, however often it is shown)."""
    if example.pictures:
        check_tower(image_processor)
        pixels = {name: image_processor(open_picture(os.path.join(image_folder, name), exif), aspect)  # (1, 3, S, S)
                  for name in dict.fromkeys(example.pictures)}
        example.pixel_values = torch.cat([pixels[name] for name in example.pictures])  # (P, 3, S, S)
    return example


def check_tower(image_processor):
    """ValueError if there is nothing to look at a picture with."""
    if image_processor is None:
        raise ValueError("picture without a tower: this model sees no pictures; give --vision_tower")


def collate(records, loaded, image_folder="", conv_mode=None, model_max_length=None, exif=False):
    """Records, as read from JSON -> Batch for loaded.model. conv_mode, model_max_length: by default the model's own."""
    model_max_length = model_max_length or loaded.config.tokenizer_model_max_length
    examples = []
    for number, record in enumerate(records):
        record = {"id": str(number)} | record
        try:
            example = render_record(record, loaded.tokenizer, conv_mode or loaded.conv_mode,
                                    loaded.config.mm_use_im_start_end, model_max_length)
            examples.append(load_pictures(
                example, loaded.image_processor, loaded.config.image_aspect_ratio, image_folder, exif))
        except ValueError as error:
            raise ValueError(f"record {record['id']!r}: {error}") from None
    return pack(examples, loaded.config, model_max_length)


# ---------------------------------------------------------------------------------------------------- a whole data set


@dataclass
class Question:
    """A record's last question, to be asked: messages [(role, text)] that end with it, images, the recorded answer."""

    id: str
    kind: str
    messages: list
    images: list
    answer: str


class Records:
    """A data set for torch's DataLoader: records[i] is the i-th Example, records.pack the collate_fn.

    All records are rendered once at the start, so that what is wrong is known before the first step. A bad record stops
    the run, or with on_bad_record="skip" is left out and counted; one whose picture turns out broken later stays where
    it is, so that the order of the others holds, but teaches nothing.
    """

    def __init__(self, paths, image_folder, loaded, conv_mode=None, model_max_length=None, on_bad_record="stop",
                 exif=False):
        # Not `loaded` itself: a DataLoader's workers may get a copy of this object, and the model is large.
        self.tokenizer, self.image_processor, self.config = loaded.tokenizer, loaded.image_processor, loaded.config
        self.image_folder, self.exif = image_folder or "", exif
        self.conv_mode = templates.canonical(conv_mode or loaded.conv_mode)
        self.model_max_length = model_max_length or loaded.config.tokenizer_model_max_length
        self.skip = on_bad_record == "skip"
        self.notes = {}  # what was odd -> the records' ids, in order
        self.records = []
        for path in _as_list(paths):
            for record in progress(_read_file(path), f"reading {path}"):
                try:
                    self.examine(record)
                    self.records.append(record)
                except ValueError as error:
                    if not self.skip:
                        raise ValueError(f"{path}: record {record['id']!r}: {error}") from None
                    self.note(f"left out, {_kind(error)}", record["id"])
        if not self.records:
            raise ValueError(f"{paths}: every record was left out; `python data.py check` lists the reasons")

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        example = self.render(self.records[i])
        try:
            return load_pictures(
                example, self.image_processor, self.config.image_aspect_ratio, self.image_folder, self.exif)
        except ValueError as error:
            if not self.skip:
                raise ValueError(f"record {example.id!r}: {error}") from None
            size = self.config.vision.image_size
            example.pixel_values = torch.zeros(len(example.pictures), 3, size, size)
            example.labels = [IGNORE_INDEX] * len(example.ids)
            example.notes.append("broken picture: nothing is learned from it")
            return example

    def pack(self, examples):
        """Examples -> Batch, cut at model_max_length."""
        return pack(examples, self.config, self.model_max_length)

    def render(self, record):
        """One record -> Example without pixels."""
        return render_record(record, self.tokenizer, self.conv_mode, self.config.mm_use_im_start_end,
                             self.model_max_length)

    def examine(self, record):
        """Note what is odd about a record; ValueError if nothing can be learned from it or its picture is missing."""
        rendered, pictures, notes = compose(record, self.conv_mode, self.tokenizer, self.config.mm_use_im_start_end)
        check_record(rendered.learned, pictures, notes, self.image_folder)
        if pictures:
            check_tower(self.image_processor)
        for note in notes:
            self.note(note, str(record["id"]))

    def note(self, what, record_id):
        """Count an oddity."""
        self.notes.setdefault(what, {})[record_id] = None

    def report(self):
        """What was odd, one line each with the first records' ids; empty if all was well."""
        return "\n".join(f"{len(ids)} records: {what} ({', '.join(list(ids)[:5])}{', …' if len(ids) > 5 else ''})"
                         for what, ids in self.notes.items())

    def question(self, i):
        """The i-th record as a Question about its last answer; None if all its answers are empty."""
        record = self.records[i]
        messages, image, _ = messages_of(record)
        messages = messages[messages[0][0] == "gpt":]
        last = max((k for k, (role, text) in enumerate(messages) if role == "gpt" and text), default=None)
        if last is None:
            return None
        tags = sum(text.count(IMAGE_TAG) for _, text in messages[:last])
        images = [image] * tags if isinstance(image, str) else (image or [])[:tags]
        return Question(str(record["id"]), record.get("kind"), messages[:last],
                        [os.path.join(self.image_folder, name) for name in images], messages[last][1])


def check_record(learned, pictures, notes, image_folder):
    """ValueError if a record has nothing to learn or a picture of it does not exist. A record whose answers are empty
    passes: the original trains with it (and learns nothing), and so the order of the others stays the original's."""
    if not learned and EMPTY_ANSWER not in notes:
        raise ValueError("nothing to learn: it has no answer; add one or leave the record out")
    for path in (os.path.join(image_folder, name) for name in pictures or []):
        if not os.path.isfile(path):
            raise ValueError(f"missing picture: {path} does not exist; check --image_folder")


def _kind(error):
    """An error's sentence up to the colon: what sort of mistake it is."""
    return str(error).split(":")[0]


def progress(items, what):
    """Pass the items on; on a terminal, after three seconds, say every second how far it is and how long it takes."""
    begun = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - begun > 3 and now - said > 1 and sys.stderr.isatty():
            said = now
            left = (now - begun) / done * (len(items) - done)
            print(f"\r{what}: {done:,} of {len(items):,}, {left:.0f} s left ", end="", file=sys.stderr, flush=True)
        yield item
    if said > begun:
        print(file=sys.stderr)


# -------------------------------------------------------------------------------------------------------- command line


def main():
    """python data.py show|check …"""
    parser = command.Parser(prog="data.py", description=__doc__.split("\n")[0])
    doors = parser.add_subparsers(dest="door", required=True)
    for run, about in ((show, "prompt, ids and labels of records"), (check, "every record and picture, one report")):
        door = doors.add_parser(run.__name__, help=about, description=about)
        door.set_defaults(run=run)
        door.add_argument("--data_path", required=True, nargs="+", help="JSON array or JSONL, one file or several")
        door.add_argument("--image_folder", default="", help="where the records' pictures lie")
        door.add_argument("--model_name_or_path", required=True, help="a model; its tokenizer files are enough")
        door.add_argument("--version", help="conversation template; default: the model's own")
        door.add_argument("--model_max_length", type=int, help="the longest sequence; default: the model's own limit")
        door.add_switch("--mm_use_im_start_end", default=None, help="<im_start> and <im_end> around pictures")
        door.add_switch("--json", help="print JSON and nothing else")
        if run is show:
            door.add_argument("--index", type=int, nargs="+", help="records, from 0; default: 0 1 2, with --json all")
    args = parser.parse_args()
    return args.run(args)


def read_model(args):
    """The parts of a model that text needs, without its weights -> (tokenizer, conv_mode, LlavaConfig)."""
    folder = find_folder(args.model_name_or_path)
    path = Path(folder) / "config.json"
    config = layouts.read_config(read_json(path), (), folder) if path.exists() else LlavaConfig()
    config.conv_mode = args.version or config.conv_mode
    if args.mm_use_im_start_end is not None:
        config.mm_use_im_start_end = args.mm_use_im_start_end
    tokenizer = Tokenizer.from_folder(folder, START_END if config.mm_use_im_start_end else ())
    config.tokenizer_model_max_length = args.model_max_length or config.tokenizer_model_max_length
    return tokenizer, templates.canonical(templates.resolve_conv_mode(config, tokenizer)), config


def show(args):
    """Print what training sees of some records."""
    tokenizer, conv_mode, config = read_model(args)
    records, rows = read_records(args.data_path), []
    for i in args.index or range(len(records) if args.json else min(3, len(records))):
        if not -len(records) <= i < len(records):
            raise ValueError(f"--index {i}: the file holds {len(records)} records, counted from 0")
        row = {"id": str(records[i]["id"])}
        try:
            example = render_record(records[i], tokenizer, conv_mode, config.mm_use_im_start_end,
                                    config.tokenizer_model_max_length)
            row |= {"prompt": example.prompt, "input_ids": example.ids, "labels": example.labels}
            text = portrait(example, colour=sys.stdout.isatty())
        except ValueError as error:
            row["error"] = str(error)
            text = f"── {row['id']}: ERROR {error}\n"
        rows.append(row)
        if not args.json:
            print(text)
    if args.json:
        print(json.dumps(rows))


def portrait(example, colour):
    """An example for a reader: its prompt with the learned tokens green (without colour: between brackets)."""
    on, off = ("\033[32m", "\033[0m") if colour else ("⟦", "⟧")
    learned = [label != IGNORE_INDEX for label in example.labels]
    text, place, inside = "", 0, False
    for (start, _), now in zip(example.spans, learned):
        if now != inside:
            text += example.prompt[place:start] + (on if now else off)
            place, inside = start, now
    text += example.prompt[place: example.spans[-1][1]] + off * inside
    head = f"── {example.id}: {len(example.ids)} tokens, {sum(learned)} learned, {len(example.pictures)} pictures"
    return "\n".join([head, *(f"   note: {note}" for note in example.notes), text, ""])


def check(args):
    """Look at every record and every picture; -> exit status 1 if there is an error."""
    tokenizer, conv_mode, config = read_model(args)
    records = read_records(args.data_path)
    limit, errors, notes, lengths = config.tokenizer_model_max_length, {}, {}, Counter()
    for record in progress(records, "checking"):
        record_id = str(record["id"])
        try:
            example = render_record(record, tokenizer, conv_mode, config.mm_use_im_start_end, limit)
            check_record(example.learned, example.pictures, example.notes, args.image_folder)
        except ValueError as error:
            errors.setdefault(_kind(error), []).append(record_id)
            continue
        try:
            for name in set(example.pictures):
                open_picture(os.path.join(args.image_folder, name))
        except ValueError:
            errors.setdefault("broken picture", []).append(record_id)
        length = len(widen(example, config.image_tokens or 1)[0])
        lengths[1 << max(5, (length - 1).bit_length())] += 1  # the power of two that holds it, 32 at least
        cut = widen(example, config.image_tokens or 1, limit)[3]
        for note in filter(None, [*example.notes, cut]):
            notes.setdefault(note, []).append(record_id)
    lengths = dict(sorted(lengths.items()))
    if args.json:
        print(json.dumps({"records": len(records), "conv_mode": conv_mode, "errors": errors, "notes": notes,
                          "tokens_up_to": lengths}))
    else:
        print(check_report(len(records), conv_mode, config, errors, notes, lengths))
    return 1 if errors else 0


def check_report(count, conv_mode, config, errors, notes, lengths):
    """The report of `check` as text."""
    lines = [f"{count} records, template {conv_mode}, {config.image_tokens or 1} tokens per picture"]
    for title, found in (("ERROR", errors), ("note", notes)):
        for what, ids in sorted(found.items(), key=lambda item: -len(item[1])):
            lines.append(f"{title:5s} {len(ids):>7,}  {what} ({', '.join(ids[:5])}{', …' if len(ids) > 5 else ''})")
    lines.append("tokens per record:")
    most = max(lengths.values(), default=1)
    lines += [f"  up to {size:>6,} {n:>8,}  {'█' * -(-40 * n // most)}" for size, n in lengths.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(main)
