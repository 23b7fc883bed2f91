"""Ask a LLaVA: prompt and pictures in, words out.

    python sample.py --image examples/scene.png --prompt "what color is the circle ?"
    python sample.py --model_name_or_path llava-hf/llava-1.5-7b-hf --image x.jpg          (no --prompt: a chat)
    python sample.py --data_path questions.jsonl --image_folder pictures --out answers.jsonl

`generate` answers a list of requests with one `Engine`. Prompts are read in packed batches; then all answers grow by a
token per step, each against its own past in the key/value cache. Those that end leave, and waiting requests take their
places at once. Whatever the company, a request gets the answer that it would get alone.

Legend: B answers that grow together, T rows of a batch, V vocabulary.
"""

if __name__ == "__main__":  # Ctrl-C may end the imports, which take seconds, but without a traceback
    import sys
    sys.excepthook = lambda kind, *error: kind is KeyboardInterrupt or sys.__excepthook__(kind, *error)

import json
import math
import sys
import time
from collections import deque
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image

import data
import quant
from formats import adapter as adapters
from formats import command, templates
from kernels import choice, linear
from model import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Cache
from sampling import beam, graph, looking, placing
from sampling.chat import Chat
from sampling.web import is_url, source
from tokenizer import IMAGE_TAG, TextStream
from vision import limit_pixels, open_picture
from weights import load

MINIATURE = Path(__file__).parent / "miniature" / "llava"  # the small model that comes with the project


READ = 8192  # rows of prompts that are read in one batch, or one prompt
GRAM = 3  # tokens that must recur for the lookup to guess what follows them


@dataclass
class Request:
    """One question. messages: [(role, text)], roles human and gpt, the last one human; images: paths or PIL pictures.

    Without any `<image>` in the messages, one line per picture is put first. temperature 0 takes the likeliest token;
    otherwise top_k, top_p and min_p (None: off) cut the choice down, in HF's order. repetition_penalty: above 1, what
    was said is less likely to be said again. stop: texts that end the answer, which does not include them. logprobs:
    tell the log-probability of each token, and of so many likeliest ones beside it. lookup: guess up to so many tokens
    ahead, from where the last few occurred before; the answer stays the same. num_beams: keep so many answers, take the
    likeliest.
    """

    messages: list
    images: list = field(default_factory=list)
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int | None = 50
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    num_beams: int = 1
    stop: list = field(default_factory=list)
    logprobs: int | None = None
    lookup: int = 0
    seed: int = 0

    def __post_init__(self):
        for name, fits, wanted in (
                ("temperature", 0 <= self.temperature < math.inf, "0 (the likeliest token) or more"),
                ("top_k", (self.top_k or 0) >= 0, "0 (all) or more"),
                ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
                ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "from 0 to 1"),
                ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0; 1 changes nothing"),
                ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
                ("num_beams", self.num_beams >= 1, "1 or more"),
                ("temperature", self.num_beams < 2 or not self.temperature, "0 with num_beams, which draws nothing"),
                ("logprobs", self.num_beams < 2 or self.logprobs is None, "none with num_beams"),
                ("logprobs", (self.logprobs or 0) >= 0, "0 or more"),
                ("stop", all(self.stop), "texts that are not empty"),
                ("lookup", self.lookup >= 0, "0 (off) or more")):
            if not fits:
                raise ValueError(f"{name} {getattr(self, name)}: expected {wanted}")


@dataclass
class Answer:
    """text: stripped, without special tokens; token_ids: new ids, the end token included when it came; prompt_ids: one
    -200 per picture; seconds: since its prompt began to be read; first_token_seconds: of these, until the first token;
    logprobs: a {"logprob", "top": {id: logprob}} per token; error: why there is no answer."""

    text: str
    token_ids: list
    prompt_ids: list
    seconds: float = 0.0
    first_token_seconds: float = 0.0
    logprobs: list = None
    error: str = None

    @property
    def tokens_per_second(self):
        """Of this answer alone, the prompt's time included."""
        return len(self.token_ids) / max(self.seconds, 1e-9)


# ---------------------------------------------------------------------------------------------------------- generation


