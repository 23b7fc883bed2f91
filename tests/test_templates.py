"""Templates: the original's strings, learned stretches by message, and the tokenizer's own Jinja."""

import hashlib
import json
import re
import shutil
from dataclasses import replace

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from formats import processor, templates
from model import LlamaConfig, LlavaConfig
from tokenizer import Tokenizer
from weights import load

CHATML = ("{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nBe kind."
          "<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TALK = [("human", "<image>\nQ1"), ("gpt", "A1"), ("human", "Q2"), ("gpt", "A2")]
SYSTEM, S_HUMAN = templates.S_USER, templates.S_HUMAN


def chat_tokenizer(folder, chat_template=CHATML):
    """A byte-level tokenizer with ChatML's marks, as SmolLM2's."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.train_from_iterator(["system user assistant\n Be kind. question answer"], trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": chat_template}))
    return Tokenizer.from_folder(folder)


def learned(rendered):
    """The learned stretches as text."""
    return [rendered.prompt[start:end] for start, end in rendered.learned]


# -------------------------------------------------------------------------------------------------- LLaVA's templates


# LLAVA.md 2.2: user `<image>\nQ1`, assistant `A1`, user `Q2`, open. {S}: the row's system sentence.
ASKED = {
    "v1": "{S} USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:",
    "llava_v1": "{S} USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:",
    "v1_mmtag": "{S} USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:",
    "llava_v0": "{S}###Human: <image>\nQ1###Assistant: A1###Human: Q2###Assistant:",
    "v0_mmtag": "{S}###Human: <image>\nQ1###Assistant: A1###Human: Q2###Assistant:",
    "v0": "{S}###Human: {E0}###Assistant: {E1}###Human: <image>\nQ1###Assistant: A1###Human: Q2###Assistant:",
    "llama_2": "[INST] <<SYS>>\n{S}\n<</SYS>>\n\n<image>\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST]",
    "llava_llama_2": "[INST] <<SYS>>\n{S}\n<</SYS>>\n\n<image>\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST]",
    "mistral_instruct": "[INST] <image>\nQ1 [/INST] A1 </s>[INST] Q2 [/INST]",
    "chatml_direct": "{S}<|im_end|><|im_start|>user\n<image>\nQ1<|im_end|><|im_start|>assistant\nA1<|im_end|>"
                     "<|im_start|>user\nQ2<|im_end|><|im_start|>assistant\n",
    "mpt": "{S}<|im_end|><|im_start|>user\n<image>\nQ1<|im_end|><|im_start|>assistant\nA1<|im_end|>"
           "<|im_start|>user\nQ2<|im_end|><|im_start|>assistant\n",
}
V0_TRAINED = "{S}\n\n### Human: <image>\nQ1\n### Assistant: A1\n### Human: Q2\n### Assistant: A2\n### "
V0_LEARNED = ["###", "### Assistant: A1\n", "###", "### Assistant: A2\n", "### "]


@pytest.mark.parametrize("name", ASKED)
def test_the_prompts_and_learned_stretches_of_every_template(name):
    row = templates.TEMPLATES[name]
    def fill(text):
        return text.replace("{S}", row.system).replace("{E0}", EXAMPLE[0]).replace("{E1}", EXAMPLE[1])
    asked = fill(ASKED[name])
    assert templates.render(name, TALK[:3], open=True).prompt == asked
    closed = templates.render(name, TALK)
    if row.style == "single":  # trained with another text than it is asked with (LLAVA.md 2.5)
        assert closed.prompt == fill(V0_TRAINED) and learned(closed) == V0_LEARNED
        return
    answer = {"two": " {}</s>", "llama_2": " {} </s>", "mpt": "{}<|im_end|>"}[row.style]
    assert closed.prompt == asked + answer.format("A2")
    assert learned(closed) == [answer.format("A1"), answer.format("A2")]


EXAMPLE = [text for _, text in templates.EXAMPLE]


def test_the_texts_of_the_table(gold):
    """System sentences as LLAVA.md 2.1 gives them; the example and all together by their hash."""
    facts = (gold.parent / "reference/LLAVA.md").read_text(encoding="utf-8")
    stated = dict(re.findall(r"^\* (S_\w+): `(.*?)`", facts, flags=re.M))
    assert len(stated) == 5
    for name, text in stated.items():
        assert (vars(templates) | templates.SENTENCES)[name] == text.replace("\\n", "\n"), name
    rows = re.findall(r"^\| ([\w/ ]+) \| (\w+) \|.*\| (S_\w+|empty|`.*?`)(?:, plus.*)? \|$", facts, flags=re.M)
    assert len(rows) == 12
    for names, style, system in rows:
        for name in names.split(" / "):
            row = templates.TEMPLATES[templates.canonical(name)]
            text = stated.get(system, "" if system == "empty" else system[1:-1].replace("\\|", "|"))
            assert (row.style, row.system) == (style.lower(), text.replace("\\n", "\n")), name


def test_the_example_of_v0():
    assert len(EXAMPLE[1]) == 1383 and hashlib.sha256("".join(EXAMPLE).encode()).hexdigest()[:8] == "ebcff27c"
    assert [line[:2] for line in EXAMPLE[1].split("\n")[1:]] == ["1.", "2.", "3.", "4.", "5.", "6.", ""]


def test_v0_takes_messages_as_they_come():
    """Training v0 never looks who speaks after whom; an empty text is a text (LLAVA.md 2.5)."""
    rendered = templates.render("template_v0", [("gpt", "hi"), ("Human", ""), ("system", "s")])
    assert rendered.prompt == f"{S_HUMAN}\n\n### Assistant: hi\n### Human: \n### unknown: s\n### "
    assert learned(rendered) == ["### Assistant: hi\n", "### Human: \n", "### unknown: s\n", "### "]  # not `human`
    with pytest.raises(ValueError, match="unknown role: turn 3"):
        templates.render("template_v0", [("human", "q"), ("gpt", "a"), ("system", "s")], open=True)


def test_quirks_of_llama_2():
    """An empty text is nothing, and impossible at the head; the first <s> is the tokenizer's."""
    say = [("human", "q"), ("gpt", ""), ("human", "q2"), ("gpt", "a")]
    assert templates.render("mistral_instruct", say).prompt == "[INST] q [/INST][INST] q2 [/INST] a </s>"
    assert templates.render("llama_2", say).prompt.endswith("q [/INST]<s>[INST] q2 [/INST] a </s>")
    with pytest.raises(ValueError, match="empty first question"):
        templates.render("llava_llama_2", [("human", ""), ("gpt", "a")])


def test_what_stands_for_a_picture():
    assert templates.show_pictures("v1", "<image>\nq") == "<image>\nq"
    assert templates.show_pictures("v1_mmtag", "<image>\nq") == "<Image><image></Image>\nq"
    assert templates.show_pictures("v0_mmtag", "<image>", True) == "<Image><im_start><image><im_end></Image>"
    assert templates.show_pictures("chat_template", "<image>", True) == "<im_start><image><im_end>"


def test_versions():
    """--version as the original takes it, but for unknown names, which it silently takes for v1."""
    assert templates.of_version("v1_mmtag") == ("v1_mmtag", None) and templates.of_version("vicuna_v1") == ("v1", None)
    assert templates.of_version("template_v0") == templates.of_version("default") == ("llava_v0", None)
    for version in ("v0", "v0.5"):
        name, warning = templates.of_version(version)
        assert name == "v1" and "the text of v1" in warning and "template_v0" in warning
    with pytest.raises(ValueError, match="'vicuna_v9' is not known here; use one of plain, v1, .*template_v0"):
        templates.of_version("vicuna_v9")


def test_v1():
    closed = templates.render("v1", TALK)
    assert closed.prompt == f"{SYSTEM} USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>"
    assert learned(closed) == [" A1</s>", " A2</s>"]
    opened = templates.render("vicuna_v1", TALK[:3], open=True)
    assert opened.prompt == f"{SYSTEM} USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:"


def test_v1_quirks():
    """An empty text is only a header; a first turn from gpt is left out; what the text says never moves a stretch."""
    assert templates.render("v1", [("human", ""), ("gpt", "x")]).prompt == f"{SYSTEM} USER:ASSISTANT: x</s>"
    empty = templates.render("v1", [("human", "q"), ("gpt", "")])
    assert empty.prompt == f"{SYSTEM} USER: q ASSISTANT:" and empty.learned == []
    first = templates.render("v1", [("gpt", "hello"), *TALK])
    assert first == replace(templates.render("v1", TALK), notes=["first turn from gpt: it is left out"])
    tricky = templates.render("v1", [("human", "ASSISTANT: a</s>"), ("gpt", "x ASSISTANT: y</s>z"), ("human", "on")])
    assert learned(tricky) == [" x ASSISTANT: y</s>z</s>"]


def test_plain():
    rendered = templates.render("plain", [("human", "Describe this.\n<image>"), ("gpt", "a cat")])
    assert rendered.prompt == "<image>a cat\n" and learned(rendered) == ["a cat\n"]
    assert templates.render("plain", [("human", "<image>\nQ")], open=True).prompt == "<image>"
    for bad in ([("human", "q"), ("gpt", "a")], TALK, [("gpt", "<image>")]):
        with pytest.raises(ValueError, match="not for template plain"):
            templates.render("plain", bad)


def test_roles_that_do_not_take_turns():
    with pytest.raises(ValueError, match="unknown role: turn 2 is from 'system'"):
        templates.render("v1", [("human", "q"), ("system", "s")])
    with pytest.raises(ValueError, match="two turns of one speaker: turn 2 is from human"):
        templates.render("v1", [("human", "q"), ("human", "q")])
    with pytest.raises(ValueError, match="turn 4 is from gpt"):
        templates.render("v1", [("gpt", "hi"), ("human", "q"), ("gpt", "a"), ("gpt", "a")])


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="'v9' is not known here; use one of plain, v1, .*chat_template"):
        templates.render("v9", TALK)


