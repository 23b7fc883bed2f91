"""Ask a LLaVA: prompt and pictures in, words out.

    python sample.py --image examples/scene.png --prompt "Where is the cross?"
    python sample.py --model_name_or_path llava-hf/llava-1.5-7b-hf --image x.jpg          (no --prompt: a chat)
    python sample.py --data_path questions.jsonl --image_folder pictures --out answers.jsonl

`generate` answers a list of requests with one `Engine`, which rests on three ideas. Prompts of all lengths are read end
to end, packed into one batch without padding. What was read stays, as keys and values, in one pool of cells
(model.Cache), in which each answer owns a stretch; so a step need only read the newest token of every answer, all in
one batch, to choose the next. And no answer waits for another: one that ends gives its cells back, and the next request
joins at once (continuous batching; Yu et al. 2022). Whatever its company, a request gets the answer it would get alone.

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
from os.path import commonprefix  # of lists, too
from pathlib import Path

import torch
from PIL import Image

import data
import quant
from formats import adapter as adapters
from formats import command, templates
from kernels import choice, linear
from model import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Cache, Stretch
from sampling import beam, graph, looking, placing
from sampling.chat import Chat
from sampling.web import is_url, source
from tokenizer import IMAGE_TAG, TextStream
from vision import limit_pixels, open_picture
from weights import load

MINIATURE = Path(__file__).parent / "miniature" / "llava"  # the small model that comes with the project
READ = 8192  # rows of prompts that are read in one batch; a longer prompt is one by itself
BELONG = {"data_path": ("out", "image_folder", "num_chunks", "chunk_idx", "batch_size"), "json": ("logprobs",),
          "attention": ("attention_layers",), "bits": ("quant_type", "quant_also")}  # flags that go with another only
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
                ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "0.01 to 100; 1 changes nothing"),
                ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
                ("num_beams", 1 <= self.num_beams <= 64, "1 to 64"),
                ("lookup", self.num_beams < 2 or not self.lookup, "0 with num_beams"),
                ("temperature", self.num_beams < 2 or not self.temperature, "0 with num_beams, which draws nothing"),
                ("logprobs", self.num_beams < 2 or self.logprobs is None, "none with num_beams"),
                ("logprobs", (self.logprobs or 0) >= 0, "0 or more"),
                ("stop", all(self.stop), "texts that are not empty"),
                ("lookup", self.lookup >= 0, "0 (off) or more"),
                ("seed", -2**63 <= self.seed < 2**64, "a number of 64 bits")):
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
    only what is new be read. stretch: the cells that it owns in the decoder's cache; read_ids: what they hold, a
    picture as many -200 as places; pixel_values: of its pictures; reused: how many rows the last prompt found here."""

    decoder: graph.Decoder = None
    stretch: Stretch = None
    read_ids: list = field(default_factory=list)
    pixel_values: torch.Tensor = None
    reused: int = 0

    def rest(self, batch, config):
        """Keep of the past what the next prompt, a batch of one, begins with as well. -> Batch of the prompt's other
        rows, at least one, and their pictures: what is still to be read"""
        ids, old, self.pixel_values = batch.input_ids.tolist(), self.pixel_values, batch.pixel_values
        same = len(commonprefix([ids[:-1], self.read_ids]))
        end = pictures = views = 0
        for size in batch.image_sizes:
            begin = ids.index(IMAGE_TOKEN_INDEX, end)
            end, shown = begin + config.tokens_of(size), slice(views, views + config.views_of(size))
            if end > same or not torch.equal(batch.pixel_values[shown], old[shown]):
                same = min(same, begin)
                break
            pictures, views = pictures + 1, shown.stop
        self.reused = self.stretch.length = same
        del self.read_ids[same:]
        return replace(
            batch, input_ids=batch.input_ids[same:], position_ids=batch.position_ids[same:],
            cu_seqlens=(batch.cu_seqlens - same).clamp(min=0), pixel_values=batch.pixel_values[views:],
            image_sizes=batch.image_sizes[pictures:])


