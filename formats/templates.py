"""Conversation templates: a list of messages -> the one string that a language model reads, and what of it is learned.

A model knows a conversation only as text. The template fixes that text: a system sentence S, a header per speaker, a
mark at the end of each answer. `render` also says which stretches of characters the model learns to write, so that
labels follow from where a message stands, never from searching or re-tokenising its text. By style:

    two       S USER: q ASSISTANT: a</s>USER: q2 ASSISTANT: a2</s>             learned: " a</s>" and " a2</s>"
    llama_2   [INST] <<SYS>>\nS\n<</SYS>>\n\nq [/INST] a </s><s>[INST] …       learned: " a </s>"
    mpt       S<|im_end|><|im_start|>user\nq<|im_end|><|im_start|>assistant\na<|im_end|>      learned: "a<|im_end|>"
    single    S###Human: q###Assistant: a###Human: q2###Assistant:             asked so, but trained with the text
              S\n\n### Human: q\n### Assistant: a\n###                         learned: "###" and "### Assistant: a\n"
    plain     <image>caption\n                                                 learned: "caption\n"; no question is read

Strings and quirks are the original's (LLAVA.md 2.1, 2.2, 2.5). A new template of such a style is a row in TEMPLATES.

A language model outside the table brings a template of its own, Jinja text in its tokenizer's files: `chat_template`.
Of a conversation it is given {"role": "user", "content": text} for human and "assistant" for gpt, no system message (it
may write one of its own), an `<image>` as part of the text; further the names of the tokenizer's special tokens. A BOS
stands in the prompt if it writes one. Learned is each answer through the special token that ends it:

    <|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n        learned: "a<|im_end|>"
"""

import json
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.sandbox

from tokenizer import IMAGE_TAG, PAD

PERSON = {"human": 0, "gpt": 1}  # who speaks, in LLaVA's records
CHAT = "chat_template"
START_END = ("<im_start>", "<im_end>")  # around a picture's place, with mm_use_im_start_end
EMPTY_ANSWER = "empty answer"

S_USER = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
          "detailed, and polite answers to the user's questions.")
S_HUMAN = S_USER.replace("user", "human")
SENTENCES = json.loads(Path(__file__).with_name("sentences.json").read_text(encoding="utf-8"))  # of the other templates
EXAMPLE = (*enumerate(SENTENCES["example"]),)


@dataclass(frozen=True)
class Template:
    """One row of LLaVA's table. style: how the parts are joined; sep ends a question, sep2 an answer; picture: what
    stands for a picture in a message; example: messages that go before the conversation when asked."""

    style: str
    system: str = ""
    roles: tuple = ("", "")
    sep: str = ""
    sep2: str = ""
    picture: str = IMAGE_TAG
    example: tuple = ()


HUMAN, USER = ("Human", "Assistant"), ("USER", "ASSISTANT")
CHATML = ("<|im_start|>user\n", "<|im_start|>assistant\n"), "<|im_end|>", "<|im_end|>"
MMTAG = f"<Image>{IMAGE_TAG}</Image>"

TEMPLATES = {
    "plain": Template("plain", sep2="\n"),
    "v1": Template("two", S_USER, USER, " ", "</s>"),
    "llava_v1": Template("two", S_HUMAN, USER, " ", "</s>"),
    "v1_mmtag": Template("two", SENTENCES["S_MMTAG"], USER, " ", "</s>", MMTAG),
    "v0": Template("single", S_HUMAN, HUMAN, "###", "###", example=EXAMPLE),
    "llava_v0": Template("single", S_HUMAN, HUMAN, "###", "###"),
    "v0_mmtag": Template("single", SENTENCES["S_MMTAG"], HUMAN, "###", "###", MMTAG),
    "llama_2": Template("llama_2", SENTENCES["S_LLAMA2"], USER, "<s>", "</s>"),
    "llava_llama_2": Template("llama_2", SENTENCES["S_LLAVA2"], USER, "<s>", "</s>"),
    "mistral_instruct": Template("llama_2", "", USER, "", "</s>"),
    "chatml_direct": Template("mpt", "<|im_start|>system\nAnswer the questions.", *CHATML),
    "mpt": Template("mpt", SENTENCES["S_MPT"], *CHATML),
}
ALIASES = {"vicuna_v1": "v1", "v0_plain": "plain", "default": "v0", "mistral_direct": "chatml_direct",
           "template_v0": "llava_v0"}  # trained alike; but asked without v0's example, which shows no picture
