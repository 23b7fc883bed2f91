"""Records -> batches: what is shown to the model, and which of its tokens it learns to write.

A record is LLaVA's JSON: {"id", "image", "conversations": [{"from": "human" | "gpt", "value": text}, …]}. Its way:

    render_record   the conversation becomes one prompt (formats/templates.py), the prompt ids; a label is the id itself
                    where the token belongs to an answer and -100 elsewhere; every picture is one -200
    Records         the same for a whole file, with the pictures as pixels, one Example per record
    pack            Examples are laid end to end: each -200 widens to the N places that the tower's features will take,
                    positions restart at 0, `cu_seqlens` says where each ends; no padding, it would be computed too

What a record holds that it should not is never passed over: it stops the run, or is counted and reported.

    python data.py show  --data_path F --image_folder D --model_name_or_path M [--version v1] [--index 0 2] [--json]
    python data.py check --data_path F --image_folder D --model_name_or_path M [--version v1] [--json] [--fix OUT]
    python data.py convert scienceqa|okvqa|ubiai|csv SRC OUT

Legend: n sequences, T tokens of all of them, P pictures, N places of one picture, S pixels of a view's side.
"""

if __name__ == "__main__":  # Ctrl-C may end the imports, which take seconds, but without a traceback
    import sys
    sys.excepthook = lambda kind, *error: kind is KeyboardInterrupt or sys.__excepthook__(kind, *error)

import hashlib
import json
import os
import sys
from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset

from formats import command, layouts, templates
from formats.files import read_json
from formats.hub import find_folder
from formats.records import SOURCES, add_tag, convert, read_records, write_records
from formats.strict_labels import loses_count, strict_labels
from formats.templates import CHAT, EMPTY_ANSWER, START_END, TEMPLATES
from formats.vocabulary import missing_tokens
from model import IGNORE_INDEX, IMAGE_TOKEN_INDEX, LlavaConfig
from tokenizer import IMAGE_TAG, Tokenizer, check_text
from vision import open_picture

MENDED = "the original would lose count of its tokens and learn nothing of it; here its answers are learned"
REPLACED = "broken picture: the next record with a picture stands in its place"
SUFFIX = "mis-suffixed picture: its content is of another format than its name says; it is read all the same"
DEEP = "picture of more than 8 bits: all that is brighter than 255 becomes white, as in the original"
SAME_ID = "duplicate id: an earlier record has it, too"
SAME = "duplicate content: an earlier record has the same picture and text"
MASKED = "tokenization mismatch: nothing is learned from it, as in the original"


@dataclass
class Example:
    """One record, rendered. ids, labels: with one -200 per picture; learned: stretches of the prompt that carry labels;
    spans: each token's characters; pictures: a file per -200; notes: what was odd; pixel_values: (views, 3, S, S)
    float32, image_sizes: (height, width) of each; replaces: ids of records with broken pictures."""

    id: str
    ids: list
    labels: list
    prompt: str = ""
    learned: list = field(default_factory=list)
    spans: list = field(default_factory=list)
    pictures: list = field(default_factory=list)
    notes: list = field(default_factory=list)
    pixel_values: torch.Tensor = None
    image_sizes: list = field(default_factory=list)
    replaces: list = field(default_factory=list)