class Engine:
    """Answers requests, at most batch_size at a time, and as many as loaded.cells have room for; `add` may be called
    between any two steps. on_token, errors, past: as in `generate`, but with tags for indices."""

    def __init__(self, loaded, batch_size=32, on_token=None, errors="raise", past=None):
        language = loaded.model.language_model.model
        weight, devices = language.embed_tokens.weight, [next(x.parameters()).device for x in language.layers]
        self.loaded, self.on_token, self.device = loaded, on_token, weight.device
        self.batch_size, self.errors, self.past = 1 if past else batch_size, errors, past
        cells = loaded.cells + 1 if loaded.cells else 0  # of a plan, and the decoder's spare one
        self.decoder = past and past.decoder or graph.Decoder(
            loaded.model, Cache(loaded.config.text, weight.dtype, devices, cells), not loaded.eager)
        self.cache = self.decoder.cache
        quant.arrange(loaded.model)  # the order of its codes
        self.waiting, self.running = deque(), []  # (request, tag), Growing

    def add(self, request, tag):
        """Put a request into the queue; its answer comes back with the tag."""
        self.waiting.append((request, tag))

    def step(self):
        """Let waiting requests join, or every answer grow by a token or more. -> [(tag, Answer)] of those that end"""
        with self.decoder.mode():
            joined, ended = self._join()
            if joined:
                self._read(joined)
            elif self.running:
                self._grow()
        for answer in [answer for answer in self.running if answer.ended]:
            self.running.remove(answer)
            ended.append((answer.tag, answer.finish()))
            if self.past is None:
                self.cache.close(answer.stretch)
        return ended

    def _join(self):
        """The next requests, as many as there is room for -> [Growing], [(tag, Answer)] of those that cannot be"""
        joined, failed, cells = [], [], self.loaded.cells
        left = cells - sum(stretch.size for stretch in self.cache.stretches) if cells else math.inf
        while self.waiting and len(self.running) + len(joined) < self.batch_size and (
                sum(len(answer.read_ids) for answer in joined) < READ):
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
        for answer in joined:
            answer.stretch = past and past.stretch or self.cache.open(answer.cells)
        if past:
            past.decoder, past.stretch = self.decoder, joined[0].stretch
            batch = past.rest(batch, self.loaded.config)
        logits = self.loaded.model.last_logits(batch.to(self.device), self.cache, [answer.stretch for answer in joined])
        if past:
            past.read_ids = joined[0].read_ids
        self.running += joined
        for answer, scores in zip(joined, logits):
            if answer.request.num_beams > 1:  # answered at once, while the others wait
                self._tell(answer, answer.search(self.decoder, scores, self.loaded.silent_ids))
        rest = [i for i, answer in enumerate(joined) if not answer.ended]
        self._choose([joined[i] for i in rest], logits[rest], [[]] * len(rest))

    def _grow(self):
        """Read the newest token of each answer, and what it guesses to come next."""
        guesses = [answer.guess() for answer in self.running]
        tokens = [[answer.token_ids[-1], *guess] for answer, guess in zip(self.running, guesses)]
        logits = self.decoder.read(tokens, [answer.stretch for answer in self.running])
        for answer, ids in zip(self.running, tokens):
            answer.read_ids += ids
        self._choose(self.running, logits, guesses)

    def _choose(self, answers, logits, guesses):
        """Take the next tokens of each answer: for every right guess one, and one more. What was read of wrong guesses
        is forgotten. logits (T, V): of all answers' new rows."""
        logits[:, self.loaded.silent_ids] = float("-inf")  # rows that only pad the vocabulary are no words
        best, row = logits.argmax(-1, keepdim=True), 0
        best, heights = torch.cat([best, logits.gather(1, best)], 1).t().tolist()  # at once: a GPU is waited for once
        if any(map(math.isnan, heights)):
            raise ValueError(f"the model's scores are no numbers (NaN) in {self.cache.keys[0].dtype}; try --dtype "
                             "bfloat16, or float32")
        for answer, guess in zip(answers, guesses):
            for right, expected in enumerate([*guess, None]):
                self._tell(answer, answer.push(logits[row + right], int(best[row + right])))
                if answer.ended or answer.token_ids[-1] != expected:
                    break
            if wrong := len(guess) - right:
                answer.stretch.length -= wrong
                del answer.read_ids[-wrong:]
            row += 1 + len(guess)

    def _tell(self, answer, piece):
        if self.on_token and piece:
            self.on_token(answer.tag, piece)


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
    changes it, and knows when it has `ended`. room: the most tokens it may have; the Engine gives it a `stretch`, of
    `cells` to begin with. ValueError: its prompt cannot be read."""

    def __init__(self, loaded, request, tag, device):
        self.began, self.request, self.tag = time.perf_counter(), request, tag
        self.example, limit = encode(loaded, request), loaded.config.text.max_position_embeddings
        self.read_ids = data.pack([self.example], loaded.config).input_ids.tolist()  # the cache holds them, or will
        if (length := len(self.read_ids)) >= limit:
            raise ValueError(f"the prompt has {length} tokens, but the model reads {limit} at most; ask with less text "
                             "or fewer pictures")
        self.room = min(request.max_new_tokens, limit - length)
        self.cells = length + (self.room if loaded.cells else min(self.room, 128))
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
        ids = [*self.read_ids, self.token_ids[-1]]
        for i in range(len(ids) - GRAM - 1, -1, -1):
            if ids[i: i + GRAM] == ids[-GRAM:]:
                found = ids[i + GRAM: i + GRAM + count]
                return found[: found.index(IMAGE_TOKEN_INDEX)] if IMAGE_TOKEN_INDEX in found else found
        return []

    def certain(self):
        """The text so far that no later token can take back: without a stop string, nor an end that may yet become one
        (`##` of `###`); it begins with no blank."""
        text = self.said
        for stop in self.stop_texts:
            text = text.split(stop)[0]
            if not self.ended:
                text = text[: len(text) - max(k for k in range(len(stop)) if text.endswith(stop[:k]))]
        return text.lstrip()

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
        if request.temperature < 1e-6:  # the same, and a score divided by it could be infinite
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

    def ends(self, token_ids):
        """Whether these are a whole answer: their last one is an end token, or their text holds a stop string."""
        text = self.tokenizer.decode(token_ids) if self.stop_texts else ""
        return token_ids[-1] in self.stop_ids or any(stop in text for stop in self.stop_texts)

    def search(self, decoder, logits, silent_ids):
        """Find the whole answer with beams; logits (V,): after the prompt. -> its text"""
        self.first_token_seconds = time.perf_counter() - self.began
        self.token_ids, self.ended = beam.search(decoder, self, logits, silent_ids), True
        return self.text()

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


def main(argv=None):
    """One question from the command line, a file of them, or a chat."""
    args = read_flags(argv)
    request = make_request(args, [("human", args.prompt)], [])
    if args.plan:
        return placing.show(args)
    if args.data_path:
        from sampling.questions import answer_file  # locks files, which Windows knows otherwise
        return answer_file(args, partial(open_model, args), partial(ask, args))
    request.images = [look(name, args.allow_urls, "--image ") for name in args.image]
    loaded = open_model(args)
    return converse(loaded, request, args) if args.prompt is None else answer_one(loaded, request, args)


def read_flags(argv):
    """The command line -> args; image and adapter are lists. ValueError: flags that do not fit together."""
    parser = build_parser()
    args = parser.parse_args(argv)
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    for flag, names in BELONG.items():
        if alone := [name for name in names if name in given and flag not in given]:
            raise ValueError(f"--{alone[0]} goes with --{flag}")
    if args.data_path and (others := given & {"prompt", "image", "attention", "json"}):
        raise ValueError(f"--{min(others)} goes without --data_path, a file of questions")
    for name in "max_pixels", "batch_size":
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} is too small; it is 1 or more")
    if args.data_path is not None and not Path(args.data_path).is_file():
        raise ValueError(f"--data_path {args.data_path}: there is no such file of questions")
    if not args.data_path and args.prompt is None and (args.json or args.attention):
        raise ValueError(f"--{'json' if args.json else 'attention'} goes with one question, not a chat; give --prompt")
    if args.attention and not args.image:
        raise ValueError("--attention needs a picture: give one with --image")
    if args.attention and not (Path(args.attention).parent.is_dir() and
                               Path(args.attention).suffix.lower() in Image.registered_extensions()):
        raise ValueError(f"--attention {args.attention}: expected a name like OUT.png in an existing folder")
    args.adapter = [folder.strip() for folder in args.adapter.split(",")] if args.adapter else []
    if "" in args.adapter:
        raise ValueError(f"--adapter {','.join(args.adapter)!r}: beside a comma a folder is missing")
    args.image = [name for names in args.image for name in (names.split(args.sep) if args.sep else [names])]
    args.device = args.device_map if args.device_map in ("cpu", "cuda") else args.device  # which these are, too
    limit_pixels(args.max_pixels)
    return args


def build_parser():
    """The flags; LLaVA's names where it has them, beside ours where its scripts do not agree."""
    parser = command.Parser(prog="sample.py", description=__doc__)
    parser.add_argument("--model_name_or_path", "--model_path", "--model_name", default=str(MINIATURE),
                        help="folder or hub id; default: the miniature")
    parser.add_argument("--model_base", help="the language model of a folder that holds a projector only")
    parser.add_argument("--vision_tower", help="a CLIP folder or id that takes the place of the model's own")
    parser.add_argument("--pretrain_mm_mlp_adapter", help="mm_projector.bin, a .safetensors, or a folder with one")
    parser.add_argument("--image", "--image_file", **command.SEVERAL, help="pictures, shown in this order")
    parser.add_argument("--sep", help="what stands between several pictures of one --image word, like ,")
    parser.add_switch("--allow_urls", help="pictures may be http(s) addresses: they are fetched, if they are public")
    parser.add_argument("--max_pixels", type=int, default=178_956_970, help="refuse larger pictures (179 million)")
    parser.add_argument("--prompt", "--query", help="the question; without it, and without --data_path: a chat")
    parser.add_argument("--data_path", "--question_file",
                        help="a file of questions, JSONL: question_id, image, text (or as for training)")
    parser.add_argument("--image_folder", default="", help="where the pictures of --data_path lie")
    parser.add_argument("--out", "--answers_file", help="the file of answers, JSONL; those there are not asked again")
    parser.add_argument("--num_chunks", type=int, default=1, help="cut --data_path into so many pieces and")
    parser.add_argument("--chunk_idx", type=int, default=0, help="answer this one, from 0 on")
    parser.add_argument("--batch_size", type=int, default=32, help="answer so many questions at a time (default 32)")
    parser.add_argument("--conv_mode", help="conversation template: v1, chat_template …; default: the model's own")
    add_settings(parser)
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
    for bits in (4, 8):
        parser.add_argument(f"--load_{bits}bit", dest="bits", action="store_const", const=bits, help=f"--bits {bits}")
    return parser