VERSIONS = {"v0": "v1", "v0.5": "v1", "default": "llava_v0"}  # of --version, where it names no template


@dataclass
class Rendered:
    """prompt: the text; learned: [(start, end)] of its characters that carry labels; bos: whether the tokenizer's BOS
    goes in front (a chat template writes its own, if it wants one); notes: what was odd about the messages."""

    prompt: str
    learned: list
    bos: bool = True
    notes: list = field(default_factory=list)


def canonical(name):
    """The template's own name; ValueError if there is none of this name."""
    name = ALIASES.get(str(name), str(name))
    if name not in TEMPLATES and name != CHAT:
        known = ", ".join([*TEMPLATES, *ALIASES, CHAT])
        raise ValueError(f"conversation template {name!r} is not known here; use one of {known}")
    return name


def of_version(version):
    """`--version` as training takes it -> (template's name, what should be said about it or None). v0 and v0.5 have
    chosen no template since LLaVA 1.1.3: they train v1's text, v0 with `[PAD]` where none is named (LLAVA.md 5.1)."""
    name = canonical(VERSIONS.get(version, version))
    warning = (f"WARNING: --version {version} trains the text of {name}, as in the original; what LLaVA v0 was "
               "trained with is --version template_v0")
    return name, warning if version in ("v0", "v0.5") else None


def choose_conv_mode(config, tokenizer, asked=False):
    """Which template a model speaks -> (name, why), decided by content (DESIGN.md, rule 3). config: LlavaConfig, whose
    conv_mode (the user has `asked` for it, or it is config.json's) goes first; tokenizer: Tokenizer or None."""
    if config.conv_mode:
        return canonical(config.conv_mode), "as asked for" if asked else "as config.json says"
    # A vision processor's chat template, which wants a message as a list of parts, passes over mere text.
    if tokenizer and tokenizer.chat_template and "pumice" in _apply_chat(tokenizer, [(0, "pumice")], True):
        return CHAT, "the tokenizer brings one"
    if config.mm_use_im_start_end and tokenizer is not None and tokenizer.token_to_id(PAD) is not None:
        return "llava_v0", f"pictures stand in {START_END[0]}, and the tokenizer has {PAD}"
    if config.mm_use_im_start_end:
        return "v1", f"pictures stand in {START_END[0]}, and the tokenizer has no {PAD}"
    if config.text.model_type == "mistral":
        return "mistral_instruct", "the language model is a Mistral"
    if config.text.vocab_size >= 64000:
        return "chatml_direct", f"the vocabulary has {config.text.vocab_size} entries, 64000 or more"
    return "v1", "nothing says otherwise"


def show_pictures(conv_mode, text, mm_use_im_start_end=False):
    """A message's text with each `<image>` as the template wants it: bare, or in <Image> or <im_start> tags."""
    place = IMAGE_TAG.join(START_END) if mm_use_im_start_end else IMAGE_TAG
    frame = IMAGE_TAG if conv_mode == CHAT else TEMPLATES[canonical(conv_mode)].picture
    return text.replace(IMAGE_TAG, frame.replace(IMAGE_TAG, place))


def render(conv_mode, messages, tokenizer=None, open=False):
    """Messages [(role, text)] -> Rendered. Roles are human and gpt in turn; a first message from gpt is left out, as in
    the original; the style single, in training, takes all as they come. open=True: the prompt ends with the header of
    the answer to come. tokenizer: for "chat_template" only. ValueError, naming the turn, for what cannot be said."""
    conv_mode = canonical(conv_mode)
    template = TEMPLATES.get(conv_mode, Template(CHAT))
    if template.style == "plain":
        return _render_plain(template, messages, open)
    if template.style == "single" and not open:
        return _render_v0(template, messages)
    messages, notes = turns(messages)
    if conv_mode == CHAT:
        rendered = _render_chat(messages, tokenizer, open)
    else:  # an answer yet to come is an empty one
        rendered = render_turns(template, [*messages, (1, "")] if open else messages)
    rendered.notes = notes
    return rendered


