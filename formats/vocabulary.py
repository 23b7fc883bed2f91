"""Tokens and rows: token i has row i of the embeddings and of the head, and files disagree about how many there are.

* More rows than tokens: llava-hf's 32064 rows for 32002 tokens are padding. A row without a token is never sampled, nor
  are llava-hf's `<image>` and `<pad>`, whose rows are chance numbers.
* Tokens that LLaVA adds to its language model: `[PAD]`, `<im_patch>`, `<im_start>`, `<im_end>` (LLAVA.md 1.4, 5.1).
  Where they are asked for and the embeddings end before them, each gets the mean of all rows, as in the original's
  training; a projector's file may bring trained ones for the last two. `<im_patch>` is never read since LLaVA 1.0: it
  is a token only where the embeddings have a row for it.
* More tokens than rows otherwise: such a token cannot be read. Special tokens that no text holds (LLaMA-2's `<pad>`)
  are a warning, anything else is the tokenizer of another model.
"""

import torch

from formats.command import say
from formats.files import LazyTensor
from formats.templates import START_END

EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"  # (V, D)
PATCH = "<im_patch>"


def missing_tokens(tokenizer, values, start_end, rows, pad_token=None, patch=False):
    """The tokens that LLaVA would add to this tokenizer, in the order of their ids. values: config.json, where no
    `mm_use_im_patch_token` beside the original's other keys means True; start_end: <im_start> and <im_end>; rows: of
    the embeddings; pad_token: where the tokenizer names none; patch: `<im_patch>`, whatever there is room for."""
    pad = [pad_token] if pad_token and tokenizer.pad_token_id is None else []
    named = values.get("mm_use_im_patch_token", "mm_hidden_size" in values or "mm_vision_tower" in values)
    wanted = pad + [PATCH] * bool(patch or named) + [*START_END] * bool(start_end)
    missing = [token for token in wanted if tokenizer.token_to_id(token) is None]
    return missing if patch or len(tokenizer) + len(missing) <= rows else [token for token in missing if token != PATCH]


def grow(weight, rows, trained=None):
    """LazyTensor (V, D) -> (rows, D): new rows are the mean of the others; the last two `trained`'s, if it is given."""
    def read():
        old = weight.read()
        new = old.mean(0, keepdim=True).expand(rows - len(old), -1)  # in the file's dtype, as the original
        return torch.cat([old, new] if trained is None else [old, new[:-2], trained.read()[-2:].to(old.dtype)])
    return LazyTensor(torch.Size([rows, *weight.shape[1:]]), weight.dtype, weight.file, read)


def add_rows(tensors, tokens, trained, rows, where):
    """Give new tokens rows, in place (LLAVA.md 1.4). trained: a projector file's embeddings, (2, D), all or None."""
    before, width = tensors[EMBEDDING].shape
    if trained is not None and not (tokens[-2:] == [*START_END] and trained.shape in ((2, width), (rows, width))):
        raise ValueError(f"{trained.file} holds embeddings {tuple(trained.shape)} for {' and '.join(START_END)}, but "
                         f"{where} takes (2, {width}) or ({rows}, {width}); use the projector's own language model")
    for name in {EMBEDDING, HEAD} & tensors.keys():
        tensors[name] = grow(tensors[name], rows, trained if name == EMBEDDING else None)
    say(f"{where}: {', '.join(tokens)} get the rows {before}-{rows - 1}, the mean of the others"
        + (f"; the last two as trained in {trained.file}" if trained is not None else ""))


def check_tokens(tokenizer, rows, image_token, where):
    """Compare a tokenizer with the rows of its embeddings. -> the ids that no answer may hold, a list.
    image_token: llava-hf's id of `<image>`, or None. ValueError if the tokenizer is another model's."""
    surplus = [i for i in range(rows, len(tokenizer)) if i != image_token]
    if surplus:
        names = ", ".join(tokenizer.decode([i], skip_special_tokens=False) for i in surplus[:8])
        names += " …" * (len(surplus) > 8)
        if not set(surplus) <= tokenizer.special_ids:
            raise ValueError(f"{where}: the tokenizer has {len(tokenizer)} tokens, the embeddings have {rows} rows, "
                             f"none for {names}; copy the tokenizer that belongs to the weights")
        say(f"WARNING: {where}: the embeddings have {rows} rows and none for {names}; keep such tokens out of texts")
    if rows > len(tokenizer):
        say(f"{where}: rows {len(tokenizer)}-{rows - 1} of the vocabulary have no token and are never sampled")
    chance = {image_token, tokenizer.token_to_id("<pad>")} if image_token is not None else set()
    return [i for i in range(rows) if i in chance or i >= len(tokenizer)]