@dataclass
class Batch:
    """Sequences end to end. input_ids, labels, position_ids: (T,) int64; cu_seqlens: (n+1,) int32, where each begins
    and the last ends; pixel_values: (views, 3, S, S) float32, one view or (anyres) several per picture, or a tower's
    features of them, in the order of the pictures' places, ids of -200, `LlavaConfig.tokens_of` its size each; ids: the
    records'; image_sizes: [(height, width)] of the pictures; notes: [(what was odd or cut, record id)]."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    pixel_values: torch.Tensor
    ids: list
    image_sizes: list = field(default_factory=list)
    notes: list = field(default_factory=list)

    def to(self, device):
        """The same batch on another device."""
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)


# ------------------------------------------------------------------------------------- a record -> prompt, ids, labels


def messages_of(record):
    """A record -> (messages [(role, text)], pictures, notes), in the original's order. image, a string: each message
    with <image> has one, moved to its front (LLAVA.md 4.3), and all show this picture. A list: nothing is moved; the
    k-th tag shows the k-th picture. None: an <image> is mere text. ValueError for what is no conversation."""
    turns, image, notes = record.get("conversations"), record.get("image"), []
    if not isinstance(turns, list) or not turns:
        raise ValueError('no conversations: expected "conversations": [{"from": "human" or "gpt", "value": text}, …]')
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise ValueError(f"turn without text: turn {number} is {str(turn)[:60]}; expected from and value")
    messages = [(turn.get("from"), turn["value"]) for turn in turns]
    for _, text in messages:
        check_text(text)
    tags = sum(text.count(IMAGE_TAG) for _, text in messages)
    if not isinstance(image, str | None) and not (isinstance(image, list) and all(isinstance(x, str) for x in image)):
        raise ValueError(f"image is no file name: {str(image)[:60]}; expected a string or a list of strings")
    if isinstance(image, str):
        messages = [(role, f"{IMAGE_TAG}\n{text.replace(IMAGE_TAG, '').strip()}".strip() if IMAGE_TAG in text else text)
                    for role, text in messages]
        if tags != 1:
            notes.append("several <image> tags for one picture: it is shown once per message" if tags else
                         "a picture without an <image> tag: it is not shown")
    elif image is None and tags:
        notes.append("an <image> tag without a picture: it is plain text")
    return messages, image, notes


def compose(record, conv_mode, tokenizer, mm_use_im_start_end=False, strict=False):
    """A record -> (Rendered, pictures: a file per <image>, or None of text only, notes). strict: as the original."""
    messages, image, notes = messages_of(record)
    if image is not None:
        if mm_use_im_start_end and None in map(tokenizer.token_to_id, START_END):
            raise ValueError("mm_use_im_start_end needs a tokenizer with the tokens <im_start> and <im_end>")
        messages = [(role, templates.show_pictures(conv_mode, text, mm_use_im_start_end)) for role, text in messages]
    elif conv_mode == "plain":
        raise ValueError("not for template plain: it takes pictures with captions, and this record has no `image`")
    rendered = templates.render(conv_mode, messages, tokenizer)
    tags = rendered.prompt.count(IMAGE_TAG)
    if isinstance(image, list) and len(image) != tags:
        raise ValueError(f"pictures and tags differ: `image` lists {len(image)}, the text has {tags} {IMAGE_TAG}")
    notes += rendered.notes
    counted = conv_mode != CHAT and not strict and rendered.learned
    if counted and loses_count(TEMPLATES[conv_mode], rendered.prompt, tokenizer):
        notes.append(MENDED)
    return rendered, [image] * tags if isinstance(image, str) else image, notes


def encode_prompt(prompt, tokenizer, bos=True, strict=False, shows=True):
    """A prompt with <image> tags -> (ids, spans), one -200 per tag (LLAVA.md 2.3): what stands between tags is encoded
    as a text of its own, which with SentencePiece begins with another space. strict: where the text begins with the BOS
    (ChatML), lose the first token behind each picture, as the original does. shows: False: a tag is mere text."""
    ids, spans, place = [], [], 0
    for piece in prompt.split(IMAGE_TAG) if shows else [prompt]:
        if place:
            ids.append(IMAGE_TOKEN_INDEX)
            spans.append((place - len(IMAGE_TAG), place))
        piece_ids, piece_spans = tokenizer.encode_with_spans(piece, bos=bos and not place)
        lost = int(strict and place > 0 and not tokenizer.adds_bos and ids[:1] == [tokenizer.bos_token_id])
        ids += piece_ids[lost:]
        spans += [(place + start, place + end) for start, end in piece_spans[lost:]]
        place += len(piece) + len(IMAGE_TAG)
    return ids, spans


def render_record(record, tokenizer, conv_mode, mm_use_im_start_end=False, model_max_length=None, strict=False):
    """A record -> Example without pixels: prompt, ids and labels as training sees them before batches are made.

    A token is learned if its characters lie within a learned stretch of the prompt. strict: count tokens as the
    original does, which drops a whole sample whose counts disagree (LLAVA.md 2.6). A text-only record is cut at
    model_max_length here, one with pictures when it is packed. ValueError: what is wrong, without the record's name."""
    conv_mode = templates.canonical(conv_mode)
    strict = strict and conv_mode != CHAT  # which the original does not know
    rendered, pictures, notes = compose(record, conv_mode, tokenizer, mm_use_im_start_end, strict)
    encode = partial(encode_prompt, tokenizer=tokenizer, strict=strict, shows=pictures is not None)
    ids, spans = encode(rendered.prompt, bos=rendered.bos)
    labels = [IGNORE_INDEX] * len(ids)
    for begin, stop in rendered.learned:
        for i in range(bisect_left(spans, (begin,)), bisect_left(spans, (stop,))):  # the tokens that start in it
            labels[i] = ids[i] if spans[i][1] <= stop else IGNORE_INDEX
    if pictures is None:
        ids, labels, _, cut = widen(ids, labels, (), model_max_length)
        notes += cut
    if strict:
        labels, mismatch = strict_labels(TEMPLATES[conv_mode], rendered, ids, lambda text: encode(text)[0],
                                         pictures is not None, tokenizer, model_max_length)
        notes += [MASKED] * mismatch
    return Example(str(record.get("id")), ids, labels, rendered.prompt, rendered.learned, spans[:len(ids)],
                   pictures or [], notes)


