"""Loading a sharded checkpoint: seconds until every weight has been read once, and the memory that it takes at most.

A LLaMA of 0.94 B parameters, random numbers in shards of 500 MB in a temporary folder: 3.8 GB in float32. Each load
runs in a process of its own on one core, ours and transformers' `from_pretrained` in turn, imports done before the
clock starts, the files in the page cache. The best of seven: what other programs do can only add to it.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from formats import files
from model import Llama, LlamaConfig

PEER = "transformers"
LARGE = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 16, "num_attention_heads": 16,
         "vocab_size": 32000}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "vocab_size": 512}


def load(smoke):
    """Seconds, a float32 file as bfloat16."""
    return race("float32", "bfloat16", smoke, "seconds", "s")


def load_same_dtype(smoke):
    """Seconds, a bfloat16 file as bfloat16."""
    return race("bfloat16", "bfloat16", smoke, "seconds", "s")


def load_peak(smoke):
    """Peak memory above the imports, a float32 file as bfloat16: 1.88 GB of parameters."""
    return race("float32", "bfloat16", smoke, "peak", "GB", rounds=1)


def load_peak_same_dtype(smoke):
    """The same for a bfloat16 file, whose mapped pages count as soon as they are read."""
    return race("bfloat16", "bfloat16", smoke, "peak", "GB", rounds=1)


def race(stored, wanted, smoke, measure, unit, rounds=7):
    """Load the same folder with both, in turn. -> a row"""
    results = {"ours": [], PEER: []}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder, "model"), SMALL if smoke else LARGE, getattr(torch, stored))
        for _ in range(1 if smoke else rounds):
            for who in results:
                results[who].append(child("loading", who, Path(folder, "model"), wanted))
    if len({result["checksum"] for result in results["ours"] + results[PEER]}) > 1:
        raise ValueError("ours and transformers did not load the same numbers")
    ours, peer = (min(result[measure] for result in results[who]) for who in results)
    return {"ours": ours, "peer": peer, "peer_name": PEER, "unit": unit, "error": 0.0}


def make(folder, config, dtype):
    """Write a LLaMA of random numbers in shards. Tensors of one shape hold the same ones, which no loader notices."""
    with torch.device("meta"):
        names = Llama(LlamaConfig(**config, num_key_value_heads=config["num_attention_heads"])).state_dict()
    numbers = {shape: torch.randn(shape).to(dtype) for shape in {tensor.shape for tensor in names.values()}}
    with files.new_folder(folder) as temporary:
        files.write_tensors(temporary, {name: numbers[tensor.shape] for name, tensor in names.items()}, int(5e8))
        files.write_files(temporary, {"config.json": config | {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5,
            "torch_dtype": str(dtype).removeprefix("torch."), "bos_token_id": 1, "eos_token_id": 2}})


def child(bench, who, *words):
    """Run a file of benches/ in a new process, whose last line is JSON: what its `measured` says."""
    words = [sys.executable, "-m", f"benches.{bench}", who, *words]
    ended = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if ended.returncode:
        raise ValueError(f"{who} did not load: {ended.stderr.strip().splitlines()[-1]}")
    return json.loads(ended.stdout.splitlines()[-1])


def measured(who, folder, dtype):
    """What the child does. -> {"seconds", "peak" (GB), "checksum"}"""
    if who == "ours":
        import weights
        run = weights.load
    else:
        import transformers
        run = transformers.LlamaForCausalLM.from_pretrained  # looked up before the clock starts: it is an import
    before, began = reset_peak(), time.perf_counter()
    model = run(folder, dtype=getattr(torch, dtype))
    model = model.model if who == "ours" else model
    checksum = sum(int(p.detach().reshape(-1).view(torch.int64).sum()) for p in model.parameters())  # reads them all
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak": (memory("VmHWM") - before) / 1e9, "checksum": checksum % 2**64}


def reset_peak():
    """Let the peak count from here (Linux). -> the bytes in memory now"""
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
        file.write("5")
    return memory("VmRSS")


def memory(key):
    """VmRSS (now) or VmHWM (at most) of this process in bytes, mapped file pages included (Linux)."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(text.split()[1]) for text in file if text.startswith(key)) * 1024


if __name__ == "__main__":
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # both use threads of their own; one core is fair and calm
    torch.set_num_threads(1)
    print(json.dumps(measured(*sys.argv[1:])))