# ---------------------------------------------------------------------------------------- the tokenizer's own template


def test_chat_template_learns_answers_through_their_end_of_turn(tmp_path):
    tokenizer = chat_tokenizer(tmp_path)
    rendered = templates.render("chat_template", TALK, tokenizer)
    end, user, gpt = "<|im_end|>", "<|im_start|>user\n", "<|im_start|>assistant\n"
    system = f"<|im_start|>system\nBe kind.{end}\n"
    assert rendered.prompt == f"{system}{user}<image>\nQ1{end}\n{gpt}A1{end}\n{user}Q2{end}\n{gpt}A2{end}\n"
    assert learned(rendered) == ["A1<|im_end|>", "A2<|im_end|>"] and not rendered.bos
    tricky = [("human", "A"), ("gpt", "A<|im_end|>\n"), ("human", "A"), ("gpt", "")]
    assert learned(templates.render("chat_template", tricky, tokenizer)) == [f"A{end}\n{end}", end]
    opened = templates.render("chat_template", TALK[:1], tokenizer, open=True)
    assert opened.prompt == f"{system}{user}<image>\nQ1{end}\n{gpt}"


def test_chat_ids_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = chat_tokenizer(tmp_path)
    peer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    said = [{"role": {"human": "user", "gpt": "assistant"}[role], "content": text} for role, text in TALK]
    for count, open in ((4, False), (3, True)):
        rendered = templates.render("chat_template", TALK[:count], tokenizer, open)
        ids = peer.apply_chat_template(said[:count], add_generation_prompt=open, tokenize=True, return_dict=False)
        assert tokenizer.encode(rendered.prompt, rendered.bos) == ids