# ------------------------------------------------------------------------------------------------- examples -> batches


def widen(ids, labels, places, model_max_length=None):
    """Give the k-th picture its places[k] -> (ids, labels, pictures left, [] or [note]), cut at model_max_length. The
    original cuts ids, then features, wherever the limit falls, possibly within a picture. Here a picture that does not
    fit whole goes, and all behind it: attention is causal, so nothing that is left and learned depended on it."""
    wide_ids, wide_labels, pictures = [], [], 0
    for token, label in zip(ids, labels):
        is_picture = token == IMAGE_TOKEN_INDEX
        width = places[pictures] if is_picture else 1
        if model_max_length and len(wide_ids) + width > model_max_length:
            nothing = "" if any(x != IGNORE_INDEX for x in wide_labels) else ": nothing to learn is left"
            return wide_ids, wide_labels, pictures, [f"cut at model_max_length{nothing}"]
        wide_ids += [token] * width
        wide_labels += [IGNORE_INDEX if is_picture else label] * width
        pictures += is_picture
    return wide_ids, wide_labels, pictures, []


def pack(examples, config, model_max_length=None):
    """Examples -> Batch; config: LlavaConfig. What is longer than model_max_length is cut, and noted."""
    input_ids, labels, positions, bounds, pixels, sizes, notes = [], [], [], [0], [], [], []
    for example in examples:
        places = [config.tokens_of(size) for size in example.image_sizes]
        row_ids, row_labels, pictures, cut = widen(example.ids, example.labels, places, model_max_length)
        if (largest := max(row_ids, default=0)) >= config.text.vocab_size:
            raise ValueError(f"record {example.id!r}: token {largest} has no row in the model's embeddings, which have "
                             f"{config.text.vocab_size}; take it out of the text, or use this very model's tokenizer")
        input_ids += row_ids
        labels += [IGNORE_INDEX] * len(row_labels[:1]) + row_labels[1:]  # nothing predicts the first
        positions += range(len(row_ids))
        bounds.append(len(input_ids))
        if pictures:
            sizes += example.image_sizes[:pictures]
            pixels.append(example.pixel_values[: sum(map(config.views_of, example.image_sizes[:pictures]))])
        notes += [(note, example.id) for note in example.notes + cut]
        notes += [(REPLACED, name) for name in example.replaces]
    size = config.vision.image_size if config.vision else 0
    return Batch(
        torch.tensor(input_ids), torch.tensor(labels), torch.tensor(positions), torch.tensor(bounds, dtype=torch.int32),
        torch.cat(pixels) if pixels else torch.zeros(0, 3, size, size), [example.id for example in examples], sizes,
        notes)


