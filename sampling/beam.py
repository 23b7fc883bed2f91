"""Beam search: N beginnings of an answer grow side by side, and the most probable whole answer wins.

Greedy choice takes the likeliest next token and may miss a likelier sentence that begins with a less likely word. Here
each step scores every continuation of N beginnings by its summed log-probability and keeps the best N. What ends is set
aside under its mean log-probability per token; the search stops when no beginning can beat the N best that are set
aside. It does as transformers' generate(num_beams=N, do_sample=False).

Legend: N beams, V vocabulary.
"""

import torch

import data


def search(model, cache, stretch, logits, prompt_ids, num_beams, room, stop_ids, silent_ids=(), stopped=None,
           repetition_penalty=1.0, length_penalty=1.0):
    """The best of the answers that N beams find. -> (its ids, its score: log-probability / length^length_penalty)

    stretch: the prompt's in the cache, which stays as it is; logits (1, V): after the prompt; prompt_ids: of
    pictures -200, the rest counts as said before; room: the most tokens of an answer; stop_ids: a set, any of which
    ends it; silent_ids: never chosen; stopped(ids): whether an answer holds a stop string.
    """
    beams, scores, stretches, ended = [[]], logits.new_zeros(1), [cache.copy(stretch)], []
    prompt = logits.new_tensor([i for i in prompt_ids if i >= 0], dtype=torch.long)
    wide = (1 + max(1, len(stop_ids))) * num_beams  # so that N still run if each takes every end
    try:
        for length in range(1, room + 1):
            chances = logits.log_softmax(-1)  # (N, V); 1 row at the beginning
            for row, beam in zip(chances, beams):  # a log-probability is never above 0: times the penalty is less
                row[torch.cat([prompt, prompt.new_tensor(beam)])] *= repetition_penalty
            chances[:, silent_ids] = float("-inf")
            best, places = (chances + scores[:, None]).flatten().topk(min(wide, chances.numel()))
            running = []  # (beam, token, score)
            for rank, (score, place) in enumerate(zip(best.tolist(), places.tolist())):
                beam, token = divmod(place, chances.shape[1])
                ids = [*beams[beam], token]
                if token not in stop_ids and length < room and not (stopped and stopped(ids)):
                    running.append((beam, token, score))
                elif rank < num_beams:
                    ended.append((score / length**length_penalty, ids))
            running = running[:num_beams]
            ended = sorted(ended, key=lambda answer: -answer[0])[:num_beams]
            full = len(ended) == num_beams
            if not running or full and running[0][2] / length**length_penalty <= ended[-1][0]:
                return ended[0][::-1]
            parents, tokens, scores = zip(*running)
            beams, scores = [[*beams[beam], token] for beam, token in zip(parents, tokens)], best.new_tensor(scores)
            stretches[:] = _inherit(cache, stretches, parents)
            logits = model.last_logits(_next_rows(tokens, stretches, logits.device), cache, stretches)
    finally:
        for owned in stretches:
            cache.close(owned)


def _inherit(cache, stretches, parents):
    """The stretches of the beams that go on: a parent's own for its first child, a twin of it for every other."""
    for i, owned in enumerate(stretches):
        if i not in parents:
            cache.close(owned)
    return [cache.copy(stretches[p]) if p in parents[:child] else stretches[p] for child, p in enumerate(parents)]


def _next_rows(tokens, stretches, device):
    """The batch of one step: each beam's newest token behind its past."""
    positions = torch.tensor([owned.length for owned in stretches], device=device)
    bounds = torch.arange(len(tokens) + 1, device=device, dtype=torch.int32)
    none = torch.empty(0, device=device)
    return data.Batch(torch.tensor(tokens, device=device), None, positions, bounds, none, [])
