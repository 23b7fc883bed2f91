"""The projector: the small network that turns picture features into vectors the language model can read.

It is all that stage 1 trains. LLaVA 1.0 used one linear map, LLaVA 1.5 two with a GELU between them. Parameters carry
the names of the original's `mm_projector` (weight, bias; or 0.weight, 0.bias, 2.weight, …), so files fit as they are.
"""

import re

from torch import nn


def build_projector(kind, mm_hidden_size, hidden_size):
    """The module for `mm_projector_type`: (…, mm_hidden_size) -> (…, hidden_size).

    `linear`, `mlpNx_gelu` (N linear layers, the exact erf GELU between them) or `identity` (no parameters).
    """
    if kind == "identity":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(mm_hidden_size, hidden_size)
    match = re.fullmatch(r"mlp(\d+)x_gelu", kind or "")
    if not match or int(match[1]) < 1:
        raise ValueError(f"mm_projector_type {kind!r} is not known; use linear, mlpNx_gelu (mlp2x_gelu …) or identity")
    layers = [nn.Linear(mm_hidden_size, hidden_size)]
    for _ in range(int(match[1]) - 1):
        layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
    return nn.Sequential(*layers)