def load_pictures(example, image_processor, aspect, image_folder=""):
    """Open the example's pictures, each file once, and put their pixels into it."""
    opened = {name: open_picture(os.path.join(image_folder, name)) for name in dict.fromkeys(example.pictures)}
    return put_pictures(example, [opened[name] for name in example.pictures], image_processor, aspect)


def put_pictures(example, pictures, image_processor, aspect):
    """Put PIL pictures into an example: pixel_values, image_sizes."""
    if pictures:
        check_tower(image_processor)
        pixels = {id(picture): image_processor(picture, aspect) for picture in pictures}  # (views, 3, S, S) each
        example.pixel_values = torch.cat([pixels[id(picture)] for picture in pictures])
        example.image_sizes = [picture.size[::-1] for picture in pictures]
    return example


def places_of(example, config, image_folder):
    """Open the example's pictures -> the places that each takes, 1 where the model's tower is not known."""
    sizes = {name: open_picture(os.path.join(image_folder, name)).size[::-1] for name in set(example.pictures)}
    return [config.tokens_of(sizes[name]) or 1 for name in example.pictures]


def check_tower(image_processor):
    """ValueError if there is nothing to look at a picture with."""
    if image_processor is None:
        raise ValueError("picture without a tower: the model has no vision tower to see it with; give --vision_tower")


def collate(records, loaded, image_folder="", conv_mode=None, model_max_length=None):
    """Records, as read from JSON -> Batch for loaded.model. conv_mode, model_max_length: by default the model's own."""
    model_max_length = model_max_length or loaded.config.tokenizer_model_max_length
    config, examples = loaded.config, []
    for number, record in enumerate(records):
        record = {"id": str(number)} | record
        try:
            example = render_record(record, loaded.tokenizer, conv_mode or loaded.conv_mode,
                                    config.mm_use_im_start_end, model_max_length)
            examples.append(load_pictures(example, loaded.image_processor, config.image_aspect_ratio, image_folder))
        except ValueError as error:
            raise ValueError(f"record {record['id']!r}: {error}") from None
    return pack(examples, config, model_max_length)


# ---------------------------------------------------------------------------------------------------- a whole data set


