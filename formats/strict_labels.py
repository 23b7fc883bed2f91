"""Labels as the original finds them: by counting the tokens of pieces of the prompt (LLAVA.md 2.5, `--strict_labels`).

The original splits the finished text at the template's marks, tokenises every piece once more by itself, and adds the
counts up: so many tokens of question, not learned, so many of answer. A piece by itself need not have as many tokens as
within the whole, so small corrections stand in between. Where a mark is missing, or stands in somebody's text, the sum
is wrong, and then nothing of the sample is learned (LLAVA.md 2.6):

    S USER: q ASSISTANT: a</s>USER: q2 ASSISTANT: say "</s>" !</s>
    [------ round --------]   [-------- round -------]   [-]  no " ASSISTANT: " in it: the count ends here, too early

Pumice labels by message span instead (data.render_record). This file is for comparing with the original, and tells
which records it would lose.
"""

from formats.templates import PAD
from model import IGNORE_INDEX
from tokenizer import IMAGE_TAG

BY_ROUND = ("two", "llama_2", "mpt")  # the styles whose rounds are counted, and the sum checked


def rounds(template, prompt):
    """The rounds that the original finds, up to one without its one answer -> [(round, its text before that)]"""
    header = template.roles[1]
    answer = {"two": f" {header}: ", "llama_2": "[/INST] ", "mpt": template.sep + header}[template.style]
    pieces, found = prompt.split(template.sep2), []
    if template.style == "mpt":  # each message ends with the mark: system, question and answer, then always two
        bounds = [0, *range(3, len(pieces), 2), len(pieces)]
        pieces = [template.sep.join(pieces[a:b]) for a, b in zip(bounds, bounds[1:])]
    for piece in pieces:
        question, *rest = piece.split(answer)
        if len(rest) != 1:
            break
        found.append((piece, question + answer))
    return found


def padding_token(tokenizer):
    """What the original pads with, and so never counts: [PAD] where there is one, else <unk>; None without either."""
    return tokenizer.special_tokens.get("unk_token") if tokenizer.token_to_id(PAD) is None else PAD


def loses_count(template, prompt, tokenizer):
    """Whether the original masks this sample whole, told from its text: a mark too many or too few, or padding."""
    if template.style not in BY_ROUND:
        return False
    padding, whole = padding_token(tokenizer), "".join(piece + template.sep2 for piece, _ in rounds(template, prompt))
    return whole != prompt or (padding is not None and padding in prompt)


def strict_labels(template, rendered, ids, encode, shows, tokenizer, model_max_length=None):
    """The original's labels -> (labels, mismatch); mismatch: True where it masks the sample because the sum is wrong.
    ids: of the prompt, cut at model_max_length if the record has no picture; encode: text -> ids with BOS; shows:
    whether it has one. For mpt the sum is LLaVA 1.1's: 1.2's is wrong for every tokenizer (LLAVA.md 2.5)."""
    labels, padding, place = list(ids), tokenizer.token_to_id(padding_token(tokenizer) or ""), 0

    def real(ids):
        return sum(token != padding for token in ids)

    def count(text):
        return real(encode(text)[:model_max_length]) if template.style == "single" and not shows else len(encode(text))

    for length, first, end in _counts(template, rendered, count, tokenizer.legacy):
        for i in range(place + first, min(place + end, len(labels))):
            labels[i] = IGNORE_INDEX
        place += length
    if template.style not in BY_ROUND:
        return labels, False
    mismatch = place != real(ids) and not (model_max_length and place >= model_max_length)
    kept = 0 if mismatch else place
    return labels[:kept] + [IGNORE_INDEX] * len(labels[kept:]), mismatch


def _counts(template, rendered, count, legacy):
    """What the original counts, in turn -> (tokens, of which those from here, to here are not learned)."""
    prompt, style = rendered.prompt, template.style
    if style == "plain":
        yield count(IMAGE_TAG), 0, count(IMAGE_TAG)
    if style == "single":  # the header goes, and a question but for its first two tokens (###)
        begins = [begin for begin, _ in rendered.learned]  # of each message, and of the end
        yield count(prompt[: begins[0]]), 0, count(prompt[: begins[0]])
        for (begin, learned), end in zip(rendered.learned, begins[1:]):
            length = count(prompt[begin:end])
            yield length, 2, length if learned < end else 0
    if style in ("two", "llama_2"):
        yield 1, 0, 1  # a round's BOS is counted for the end mark that its text lacks
    for number, (piece, beginning) in enumerate(rounds(template, prompt) if style in BY_ROUND else ()):
        length, asked = count(piece), count(beginning)
        if style == "mpt":
            length += count(template.sep)
        else:
            asked -= 2  # the BOS, and the space that in the whole belongs to the answer's first word
        if style == "two" and number and not legacy:
            length, asked = length - 1, asked - 1  # USER has two tokens at the head of a text, and one behind </s>
        yield length, 0, asked