def generate(loaded, requests, on_token=None, batch_size=32, errors="raise", past=None, on_answer=None):
    """Answer every request. -> [Answer] in the same order.

    requests: Request objects or dicts of their fields; up to batch_size of them are answered at a time. on_token(index,
    text), on_answer(index, answer): called with each finished piece of text, with each answer as soon as it has ended.
    errors: what is wrong with a request (a broken picture, a prompt that is too long) is raised, or with "keep" told in
    its answer, while the others go on. past: see Past.
    """
    engine, answers = Engine(loaded, batch_size, on_token, errors, past), [None] * len(requests)
    for i, request in enumerate(requests):
        engine.add(request if isinstance(request, Request) else Request(**request), i)
    while engine.waiting or engine.running:
        for i, answer in engine.step():
            answers[i] = answer
            if on_answer:
                on_answer(i, answer)
    return answers


@dataclass
class Past:
    """What one conversation has read so far. Given to `generate` with each of its questions, one at a time, it lets
    only what is new be read. rows: the ids that the cache holds, a picture as many -200 as places; pixel_values of its
    pictures; reused: how many rows the last prompt found here."""

    cache: Cache = None
    stretch: object = None
    rows: list = field(default_factory=list)
    pixel_values: torch.Tensor = None
    reused: int = 0
    decoder: object = None

    def common(self, batch, config):
        """How many rows, pictures and views of the one prompt in a batch are here already; one row at least is not."""
        ids, self.pixel_values, old = batch.input_ids.tolist(), batch.pixel_values, self.pixel_values
        same = next((i for i, (new, held) in enumerate(zip(ids[:-1], self.rows)) if new != held),
                    min(len(ids) - 1, len(self.rows)))
        end = pictures = views = 0
        for size in batch.image_sizes:
            begin = ids.index(IMAGE_TOKEN_INDEX, end)
            end, shown = begin + config.tokens_of(size), slice(views, views + config.views_of(size))
            if end > same or not torch.equal(batch.pixel_values[shown], old[shown]):
                same = min(same, begin)
                break
            pictures, views = pictures + 1, shown.stop
        return same, pictures, views


