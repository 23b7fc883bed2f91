"""GGUF, llama.cpp's file format, read into Hugging Face's names: one LLaMA with all its numbers and its tokenizer.

Three things differ from a Hugging Face folder. The weights may be quantised in small blocks; the package `gguf`
(imported only here) turns them back into float32. The rows of q_proj and k_proj stand in another order: llama.cpp
rotates neighbouring pairs (2i, 2i+1) of a head, Hugging Face the halves (i, i + K/2). And everything that is not a
tensor, config and tokenizer included, is one flat list of keys and values. (H heads, K head dim, D model dim.)
"""

import json

import tokenizers
import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

from formats.files import LazyTensor

NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}

CONFIG = {  # config.json's key -> GGUF's
    "vocab_size": "llama.vocab_size", "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length", "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count", "num_key_value_heads": "llama.attention.head_count_kv",
    "max_position_embeddings": "llama.context_length", "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "rope_theta": "llama.rope.freq_base",
}
SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}  # tokens: config.json's word -> GGUF's

SPLITS = {"smollm": [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]}  # GGUF's pre-tokenizers
CONTROL, USER_DEFINED = 3, 4  # token types


def open_gguf(path):
    """A LLaMA's GGUF file -> (gguf's reader, {key: value}). ValueError: no package gguf, a broken file, no LLaMA."""
    try:
        import gguf
        file = gguf.GGUFReader(path)
    except ImportError:
        raise ValueError(f"reading {path} needs the package gguf; pip install gguf") from None
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; expected a .gguf file") from None
    except Exception as error:  # numpy's complaints about missing bytes
        raise ValueError(f"{path} cannot be read, it is truncated or no GGUF file ({error})") from None
    values = {key: value.contents() for key, value in file.fields.items()}
    if values.get("general.architecture") != "llama":
        raise ValueError(f"{path} holds a {values.get('general.architecture')!r} model; expected 'llama'")
    return file, values


def read(path):
    """A LLaMA's GGUF -> ({Hugging Face name: LazyTensor, float32}, {file: its JSON}). ValueError: not known here."""
    file, values = open_gguf(path)
    tensors = dict(named(tensor, values, path) for tensor in file.tensors)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32",
              **{ours: values[theirs] for ours, theirs in CONFIG.items() if theirs in values},
              "tie_word_embeddings": "lm_head.weight" not in tensors}
    config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")  # kept as float32: 1e-5 reads 9.999999747e-06
    ids = {word: values[key] for word, name in SPECIAL.items() if (key := f"tokenizer.ggml.{name}_token_id") in values}
    generation = {f"{word}_token_id": ids[word] for word in ("bos", "eos", "pad") if word in ids}
    return tensors, {"config.json": config | generation, "generation_config.json": generation,
                     **tokenizer_files(values, ids, path)}


def named(tensor, values, path):
    """gguf's entry of a tensor, 'blk.3.attn_q.weight' -> ('model.layers.3.self_attn.q_proj.weight', LazyTensor)."""
    *block, kind, leaf = tensor.name.split(".")
    if kind not in NAMES or leaf != "weight":
        raise ValueError(f"{path}: tensor {tensor.name!r} is not one of a LLaMA")
    heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}.get(kind)

    def dequantised():
        import gguf
        weight = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))  # float32, as (out, in)
        return halves(weight, values[heads]) if heads else weight
    name = f"model.layers.{block[1]}.{NAMES[kind]}.weight" if block else f"{NAMES[kind]}.weight"
    shape = torch.Size(int(size) for size in reversed(tensor.shape))  # GGUF counts dimensions from the last
    return name, LazyTensor(shape, torch.float32, path, dequantised)


def halves(weight, heads):
    """Rows of q or k (H*K, D) from llama.cpp's order, pairs side by side, to Hugging Face's, first and second half."""
    pairs = weight.unflatten(0, (heads, -1, 2))  # (H, K/2, 2, D)
    return pairs.transpose(1, 2).flatten(0, 2).contiguous()  # (H, 2, K/2, D) -> (H*K, D)


def tokenizer_files(values, ids, path):
    """tokenizer.json and tokenizer_config.json from GGUF's lists of pieces and merges; ids: {"bos": 1, …}."""
    kind, split = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in SPLITS:
        raise ValueError(f"{path}: a tokenizer of kind {kind!r} that splits like {split!r} is not known here; "
                         f"known is 'gpt2' with {', '.join(SPLITS)}")
    pieces, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    library = tokenizers.Tokenizer(tokenizers.models.BPE(
        {piece: i for i, piece in enumerate(pieces)},
        [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]))
    library.pre_tokenizer, library.decoder = Sequence(SPLITS[split]), tokenizers.decoders.ByteLevel()
    library.add_tokens([tokenizers.AddedToken(piece, special=kind == CONTROL, normalized=False)
                        for piece, kind in zip(pieces, types) if kind in (CONTROL, USER_DEFINED)])
    config = {
        # Not GPT2Tokenizer: transformers 5 would put its own pre-tokenizer in place of the one that splits digits.
        "tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False, "clean_up_tokenization_spaces": False,
        "model_max_length": values["llama.context_length"], "chat_template": values.get("tokenizer.chat_template"),
        **{f"{word}_token": pieces[i] for word, i in ids.items()},
    }
    return {"tokenizer.json": json.loads(library.to_str()), "tokenizer_config.json": config}
