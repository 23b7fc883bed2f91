"""Ask a LLaVA: prompt and pictures in, words out.

    python sample.py --image examples/scene.png --prompt "what color is the circle ?"
    python sample.py --model_name_or_path llava-hf/llava-1.5-7b-hf --image x.jpg          (no --prompt: a chat)

`generate` answers a list of requests: prompts of any length are read in one packed batch, then all answers grow by one
token per step, each against its own past in the key/value cache.

Legend: B requests, T rows of all prompts together, V vocabulary.
"""

import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

import data
from formats import adapter as adapters
from formats import command, templates
from kernels import choice
from kernels.elementwise import rotate
from model import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Cache
from tokenizer import IMAGE_TAG, TextStream
from vision import NEWLINE, join_tiles, open_picture, unpad
from weights import load

MINIATURE = Path(__file__).parent / "miniature" / "llava"  # the small model that comes with the project


@dataclass
class Request:
    """One question. messages: [(role, text)], roles human and gpt, the last one human; images: paths or PIL pictures.

    Without any `<image>` in the messages, one line per picture is put first. temperature 0 takes the likeliest token;
    otherwise top_k and top_p (None: off) cut the choice down, in HF's order.
    """

    messages: list
    images: list = field(default_factory=list)
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int | None = 50
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self):
        top_k, top_p = self.top_k or 0, 1 if self.top_p is None else self.top_p
        if not (0 <= self.temperature < math.inf and 0 < top_p <= 1 and top_k >= 0):
            raise ValueError(f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}: expected a "
                             "temperature and top_k from 0 on, top_p above 0 and at most 1")


@dataclass
class Answer:
    """text: stripped, without special tokens; token_ids: new ids, the end token included when it came; prompt_ids: one
    -200 per picture; seconds: the whole batch's; first_token_seconds: until its first tokens."""

    text: str
    token_ids: list
    prompt_ids: list
    seconds: float = 0.0
    first_token_seconds: float = 0.0

    @property
    def tokens_per_second(self):
        """Of this answer alone, the prompt's time included."""
        return len(self.token_ids) / max(self.seconds, 1e-9)


# ---------------------------------------------------------------------------------------------------------- generation


@torch.no_grad()
def generate(loaded, requests, on_token=None, batch_size=64):
    """Answer every request. -> [Answer] in the same order.

    requests: Request objects or dicts of their fields. on_token(index, text) is called with each finished piece of
    text. Up to batch_size requests are decoded together.
    """
    requests = [r if isinstance(r, Request) else Request(**r) for r in requests]
    answers = []
    for first in range(0, len(requests), batch_size):
        part = requests[first: first + batch_size]
        answers += _generate_batch(loaded, part, on_token and (lambda i, text, first=first: on_token(first + i, text)))
    return answers


def _generate_batch(loaded, requests, on_token):
    """One batch: read all prompts at once, then one token per request and step; ended requests leave."""
    start, embedding = time.perf_counter(), loaded.model.language_model.model.embed_tokens.weight
    prompts = [encode(loaded, request) for request in requests]
    batch = data.pack(prompts, loaded.config).to(embedding.device)
    lengths = batch.cu_seqlens.diff().tolist()
    room = [_room(loaded, length, request) for length, request in zip(lengths, requests)]
    capacity = max(lengths) + max(room)  # an ended request goes on beside the others until it leaves
    cache = Cache(loaded.config.text, len(requests), capacity, embedding.dtype, embedding.device)
    answers = [Growing(loaded, request, embedding.device, limit) for request, limit in zip(requests, room)]
    rows = list(range(len(requests)))  # which answer each row of the cache belongs to
    logits = loaded.model.last_logits(batch, cache)  # (B, V)
    first_token = time.perf_counter() - start
    while True:
        logits[:, loaded.silent_ids] = float("-inf")  # rows that only pad the vocabulary are no words
        likeliest = logits.argmax(-1).tolist()
        for row, i in enumerate(rows):
            if not answers[i].ended:
                piece = answers[i].push(logits[row], likeliest[row])
                if on_token and piece:
                    on_token(i, piece)
        running = [row for row, i in enumerate(rows) if not answers[i].ended]
        if not running:
            break
        if len(running) <= len(rows) // 2:  # the ended ones leave once they are half of the batch
            cache.keep(running)
            rows = [rows[row] for row in running]
        newest = torch.tensor([answers[i].token_ids[-1] for i in rows], device=embedding.device)
        logits = loaded.model.last_logits(_one_row_each(newest, cache), cache)
    seconds = time.perf_counter() - start
    return [Answer(a.text(), a.token_ids, p.ids, seconds, first_token) for a, p in zip(answers, prompts)]


