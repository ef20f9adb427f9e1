"""FSDP: each process keeps a share of every weight, of the frozen base too.

Accelerate's launcher asks for it through environment variables; the Trainer and accelerate do it.
Knows torch.distributed and accelerate; knows nothing of data or of files.
"""

from __future__ import annotations

import os
from typing import Any

from lora_edge.errors import AdapterError
from lora_edge.training.settings import CONVERTED_INITS, Settings

_PLAIN = (
    "Launch with plain data parallelism; --base-format bf16, --gradient-checkpointing and "
    "--accumulate save memory."
)


def sharded() -> bool:
    """Whether the launcher asked for FSDP."""
    return _on("ACCELERATE_USE_FSDP")


def check_launch(settings: Settings) -> None:
    """Refuse a launch that would not do what was asked for, or cannot save an adapter.

    Raises:
        AdapterError: several processes of which one was started; DeepSpeed; FSDP's first version;
            FSDP of a 4-bit base, or with an ``init`` whose factors are converted at the end.
    """
    if _on("ACCELERATE_USE_DEEPSPEED"):
        raise AdapterError(
            "DeepSpeed is on: it shards the adapter too, and how it is then saved was not tried",
            f"FSDP shards too: accelerate launch --use_fsdp --fsdp_version 2. {_PLAIN}",
        )
    for_many = {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if "WORLD_SIZE" not in os.environ and for_many and _on("ACCELERATE_USE_CPU"):
        # Which accelerate's simple launcher sets for more than one process, and starts one.
        raise AdapterError(
            "accelerate launch was asked for several processes on the CPU, and leaves it to mpirun "
            "to start them: this one would train alone",
            "Launch with --multi_gpu in place of --cpu, and give --device cpu; or use torchrun.",
        )
    if not sharded():
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise AdapterError(
            f"FSDP is on in version {version}, which flattens a layer's frozen and trained weights "
            "into one",
            "Launch with --fsdp_version 2.",
        )
    if settings.base_format == "4bit":
        raise AdapterError("FSDP is on with base_format 4bit, which was not tried", _PLAIN)
    if settings.init in CONVERTED_INITS:
        raise AdapterError(
            f"FSDP is on with init {settings.init}, whose factors are converted at the end on the "
            "whole model",
            "Use another --init. " + _PLAIN,
        )


def check_whole(settings: Settings, *, classifies: bool) -> None:
    """Refuse to shard a module that PEFT trains as a copy of its own.

    Tried with accelerate 1.15: its preparation failed on a tied ``lm_head`` and on a classifier.

    Raises:
        AdapterError: a classifier, or modules to save, with FSDP.
    """
    if sharded() and (classifies or settings.modules_to_save):
        what = "a classifier's head" if classifies else ", ".join(settings.modules_to_save)
        raise AdapterError(
            f"FSDP is on, and {what} is trained as a copy of the whole module, on which "
            "accelerate's preparation failed when it was tried",
            _PLAIN,
        )


def shard_on_cpu(trainer: Any) -> None:
    """Make a Trainer on the CPU shard as on CUDA; called when its accelerator has been made.

    Accelerate passes over FSDP where there is no accelerator (``accelerate/state.py`` lists the
    kinds of devices): every process would silently keep the whole model.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = trainer.accelerator.state
    if not sharded() or state.distributed_type != DistributedType.MULTI_CPU:
        return
    plugin = FullyShardedDataParallelPlugin()
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    state.fsdp_plugin = plugin
    state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    trainer.is_fsdp_enabled = True


def whole_weights(model: Any) -> dict[str, Any] | None:
    """What is trained of a sharded model, whole and on the CPU; ``None`` where nothing is sharded.

    All processes must call it; only the first gets the weights.
    """
    if not sharded():
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    return weights


def _on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true")