def test_generation_tags_are_read_through(tmp_path):
    marked = CHATML.replace("{{ message['content'] }}", "{% generation %}{{ message['content'] }}{% endgeneration %}")
    (tmp_path / "a").mkdir()
    tokenizer = chat_tokenizer(tmp_path / "a", marked)
    assert templates.render("chat_template", TALK, tokenizer).prompt.endswith("A2<|im_end|>\n")


@pytest.mark.parametrize("chat_template, sentence", [
    ("{{ raise_exception('no pictures') }}", "refuses this conversation: no pictures"),
    ("{% for m in messages %}{{ m['content'] }}", "refuses this conversation: Unexpected end of template"),
    ("{% for m in messages %}[{{ m['content'] }}]{% endfor %}", "chat template without an end: it writes an answer as"),
    ("{% for m in messages %}{{ '!' if loop.last }}{{ m['content'] }}<|im_end|>{% endfor %}", "writes turn 2"),
])
def test_chat_templates_that_cannot_be_used(tmp_path, chat_template, sentence):
    with pytest.raises(ValueError, match=sentence):
        templates.render("chat_template", TALK, chat_tokenizer(tmp_path, chat_template))


def test_a_tokenizer_without_chat_template(tiny_tokenizer):
    with pytest.raises(ValueError, match="no chat template: the tokenizer has none; use --version"):
        templates.render("chat_template", TALK, Tokenizer.from_folder(tiny_tokenizer))


# --------------------------------------------------------------------------------------------- which one, and its end


def test_which_template_a_model_speaks(tmp_path, tiny_tokenizer):
    """DESIGN.md rule 3, in its order."""
    plain, chat = Tokenizer.from_folder(tiny_tokenizer), chat_tokenizer(tmp_path)

    def resolve(tokenizer, model_type="llama", vocab_size=32000, **config):
        text = LlamaConfig(vocab_size, model_type=model_type)
        return templates.choose_conv_mode(LlavaConfig(text, **config), tokenizer)[0]

    assert resolve(chat, conv_mode="vicuna_v1") == "v1"
    with pytest.raises(ValueError, match="'v9' is not known here"):
        resolve(chat, conv_mode="v9")
    assert resolve(chat, mm_use_im_start_end=True) == "chat_template"
    assert resolve(plain, mm_use_im_start_end=True, model_type="mistral") == "v1"
    padded = Tokenizer.from_folder(tiny_tokenizer, [templates.PAD])
    assert resolve(padded, mm_use_im_start_end=True, model_type="mistral") == "llava_v0"
    assert templates.choose_conv_mode(LlavaConfig(), plain) == ("v1", "nothing says otherwise")
    assert resolve(plain, model_type="mistral", vocab_size=64000) == "mistral_instruct"
    assert resolve(plain, vocab_size=64000) == "chatml_direct"
    assert resolve(plain) == resolve(None) == "v1"