def add_settings(parser):
    """The flags of what a Request holds beside messages and images."""
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token (default)")
    parser.add_argument("--top_k", type=int, default=50, help="draw among so many tokens at most (default 50)")
    parser.add_argument("--top_p", type=float, help="draw among the likeliest tokens of this share (default: all)")
    parser.add_argument("--min_p", type=float, help="draw among tokens at least so likely, the likeliest being 1")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1: rather say something new")
    parser.add_argument("--num_beams", type=int, default=1, help="keep so many answers and take the likeliest")
    parser.add_argument("--stop", **command.SEVERAL, metavar="TEXT", help="texts that end the answer")
    parser.add_argument("--logprobs", type=int, metavar="N", help="with --json: log-probabilities, of N others, too")
    parser.add_argument("--lookup", type=int, default=0, metavar="N", help="guess N tokens ahead: same answer, sooner")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="the longest answer (default 512)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")


def make_request(args, messages, images):
    """The command line's settings and a conversation -> Request."""
    try:
        return Request(messages, images, **{f.name: getattr(args, f.name) for f in fields(Request)[2:]})
    except ValueError as error:
        raise ValueError(f"--{error}") from None


def look(name, allow_urls, flag=""):
    """A picture's name, a path or a URL -> PIL picture. ValueError: there is none, named with its flag."""
    if not is_url(name) and not Path(name).is_file():
        hint = "; several pictures in one word go with --sep ," * ("," in str(name))
        raise ValueError(f"{flag}{name} {'is a folder' if Path(name).is_dir() else 'does not exist'}{hint}")
    return as_picture(source(name, allow_urls))


