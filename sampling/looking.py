"""Where it looked: for each word of an answer, the pictures with the patches lit that the word attended to.

A token is chosen by the row before it, and every layer's heads share that row's attention out over the rows up to it,
those of the pictures among them. What they give to the pictures' places is the map of the token. Which layers to ask
(`--attention_layers`) is a choice:

    mean     the mean over all layers and heads (the default)
    last     the last layer alone: what is read just before the choice, when the picture has mostly been read already
    20-32    some layers, counted from 1; 20 is that one alone
    rollout  where the row's content came from (Abnar and Zuidema 2020): a row that is attended to is itself mixed from
             earlier ones. Of a layer's output half is taken to be the row itself, the residual, and half what attention
             brings; multiplied through all layers, that is each place's share in the row

A map is no proof of a reason, and large models rest much of their attention on rows that say nothing (Xiao et al.
2023): the sheet says beside each word what share of its attention the picture had.

Legend: T rows of the prompt and the answer, W tokens of the answer, P pictures, H heads, K head dim.
"""

import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import data
from kernels.elementwise import rotate
from model import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tokenizer import TextStream
from vision import NEWLINE, fit, join_tiles, unpad

CELLS = 64  # of a picture on a sheet at most: itself, the whole answer, and the first 62 words
COLUMNS, WIDTH = 8, 1280  # of a sheet: cells beside each other at most, and pixels, roughly
PAPER, INK, FAINT = (18, 18, 22), (240, 240, 235), (140, 140, 150)


# ----------------------------------------------------------------------------------------------------------- attention


def layer_range(layers, count):
    """--attention_layers -> (first, behind the last) of a model's `count` layers, from 0. ValueError for no such."""
    if layers in ("mean", "rollout", "last"):
        return count - 1 if layers == "last" else 0, count
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", layers)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last <= count:
        raise ValueError(f"--attention_layers {layers}: expected mean, last, rollout, or layers of 1 to {count}, like "
                         f"{count} or 1-{count}")
    return first - 1, last


@torch.no_grad()
def picture_attention(loaded, example, token_ids, layers="mean"):
    """How much the row that chose each token of an answer attended to each place of each picture. -> P tensors
    (W, places) float32. example: the prompt (data.Example); token_ids: the answer's; layers: as --attention_layers

    One more pass over prompt and answer. The layers' queries and keys are made a second time beside it, since the fused
    attention never holds the weights themselves; of them only the W rows are computed, head by head. Rollout needs all
    rows, (T, T) of one layer and head at a time.
    """
    asked, ids = len(data.pack([example], loaded.config).input_ids), example.ids + token_ids
    example = replace(example, ids=ids, labels=[IGNORE_INDEX] * len(ids))
    batch, language = data.pack([example], loaded.config), loaded.model.language_model.model
    every = torch.arange(len(batch.input_ids))
    writing, places = every[asked - 1: -1], every[batch.input_ids == IMAGE_TOKEN_INDEX]
    first, last = layer_range(layers, len(language.layers))
    rollout, start = layers == "rollout", (every[:, None] == places).float()  # (T, places): each place is its own
    share = start if rollout else 0 * start[writing]

    def listen(attention, inputs):
        nonlocal share
        weights = head_mean(attention, *inputs[:2], every if rollout else writing)
        share = share.to(weights.device)  # layers may lie on several GPUs
        share = (weights @ share + share) / 2 if rollout else share + weights[:, places] / (last - first)

    handles = [layer.self_attn.register_forward_pre_hook(listen) for layer in language.layers[first:last]]
    try:
        loaded.model.hidden(batch.to(language.embed_tokens.weight.device))
    finally:
        for handle in handles:
            handle.remove()
    share = share[writing] if rollout else share
    return share.cpu().split([loaded.config.tokens_of(size) for size in batch.image_sizes], 1)