def _one_row_each(token_ids, cache):
    """The batch of a decode step: each request's newest token (B,), at its next position."""
    bounds = torch.arange(len(token_ids) + 1, device=token_ids.device)
    return data.Batch(token_ids, None, cache.lengths.clone(), bounds, token_ids.new_empty(0, dtype=torch.float32), [])


def _room(loaded, length, request):
    """How many tokens an answer may have: max_new_tokens, or what the context leaves."""
    limit = loaded.config.text.max_position_embeddings
    if length >= limit:
        raise ValueError(f"the prompt has {length} tokens, but the model reads {limit} at most; ask with less text or "
                         "fewer pictures")
    return min(request.max_new_tokens, limit - length)


def encode(loaded, request):
    """A request -> data.Example without labels: the open prompt's ids, one -200 per picture, and the pixels."""
    if loaded.tokenizer is None:
        raise ValueError("the model's folder has no tokenizer; copy tokenizer.json and tokenizer_config.json into it")
    messages = [(role, text.replace("<image-placeholder>", IMAGE_TAG)) for role, text in request.messages]
    if request.images and not any(IMAGE_TAG in text for _, text in messages):
        role, text = messages[0]
        messages[0] = (role, f"{IMAGE_TAG}\n" * len(request.images) + text)
    if request.images:
        messages = [(role, templates.show_pictures(loaded.conv_mode, text, loaded.config.mm_use_im_start_end))
                    for role, text in messages]
    rendered = templates.render(loaded.conv_mode, messages, loaded.tokenizer, open=True)
    ids, _ = data.encode_prompt(rendered.prompt, loaded.tokenizer, rendered.bos, shows=bool(request.images))
    if ids.count(IMAGE_TOKEN_INDEX) != len(request.images):
        raise ValueError(f"{len(request.images)} pictures for {ids.count(IMAGE_TOKEN_INDEX)} {IMAGE_TAG} tags; "
                         "give one picture per tag, or no tags")
    example = data.Example("question", ids, [IGNORE_INDEX] * len(ids))
    pictures = [as_picture(image) for image in request.images]
    return data.put_pictures(example, pictures, loaded.image_processor, loaded.config.image_aspect_ratio)


def as_picture(image):
    """A path or a PIL picture -> a PIL picture in RGB."""
    return image.convert("RGB") if isinstance(image, Image.Image) else open_picture(image)