def open_model(args):
    """The model that the command line names, with its adapters, made ready to answer. -> weights.Loaded"""
    *others, adapter = args.adapter or [None]
    spread = args.device_map or args.max_memory
    loaded = load(
        args.model_name_or_path, dtype=args.dtype, device=args.device, bits=args.bits, quant_type=args.quant_type,
        double_quant=args.double_quant, quant_also=args.quant_also, model_base=args.model_base,
        vision_tower=args.vision_tower, pretrain_mm_mlp_adapter=args.pretrain_mm_mlp_adapter, conv_mode=args.conv_mode,
        adapter=adapter, force=args.force,
        place=placing.Placing(args.device_map, args.max_memory, args.plan_tokens) if spread else None)
    loaded.eager = args.eager
    for folder in reversed(others):  # each is tried on, the first stays
        adapters.switch(loaded, folder, args.force)
    loaded.model.requires_grad_(False)
    if args.verbose:
        print(choice.describe(loaded.model.language_model.model.embed_tokens.weight.device), file=sys.stderr)
    if not (args.eager or loaded.lora or spread):
        linear.pack(loaded.model.language_model)
    return loaded


def ask(args, loaded, questions, on_answer):
    """Answer the questions of a file with the command line's settings; each that cannot be asked has an error."""
    requests = [make_request(args, [("human", question.prompt)], question.images) for question in questions]
    generate(loaded, requests, batch_size=args.batch_size, errors="keep", on_answer=on_answer)


