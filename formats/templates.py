"""Conversation templates: a list of messages -> the one string that a language model reads, and what of it is learned.

A model knows a conversation only as text. The template fixes that text: a system sentence, a header per speaker, a mark
at the end of each answer. `render` also says which stretches of characters the model learns to write (its answers with
their end marks), so that labels follow from where a message stands, never from searching or re-tokenising its text.

    v1             S USER: q ASSISTANT: a</s>USER: q2 ASSISTANT: a2</s>     learned: " a</s>" and " a2</s>"
    plain          <image>caption\n                                        learned: "caption\n"; the question is dropped
    chat_template  what the tokenizer's own Jinja template writes; ChatML e.g.
                   <|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n    learned: "a<|im_end|>"

Strings and quirks are the original's (LLAVA.md 2.1, 2.2, 2.5). A new template of a style below is a row in TEMPLATES.
"""

from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache

import jinja2
import jinja2.ext
import jinja2.sandbox

from tokenizer import IMAGE_TAG

PERSON = {"human": 0, "gpt": 1}  # who speaks, in LLaVA's records
CHAT = "chat_template"

S_USER = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
          "detailed, and polite answers to the user's questions.")


@dataclass(frozen=True)
class Template:
    """One row of LLaVA's table. style: how the parts are joined; sep ends a question, sep2 (or else sep) an answer."""

    style: str
    system: str = ""
    roles: tuple = ("", "")
    sep: str = ""
    sep2: str = ""


TEMPLATES = {
    "plain": Template("plain", sep="\n"),
    "v1": Template("two", S_USER, ("USER", "ASSISTANT"), " ", "</s>"),
}
ALIASES = {"vicuna_v1": "v1", "v0_plain": "plain"}


@dataclass
class Rendered:
    """prompt: the text; learned: [(start, end)] of its characters that carry labels; bos: whether the tokenizer's BOS
    goes in front (a chat template writes its own, if it wants one)."""

    prompt: str
    learned: list
    bos: bool = True


def canonical(name):
    """The template's own name; ValueError if there is none of this name."""
    name = ALIASES.get(name, name)
    if name not in TEMPLATES and name != CHAT:
        known = ", ".join([*TEMPLATES, *ALIASES, CHAT])
        raise ValueError(f"conversation template {name!r} is not known here; use one of {known}")
    return name


def resolve_conv_mode(config, tokenizer):
    """Which template a model speaks -> its name. Decided by content, in this order (DESIGN.md, rule 3).

    config: LlavaConfig, whose conv_mode (asked for by the user, or from config.json) goes first; tokenizer: Tokenizer,
    or None where there is none. The name may be one that is not in the table yet: `render` says so when it is needed.
    """
    if config.conv_mode:
        return ALIASES.get(config.conv_mode, config.conv_mode)
    if tokenizer is not None and tokenizer.chat_template and _shows_text(tokenizer):
        return CHAT
    if config.mm_use_im_start_end:
        return "v1" if tokenizer is None or tokenizer.token_to_id("[PAD]") is None else "llava_v0"
    if config.text.model_type == "mistral":
        return "mistral_instruct"
    return "chatml_direct" if config.text.vocab_size >= 64000 else "v1"


def render(conv_mode, messages, tokenizer=None, open=False):
    """Messages [(role, text)] -> Rendered.

    Roles are human and gpt in turn; a first message from gpt is left out, as the original does. open=True: the prompt
    ends with the header of the answer that is to be generated. The tokenizer is needed for "chat_template" only.
    ValueError, naming the turn, for what the template cannot say.
    """
    conv_mode = canonical(conv_mode)
    messages = turns(messages)
    if conv_mode == CHAT:
        return _render_chat(messages, tokenizer, open)
    template = TEMPLATES[conv_mode]
    return {"two": _render_two, "plain": _render_plain}[template.style](template, messages, open)


def turns(messages):
    """[(role, text)] -> [(0 or 1, text)]: 0 asks and 1 answers, alternating from 0; ValueError otherwise."""
    for number, (role, _) in enumerate(messages, 1):
        if role not in PERSON:
            raise ValueError(f"unknown role: turn {number} is from {role!r}; expected human or gpt")
    messages = [(PERSON[role], text) for role, text in messages]
    skipped = int(bool(messages) and messages[0][0] == 1)
    for number, (person, _) in enumerate(messages[skipped:]):
        if person != number % 2:
            who = ("human", "gpt")[person]
            raise ValueError(f"two turns of one speaker: turn {number + skipped + 1} is from {who} like the one before "
                             "it; expected human and gpt in turn")
    return messages[skipped:]


