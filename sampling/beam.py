"""Beam search: N beginnings of an answer grow side by side, and the most probable whole answer wins.

Greedy choice takes the likeliest next token and may miss a likelier sentence that begins with a less likely word. Here
each step scores every continuation of N beginnings by its summed log-probability and keeps the best N. What ends is set
aside under its mean log-probability per token; the search stops when no beginning can beat the N best that are set
aside. It does as transformers' generate(num_beams=N, do_sample=False).

Legend: N beams, V vocabulary.
"""

import torch


def search(decoder, answer, logits, silent_ids=()):
    """The best of the answers that N beams find -> its ids

    decoder: reads tokens (graph.Decoder); answer: a sample.Growing whose prompt is in the cache, which stays as it is;
    logits (V,): after the prompt; silent_ids: never chosen.
    """
    num_beams, penalty, cache = answer.request.num_beams, answer.request.repetition_penalty, decoder.cache
    beams, scores, stretches, ended = [[]], logits.new_zeros(1), [cache.copy(answer.stretch)], []
    prompt = logits.new_tensor([i for i in answer.example.ids if i >= 0], dtype=torch.long)  # without pictures
    wide = (1 + max(1, len(answer.stop_ids))) * num_beams  # so that N still run if each takes every end
    logits = logits[None]
    try:
        for length in range(1, answer.room + 1):
            chances = logits.log_softmax(-1)  # (N, V); 1 row at the beginning
            for row, beam in zip(chances, beams) if penalty != 1 else ():  # never above 0: times the penalty is less
                row[torch.cat([prompt, prompt.new_tensor(beam)])] *= penalty
            chances[:, silent_ids] = float("-inf")
            best, indices = (chances + scores[:, None]).flatten().topk(min(wide, chances.numel()))
            running = []  # (beam, token, score)
            for rank, (score, index) in enumerate(zip(best.tolist(), indices.tolist())):
                beam, token = divmod(index, chances.shape[1])
                ids = [*beams[beam], token]
                if length < answer.room and not answer.ends(ids):
                    running.append((beam, token, score))
                elif rank < num_beams:
                    ended.append((score / length, ids))
            running = running[:num_beams]
            ended = sorted(ended, key=lambda one: -one[0])[:num_beams]
            if not running or len(ended) == num_beams and running[0][2] / length <= ended[-1][0]:
                return ended[0][1]
            parents, tokens, scores = zip(*running)
            beams, scores = [[*beams[beam], token] for beam, token in zip(parents, tokens)], best.new_tensor(scores)
            stretches = inherit(cache, stretches, parents)
            logits = decoder.read([[token] for token in tokens], stretches)
    finally:
        for stretch in stretches:
            cache.close(stretch)


def inherit(cache, stretches, parents):
    """The stretches of the beams that go on: a parent's own for its first child, a twin of it for every other."""
    for i, stretch in enumerate(stretches):
        if i not in parents:
            cache.close(stretch)
    return [cache.copy(stretches[p]) if p in parents[:child] else stretches[p] for child, p in enumerate(parents)]