class Engine:
    """Answers requests, at most batch_size at a time; `add` may be called between any two steps."""

    def __init__(self, loaded, batch_size=32, on_token=None, errors="raise", past=None):
        weight = loaded.model.language_model.model.embed_tokens.weight
        self.loaded, self.on_token, self.device = loaded, on_token, weight.device
        self.batch_size = 1 if past else batch_size
        self.errors, self.past = errors, past
        devices = [next(layer.parameters()).device for layer in loaded.model.language_model.model.layers]
        self.cache = past and past.cache or Cache(loaded.config.text, weight.dtype, devices, (loaded.cells or -1) + 1)
        self.decoder = past and past.decoder or graph.Decoder(loaded.model, self.cache, not loaded.eager)
        quant.arrange(loaded.model)
        self.waiting, self.running = deque(), []  # (request, tag), Growing

    def add(self, request, tag):
        """Put a request into the queue; its answer comes back with the tag."""
        self.waiting.append((request, tag))

    @torch.no_grad()
    def step(self):
        """Let waiting requests join, or every answer grow by a token or more. -> [(tag, Answer)] of those that end"""
        joined, ended = self._join()
        if joined:
            self._read(joined)
        elif self.running:
            self._grow()
        ended += [(answer.tag, answer.finish()) for answer in self.running if answer.ended]
        for answer in self.running:
            if answer.ended and self.past is None:
                self.cache.close(answer.stretch)
        self.running = [answer for answer in self.running if not answer.ended]
        return ended

    def _join(self):
        """The next requests, as many as there is room for -> [Growing], [(tag, Answer)] of those that cannot be"""
        joined, failed, left = [], [], math.inf
        if self.loaded.cells:
            left = self.loaded.cells - sum(stretch.size for stretch in self.cache.stretches)
        while self.waiting and len(self.running) + len(joined) < self.batch_size and (
                sum(len(answer.rows) for answer in joined) < READ):
            request, tag = self.waiting.popleft()
            try:
                answer = request if isinstance(request, Growing) else Growing(self.loaded, request, tag, self.device)
            except (ValueError, OSError) as error:
                if self.errors == "raise":
                    raise
                failed.append((tag, Answer("", [], [], error=str(error))))
                continue
            left -= answer.cells * answer.request.num_beams
            if left < 0 and (self.running or joined):  # alone it may have more than was planned with
                self.waiting.appendleft((answer, tag))
                break
            joined.append(answer)
        return joined, failed

    def _read(self, joined):
        """Read the prompts of new requests in one batch, and choose the first token of each."""
        batch, past = data.pack([answer.example for answer in joined], self.loaded.config), self.past
        if past:
            batch, joined[0].stretch = self._continue(batch), past.stretch
        for answer in () if past else joined:
            answer.stretch = self.cache.open(answer.cells)
        logits = self.loaded.model.last_logits(batch.to(self.device), self.cache, [answer.stretch for answer in joined])
        if past:
            past.rows = joined[0].rows
        self.running += joined
        for i, answer in enumerate(joined):
            if answer.request.num_beams > 1:  # answered at once, while the others wait
                answer.search(self.loaded, self.cache, logits[i: i + 1])
                if self.on_token and answer.text():
                    self.on_token(answer.tag, answer.text())
        rest = [i for i, answer in enumerate(joined) if not answer.ended]
        self._choose([joined[i] for i in rest], logits[rest], [[]] * len(rest))

    def _grow(self):
        """Read the newest token of each answer, and what it guesses to come next."""
        running = self.running
        guesses = [answer.guess() for answer in running]
        rows = [[answer.token_ids[-1], *guess] for answer, guess in zip(running, guesses)]
        stretches = [answer.stretch for answer in running]
        if self.decoder.records and not any(guesses):
            logits = self.decoder(sum(rows, []), stretches)
        else:
            places = [stretch.length + i for stretch, row in zip(stretches, rows) for i in range(len(row))]
            ids, places = torch.tensor([sum(rows, []), places], device=self.device)
            bounds = torch.tensor([0, *(len(row) for row in rows)], device=self.device).cumsum(0)
            batch = data.Batch(ids, None, places, bounds, ids.new_empty(0, dtype=torch.float32), [])
            logits = self.loaded.model.logits(batch, self.cache, stretches)  # (T, V)
        for answer, row in zip(running, rows):
            answer.rows += row
        self._choose(running, logits, guesses)

    def _choose(self, answers, logits, guesses):
        """Take the next tokens of each answer: for every right guess one, and one more. logits (T, V): its rows."""
        logits[:, self.loaded.silent_ids] = float("-inf")  # rows that only pad the vocabulary are no words
        likeliest, at = logits.argmax(-1).tolist(), 0
        for answer, guess in zip(answers, guesses):
            for right, expected in enumerate([*guess, None]):
                piece = answer.push(logits[at + right], likeliest[at + right])
                if self.on_token and piece:
                    self.on_token(answer.tag, piece)
                if answer.ended or answer.token_ids[-1] != expected:
                    break
            if wrong := len(guess) - right:
                answer.stretch.length -= wrong
                del answer.rows[-wrong:]
            at += 1 + len(guess)

    def _continue(self, batch):
        """The part of a conversation's prompt that its past does not hold. -> Batch"""
        past = self.past
        if past.cache is None:
            past.cache, past.stretch = self.cache, self.cache.open(len(batch.input_ids) + 128)
            past.decoder = self.decoder
        past.reused, pictures, views = past.common(batch, self.loaded.config)
        past.stretch.length, past.rows = past.reused, past.rows[: past.reused]
        return replace(
            batch, input_ids=batch.input_ids[past.reused:], position_ids=batch.position_ids[past.reused:],
            cu_seqlens=(batch.cu_seqlens - past.reused).clamp(min=0), pixel_values=batch.pixel_values[views:],
            image_sizes=batch.image_sizes[pictures:])


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
    """A path, a PIL picture, or a function that brings one -> a PIL picture in RGB."""
    image = image() if callable(image) else image
    return image.convert("RGB") if isinstance(image, Image.Image) else open_picture(image)