class Records:
    """A data set for torch's DataLoader: records[i] is the i-th Example, records.pack the collate_fn.

    All records are looked at once, at the start, so that what is wrong is known before the first step; none is kept. A
    bad record stops the run, or with on_bad_record="skip" is left out and counted. So does a picture that is missing;
    with on_bad_image="skip" the next record with a picture stands in the place of its record, and the others keep
    theirs. A picture that turns out broken later stops the run, or with either flag has its record replaced."""

    def __init__(self, paths, image_folder, loaded, conv_mode=None, model_max_length=None, on_bad_record="stop",
                 strict_labels=False, on_bad_image="stop", seed=42):
        # Not `loaded` itself: a DataLoader's workers may get a copy of this object, and the model is large.
        self.tokenizer, self.image_processor, self.config = loaded.tokenizer, loaded.image_processor, loaded.config
        self.image_folder, self.conv_mode = image_folder or "", templates.canonical(conv_mode or loaded.conv_mode)
        self.model_max_length = model_max_length or loaded.config.tokenizer_model_max_length
        self.skip, self.replace, self.strict = on_bad_record == "skip", on_bad_image == "skip", strict_labels
        self.load = partial(load_pictures, image_processor=self.image_processor, image_folder=self.image_folder,
                            aspect=self.config.image_aspect_ratio)  # or what training/features.py has of them
        self.notes, self.words = {}, []  # what was odd -> records' ids, in order; words, below 0 without a picture
        every, good = read_records(paths, seed), []
        line = command.Progress("reading records", len(every), of_bytes=False)
        for i, record in enumerate(every):
            line.advance(1)
            try:
                rendered, pictures, notes = compose(
                    record, self.conv_mode, self.tokenizer, self.config.mm_use_im_start_end, strict_labels)
                check_record(rendered.learned, None if self.replace else pictures, notes, self.image_folder)
                if pictures:
                    check_tower(self.image_processor)
                good.append(i)
                words = sum(len(turn["value"].split()) for turn in record["conversations"])
                self.words.append(words if "image" in record else -words)
                self.note((note, record["id"]) for note in notes)
            except ValueError as error:
                if not self.skip:
                    path = every.datasets[bisect_right(every.cumulative_sizes, i)].path
                    raise ValueError(f"{path}: record {record['id']!r}: {error}") from None
                self.note([("left out, " + str(error).split(":")[0], record["id"])])
        if not good:
            raise ValueError(f"{paths}: every record was left out; `python data.py check` lists the reasons")
        self.records = Subset(every, np.array(good))  # a sequence that reads and parses what is asked for

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        broken = []
        for record in map(self.records.__getitem__, chain(range(i, len(self)), range(i))):
            if broken and record.get("image") is None:
                continue
            example = render_record(record, self.tokenizer, self.conv_mode, self.config.mm_use_im_start_end,
                                    self.model_max_length, self.strict)
            try:
                example.replaces = broken
                return self.load(example)
            except ValueError as error:
                if not self.replace and not self.skip:
                    raise ValueError(f"record {example.id!r}: {error}") from None
                broken.append(example.id)
        raise ValueError(f"no picture can be read in {self.image_folder}; check --image_folder")

    def pack(self, examples):
        """Examples -> Batch, cut at model_max_length."""
        return pack(examples, self.config, self.model_max_length)

    def note(self, notes):
        """Count oddities, (what, record id)."""
        for what, record_id in notes:
            self.notes.setdefault(what, {})[str(record_id)] = None

    def report(self):
        """What was odd, one line each with the first records' ids; empty if all was well."""
        return "\n".join(f"{len(ids)} records: {what} ({', '.join(list(ids)[:5])}{', …' if len(ids) > 5 else ''})"
                         for what, ids in self.notes.items())

    def question(self, i):
        """The i-th record's last question, to be asked, as it has an answer; None if all its answers are empty."""
        record = self.records[i]
        messages, image, _ = messages_of(record)
        messages = messages[messages[0][0] == "gpt":]
        last = max((k for k, (role, text) in enumerate(messages) if role == "gpt" and text), default=None)
        if last is None:
            return None
        tags = sum(text.count(IMAGE_TAG) for _, text in messages[:last])
        images = [image] * tags if isinstance(image, str) else (image or [])[:tags]
        return SimpleNamespace(
            id=str(record["id"]), kind=record.get("kind"), messages=messages[:last], answer=messages[last][1],
            images=[os.path.join(self.image_folder, name) for name in images])


def check_record(learned, pictures, notes, image_folder):
    """ValueError if a record has nothing to learn or a picture of it does not exist. A record whose answers are empty
    passes: the original trains with it (and learns nothing), and so the order of the others stays the original's."""
    if not learned and EMPTY_ANSWER not in notes:
        raise ValueError("nothing to learn: it has no answer; add one or leave the record out")
    for path in (os.path.join(image_folder, name) for name in pictures or []):
        if not os.path.isfile(path):
            raise ValueError(f"missing picture: {path} does not exist; check --image_folder")


# -------------------------------------------------------------------------------------------------------- command line


