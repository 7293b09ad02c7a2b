"""What this machine's processor can do that matters to networks in few bits."""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def instructions() -> frozenset[str]:
    """Of "vnni" (sums of products of bytes) and "bf16" (AVX512-BF16 or AMX), those that this processor has."""
    cpu: Any = torch.cpu
    found = {
        "vnni": ("_is_vnni_supported",),
        "bf16": ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
    }
    return frozenset(name for name, asked in found.items() if any(getattr(cpu, f, lambda: False)() for f in asked))
