"""Adapters and quantised weights beside PEFT's and bitsandbytes': a step, decoding a matrix, loading.

`nf4_dequantise`: milliseconds to decode a doubly quantised matrix on one thread, ours into its workspace, theirs by the
C++ of `dequantize_4bit`, in turn; the least of many, other programs can only add to it. `error`: they must be equal bit
for bit. The matrices are one of SmolLM2-135M (1536 x 576) and one of a 7B LLaMA (4096 x 4096).

`nf4_load_peak`: a LLaMA of 0.54 B parameters, 1.07 GB in bfloat16, becomes NF4 while it is loaded, in a process of its
own: the most memory above the imports, mapped file pages included. What stays is 0.47 GB: 405 M weights in 4.127 bits,
the embeddings and the head in bfloat16. Theirs is transformers' `from_pretrained` with a BitsAndBytesConfig.

`lora_step`, `qlora_step`: a step of LoRA with rank 16 upon SmolLM2-135M's shape in bfloat16, or upon its NF4 codes, on
the batches of benches/training.py: CPU seconds of one thread. `lora_step_bytes`: what stands above the frozen weights,
that is adapters, gradients, AdamW's moments and the most that a step allocates; `qlora_step_bytes`: the weights, too.
"""

import gc
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

import quant
import train
from benches import loading, training
from kernels import nf4
from model import Llava, LlavaConfig
from training import flags
from vision import ClipVisionConfig

PEER = "bitsandbytes"
LAYERS = loading.LARGE | {"num_hidden_layers": 8}


def dequantise(smoke):
    """A small matrix, to float32, a CPU's dtype."""
    return decode((64, 128) if smoke else (1536, 576), torch.float32, smoke)


def dequantise_bf16(smoke):
    """The same to bfloat16."""
    return decode((64, 128) if smoke else (1536, 576), torch.bfloat16, smoke)


def dequantise_7b(smoke):
    """A large matrix, to bfloat16."""
    return decode((64, 128) if smoke else (4096, 4096), torch.bfloat16, smoke)


def decode(shape, dtype, smoke):
    """Both on the same codes, in turn. -> a row"""
    from bitsandbytes import functional
    torch.set_num_threads(1)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    parts, room = nf4.encode(weight, "nf4"), torch.empty(shape, dtype=dtype)
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ways = (lambda: nf4.decode("nf4", *parts, room), lambda: functional.dequantize_4bit(codes, state))
    error, spent = (ways[0]().float() - ways[1]().float()).abs().max().item(), ([], [])
    for _ in range(3 if smoke else 100):
        for way, seconds in zip(ways, spent):
            began = time.perf_counter()
            way()
            seconds.append(time.perf_counter() - began)
    ours, peer = (1000 * min(seconds) for seconds in spent)
    return {"ours": ours, "peer": peer, "peer_name": PEER, "unit": "ms", "error": error}


def load_peak(smoke):
    """GB at most while 1.07 GB become NF4. error: of the first matrix."""
    with tempfile.TemporaryDirectory() as folder:
        loading.make(Path(folder, "model"), loading.SMALL if smoke else LAYERS, torch.bfloat16)
        ours, theirs = (loading.child("quantising", who, Path(folder, "model")) for who in ("ours", PEER))
    if ours["checksum"] != theirs["checksum"]:
        raise ValueError("ours and bitsandbytes did not make the same codes")
    return {"ours": ours["peak"], "peer": theirs["peak"], "peer_name": PEER, "unit": "GB", "error": 0.0}


def measured(who, folder):
    """What the child does. -> {"peak" (GB), "kept" (GB), "checksum"}"""
    if who == "ours":
        import weights
        before = loading.reset_peak()
        model = weights.load(folder, dtype=torch.bfloat16, bits=4).model.language_model
        codes = [layer.mlp.up_proj.codes for layer in model.model.layers]
    else:
        import bitsandbytes  # noqa: F401
        import transformers
        run, before = transformers.LlamaForCausalLM.from_pretrained, loading.reset_peak()
        config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                                 bnb_4bit_use_double_quant=True)
        model = run(folder, dtype=torch.bfloat16, quantization_config=config)
        codes = [layer.mlp.up_proj.weight for layer in model.model.layers]
    kept = sum(p.numel() * p.itemsize for p in model.parameters())
    for p in model.parameters():
        p.view(torch.uint8).max()  # reads what is still in the file
    peak = loading.memory("VmHWM") - before
    return {"peak": peak / 1e9, "kept": kept / 1e9, "checksum": sum(int(part.long().sum()) for part in codes)}


# --------------------------------------------------------------------------------------------------------------- QLoRA


def lora_step(smoke):
    """CPU seconds."""
    return race(16, smoke)