class Growing:
    """An answer that is being written: chooses its tokens with a random generator of its own, so that company never
    changes it, and knows when it has ended. ValueError: its prompt cannot be read."""

    def __init__(self, loaded, request, tag, device):
        self.began, self.request, self.tag = time.perf_counter(), request, tag
        self.example, limit = encode(loaded, request), loaded.config.text.max_position_embeddings
        self.rows = data.pack([self.example], loaded.config).input_ids.tolist()  # what the cache holds, or soon will
        if len(self.rows) >= limit:
            raise ValueError(f"the prompt has {len(self.rows)} tokens, but the model reads {limit} at most; ask with "
                             "less text or fewer pictures")
        self.room = min(request.max_new_tokens, limit - len(self.rows))
        self.cells = len(self.rows) + min(self.room, self.room if loaded.cells else 128)  # of the cache, to begin with
        self.ended, self.token_ids, self.logprobs = False, [], []
        self.said, self.passed_on = "", 0  # the text so far, and how many characters of it push() has returned
        self.tokenizer, self.stream = loaded.tokenizer, TextStream(loaded.tokenizer)
        stop_ids, stop_texts = templates.stop(loaded.conv_mode, loaded.tokenizer)
        self.stop_ids, self.stop_texts = stop_ids | loaded.config.text.eos_token_ids, [*stop_texts, *request.stop]
        self.generator = torch.Generator(device).manual_seed(request.seed)

    def push(self, logits, likeliest):
        """Take the next token from its scores (V,). -> the text it completes"""
        plain = self.request.temperature <= 0 and self.request.repetition_penalty == 1
        token = likeliest if plain else self.draw(self.penalise(logits))
        if self.request.logprobs is not None:
            self.logprobs.append(logprobs(logits, token, self.request.logprobs))
        if not self.token_ids:
            self.first_token_seconds = time.perf_counter() - self.began
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

    def guess(self):
        """Up to `lookup` tokens that may come next: those that followed the last GRAM tokens where they stood before,
        most recently, in prompt or answer (Saxena 2023, prompt lookup decoding)."""
        count = min(self.request.lookup, self.room - len(self.token_ids) - 1)
        if count < 1:
            return []
        rows = [*self.rows, self.token_ids[-1]]
        tail = rows[-GRAM:]
        for i in range(len(rows) - GRAM - 1, -1, -1):
            if rows[i: i + GRAM] == tail:
                found = rows[i + GRAM: i + GRAM + count]
                return found[: found.index(IMAGE_TOKEN_INDEX)] if IMAGE_TOKEN_INDEX in found else found
        return []

    def certain(self):
        """The text so far without a stop string, nor a tail that may yet become one (`##` of `###`)."""
        text = self.said
        for stop in self.stop_texts:
            text = text.split(stop)[0]
            if not self.ended:
                text = text[: len(text) - max(k for k in range(len(stop)) if text.endswith(stop[:k]))]
        return text

    def penalise(self, logits):
        """Scores of what the prompt or the answer says already, divided by repetition_penalty, or times it if they are
        below 0 (Keskar et al. 2019, section 4.1)."""
        if self.request.repetition_penalty == 1:
            return logits
        said = torch.tensor([i for i in {*self.example.ids, *self.token_ids} if i >= 0], device=logits.device)
        scores, penalty = logits[said], self.request.repetition_penalty
        return logits.index_copy(0, said, torch.where(scores < 0, scores * penalty, scores / penalty))

    def draw(self, logits):
        """Sample: temperature, then top-k, then top-p (Holtzman et al. 2020), then min-p (Nguyen et al. 2024), in HF's
        order. temperature 0 takes the likeliest."""
        request = self.request
        if request.temperature <= 0:
            return int(logits.argmax())
        logits = logits / request.temperature
        if request.top_k:
            logits[logits < logits.topk(min(request.top_k, len(logits))).values[-1]] = float("-inf")
        if request.top_p is not None and request.top_p < 1:
            chances, order = logits.softmax(-1).sort(descending=True)
            before = chances.cumsum(-1) - chances  # the mass of all likelier tokens
            logits[order[before >= request.top_p]] = float("-inf")  # the likeliest always stays
        if request.min_p:
            chances = logits.softmax(-1)
            logits[chances < request.min_p * chances.max()] = float("-inf")
        return int(torch.multinomial(logits.softmax(-1), 1, generator=self.generator))

    def text(self):
        """What was said, without stop strings and special tokens."""
        text = self.tokenizer.decode(self.token_ids)
        for stop in self.stop_texts:
            text = text.split(stop)[0]
        return text.strip()

    def search(self, loaded, cache, logits):
        """Find the whole answer with beams; logits (1, V): after the prompt."""
        def stopped(ids):
            text = self.tokenizer.decode(ids) if self.stop_texts else ""
            return any(stop in text for stop in self.stop_texts)

        self.first_token_seconds = time.perf_counter() - self.began
        self.token_ids = beam.search(
            loaded.model, cache, self.stretch, logits, self.rows, self.request.num_beams, self.room, self.stop_ids,
            loaded.silent_ids, stopped, self.request.repetition_penalty)[0]
        self.ended = True

    def finish(self):
        """-> Answer"""
        return Answer(self.text(), self.token_ids, self.example.ids, time.perf_counter() - self.began,
                      self.first_token_seconds, self.logprobs or None)


