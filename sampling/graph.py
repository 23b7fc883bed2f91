"""The step by which answers grow, recorded once on a GPU and played back for every token after that.

A step of a 7B model is some 400 kernels of a few microseconds each, and Python takes longer to launch one than the GPU
to run it. A CUDA graph is the list of all launches, with the addresses of all they touch, played back by a single call.
So whatever differs from step to step must lie in one tensor that stays where it is: the newest token of each answer,
and where in the cache it goes and looks. Recorded anew is only what changes the launches themselves: the number of
rows, rounded up to a power of two, the length of the longest answer, rounded up likewise, and where the cache's pools
lie.

The first times, the same step runs from the same tensor without being recorded. Where none can be, on a CPU or over
several devices, and where answers guess more than one token ahead, the model reads a packed batch as it does a prompt.
"""

import warnings

import torch

import data
import quant
from kernels.choice import use_triton

SHORTEST = 256  # cells that a step is made for at least
TRIES = 2  # times that a step runs before it is recorded, which compiles its kernels and makes their tables


class Decoder:
    """Reads what has been said last, by recorded steps where it can. For one model and the cache of all its sequences.

    records: whether it can; steps: {(rows, longest): Step}; pools: where the cache lay when they were made; spare: a
    stretch for the rows, up to a power of two, that nobody asked for. mode: in which all is computed, as long as the
    cache lives: inference mode, where SmolLM2 takes 5 % less time for a token, unless the model learns, or is FSDP's,
    which keeps what it gathers."""

    def __init__(self, model, cache, wanted=True):
        self.model, self.cache, self.records = model, cache, wanted and can_be_recorded(model)
        self.steps, self.pools, self.spare = {}, None, None
        plain = all(type(p.data) is torch.Tensor and not p.requires_grad for p in model.parameters())
        self.mode = torch.inference_mode if plain else torch.no_grad

    def read(self, tokens, stretches):
        """tokens: of each sequence those that its stretch of the cache does not hold yet, lists of ids. -> scores after
        each of them, (T, V) float32, until the next call"""
        if self.records and all(len(ids) == 1 for ids in tokens):
            return self(sum(tokens, []), stretches)
        positions = [stretch.length + i for stretch, ids in zip(stretches, tokens) for i in range(len(ids))]
        device = self.model.language_model.model.embed_tokens.weight.device
        ids, positions = torch.tensor([sum(tokens, []), positions], device=device)
        bounds = torch.tensor([0, *map(len, tokens)], device=device).cumsum(0)
        batch = data.Batch(ids, None, positions, bounds, torch.empty(0, device=device), [])
        return self.model.logits(batch, self.cache, stretches)

    def __call__(self, token_ids, stretches):
        """The next token of each stretch, ids in a list -> scores after it, (B, V) float32, until the next call."""
        for stretch in stretches:
            self.cache.fit(stretch, stretch.length + 1)
        rows = 1 << (len(token_ids) - 1).bit_length() if self.records else len(token_ids)
        if rows > len(token_ids) and self.spare is None:
            self.spare = self.cache.open(1)
        pools = [pool.data_ptr() for pool in (*self.cache.keys, *self.cache.values)]
        if pools != self.pools:
            self.pools, self.steps = pools, {}
        longest = max(SHORTEST, 1 << max(stretch.length for stretch in stretches).bit_length())
        if (rows, longest) not in self.steps:
            self.steps[rows, longest] = Step(self.model, self.cache, rows, longest)
        columns = [(token, s.length, s.start, s.length + 1, s.start + s.length)
                   for token, s in zip(token_ids, stretches, strict=True)]
        while len(columns) < rows:
            columns.append((0, 0, self.spare.start, 1, self.spare.start))
        logits = self.steps[rows, longest](columns, self.records)
        for stretch in stretches:
            stretch.length += 1
        return logits[: len(token_ids)]


class Step:
    """The step of so many rows, none of which looks at more than `longest` cells."""

    def __init__(self, model, cache, rows, longest):
        self.language_model, self.cache, self.longest = model.language_model, cache, longest
        device = self.language_model.model.embed_tokens.weight.device
        # token, position, and of the cache: first cell, number of cells to look at, cell to write
        self.numbers, self.runs, self.graph = torch.zeros(5, rows, dtype=torch.int64, device=device), 0, None

    def __call__(self, columns, records):
        """columns: a tuple of the five numbers for each row. records: whether to record. -> scores (rows, V) float32"""
        self.numbers.copy_(torch.tensor(columns).t())
        if records and self.graph is None and self.runs == TRIES:
            try:
                self.graph, self.logits, self.held = record(self.run)
            except RuntimeError as error:
                warnings.warn(f"this step cannot be recorded, and runs without: {str(error)[:200]}", stacklevel=2)
        self.runs += 1
        if self.graph is None:
            return self.run()
        self.graph.replay()
        return self.logits

    def run(self):
        """The step itself: nothing in it waits for the GPU, or makes a tensor out of Python's numbers."""
        ids, positions, starts, lengths, cells = self.numbers
        self.cache.announce(starts, lengths, cells, self.longest)
        model = self.language_model.model
        return self.language_model.lm_head(model(model.embed_tokens(ids), positions, None, self.cache)).float()


def record(run):
    """-> the CUDA graph of what run() launches, the tensor where its result will be, and what it uses besides: a place
    that it knows must not be given to others"""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result, list(quant.WORKSPACE.values())


def can_be_recorded(model):
    """Whether all of a model is on one GPU, in plain tensors, nothing is done between its layers, such as fetching them
    from elsewhere, and attention is Triton's: the reference asks the GPU how long the sequences are."""
    plain = all(type(p.data) is torch.Tensor for p in model.language_model.parameters())
    hooked = any(module._forward_pre_hooks or module._forward_hooks for module in model.language_model.modules())
    devices = {p.device for p in model.language_model.parameters()}
    weight = model.language_model.model.embed_tokens.weight
    return plain and not hooked and len(devices) == 1 and weight.device.type == "cuda" and use_triton(
        "attention", weight, slow=weight.dtype == torch.float32)