def stop(conv_mode, tokenizer):
    """What ends a generated answer -> (set of ids, list of strings that are no single token)."""
    conv_mode = canonical(conv_mode)
    ids = {tokenizer.eos_token_id} - {None}
    if conv_mode == CHAT:
        return ids | {_end_of_turn(tokenizer)[0]}, []
    end = TEMPLATES[conv_mode].sep2 or TEMPLATES[conv_mode].sep
    end_id = tokenizer.token_to_id(end)
    return (ids, [end]) if end_id is None else (ids | {end_id}, [])


# -------------------------------------------------------------------------------------------------- LLaVA's templates


def _render_two(template, messages, open):
    """`system sep`, then `role: text sep` for the human and `role: text sep2` for the assistant.

    An empty text leaves only `role:` with no separator: the original takes it for an answer yet to come.
    """
    prompt, learned = template.system + template.sep, []
    for person, text in messages:
        prompt += template.roles[person] + ":"
        if text:
            start = len(prompt)
            prompt += " " + text + (template.sep, template.sep2)[person]
            if person == 1:
                learned.append((start, len(prompt)))
    if open:
        prompt += template.roles[1] + ":"
    return Rendered(prompt, learned)


def _render_plain(template, messages, open):
    """Stage 1: the picture and its caption, nothing else. Of the question only the <image> tags remain."""
    pictures = IMAGE_TAG * messages[0][1].count(IMAGE_TAG) if messages else ""
    if len(messages) != 2 - open or not pictures:
        raise ValueError(f"not for template plain: it takes one question with an {IMAGE_TAG} tag and one answer; "
                         f"found {len(messages)} turns, {'with' if pictures else 'without'} a tag in the first")
    if open:
        return Rendered(pictures, [])
    prompt = pictures + messages[1][1] + template.sep
    return Rendered(prompt, [(len(pictures), len(prompt))])


# --------------------------------------------------------------------------------------- the tokenizer's own template


def _render_chat(messages, tokenizer, open):
    """Learned is each answer through its end-of-turn token, found by rendering the conversation's beginnings: an answer
    starts where the prompt that asks for it ends."""
    if not tokenizer.chat_template:
        raise ValueError("no chat template: the tokenizer has none; use --version with one of LLaVA's templates")
    prompt = _apply_chat(tokenizer, messages, open)
    learned = []
    for i, (person, _) in enumerate(messages):
        if person == 1:
            asked = _apply_chat(tokenizer, messages[:i], True)
            answered = _apply_chat(tokenizer, messages[:i + 1], False)
            if not (prompt.startswith(answered) and answered.startswith(asked)):
                raise ValueError(f"chat template not for training: it writes turn {i + 1} differently once more turns "
                                 "follow, so nobody can say what is learned; use --version with one of LLaVA's")
            learned.append((len(asked), len(answered) - len(_end_of_turn(tokenizer)[1])))
    return Rendered(prompt, learned, bos=False)


@lru_cache
def _end_of_turn(tokenizer):
    """(id of the token that ends an answer, the text that the template writes behind it, e.g. a newline)."""
    asked = _apply_chat(tokenizer, [(0, "a")], True)
    answer = _apply_chat(tokenizer, [(0, "a"), (1, "b")], False)[len(asked):]
    for token_id, (_, end) in reversed(list(zip(*tokenizer.encode_with_spans(answer, bos=False)))):
        if token_id in tokenizer.special_ids:
            return token_id, answer[end:]
    raise ValueError(f"chat template without an end: it writes an answer as {answer!r}, which holds no special token "
                     "to stop at; use --version with one of LLaVA's templates")


def _shows_text(tokenizer):
    """False for a vision processor's template, which wants a message as a list of parts and passes over mere text."""
    return "pumice" in _apply_chat(tokenizer, [(0, "pumice")], True)


def _apply_chat(tokenizer, messages, open):
    """Run the Jinja template; ValueError with its own complaint."""
    said = [{"role": ("user", "assistant")[person], "content": text} for person, text in messages]
    try:
        template = _compile(tokenizer.chat_template)
        return template.render(messages=said, add_generation_prompt=open, **tokenizer.special_tokens)
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"the tokenizer's chat template refuses this conversation: {error}") from None


class _Generation(jinja2.ext.Extension):
    """{% generation %}…{% endgeneration %} marks answers for transformers' own masks; we only read through it."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


@lru_cache
def _compile(chat_template):
    """Jinja text -> template, in a sandbox (it comes with a download) and with the names that such templates expect."""
    def refuse(message):
        raise jinja2.TemplateError(message)

    world = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                         extensions=[jinja2.ext.loopcontrols, _Generation])
    world.globals.update(raise_exception=refuse, strftime_now=lambda form: datetime.now().strftime(form))
    return world.from_string(chat_template)