class Growing:
    """An answer that is being written: chooses its tokens with a random generator of its own, so that company never
    changes it, and knows when it has ended."""

    def __init__(self, loaded, request, device, room):
        self.request, self.room, self.ended, self.token_ids = request, room, False, []
        self.said, self.passed_on = "", 0  # the text so far, and how many characters of it push() has returned
        self.tokenizer, self.stream = loaded.tokenizer, TextStream(loaded.tokenizer)
        self.stop_ids, self.stop_texts = templates.stop(loaded.conv_mode, loaded.tokenizer)
        self.stop_ids = self.stop_ids | loaded.config.text.eos_token_ids
        self.generator = torch.Generator(device).manual_seed(request.seed)

    def push(self, logits, likeliest):
        """Take the next token from its scores (V,). -> the text it completes"""
        token = likeliest if self.request.temperature <= 0 else self.draw(logits)
        self.token_ids.append(token)
        stopped = token in self.stop_ids
        self.said += "" if stopped else self.stream.push(token)
        stopped = stopped or any(stop in self.said for stop in self.stop_texts)
        self.ended = stopped or len(self.token_ids) >= self.room
        if self.ended:
            self.said += self.stream.flush()
        piece = self.certain()[self.passed_on:]
        self.passed_on += len(piece)
        return piece

    def certain(self):
        """The text so far without a stop string, nor a tail that may yet become one (`##` of `###`)."""
        text = self.said
        for stop in self.stop_texts:
            text = text.split(stop)[0]
            if not self.ended:
                text = text[: len(text) - max(k for k in range(len(stop)) if text.endswith(stop[:k]))]
        return text

    def draw(self, logits):
        """Sample: temperature, then top-k, then top-p (Holtzman et al. 2020), in HF's order."""
        logits = logits / self.request.temperature
        if self.request.top_k:
            logits[logits < logits.topk(min(self.request.top_k, len(logits))).values[-1]] = float("-inf")
        if self.request.top_p is not None and self.request.top_p < 1:
            chances, order = logits.softmax(-1).sort(descending=True)
            before = chances.cumsum(-1) - chances  # the mass of all likelier tokens
            logits[order[before >= self.request.top_p]] = float("-inf")  # the likeliest always stays
        return int(torch.multinomial(logits.softmax(-1), 1, generator=self.generator))

    def text(self):
        """What was said, without stop strings and special tokens."""
        text = self.tokenizer.decode(self.token_ids)
        for stop in self.stop_texts:
            text = text.split(stop)[0]
        return text.strip()


# ------------------------------------------------------------------------------------------------------ where it looked


@torch.no_grad()
def picture_attention(loaded, request, answer):
    """How much the answer's tokens attended to each place of each picture. -> P tensors (places,), means over tokens,
    heads and layers

    One more pass over prompt and answer. Each layer's queries and keys are made a second time beside it, since the
    fused attention never holds the weights themselves.
    """
    example = encode(loaded, request)
    asked = len(data.pack([example], loaded.config).input_ids)
    example.ids = example.ids + answer.token_ids
    example.labels = [IGNORE_INDEX] * len(example.ids)
    model = loaded.model
    batch = data.pack([example], loaded.config).to(model.language_model.lm_head.weight.device)
    writing = torch.arange(asked - 1, len(batch.input_ids) - 1, device=batch.input_ids.device)  # rows that chose tokens
    places = (batch.input_ids == IMAGE_TOKEN_INDEX).nonzero().squeeze(1)  # of all pictures
    maps = []

    def listen(attention, inputs):
        x, rotary = inputs[:2]
        q, k = rotate(*(proj(x).unflatten(-1, (-1, attention.head_dim))
                        for proj in (attention.q_proj, attention.k_proj)), *rotary)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)  # (T, H, K)
        scores = torch.einsum("whk,thk->hwt", q[writing], k).float() * attention.head_dim**-0.5
        future = torch.arange(len(x), device=x.device) > writing[:, None]
        maps.append(scores.masked_fill(future, float("-inf")).softmax(-1)[:, :, places].mean((0, 1)))

    handles = [layer.self_attn.register_forward_pre_hook(listen) for layer in model.language_model.model.layers]
    model.hidden(batch)
    for handle in handles:
        handle.remove()
    return torch.stack(maps).mean(0).cpu().split([loaded.config.tokens_of(size) for size in batch.image_sizes])