def lora_step_bytes(smoke):
    """MB above the frozen weights."""
    return race(16, smoke, peak=True)


def qlora_step(smoke):
    """CPU seconds."""
    return race(4, smoke)


def qlora_step_bytes(smoke):
    """MB, weights and codes included."""
    return race(4, smoke, peak=True)


def race(bits, smoke, peak=False):
    """Both sides on the same weights and batches, in turn. -> a row"""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    small = replace(training.SMALL, intermediate_size=128)  # widths of which bitsandbytes decodes rightly on a CPU
    config = LlavaConfig(small if smoke else training.TEXT,
                         training.SMALL_TOWER if smoke else ClipVisionConfig(), "mlp2x_gelu")
    batches, model = [training.drawn("finetune", config, seed) for seed in range(1 if smoke else 3)], Llava(config)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.02)
    sides = theirs(model, bits), ours(model, bits)
    losses = [[side.loss(batch).item() for side, _ in sides] for batch in batches]
    for side, _ in sides:
        training.step(side, batches[0])  # makes the moments
    if peak:
        trained = [sum(p.numel() for p in side.trained) for side, _ in sides]
        peer, mine = (((held() if bits < 16 else 4 * count) + 12 * count + max(
            training.allocated(side, batch) for batch in batches)) / 1e6 for count, (side, held) in zip(trained, sides))
    else:
        rounds = [[[training.seconds(side, batch) for side, _ in sides] for batch in batches]
                  for _ in range(1 if smoke else 3)]
        means = [[statistics.mean(spent) for spent in zip(*pairs)] for pairs in rounds]
        peer, mine = map(statistics.median, zip(*means))
    del sides, model
    gc.collect()  # what is sharded must be gone before the group is
    dist.destroy_process_group()
    name = f"peft+{PEER}" if bits < 16 else "peft"
    return {"ours": mine, "peer": peer, "peer_name": name, "unit": "MB" if peak else "s",
            "error": max(abs(one - other) for one, other in losses)}


def ours(model, bits):
    """What train.py does with --lora_enable on one process. -> (Side, () -> bytes held from step to step)"""
    how = quant.Quantisation(bits)
    for name, module in list(model.named_modules()):
        if how.wants(name, module):
            model.set_submodule(name, how.linear(module.weight.detach().bfloat16(), torch.bfloat16))
    args = flags.parse(f"--stage finetune --bf16 --use_cpu --bits {bits} --lora_enable --lora_r 16 --lora_alpha 32 "
                       "--lora_dropout 0 --model_name_or_path drawn --data_path drawn --output_dir none".split())
    for p in train.choose_trained(model, args).parameters():
        if p.is_floating_point() and not p.requires_grad:
            p.data = p.data.bfloat16()
    train.shard(model, train.start_distributed(args)[1], args)
    side = training.Side(model.loss, [p for p in model.parameters() if p.requires_grad],
                         train.build_optimizer(model, args))
    return side, lambda: sum(p.numel() * p.itemsize for p in [*model.parameters(), *quant.WORKSPACE.values()])


def theirs(ours, bits):
    """transformers' model, with 4 bits bitsandbytes' Linear4bit, PEFT's adapters in float32, autocast. -> the same"""
    import bitsandbytes
    import peft
    model, image_token = training.peer(ours)
    model = model.bfloat16().requires_grad_(False)
    layers, kept = model.model.language_model.layers, []
    for name, module in list(layers.named_modules()):
        if isinstance(module, torch.nn.Linear) and bits == 4:
            quantised = bitsandbytes.nn.Linear4bit(module.in_features, module.out_features, bias=False,
                                                   compute_dtype=torch.bfloat16, quant_type="nf4")
            quantised.weight = bitsandbytes.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True).to("cpu")
            layers.set_submodule(name, quantised)
            state = quantised.weight.quant_state
            kept += [state.absmax, state.state2.absmax]
    leaves = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    model = peft.get_peft_model(model, peft.LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, target_modules=rf".*language_model.*\.({leaves})"))
    model.base_model.model.model.multi_modal_projector.requires_grad_(True).float()

    def loss(batch):
        inputs = training.padded(batch, image_token)
        with torch.autocast("cpu", torch.bfloat16):
            return model(**inputs | {"pixel_values": inputs["pixel_values"].bfloat16()}).loss

    trained = [p for p in model.parameters() if p.requires_grad]
    side = training.Side(loss, trained, torch.optim.AdamW(trained, 1e-3, fused=True))
    return side, lambda: sum(tensor.numel() * tensor.itemsize for tensor in [*model.parameters(), *kept])


if __name__ == "__main__":
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # one core, as in the other rows
    torch.set_num_threads(1)
    print(json.dumps(measured(*sys.argv[1:])))