def logprobs(logits, token, count):
    """The log-probability of a token by the model's own scores (V,), whatever was done to draw it, and those of the
    `count` likeliest. -> {"logprob", "top": {id: logprob}}"""
    chances = logits.log_softmax(-1)
    top = chances.topk(min(count, len(chances)))
    return {"logprob": chances[token].item(), "top": dict(zip(top.indices.tolist(), top.values.tolist()))}


# --------------------------------------------------------------------------------------------------------- command line


def check_flags(args):
    """ValueError for flags that do not fit. What is wrong with a picture is better known before a large model is
    loaded, too."""
    if misplaced := [name for name in ("prompt", "image", "attention", "json") if getattr(args, name)
                     and args.data_path] + [name for name in ("out", "image_folder") if getattr(args, name)
                                            and not args.data_path]:
        raise ValueError(f"--{misplaced[0]} goes {'without' if args.data_path else 'with'} --data_path, a file of "
                         "questions")
    for name in "max_pixels", "batch_size":
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} is too small; it is 1 or more")
    if args.data_path:
        return
    if args.prompt is None and (args.json or args.attention):
        raise ValueError(f"--{'json' if args.json else 'attention'} goes with one question, not a chat; give --prompt")
    if args.attention and not args.image:
        raise ValueError("--attention needs a picture: give one with --image")
    if args.attention and not (Path(args.attention).parent.is_dir() and
                               Path(args.attention).suffix.lower() in Image.registered_extensions()):
        raise ValueError(f"--attention {args.attention}: expected a name like OUT.png in an existing folder")
    args.image = [name for names in args.image for name in (names.split(args.sep) if args.sep else [names])]
    for name in args.image:
        if not is_url(name) and not Path(name).is_file():
            raise ValueError(f"--image {name} does not exist")
        as_picture(source(name, args.allow_urls))