def turns(messages):
    """[(role, text)] -> ([(0 or 1, text)], notes): 0 asks and 1 answers, alternating from 0; ValueError otherwise."""
    skipped = int(bool(messages) and messages[0][0] == "gpt")
    for number, (role, _) in enumerate(messages):
        if role not in [*PERSON]:  # a list, as a role may be anything that JSON holds
            raise ValueError(f"unknown role: turn {number + 1} is from {role!r}; expected human or gpt")
        if PERSON[role] != (number + skipped) % 2:
            raise ValueError(f"two turns of one speaker: turn {number + 1} is from {role} like the one before it; "
                             "expected human and gpt in turn")
    messages = [(PERSON[role], text) for role, text in messages[skipped:]]
    odd = {"first turn from gpt: it is left out": skipped,
           "last turn from human: it has no answer to learn": messages and messages[-1][0] == 0,
           "empty question": (0, "") in messages, EMPTY_ANSWER: (1, "") in messages}
    return messages, [note for note, found in odd.items() if found]


def stop(conv_mode, tokenizer):
    """What ends a generated answer -> (set of ids, list of strings that are no special token)."""
    conv_mode = canonical(conv_mode)
    ids = {tokenizer.eos_token_id} - {None}
    if conv_mode == CHAT:
        return ids | {_end_of_turn(tokenizer)[0]}, []
    end = TEMPLATES[conv_mode].sep2
    end_id = tokenizer.token_to_id(end)
    return (ids | {end_id}, []) if end_id in tokenizer.special_ids else (ids, [end])


# -------------------------------------------------------------------------------------------------- LLaVA's templates


def frame(template):
    """What goes around texts -> {"head": once, "question", "answer": (header, before, after), "first": before one}"""
    if template.style == "llama_2":  # the first <s> is the tokenizer's
        system = f"<<SYS>>\n{template.system}\n<</SYS>>\n\n" if template.system else ""
        return {"head": "", "first": f"[INST] {system}", "question": ("", f"{template.sep}[INST] ", " [/INST]"),
                "answer": ("", " ", f" {template.sep2}")}
    colon, space = (":", " ") if template.style in ("two", "single") else ("", "")
    question, answer = (role + colon for role in template.roles)
    return {"head": template.system + template.sep, "first": space, "question": (question, space, template.sep),
            "answer": (answer, space, template.sep2)}


def render_turns(template, messages):
    """Styles two, llama_2, mpt, and single when asked. Of an empty text only the header: an answer yet to come."""
    if template.style == "llama_2" and messages and not messages[0][1]:
        raise ValueError("empty first question: this template puts its system sentence there; expected a text")
    around = frame(template)
    prompt, learned = around["head"], []
    for number, (person, text) in enumerate([*template.example, *messages]):
        header, before, after = around["answer" if person else "question"]
        prompt += header
        if text:
            start = len(prompt)
            prompt += (before if number else around["first"]) + text + after
            if person == 1:
                learned.append((start, len(prompt)))
    return Rendered(prompt, learned)


def _render_v0(template, messages):
    """What LLaVA v0 was trained with, not quite what it is asked with: a line per message, whoever it is from. Learned
    are the answers with their headers, and the ### before a question and at the end, where an answer stops."""
    prompt, learned = template.system + "\n\n", []
    for role, text in messages:
        start = len(prompt)
        name = template.roles[PERSON[role.lower()]] if str(role).lower() in PERSON else "unknown"
        prompt += f"### {name}: {text}\n"
        learned.append((start, start + len("###") if role == "human" else len(prompt)))
    return Rendered(prompt + "### ", [*learned, (len(prompt), len(prompt) + len("### "))])


def _render_plain(template, messages, open):
    """Stage 1: the picture and its caption, nothing else. Of the question only the <image> tags remain."""
    pictures = IMAGE_TAG * messages[0][1].count(IMAGE_TAG) if messages else ""
    roles = [str(role) for role, _ in messages]
    if roles != ["human", "gpt"][: 2 - open] or not pictures:
        raise ValueError(f"not for template plain: it takes one question with an {IMAGE_TAG} tag and one answer; found "
                         f"turns from {', '.join(roles)}, {'with' if pictures else 'without'} a tag in the first")
    if open:
        return Rendered(pictures, [])
    prompt = pictures + messages[1][1] + template.sep2
    return Rendered(prompt, [(len(pictures), len(prompt))], notes=[] if messages[1][1] else [EMPTY_ANSWER])


# --------------------------------------------------------------------------------------- the tokenizer's own template


def _render_chat(messages, tokenizer, open):
    """Learned is each answer through its end-of-turn token; it starts where the prompt that asks for it ends."""
    if not tokenizer.chat_template:
        raise ValueError("no chat template: the tokenizer has none; use --version with one of LLaVA's templates")
    prompt, learned = _apply_chat(tokenizer, messages, open), []
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
