"""Templates: the original's strings, learned stretches by message, and the tokenizer's own Jinja."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from formats import templates
from model import LlamaConfig, LlavaConfig
from tokenizer import Tokenizer

CHATML = ("{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nBe kind."
          "<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TALK = [("human", "<image>\nQ1"), ("gpt", "A1"), ("human", "Q2"), ("gpt", "A2")]
SYSTEM = templates.S_USER


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
    assert first == templates.render("v1", TALK)
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
        return templates.resolve_conv_mode(LlavaConfig(text, **config), tokenizer)

    assert resolve(chat, conv_mode="vicuna_v1") == "v1"
    assert resolve(chat, mm_use_im_start_end=True) == "chat_template"
    assert resolve(plain, mm_use_im_start_end=True, model_type="mistral") == "v1"
    assert resolve(plain, model_type="mistral", vocab_size=64000) == "mistral_instruct"
    assert resolve(plain, vocab_size=64000) == "chatml_direct"
    assert resolve(plain) == resolve(None) == "v1"


def test_the_template_of_a_vision_processor_is_not_the_tokenizer_s_own(tmp_path):
    parts = ("{% for m in messages %}{{ m['role'] }}: {% for part in m['content'] "
             "| selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}{% endfor %}")
    assert templates.resolve_conv_mode(LlavaConfig(), chat_tokenizer(tmp_path, parts)) == "v1"


def test_what_ends_an_answer(tmp_path, tiny_tokenizer):
    plain, chat = Tokenizer.from_folder(tiny_tokenizer), chat_tokenizer(tmp_path)
    assert templates.stop("v1", plain) == ({2}, [])
    assert templates.stop("chat_template", chat) == ({chat.token_to_id("<|im_end|>")}, [])
    assert templates.stop("v1", chat) == ({chat.eos_token_id}, ["</s>"])  # no token of its own: a string to watch for
    assert templates.stop("plain", plain) == ({2}, ["\n"])