def main(argv=None):
    """One question from the command line, a file of them, or a chat."""
    args = build_parser().parse_args(argv)
    limit_pixels(args.max_pixels)
    check_flags(args)
    request = make_request(args, [("human", args.prompt)], args.image)
    worn = [folder.strip() for folder in args.adapter.split(",")] if args.adapter else [None]
    if "" in worn:
        raise ValueError(f"--adapter {args.adapter!r}: beside a comma a folder is missing")
    device = args.device_map if args.device_map in ("cpu", "cuda") else args.device
    place = placing.Placing(args.device_map or "auto", args.max_memory, args.plan_tokens)
    if args.plan:
        coding = quant.Quantisation(args.bits, args.quant_type, args.double_quant, args.quant_also)
        return placing.show(place, args.model_name_or_path, device, args.dtype, coding, args.model_base,
                            args.vision_tower, worn[-1])
    def open_model():
        loaded = load(
            args.model_name_or_path, dtype=args.dtype, device=device, bits=args.bits, quant_type=args.quant_type,
            double_quant=args.double_quant, quant_also=args.quant_also, model_base=args.model_base,
            vision_tower=args.vision_tower, pretrain_mm_mlp_adapter=args.pretrain_mm_mlp_adapter,
            conv_mode=args.conv_mode, adapter=worn[-1], force=args.force,
            place=place if args.device_map or args.max_memory else None)
        loaded.eager = args.eager
        for folder in worn[-2::-1]:  # each is tried on, the first stays
            adapters.switch(loaded, folder, args.force)
        if args.verbose:
            print(choice.describe(loaded.model.language_model.model.embed_tokens.weight.device), file=sys.stderr)
        if not (args.eager or loaded.lora or args.device_map or args.max_memory):
            linear.pack(loaded.model.language_model)
        return loaded

    if args.data_path:
        from sampling.questions import answer_file  # locks files, which Windows knows otherwise
        return answer_file(args, open_model, partial(ask, args))
    loaded = open_model()
    if args.attention:
        looking.stretch(args.attention_layers, loaded.config.text.num_hidden_layers)
    if args.prompt is None:
        return converse(loaded, request, args, worn)
    request.images = [source(name, args.allow_urls) for name in args.image]
    answer = stream(loaded, request, quiet=args.json)
    if args.json:
        said = {key: value for key, value in vars(answer).items() if value is not None}
        print(json.dumps(said | {"tokens_per_second": answer.tokens_per_second, "conv_mode": loaded.conv_mode}))
    if args.attention:
        request.images = [as_picture(image) for image in request.images]
        looking.show(loaded, encode(loaded, request), request.images, answer, args)
    return 0


def build_parser():
    """The flags; LLaVA's names where it has them."""
    parser = command.Parser(prog="sample.py", description=__doc__)
    parser.add_argument("--model_name_or_path", default=str(MINIATURE), help="folder or hub id; default: the miniature")
    parser.add_argument("--model_base", help="the language model of a folder that holds a projector only")
    parser.add_argument("--vision_tower", help="a CLIP folder or id that takes the place of the model's own")
    parser.add_argument("--pretrain_mm_mlp_adapter", help="mm_projector.bin, a .safetensors, or a folder with one")
    parser.add_argument("--image", nargs="+", default=[], help="one picture or several, shown in this order")
    parser.add_argument("--sep", help="what stands between several pictures of one --image word, like ,")
    parser.add_switch("--allow_urls", help="pictures may be http(s) addresses: they are fetched, if they are public")
    parser.add_argument("--max_pixels", type=int, default=178_956_970, help="refuse larger pictures (179 million)")
    parser.add_argument("--prompt", help="the question; without it, and without --data_path: a chat")
    parser.add_argument("--data_path", help="a file of questions, JSONL: question_id, image, text (or as for training)")
    parser.add_argument("--image_folder", default="", help="where the pictures of --data_path lie")
    parser.add_argument("--out", help="the file of answers, JSONL; what is there already is not asked again")
    parser.add_argument("--num_chunks", type=int, default=1, help="cut --data_path into so many pieces and")
    parser.add_argument("--chunk_idx", type=int, default=0, help="answer this one, from 0 on")
    parser.add_argument("--batch_size", type=int, default=32, help="answer so many questions at a time (default 32)")
    parser.add_argument("--conv_mode", help="conversation template: v1, chat_template …; default: the model's own")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token (default)")
    parser.add_argument("--top_k", type=int, default=50, help="draw among so many tokens at most (default 50)")
    parser.add_argument("--top_p", type=float, help="draw among the likeliest tokens of this share (default: all)")
    parser.add_argument("--min_p", type=float, help="draw among tokens at least so likely, the likeliest being 1")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1: rather say something new")
    parser.add_argument("--num_beams", type=int, default=1, help="keep so many answers and take the likeliest")
    parser.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="texts that end the answer")
    parser.add_argument("--logprobs", type=int, metavar="N", help="with --json: log-probabilities, of N others, too")
    parser.add_argument("--lookup", type=int, default=0, metavar="N", help="guess N tokens ahead: same answer, sooner")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="the longest answer (default 512)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument("--attention", metavar="OUT.png", help="for each word, the pictures with its attention lit")
    parser.add_argument("--attention_layers", default="mean", help="mean (default), last, rollout, or some: 20-32")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--device_map", choices=placing.MAPS, help="spread the layers: over GPUs, main memory, disk")
    parser.add_argument("--max_memory", help="what the model may take: 4GB, or cuda:0=4GB,cpu=8GB; else what is free")
    parser.add_argument("--plan_tokens", type=int, default=2048, help="of prompt and answer, to keep room for (2048)")
    parser.add_switch("--plan", help="say what would lie where, from config.json alone, and load nothing")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16; auto: float32 on a CPU, where "
                        "bfloat16 is some times as fast if the processor knows it")
    parser.add_argument("--bits", type=int, default=16, help="8 or 4: hold the LLM's matrices in so few bits")
    parser.add_argument("--quant_type", default="nf4", help="what 4 bits mean: nf4 (default), fp4, int4 (fast on CPUs)")
    parser.add_switch("--double_quant", default=True, help="with 4 bits, hold the scales in 8 (default True)")
    parser.add_argument("--quant_also", default="", help="quantise, too: mm_projector, as the original does; lm_head")
    parser.add_argument("--adapter", help="a LoRA folder, or several, comma-separated; a chat can switch between them")
    parser.add_switch("--force", help="use an adapter although it was trained on another base")
    parser.add_switch("--eager", help="compute plainly: no CUDA graph, no matrices packed for the processor")
    parser.add_switch("--verbose", help="say which kernels compute: Triton's or the references (kernels/choice.py)")
    parser.add_switch("--json", help="print one JSON object and nothing else")
    return parser