def head_mean(attention, x, rotary, rows):
    """The attention weights of some rows (W,) of a layer's input x (T, D), mean over heads. -> (W, T) float32"""
    q, k = (proj(x).unflatten(-1, (-1, attention.head_dim)) for proj in (attention.q_proj, attention.k_proj))
    q, k = rotate(q, k, *rotary)
    future = (torch.arange(len(x)) > rows[:, None]).to(x.device)
    total = x.new_zeros(future.shape, dtype=torch.float32)
    for head in range(q.shape[1]):
        keys = k[:, head * k.shape[1] // q.shape[1]]  # (T, K)
        scores = (q[rows, head] @ keys.T).float() * attention.head_dim**-0.5
        total += scores.masked_fill_(future, float("-inf")).softmax(-1)
    return total / q.shape[1]


def words_of(tokenizer, answer):
    """The words of an answer as they read in its text, punctuation included -> [(word, numbers of its tokens)]."""
    stream, text, bounds = TextStream(tokenizer), "", [0]
    for token in answer.token_ids:
        text += stream.push(token)
        bounds.append(len(text))
    text += stream.flush()
    spans = [(start, next((end for end in bounds[i + 1:] if end > start), len(text)))  # bytes that are no character
             for i, start in enumerate(bounds[:-1])]  # yet belong to where that ends
    found = [[i for i, (start, end) in enumerate(spans) if start < word.end() and word.start() < end]
             for word in re.finditer(r"\S+", text)]
    return list(zip(answer.text.split(), found))  # behind the text come stop strings only


# ------------------------------------------------------------------------------------------------------------ pictures


def heat_maps(config, size, attention):
    """Attention to the places of a picture of (height, width) -> grids that each cover the whole picture, as attention
    per area: one from the squashed view, with anyres one from the tiles, too."""
    order, side = config.reading_order(size), config.vision.image_size // config.vision.patch_size
    views = torch.zeros(config.views_of(size) * config.image_tokens)
    views[order[order != NEWLINE]] = attention[order != NEWLINE]
    views = views.view(-1, config.image_tokens)[:, -side * side:].view(-1, side, side)  # without the class token
    yield views[0] * side**2
    if len(views) > 1:
        tiles = unpad(join_tiles(views[1:], config.tiles_of(size)), size, config.unpad_rounded)
        if tiles.numel():  # none are left of a picture that is a mere line
            yield tiles * tiles.numel()


def as_seen(loaded, picture, side):
    """A PIL picture as the tower sees it, padded or cut, but side x side pixels; with anyres whole and unsquashed."""
    aspect, processor = loaded.config.image_aspect_ratio, loaded.image_processor
    if aspect == "anyres":
        return picture.resize(fit(picture.size[::-1], (side, side))[::-1])
    edge = side * (processor.shortest_edge or processor.crop_size) // processor.crop_size
    return replace(processor, crop_size=side, shortest_edge=edge).resize_and_crop(processor.views(picture, aspect)[0])


def light_up(config, seen, pictures, attentions):
    """Pictures in the dark, in which the attended patches have light and colour, the most attended of all the most.

    seen: the pictures as they are to be shown; attentions: (places,) for each. -> [PIL], as large as seen
    """
    heat = [sum(F.interpolate(grid[None, None], whole.size[::-1], mode="bicubic")[0, 0].clamp(min=0)
                for grid in heat_maps(config, picture.size[::-1], attention))
            for whole, picture, attention in zip(seen, pictures, attentions)]
    brightest = max(one.max() for one in heat).clamp(min=1e-9)
    masks = [Image.fromarray((255 * one / brightest).round().byte().numpy()) for one in heat]
    dark = [whole.convert("L").point(lambda value: value // 3).convert("RGB") for whole in seen]
    return list(map(Image.composite, seen, dark, masks))


def galleries(loaded, pictures, maps, words):
    """For each picture its cells [(caption, share of the attention or None, PIL)]: itself, lit by all words, by one."""
    everything = sorted({i for _, tokens in words for i in tokens}) or range(len(maps[0]))
    wanted = [("the answer", everything)] * (len(words) != 1) + words[: CELLS - 2]
    side = WIDTH // min(max(len(wanted) + 1, 4), COLUMNS)
    seen = [as_seen(loaded, picture, side) for picture in pictures]
    rows = [[("the picture", None, whole)] for whole in seen]
    for caption, tokens in wanted:
        attentions = [of_picture[tokens].mean(0) for of_picture in maps]
        for row, attention, lit in zip(rows, attentions, light_up(loaded.config, seen, pictures, attentions)):
            row.append((caption, float(attention.sum()), lit))
    return rows


def contact_sheet(rows, title, note):
    """Galleries one below the other, their cells in lines of COLUMNS, under a title and a note. -> PIL"""
    gap, columns, side = 12, min(len(rows[0]), COLUMNS), max(row[0][2].width for row in rows)
    lines = [row[i: i + columns] for row in rows for i in range(0, len(row), columns)]
    large, small = ImageFont.load_default(24), ImageFont.load_default(16)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, 80 + sum(line[0][2].height + 36 for line in lines)), PAPER)
    pen, top = ImageDraw.Draw(sheet), 76
    pen.text((gap, 12), shortened(title, large, sheet.width - 2 * gap), INK, large)
    pen.text((gap, 44), shortened(note, small, sheet.width - 2 * gap), FAINT, small)
    for line in lines:
        below = top + line[0][2].height + 4
        for left, (caption, share, lit) in zip(range(gap, sheet.width, side + gap), line):
            percent = "" if share is None else f"{share:.0%}"
            sheet.paste(lit, (left, top))
            pen.text((left, below), shortened(caption, small, side - small.getlength(percent) - gap), INK, small)
            pen.text((left + side, below), percent, FAINT, small, "ra")
        top = below + 32
    return sheet


def shortened(text, font, room):
    """As much of a text as `room` pixels hold, in one line."""
    text = " ".join(text.split())
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "…") > room:
        text = text[:-1]
    return text + "…"


