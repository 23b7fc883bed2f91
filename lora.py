"""LoRA: learn a small correction to a large matrix, and leave the matrix alone (Hu et al. 2021).

Fine-tuning turns a weight W (out, in) into W + D. Section 4.1's observation is that D can be poor: of rank r, a few
directions, and the model still learns its task. So D is written as a product that cannot be richer,

    y = W x + s B A x        A (r, in), B (out, r), s = alpha / r

and W is frozen. For a square matrix of 4096 and r = 128 that is 1/16 of the numbers to train, and of the gradients and
the two moments that AdamW keeps of each. A begins random and B zero, so the first step starts from the model as it was.
alpha / r lets r change without a new learning rate; for large r, alpha / sqrt(r) keeps the correction's size better
(rank-stabilised, Kalajdzievski 2023; --use_rslora). Dropout, if any, falls on x on its way to A alone.

Eight numbers: A has four and B has four. W is 4 x 4, its correction can be anything of rank 1:

>>> import torch
>>> from torch import tensor
>>> W = torch.eye(4)
>>> A, B = tensor([[1.0, 0.0, 2.0, 0.0]]), tensor([[0.0], [3.0], [0.0], [1.0]])  # r = 1
>>> x, s = tensor([1.0, 1.0, 1.0, 1.0]), 0.5
>>> A @ x  # x is reduced to r numbers, here its first and twice its third
tensor([3.])
>>> W @ x + s * B @ (A @ x)  # what they say is added to rows 2 and 4 of what W says
tensor([1.0000, 5.5000, 1.0000, 2.5000])
>>> D = s * B @ A  # never made in training; added once and for all by `python weights.py merge`
>>> torch.equal((W + D) @ x, W @ x + s * B @ (A @ x)), int(torch.linalg.matrix_rank(D))
(True, 1)

Which matrices: as in LLaVA every linear of the language model but lm_head. Found is what a module is and where it
stands: CLIP's layers have a q_proj, too, which a search for names would adapt unasked (LLAVA.md 5.6).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from kernels.lora import lora_linear
from quant import QuantisedLinear

PARTS = ("language_model", "vision_tower", "mm_projector")
BIASES = ("none", "all", "lora_only")


@dataclass
class LoraConfig:
    """What an adapter is beside its numbers; names are PEFT's."""

    r: int = 64
    lora_alpha: float = 16
    lora_dropout: float = 0.05
    use_rslora: bool = False

    def __post_init__(self):
        if not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"--lora_r {self.r}: expected a rank, a whole number from 1 on")
        if not isinstance(self.lora_alpha, (int, float)) or not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"--lora_alpha {self.lora_alpha}: expected a number above 0")
        if not isinstance(self.lora_dropout, (int, float)) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout {self.lora_dropout}: expected a chance from 0 on and below 1")

    @property
    def scale(self):
        """s."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class LoraLinear(nn.Module):
    """A frozen linear and its adapter. lora_A (r, in), lora_B (out, r); all else is the linear's, under its names.

    The two modules share one dict of parameters: `q_proj.weight` stays `q_proj.weight` for checkpoints, for FSDP, which
    puts the gathered weight there, and for the linear itself. With lora_A None the layer is the linear that it was.
    """

    def __init__(self, linear):
        super().__init__()
        self._parameters, self._buffers = linear._parameters, linear._buffers
        self.__dict__["linear"] = linear  # not as a child, whose parameters would have other names
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.lora_A = self.lora_B = None

    def set(self, A, B):
        """Put an adapter's numbers in, where the weight is."""
        self.lora_A, self.lora_B = (nn.Parameter(matrix.to(next(self.linear.parameters()).device)) for matrix in (A, B))

    def dense(self):
        """W (out, in), decoded if it is quantised."""
        return self.linear.weight

    def forward(self, x):
        if self.lora_A is None:
            return self.linear(x)
        if not torch.is_grad_enabled():  # few rows are multiplied with codes as they are
            y, h = self.linear(x), F.linear(x.reshape(-1, self.in_features), self.lora_A)  # (T, r)
            y.view(-1, self.out_features).addmm_(h, self.lora_B.t(), alpha=self.scale)
            return y
        dropout = self.dropout if self.training else 0.0
        seed = int(torch.randint(2**62, ())) if dropout else 0  # of the CPU's generator, which checkpoints keep
        return lora_linear(x, self.dense, self.bias, self.lora_A, self.lora_B, self.scale, dropout, seed)


