"""Named bundles of settings, kept in this one place. What is given besides goes over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # Attention only, as in the LoRA paper: the smallest adapter.
    "small": {"rank": 8, "alpha": 16.0, "target_modules": ("q_proj", "v_proj"), "lr": 2e-4},
    # Every linear layer with rsLoRA, which keeps larger ranks stable; LoRA+ on B.
    "strong": {"rank": 32, "alpha": 32.0, "rslora": True, "lr": 1e-4, "loraplus_ratio": 4.0},
    # DoRA with dropout: for few examples.
    "dora": {"rank": 8, "alpha": 16.0, "dora": True, "dropout": 0.05, "lr": 1e-4},
    # The least memory: half-precision base, one example at a time, activations computed twice.
    "lean": {
        "base_format": "bf16",
        "batch_size": 1,
        "accumulate": 8,
        "gradient_checkpointing": True,
        "group_by_length": True,
    },
    # Short examples, many of them: full rows.
    "packed": {"packing": True, "batch_size": 2, "accumulate": 2},
}
"""Name -> settings."""