def main():
    """python data.py show|check|convert …"""
    parser = command.Parser(prog="data.py", description=__doc__.split("\n")[0])
    doors = parser.add_subparsers(dest="door", required=True)
    for run, about in ((show, "prompt, ids and labels of records"), (check, "every record and picture, one report")):
        door = doors.add_parser(run.__name__, help=about, description=about)
        door.set_defaults(run=run)
        door.add_argument("--data_path", required=True, nargs="+", help="JSON array or JSONL, one file or several")
        door.add_argument("--image_folder", default="", help="where the records' pictures lie")
        door.add_argument("--model_name_or_path", required=True, help="a model; its tokenizer files are enough")
        door.add_argument("--version", help="conversation template, as in training; default: the model's own")
        door.add_switch("--strict_labels", help="count tokens as the original does, and drop a sample that disagrees")
        door.add_argument("--model_max_length", type=int, help="the longest sequence; default: the model's own limit")
        door.add_switch("--mm_use_im_start_end", default=None, help="<im_start> and <im_end> around pictures")
        door.add_switch("--json", help="print JSON and nothing else")
        door.add_argument("--seed", type=int, default=42, help="draws the records where a path has a share: a.json:0.5")
        if run is show:
            door.add_argument("--index", type=int, nargs="+", help="records, from 0; default: 0 1 2, with --json all")
        else:
            door.add_argument("--fix", metavar="OUT", help="write the records that can be learned from, each once")
            door.add_argument("--dataloader_num_workers", type=int, help="processes; default: one per processor")
    door = doors.add_parser("convert", help="records out of other data sets")
    door.set_defaults(run=convert)
    door.add_argument("kind", choices=SOURCES, help="what SRC is")
    door.add_argument("src", metavar="SRC", help="scienceqa, okvqa: a folder; ubiai: the JSON export; csv: the table")
    door.add_argument("out", metavar="OUT", help="the JSON file to write")
    door.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="; ".join(
        " ".join([kind, *map("=".join, source.__kwdefaults__.items())]) for kind, source in SOURCES.items()))
    args = parser.parse_args()
    return args.run(args)


def read_model(args):
    """The parts of a model that text needs, without its weights -> (tokenizer, conv_mode, LlavaConfig)."""
    folder = find_folder(args.model_name_or_path, weights=False)
    values = read_json(Path(folder) / "config.json", missing={})
    config = layouts.read_config(values, (), folder) if values else LlavaConfig()
    if args.version:
        config.conv_mode, warning = templates.of_version(args.version)
        if warning:
            print(warning, file=sys.stderr)
    if args.mm_use_im_start_end is not None:
        config.mm_use_im_start_end = args.mm_use_im_start_end
    tokenizer = Tokenizer.from_folder(folder)
    tokens = missing_tokens(tokenizer, values, config.mm_use_im_start_end, config.text.vocab_size,
                            templates.PAD if args.version == "v0" else None)
    if tokens:
        tokenizer.add_tokens(tokens)
    config.tokenizer_model_max_length = args.model_max_length or config.tokenizer_model_max_length
    return tokenizer, templates.choose_conv_mode(config, tokenizer)[0], config


def show(args):
    """Print what training sees of some records."""
    tokenizer, conv_mode, config = read_model(args)
    records, rows = read_records(args.data_path, args.seed), []
    for i in args.index or range(len(records) if args.json else min(3, len(records))):
        if not -len(records) <= i < len(records):
            raise ValueError(f"--index {i}: the file holds {len(records)} records, counted from 0")
        row = {"id": str(records[i]["id"])}
        try:
            example = render_record(records[i], tokenizer, conv_mode, config.mm_use_im_start_end,
                                    config.tokenizer_model_max_length, args.strict_labels)
            row |= {"prompt": example.prompt, "input_ids": example.ids, "labels": example.labels}
            known = config.vision and all(os.path.isfile(os.path.join(args.image_folder, x)) for x in example.pictures)
            places = places_of(example, config, args.image_folder) if known and not args.json else None
            text = portrait(example, places, colour=sys.stdout.isatty())
        except ValueError as error:
            row["error"] = str(error)
            text = f"── {row['id']}: ERROR {error}\n"
        rows.append(row)
        if not args.json:
            print(text)
    if args.json:
        print(json.dumps(rows))


def portrait(example, places, colour):
    """Its prompt for a reader, learned tokens green (without colour: in brackets). places: of its pictures, or None."""
    on, off = ("\033[32m", "\033[0m") if colour else ("⟦", "⟧")
    learned = [label != IGNORE_INDEX for label in example.labels]
    text, place, inside = "", 0, False
    for (start, _), now in zip(example.spans, learned):
        if now != inside:
            text += example.prompt[place:start] + (on if now else off)
            place, inside = start, now
    text += example.prompt[place: example.spans[-1][1]] + off * inside
    tokens = len(example.ids) + sum(n - 1 for n in places or ())
    head = f"── {example.id}: {tokens} tokens, {sum(learned)} learned, {len(example.pictures)} pictures"
    if example.pictures:
        head += " of one token each" if places is None else f" of {', '.join(map(str, places))} tokens"
    return "\n".join([head, *(f"   note: {note}" for note in example.notes), text, ""])