def light_up(loaded, image, attention, side=384):
    """The picture as the tower sees it (of several views the first, which shows all of it), and beside it the same with
    the attended patches lit.

    attention (places,) -> PIL (2 side, side)
    """
    picture, processor = as_picture(image), loaded.image_processor
    whole = processor.resize_and_crop(processor.views(picture, loaded.config.image_aspect_ratio)[0])
    whole = whole.resize((side, side), Image.Resampling.LANCZOS)
    heat = sum(F.interpolate(grid[None, None], (side, side), mode="bicubic")[0, 0].clamp(min=0)
               for grid in heat_maps(loaded.config, picture.size[::-1], attention))
    mask = Image.fromarray((255 * heat / heat.max().clamp(min=1e-9)).byte().numpy())
    lit = Image.composite(whole, whole.point(lambda value: value // 5), mask)
    sheet = Image.new("RGB", (2 * side, side))
    sheet.paste(whole, (0, 0))
    sheet.paste(lit, (side, 0))
    return sheet


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


def thumbnail(sheet, rows=14):
    """A picture as text: one character of a terminal shows two pixels, one above the other."""
    small = sheet.resize((rows * 2 * sheet.width // sheet.height, rows * 2))
    cell = "\033[38;2;{};{};{};48;2;{};{};{}m\u2580"  # upper half block: foreground above, background below
    lines = []
    for y in range(0, small.height, 2):
        cells = [(small.getpixel((x, y)), small.getpixel((x, y + 1))) for x in range(small.width)]
        lines.append("".join(cell.format(*upper, *lower) for upper, lower in cells) + "\033[0m")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------- command line


def main(argv=None):
    """One question from the command line, or a chat."""
    args = build_parser().parse_args(argv)
    if args.prompt is None and (args.json or args.attention):
        raise ValueError(f"--{'json' if args.json else 'attention'} goes with one question, not a chat; give --prompt")
    if args.attention and not args.image:
        raise ValueError("--attention needs a picture: give one with --image")
    if args.attention and not (Path(args.attention).parent.is_dir() and
                               Path(args.attention).suffix.lower() in Image.registered_extensions()):
        raise ValueError(f"--attention {args.attention}: expected a name like OUT.png in an existing folder")
    if args.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens {args.max_new_tokens} is too small; it is 1 or more")
    for image in args.image:  # a wrong path is better known before a large model is loaded
        if not Path(image).is_file():
            raise ValueError(f"--image {image} does not exist")
        open_picture(image)
    worn = [folder.strip() for folder in args.adapter.split(",")] if args.adapter else [None]
    if "" in worn:
        raise ValueError(f"--adapter {args.adapter!r}: beside a comma a folder is missing")
    loaded = load(args.model_name_or_path, dtype=args.dtype, device=args.device, bits=args.bits,
                  quant_type=args.quant_type, double_quant=args.double_quant, quant_also=args.quant_also,
                  model_base=args.model_base, vision_tower=args.vision_tower,
                  pretrain_mm_mlp_adapter=args.pretrain_mm_mlp_adapter, conv_mode=args.conv_mode,
                  adapter=worn[-1], force=args.force)
    for folder in worn[-2::-1]:  # each is tried on, the first stays
        adapters.switch(loaded, folder, args.force)
    if args.verbose:
        print(choice.describe(loaded.model.language_model.lm_head.weight.device), file=sys.stderr)
    if args.prompt is None:
        return chat(loaded, args, worn)
    request = make_request(args, [("human", args.prompt)])
    answer = stream(loaded, request, quiet=args.json)
    if args.json:
        print(json.dumps(vars(answer) | {"tokens_per_second": answer.tokens_per_second, "conv_mode": loaded.conv_mode}))
    if args.attention:
        show_attention(loaded, request, answer, args)
    return 0


def build_parser():
    """The flags; LLaVA's names where it has them."""
    parser = command.Parser(prog="sample.py", description=__doc__)
    parser.add_argument("--model_name_or_path", default=str(MINIATURE), help="folder or hub id; default: the miniature")
    parser.add_argument("--model_base", help="the language model of a folder that holds a projector only")
    parser.add_argument("--vision_tower", help="a CLIP folder or id that takes the place of the model's own")
    parser.add_argument("--pretrain_mm_mlp_adapter", help="mm_projector.bin, a .safetensors, or a folder with one")
    parser.add_argument("--image", nargs="+", default=[], help="one picture or several, shown in this order")
    parser.add_argument("--prompt", help="the question; without it: a chat")
    parser.add_argument("--conv_mode", help="conversation template: v1, chat_template …; default: the model's own")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token (default)")
    parser.add_argument("--top_k", type=int, default=50, help="draw among so many tokens at most (default 50)")
    parser.add_argument("--top_p", type=float, help="draw among the likeliest tokens of this share (default: all)")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="the longest answer (default 512)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument("--attention", metavar="OUT.png", help="write the pictures with the attended patches lit")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16; auto: float32 on a CPU")
    parser.add_argument("--bits", type=int, default=16, help="8 or 4: hold the LLM's matrices in so few bits")
    parser.add_argument("--quant_type", default="nf4", help="what 4 bits mean: nf4 (default) or fp4")
    parser.add_switch("--double_quant", default=True, help="with 4 bits, hold the scales in 8 (default True)")
    parser.add_argument("--quant_also", default="", help="quantise, too: mm_projector, as the original does; lm_head")
    parser.add_argument("--adapter", help="a LoRA folder, or several, comma-separated; a chat can switch between them")
    parser.add_switch("--force", help="use an adapter although it was trained on another base")
    parser.add_switch("--verbose", help="say which kernels compute: Triton's or the references (kernels/choice.py)")
    parser.add_switch("--json", help="print one JSON object and nothing else")
    return parser


def make_request(args, messages):
    """The command line's settings and a conversation -> Request."""
    return Request(messages, args.image, args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)


def stream(loaded, request, quiet=False):
    """Answer one request, printing the text as it comes and the speed at the end. -> Answer"""
    printed = []

    def write(_, piece):
        piece = piece if printed else piece.lstrip()
        if piece:
            printed.append(piece)
            print(piece, end="", flush=True)

    answer = generate(loaded, [request], None if quiet else write)[0]
    if not quiet:
        print()
        decode = max(answer.seconds - answer.first_token_seconds, 1e-9)
        rate = (len(answer.token_ids) - 1) / decode
        language = loaded.model.language_model  # every weight is read once per token, of the embeddings one row only
        weights = language.lm_head.weight, *language.model.layers.parameters()
        read = sum(p.numel() * p.element_size() for p in weights) * rate / 1e9
        print(f"[{len(answer.token_ids)} tokens, first after {answer.first_token_seconds:.2f} s, "
              f"then {rate:.1f} tokens/s, {read:.2f} GB/s of weights]", file=sys.stderr)
    return answer


def show_attention(loaded, request, answer, args):
    """Write the sheet of pictures with lit patches; on a terminal, show it there as well."""
    maps = picture_attention(loaded, request, answer)
    sheets = [light_up(loaded, image, attention) for image, attention in zip(request.images, maps)]
    page = Image.new("RGB", (sheets[0].width, sum(sheet.height for sheet in sheets)))
    for i, sheet in enumerate(sheets):
        page.paste(sheet, (0, i * sheet.height))
    page.save(args.attention)
    if sys.stdout.isatty() and not args.json:
        print("\n".join(map(thumbnail, sheets)))
    print(f"attention over the patches written to {args.attention}", file=sys.stderr)


def chat(loaded, args, worn):
    """Ask and answer until an empty line; the pictures belong to the first question. Ctrl-C stops an answer; of several
    adapters, /adapter NAME (the end of its path) puts on another one, and the chat begins anew."""
    print("Ask away; an empty line ends the chat." + (f" You show {len(args.image)} picture(s)." if args.image else ""))
    messages = []
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            question = ""
        if not question:
            return 0
        if question.split()[0] == "/adapter" and len(worn) < 2:
            print("[/adapter switches between the folders of --adapter A,B,…; here there are no two]")
            continue
        if question.split()[0] == "/adapter":
            name = question.removeprefix("/adapter").strip().rstrip("/")
            if found := [path for path in worn if name and f"/{path.rstrip('/')}".endswith(f"/{name}")]:
                adapters.switch(loaded, found[0], args.force)
                messages, loaded.conv_mode = [], args.conv_mode or loaded.conv_mode
            print(f"[{found[0]} answers from here on]" if found else f"[/adapter and one of {', '.join(worn)}]")
            continue
        messages.append(("human", question))
        try:
            messages.append(("gpt", stream(loaded, make_request(args, messages)).text))
        except KeyboardInterrupt:
            print("\n[stopped; the question is forgotten]")
            messages.pop()


if __name__ == "__main__":
    command.run(main)