def make_request(args, messages, images):
    """The command line's settings and a conversation -> Request."""
    try:
        return Request(messages, images, **{f.name: getattr(args, f.name) for f in fields(Request)[2:]})
    except ValueError as error:
        raise ValueError(f"--{error}") from None


def ask(args, loaded, questions, on_answer):
    """Answer the questions of a file with the command line's settings; each that cannot be asked has an error."""
    requests = [make_request(args, [("human", question.prompt)], question.images) for question in questions]
    generate(loaded, requests, batch_size=args.batch_size, errors="keep", on_answer=on_answer)


def stream(loaded, request, past=None, hear=None, quiet=False):
    """Answer one request, printing the text as it comes and the speed at the end; hear(piece) is called with each piece
    that was printed. -> Answer"""
    printed = []

    def write(_, piece):
        piece = piece if printed else piece.lstrip()
        if piece:
            printed.append(piece)
            print(piece, end="", flush=True)
            if hear:
                hear(piece)

    answer = generate(loaded, [request], None if quiet else write, past=past)[0]
    if not quiet:
        print()
        decode = max(answer.seconds - answer.first_token_seconds, 1e-9)
        rate = (len(answer.token_ids) - 1) / decode
        language = loaded.model.language_model  # every weight is read once per token, of the embeddings one row only
        weights = *language.lm_head.parameters(), *language.model.layers.parameters()
        read = sum(p.numel() * p.element_size() for p in weights) * rate / 1e9
        print(f"[{len(answer.token_ids)} tokens, first after {answer.first_token_seconds:.2f} s, "
              f"then {rate:.1f} tokens/s, {read:.2f} GB/s of weights]", file=sys.stderr)
    return answer


def converse(loaded, request, args, worn):
    """A chat with the request's settings and pictures."""
    def look(name):
        data.check_tower(loaded.image_processor)
        if not is_url(name) and not Path(name).is_file():
            raise ValueError(f"{name} does not exist")
        return as_picture(source(name, args.allow_urls))

    def wear(folder):
        adapters.switch(loaded, folder, args.force)
        loaded.conv_mode = args.conv_mode or loaded.conv_mode

    return Chat(partial(stream, loaded), Past, request, look, worn, wear).run()


if __name__ == "__main__":
    command.run(main)