def inspect_record(record, model, image_folder, strict):
    """What `check` finds -> (record id, error or None, notes, tokens, whether any is learned, its content's hash)."""
    tokenizer, conv_mode, config = model
    limit, content = config.tokenizer_model_max_length, json.dumps([record.get("image"), record.get("conversations")])
    name, content = str(record["id"]), hashlib.blake2b(content.encode(), digest_size=16).digest()
    try:
        example = render_record(record, tokenizer, conv_mode, config.mm_use_im_start_end, limit, strict)
        check_record(example.learned, example.pictures, example.notes, image_folder)
    except ValueError as error:
        return name, str(error).split(":")[0], [], 0, False, content
    broken, odd = None, []
    try:
        places = places_of(example, config, image_folder)
        for path in (os.path.join(image_folder, name) for name in example.pictures):
            with Image.open(path) as picture:
                kind = "JPEG" if picture.format == "MPO" else picture.format  # a JPEG with a second picture in it
                odd += [DEEP] * (picture.mode[0] in "IF")  # I;16, I: integers of 16 and 32 bits; F: floats
            odd += [SUFFIX] * (Image.registered_extensions().get(Path(path).suffix.lower(), kind) != kind)
    except ValueError:
        broken, places = "broken picture", [config.image_tokens or 1] * len(example.pictures)
    _, labels, _, cut = widen(example.ids, example.labels, places, limit)
    length, learns = len(example.ids) + sum(places) - len(places), any(label != IGNORE_INDEX for label in labels)
    return name, broken, [*example.notes, *sorted({*odd}), *cut], length, learns, content


def check(args):
    """Look at every record and every picture; -> exit status 1 if there is an error."""
    model = _, conv_mode, config = read_model(args)
    records, processes = read_records(args.data_path, args.seed), args.dataloader_num_workers
    errors, notes, lengths, seen, clean = {}, {}, Counter(), set(), []
    if processes is None:
        processes = os.cpu_count() if len(records) > 500 else 0
    rows = DataLoader(records, batch_size=None, num_workers=processes, collate_fn=partial(
        inspect_record, model=model, image_folder=args.image_folder, strict=args.strict_labels))
    line = command.Progress("checking", len(records), of_bytes=False)
    for i, (name, error, odd, length, learns, content) in enumerate(rows):
        line.advance(1)
        if learns and not error and content not in seen:
            clean.append(i)
        if length:
            lengths[1 << max(5, (length - 1).bit_length())] += 1  # the power of two that holds it, 32 at least
        for note in [*odd, *(what for what, key in ((SAME_ID, name), (SAME, content)) if key in seen)]:
            notes.setdefault(note, []).append(name)
        if error:
            errors.setdefault(error, []).append(name)
        seen |= {name, content}
    if args.json:
        print(json.dumps({"records": len(records), "conv_mode": conv_mode, "errors": errors, "notes": notes,
                          "tokens_up_to": dict(sorted(lengths.items())), "clean": len(clean)}))
    else:
        each = f"{config.image_tokens or 1} tokens per {'view' if config.image_aspect_ratio == 'anyres' else 'picture'}"
        print(f"{len(records)} records, template {conv_mode}, {each}")
        for title, found in (("ERROR", errors), ("note", notes)):
            for what, ids in sorted(found.items(), key=lambda item: -len(item[1])):
                print(f"{title:5s} {len(ids):>7,}  {what} ({', '.join(ids[:5])}{', …' if len(ids) > 5 else ''})")
        print(f"{len(clean)} can be learned from, each counted once\ntokens per record:")
        for size, n in sorted(lengths.items()):
            print(f"  up to {size:>6,} {n:>8,}  {'█' * -(-40 * n // max(lengths.values()))}")
    if args.fix:
        write_records(args.fix, (add_tag(records[i]) for i in clean))
        print(f"{len(clean)} records written to {args.fix}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    command.run(main)