def thumbnail(picture, rows=14):
    """A picture as text: one character of a terminal shows two pixels, one above the other."""
    pixels = np.asarray(picture.resize((rows * 2 * picture.width // picture.height, rows * 2)))
    cell = "\033[38;2;{};{};{};48;2;{};{};{}m\u2580"  # upper half block: foreground above, background below
    return "\n".join("".join(cell.format(*above, *below) for above, below in zip(*two_rows)) + "\033[0m"
                     for two_rows in zip(pixels[::2], pixels[1::2]))


def show(loaded, example, pictures, answer, args):
    """Write the contact sheet to --attention; on a terminal, show as many cells of each picture as fit there, too.

    example: the prompt (data.Example) of PIL pictures; answer: has token_ids and text; args: the command line's."""
    maps = picture_attention(loaded, example, answer.token_ids, args.attention_layers)
    words = words_of(loaded.tokenizer, answer)
    rows, layers = galleries(loaded, pictures, maps, words), loaded.config.text.num_hidden_layers
    note = f"layers: {args.attention_layers} of {layers}; per cent: the share of its attention that the picture had"
    contact_sheet(rows, args.prompt, note).save(args.attention)
    for row in rows if sys.stdout.isatty() and not args.json else ():
        row, side = row[: max(2, shutil.get_terminal_size().columns // 28)], max(row[0][2].size)
        strip = Image.new("RGB", (side * len(row), side), PAPER)
        for i, (_, _, lit) in enumerate(row):
            strip.paste(lit, (i * side, side - lit.height))
        print("".join(f"{caption[:27]:28}" for caption, _, _ in row), thumbnail(strip), sep="\n")
    shown = "" if len(words) <= CELLS - 2 else f", the first {CELLS - 2} of {len(words)} words"
    print(f"attention over the patches written to {args.attention}{shown}", file=sys.stderr)