def answer_one(loaded, request, args):
    """The question of --prompt, with --json as an object, with --attention also where the model looked. -> 0"""
    if args.attention:
        looking.layer_range(args.attention_layers, loaded.config.text.num_hidden_layers)  # before anyone waits
    answer = generate(loaded, [request])[0] if args.json else stream(loaded, request)
    if args.json:
        said = {key: value for key, value in vars(answer).items() if value is not None}
        rate = len(answer.token_ids) / max(answer.seconds, 1e-9)  # the prompt's time included
        print(json.dumps(said | {"tokens_per_second": rate, "conv_mode": loaded.conv_mode}))
    if args.attention:
        looking.show(loaded, encode(loaded, request), request.images, answer, args)
    return 0


def converse(loaded, request, args):
    """A chat with the request's settings; its pictures go with the first question. -> 0"""
    def show(name):
        data.check_tower(loaded.image_processor)
        return look(name, args.allow_urls)

    def wear(folder):
        adapters.switch(loaded, folder, args.force)
        loaded.model.requires_grad_(False)
        loaded.conv_mode = args.conv_mode or loaded.conv_mode

    if request.images:
        data.check_tower(loaded.image_processor)
    first = [*zip(args.image, request.images)]
    return Chat(partial(stream, loaded), Past, request, show, first, args.adapter, wear).run()


def stream(loaded, request, past=None, hear=None):
    """Answer one request, printing the text as it comes and the speed at the end; hear(piece) is called with each piece
    that was printed. -> Answer"""
    def write(_, piece):
        print(piece, end="", flush=True)
        if hear:
            hear(piece)

    answer = generate(loaded, [request], write, past=past)[0]
    print()
    rate = (len(answer.token_ids) - 1) / max(answer.seconds - answer.first_token_seconds, 1e-9)
    language = loaded.model.language_model  # every weight is read once per token, of the embeddings one row only
    size = sum(p.nbytes for part in (language.lm_head, language.model.layers) for p in part.parameters())
    print(f"[{len(answer.token_ids)} tokens, first after {answer.first_token_seconds:.2f} s, then {rate:.1f} tokens/s, "
          f"{size * rate / 1e9:.2f} GB/s of weights]", file=sys.stderr)
    return answer


if __name__ == "__main__":
    command.run(main)