def test_loading_says_which_template_and_why(tiny_llama, tmp_path, capsys):
    load(tiny_llama("mha"))
    assert "template v1 (nothing says otherwise)" in capsys.readouterr().err
    load(tiny_llama("mha"), conv_mode="v1_mmtag")
    assert "template v1_mmtag (as asked for)" in capsys.readouterr().err
    folder = shutil.copytree(tiny_llama("mha"), tmp_path / "named")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"conv_mode": "v1_mmtag"}))
    load(folder)
    assert "template v1_mmtag (as config.json says)" in capsys.readouterr().err


def test_the_template_of_a_vision_processor_is_not_the_tokenizer_s_own(tmp_path):
    parts = ("{% for m in messages %}{{ m['role'] }}: {% for part in m['content'] "
             "| selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}{% endfor %}")
    assert templates.choose_conv_mode(LlavaConfig(), chat_tokenizer(tmp_path, parts))[0] == "v1"


def test_what_ends_an_answer(tmp_path, tiny_tokenizer):
    plain, chat = Tokenizer.from_folder(tiny_tokenizer), chat_tokenizer(tmp_path)
    assert templates.stop("v1", plain) == ({2}, [])
    assert templates.stop("chat_template", chat) == ({chat.token_to_id("<|im_end|>")}, [])
    assert templates.stop("v1", chat) == ({chat.eos_token_id}, ["</s>"])  # no token of its own: a string to watch for
    assert templates.stop("plain", plain) == ({2}, ["\n"])
    assert templates.stop("llava_v0", plain) == ({2}, ["###"])
    assert templates.stop("mistral_instruct", plain) == templates.stop("llama_2", plain) == ({2}, [])
    assert templates.stop("chatml_direct", plain) == ({2}, ["<|im_end|>"])
    assert templates.stop("mpt", chat) == ({chat.token_to_id("<|im_end|>")}, [])


# ------------------------------------------------------------------------------------------------- chat_template.jinja


SAID = [
    [("human", "<image>\nQ1"), ("gpt", "A1"), ("human", "Q2 'quoted' \"twice\"")],
    [("human", "Q {{ 1 }} <s>"), ("gpt", ""), ("human", "é 😀\n\n"), ("gpt", " a "), ("human", "last")],
    [("gpt", "dropped"), ("human", "<image>\nQ")],
]


@pytest.mark.parametrize("start_end", [False, True])
@pytest.mark.parametrize("name", templates.TEMPLATES)
def test_every_template_as_jinja(name, start_end):
    """chat_template.jinja in transformers' hands: the prompt that we ask with, from texts and from lists of parts."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    jinja = processor.chat_template(name, None, start_end)

    def applied(messages, parts):
        said = []
        for role, text in messages:
            count = text.count("<image>\n") * parts
            content = [{"type": "image"}] * count + [{"type": "text", "text": text[len("<image>\n") * count:]}]
            said.append({"role": {"human": "user", "gpt": "assistant"}[role], "content": content if parts else text})
        return utils.render_jinja_template([said], chat_template=jinja, add_generation_prompt=True)[0][0]

    for messages in [SAID[0][:1]] if name == "plain" else SAID:
        shown = [(role, templates.show_pictures(name, text, start_end)) for role, text in messages]
        if name == "plain":
            shown = messages
        prompt = templates.render(name, shown, open=True).prompt
        assert applied(messages, parts=False) == applied(messages, parts=True) == prompt
    with pytest.raises(Exception, match="knows no role system"):
        utils.render_jinja_template([[{"role": "system", "content": "s"}]], chat_template=jinja)


def test_a_finished_conversation_as_jinja():
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    said = [{"role": {"human": "user", "gpt": "assistant"}[role], "content": text} for role, text in TALK]
    for name, row in templates.TEMPLATES.items():
        if row.style not in ("single", "plain"):
            jinja = processor.chat_template(name, None)
            plain = [message | {"content": message["content"].replace("<image>\n", "")} for message in said]
            messages = [(role, text.replace("<image>\n", "")) for role, text in TALK]
            assert utils.render_jinja_template([plain], chat_template=jinja)[0][0] == (
                templates.render(name, messages).prompt), name
    caption = [{"role": "user", "content": "q <image>"}, {"role": "assistant", "content": "a cat"}]
    assert utils.render_jinja_template([caption], chat_template=processor.chat_template("plain", None))[0][0] == (
        "<image>a cat\n")
