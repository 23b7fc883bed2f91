"""Which kernels run: Triton's on NVIDIA GPUs from sm_80 (A100) on, the plain PyTorch references everywhere else.

Every file of this folder holds both, and one public function that asks `use_triton`. The environment decides otherwise;
it is read once, when the program starts:

    PUMICE_KERNELS=auto                  as above (the default)
    PUMICE_KERNELS=reference             never Triton's: to compare numbers, or where a kernel misbehaves
    PUMICE_KERNELS=triton                always Triton's; what they cannot take is an error, no silent fallback
    PUMICE_KERNELS=attention=reference   for one kernel only; rules are joined with commas, later ones win
    PUMICE_KERNELS=nf4=planar            as nf4=triton, and its codes are laid in planes where rows are multiples of 128
                                         weights: fewer instructions, but not timed on any GPU yet, so not the default
    TRITON_INTERPRET=1                   with the above: run them on a CPU in Triton's interpreter, to test and to learn

Triton is not imported where no kernel of it can run. `jit` then makes nothing of a kernel, and `tl` holds no more than
what a kernel's signature mentions.
"""

import importlib.util
import os
from functools import cache
from types import SimpleNamespace

import torch

KERNELS = ("attention", "cross_entropy", "elementwise", "lora", "nf4")
WORDS = ("auto", "triton", "reference")
MORE_WORDS = {"nf4": ("planar",)}
CAPABILITY = (8, 0)  # bfloat16 products and asynchronous copies begin here
ASKED = os.environ.get("PUMICE_KERNELS", "")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if importlib.util.find_spec("triton") and (torch.version.cuda or INTERPRETED or "triton" in ASKED):
    import triton
    import triton.language as tl

    jit = triton.jit
else:
    triton, tl = None, SimpleNamespace(constexpr=None)

    def jit(kernel):
        """No Triton, no kernel."""


@cache
def rules(text=ASKED):
    """`reference,attention=triton` -> {kernel: word} for all KERNELS. ValueError for what is no such rule."""
    found = dict.fromkeys(KERNELS, "auto")
    for rule in filter(None, text.replace(" ", "").split(",")):
        name, _, word = rule.rpartition("=")
        if word not in (*WORDS, *MORE_WORDS.get(name, ())) or name and name not in KERNELS:
            raise ValueError(f"PUMICE_KERNELS={text}: expected {', '.join(WORDS)}, or KERNEL=one of them, with KERNEL "
                             f"{' or '.join(KERNELS)}; or nf4=planar")
        found.update(dict.fromkeys([name] if name else KERNELS, word))
    return found


def use_triton(kernel, x, obstacle=None, slow=False):
    """Whether `kernel` computes with Triton on the device of x. obstacle: why it cannot take these inputs, or None.
    slow: it can, but the reference is faster. Either means the reference, unless Triton was asked for: then what is
    slow is computed, and an obstacle is a ValueError."""
    word = rules()[kernel]
    if word in ("auto", "reference"):
        return word == "auto" and not obstacle and not slow and device_has_triton(x.device)
    if triton is None:
        raise ValueError(f"PUMICE_KERNELS asks for Triton's {kernel}, but Triton is not installed: pip install triton")
    if not (x.is_cuda or INTERPRETED):
        raise ValueError(f"PUMICE_KERNELS asks for Triton's {kernel}, but its tensors are on {x.device}: on a CPU, set "
                         "TRITON_INTERPRET=1 too, which is slow")
    if obstacle:
        raise ValueError(f"PUMICE_KERNELS asks for Triton's {kernel}, which cannot compute this: {obstacle}")
    return True


@cache
def device_has_triton(device):
    """Whether Triton's kernels are the default there."""
    return (triton is not None and device.type == "cuda" and torch.version.cuda is not None
            and torch.cuda.get_device_capability(device) >= CAPABILITY)


def describe(device):
    """What is used on a device, in one line."""
    device = torch.device(device)
    here = device_has_triton(device)
    words = {name: ("triton" if here else "reference") if word == "auto" else word for name, word in rules().items()}
    names = {"triton": [name + " in planes" * (words[name] == "planar") for name in KERNELS
                        if words[name] != "reference"], "reference": [n for n in KERNELS if words[n] == "reference"]}
    parts = [f"Triton {triton.__version__ if triton else '(not installed)'} for {', '.join(names['triton'])}"
             + " in its interpreter" * (INTERPRETED and device.type != "cuda")] if names["triton"] else []
    parts += [f"PyTorch for {', '.join(names['reference'])}"] if names["reference"] else []
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"kernels on {where}: {'; '.join(parts)}"