LINEARS = (nn.Linear, QuantisedLinear, LoraLinear)


def targets(model, target):
    """The linears that `--lora_target` means -> {name: module}, adapted ones included, in the model's order.

    target: comma-separated words. `language_model` (LLaVA's choice), `vision_tower`, `mm_projector` are all of a part,
    `all-linear` of the three. Other words are a module's name or whole pieces of it (`q_proj`, `layers.0`), looked for
    in the language model, or in another part if they begin with its name. ValueError: a word that names nothing.
    lm_head is never adapted: the loss reads its weight, not its output.
    """
    linears = {name: module for name, module in model.named_modules()
               if isinstance(module, LINEARS) and name.split(".")[0] in PARTS and not name.endswith("lm_head")}
    found, words = set(), target.replace("all-linear", ",".join(PARTS)).replace(" ", "").split(",")
    if not any(words):
        raise ValueError(f"--lora_target {target!r} is empty; name what to adapt, like language_model or q_proj,v_proj")
    for word in filter(None, words):
        part, _, piece = word.partition(".") if word.split(".")[0] in PARTS else (PARTS[0], ".", word)
        own = {name for name in linears if name.split(".")[0] == part and (not piece or f".{piece}." in f"{name}.")}
        if not own:
            leaves = sorted({name.split(".")[-1] for name in linears if name.startswith(part)})
            raise ValueError(f"--lora_target {word!r} names nothing that can be adapted; the linears of the model's "
                             f"{part} are {', '.join(leaves) or 'none'}")
        found |= own
    return {name: module for name, module in linears.items() if name in found}


def inject(model, target, lora, seed):
    """Adapt what `--lora_target` says, beginning at no correction: A as PEFT draws it (Kaiming's uniform, a = sqrt 5),
    B zero. Seeded before it draws, which is why two runs are alike. -> {our name: number} of both, for a model that has
    no memory yet to put them in"""
    generator, drawn = torch.Generator().manual_seed(seed), {}
    for name, linear in targets(model, target).items():
        A = torch.empty(lora.r, linear.in_features).uniform_(-1, 1, generator=generator) * linear.in_features**-0.5
        drawn |= {f"{name}.lora_A": A, f"{name}.lora_B": torch.zeros(linear.out_features, lora.r)}
        adapt(model, name, lora).set(A, drawn[f"{name}.lora_B"])
    return drawn


def adapt(model, name, lora):
    """The LoraLinear of this name, which takes the linear's place if it has not yet."""
    linear = model.get_submodule(name)
    if not isinstance(linear, LoraLinear):
        parent, _, leaf = name.rpartition(".")
        linear = LoraLinear(linear)
        setattr(model.get_submodule(parent), leaf, linear)
    linear.scale, linear.dropout = lora.scale, lora.lora_dropout
    return linear


def put(model, modules, lora, dtype):
    """Make the model wear an adapter, and no other.

    modules: {name: {"lora_A": LazyTensor (r, in), "lora_B": LazyTensor (out, r)}}; dtype: what they are cast to.
    ValueError: a module that the model lacks or that has other widths, a rank that is not lora.r.
    """
    for module in adapted(model).values():
        module.lora_A = module.lora_B = None
    linears = {name: module for name, module in model.named_modules() if isinstance(module, LINEARS)}
    for name, pair in modules.items():
        found, linear = [tuple(pair[key].shape) for key in ("lora_A", "lora_B")], linears.get(name)
        wanted = linear and [(lora.r, linear.in_features), (linear.out_features, lora.r)]
        if found != wanted:
            raise ValueError(f"the adapter of {name} has lora_A and lora_B of {found[0]} and {found[1]}, "
                             + (f"rank {lora.r} on this model has {wanted[0]} and {wanted[1]}" if wanted else
                                "and no linear of this model has that name") + "; give the base and config it is for")
        adapt(model, name, lora).set(*(pair[key].read().to(dtype) for key in ("lora_A", "lora_B")))


def adapted(model):
    """{name: LoraLinear} of a model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def trained(model, bias):
    """The parameters that an adapter trains: A and B; with bias `lora_only` the biases of the adapted linears, with
    `all` all of the parts that hold one."""
    layers = adapted(model)
    places = {"none": (), "lora_only": layers.keys(), "all": {name.split(".")[0] for name in layers}}[bias]
    return [p for name, p in model.named_parameters() if ".lora_" in name or name.endswith(".bias") and
            {name.removesuffix(".bias"), name.split(".")[0]} & set(places)]
