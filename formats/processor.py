"""What transformers' AutoProcessor reads beside a llava-hf folder's weights: pictures, the `<image>` token, a chat.

To LLaVA `<image>` is a mark in the text that never becomes an id. llava-hf gives it one, and as many copies of it as a
picture has features. A tokenizer without it gets `<image>` as its next id, 32000 for LLaMA's; no other id changes. The
published folders have 64 more embedding rows for that (32064), and so do ours.
"""

import json
from pathlib import Path

from formats.layouts import STRATEGIES
from formats.templates import CHAT, TEMPLATES, canonical, frame, render_turns, show_pictures
from tokenizer import IMAGE_TAG, MANNERS

JINJA = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")  # LLaVA's templates, all in one


def preprocessor_config(image_processor, config):
    """preprocessor_config.json: CLIPImageProcessor cuts pictures to a square, Llava's pads, LlavaNext's: anyres."""
    values = image_processor.to_dict() | {"processor_class": processor_class(config)}
    if config.image_aspect_ratio == "pad":
        values |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    elif config.image_aspect_ratio == "anyres":
        values |= {"image_processor_type": "LlavaNextImageProcessor", "do_pad": True,
                   "image_grid_pinpoints": config.pinpoints}
    return values


def processor_class(config):
    """The class that turns text and pictures into a model's input."""
    return "LlavaNextProcessor" if config.image_aspect_ratio == "anyres" else "LlavaProcessor"


def processor_config(config):
    """processor_config.json: how many copies of `<image>` a picture takes."""
    return {
        "processor_class": processor_class(config), "image_token": IMAGE_TAG, "patch_size": config.vision.patch_size,
        "num_additional_image_tokens": 1,  # CLIP's class token, which the strategy `default` takes away again
        "vision_feature_select_strategy": STRATEGIES[config.mm_vision_select_feature],
    }


def add_image_token(files, next_id):
    """Give the tokenizer in `files` ({name: bytes}, changed in place) an `<image>` token, if it has none. -> its id"""
    if "tokenizer.json" not in files:
        return next_id
    spec, config = json.loads(files["tokenizer.json"]), json.loads(files.get("tokenizer_config.json", b"{}"))
    listed = {str(token.pop("id")): token for token in json.loads(files["tokenizer.json"])["added_tokens"]}
    listed |= config.get("added_tokens_decoder", {})
    ids = [int(token_id) for token_id, token in listed.items() if token["content"] == IMAGE_TAG]
    if ids:
        return ids[0]
    token = MANNERS | {"content": IMAGE_TAG, "special": True}
    spec["added_tokens"].append({"id": next_id, **token})
    config["added_tokens_decoder"] = listed | {str(next_id): token}
    files["tokenizer.json"] = json.dumps(spec, ensure_ascii=False, indent=1).encode()
    files["tokenizer_config.json"] = json.dumps(config, ensure_ascii=False, indent=2).encode()
    return next_id


def remove_image_token(files):
    """The reverse: take `<image>`, and `<pad>` behind it, out -> rows that are left; None: they do not come last."""
    if "tokenizer.json" not in files:
        return None
    spec = json.loads(files["tokenizer.json"])
    rows = len(spec["model"]["vocab"])
    tail = {token["content"] for token in spec["added_tokens"] if token["id"] >= rows}
    if IMAGE_TAG not in tail or not tail <= {IMAGE_TAG, "<pad>"}:
        return None
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in tail]
    files["tokenizer.json"] = json.dumps(spec, ensure_ascii=False, indent=1).encode()
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if name in files:
            files[name] = json.dumps(_without(json.loads(files[name]), tail), ensure_ascii=False, indent=2).encode()
    files.pop("added_tokens.json", None)
    return rows


def _without(values, tokens):
    """A tokenizer's config without what names one of the tokens, in the list of added tokens, too."""
    return {key: _without(value, tokens) if key == "added_tokens_decoder" else value for key, value in values.items()
            if (value.get("content") if isinstance(value, dict) else str(value)) not in tokens}


def chat_template(conv_mode, tokenizer, mm_use_im_start_end=False):
    """The conversation template as Jinja: what formats/templates.py renders when a question is asked. A message's
    content is a text, or transformers' list of parts, of which pictures come first as `<image>` lines."""
    if conv_mode == CHAT:
        return tokenizer.chat_template
    template = TEMPLATES[canonical(conv_mode)]
    settings = frame(template) | {
        "head": render_turns(template, []).prompt,  # v0's example included
        "tag": IMAGE_TAG, "shown": show_pictures(conv_mode, IMAGE_TAG, mm_use_im_start_end),
        "only_tags": template.style == "plain"}
    return "".join(f"{{%- set {name} = {json.dumps(value)} -%}}\n" for name, value in settings.items()) + JINJA
