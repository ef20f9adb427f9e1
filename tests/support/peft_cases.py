"""The LoRA configurations of PEFT 0.21.2's ``tests/test_custom_models.py``, on our own modules.

Run as a program, it prints how many of them are exact and how many are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Mlp(nn.Module):
    """Two linear layers on ``[batch, 7]``."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.lin0 = nn.Linear(7, 9, bias=bias)
        self.lin1 = nn.Linear(9, 5, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.log_softmax(self.lin1(torch.relu(self.lin0(x))), -1)


class _Product(nn.Module):
    """A linear layer that is no ``nn.Linear``."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features) * 0.3)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class ProductMlp(Mlp):
    """The same with parameters in the place of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = _Product(7, 9), _Product(9, 5)  # type: ignore[assignment]


class EmbeddingConv1D(nn.Module):
    """An embedding, transformers' Conv1D and a linear layer on ``[batch, 4]`` token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(12, 6)
        self.conv1d = Conv1D(5, 6)
        self.lin0 = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.lin0(torch.relu(self.conv1d(self.emb(x))).flatten(1))
        return found


class Convolution(nn.Module):
    """A convolution under the name that is asked for, and a linear layer."""

    def __init__(self, name: str, convolution: nn.Module, size: tuple[int, ...]) -> None:
        super().__init__()
        self.add_module(name, convolution)
        self.lin0 = nn.Linear(convolution(torch.zeros(1, *size)).numel(), 3)
        self._name = name

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.lin0(torch.relu(self.get_submodule(self._name)(x)).flatten(1))
        return found


class Attention(nn.Module):
    """PyTorch's own attention, and a linear layer, on ``[batch, 5, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lin0 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.lin0(self.mha(x, x, x, need_weights=False)[0])
        return found


class Recurrent(nn.Module):
    """A recurrent layer between two linear layers, on ``[batch, 4, 7]``."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(7, 6)
        self.gru = nn.GRU(6, 5, batch_first=True)
        self.lin1 = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.lin1(self.gru(self.lin0(x))[0])
        return found


_SIZES: dict[str, tuple[int, ...]] = {
    "mlp": (7,), "plain": (7,), "product": (7,), "embedding": (4,), "mha": (5, 8), "gru": (4, 7),
    "conv1d": (3, 9), "conv1d1": (3, 9), "conv2d": (4, 5, 6), "groups": (8, 5, 6),
    "groups2": (8, 5, 6), "conv3d": (2, 3, 4, 5),
}  # fmt: skip
_MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": Mlp,
    "plain": lambda: Mlp(bias=False),
    "product": ProductMlp,
    "embedding": EmbeddingConv1D,
    "mha": Attention,
    "gru": Recurrent,
    "conv1d": lambda: Convolution("conv1d", nn.Conv1d(3, 5, 2), _SIZES["conv1d"]),
    "conv1d1": lambda: Convolution("conv1d", nn.Conv1d(3, 5, 1), _SIZES["conv1d"]),
    "conv2d": lambda: Convolution("conv2d", nn.Conv2d(4, 6, 3), _SIZES["conv2d"]),
    "groups": lambda: Convolution("conv2d", nn.Conv2d(8, 8, 3, groups=4), _SIZES["groups"]),
    "groups2": lambda: Convolution(
        "conv2d", nn.Conv2d(8, 12, 3, padding=1, groups=2), _SIZES["groups2"]
    ),
    "conv3d": lambda: Convolution("conv3d", nn.Conv3d(2, 5, 2), _SIZES["conv3d"]),
}


def make_model(name: str) -> tuple[nn.Module, Tensor]:
    """A module of the table, no parameter at a neutral value, and an input of three rows."""
    torch.manual_seed(0)
    model = _MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    if name == "embedding":
        return model, torch.tensor([[0, 10, 3, 4], [10, 1, 2, 5], [7, 0, 6, 11]])
    return model, torch.randn(3, *_SIZES[name])


class Case(NamedTuple):
    """A configuration.

    Attributes:
        model: of :data:`_MODELS`.
        settings: fields of ``LoraConfig``, beside r = 4 and alpha = 6.
        feature: the part of the graph inputs that carries what is tested.
        path: the inputs of this layer only; empty: of all.
        refused: what the refusal says, where a mode refuses it.
    """

    model: str
    settings: dict[str, Any]
    feature: str = "B"
    path: str = ""
    refused: dict[str, str] = {}  # noqa: RUF012


def _both(words: str) -> dict[str, str]:
    return {"switchable": words, "merged": words}


_L0, _L01 = {"target_modules": ["lin0"]}, {"target_modules": ["lin0", "lin1"]}
_DORA = {"use_dora": True}
_NO_STACK = r"changes parameters of lin0, and the module has no stacked parameters there"
_MHA = _both(r"mha is an nn\.MultiheadAttention.*twice")

_SAVED = r"replaces {}\..*, which is no weight or bias of a linear, embedding, convolution or norm"


def _velora(kind: str) -> VeloraConfig:
    return VeloraConfig(num_groups=1, init_type=kind)


def _bdlora(**settings: Any) -> dict[str, Any]:
    return {**_L01, "use_bdlora": BdLoraConfig(match_strict=False, **settings)}


# By PEFT's name of the case.
PEFT_CASES: dict[str, Case] = {
    "Vanilla MLP 1 LoRA": Case("mlp", {"target_modules": "lin0"}),
    "Vanilla MLP 2 LoRA": Case("mlp", _L0),
    "Vanilla MLP 3 LoRA": Case("mlp", {"target_modules": ["lin1"]}),
    "Vanilla MLP 4 LoRA": Case("mlp", _L01, path="lin1"),
    "Vanilla MLP 5 LoRA": Case("mlp", {**_L0, "modules_to_save": ["lin1"]}, path="lin1"),
    "Vanilla MLP 6 LoRA": Case("mlp", {**_L0, "lora_alpha": 3, "lora_dropout": 0.1}),
    "Vanilla MLP 7 LoRA with DoRA": Case("mlp", _L0 | _DORA, "G"),
    "Vanilla MLP 8 LoRA with DoRA": Case("mlp", _L01 | _DORA, "G", "lin1"),
    "Vanilla MLP 9 LoRA with DoRA": Case(
        "mlp", {"target_modules": "lin1", "lora_alpha": 32} | _DORA, "G"
    ),
    "Vanilla MLP 1 LoRA with KaSA": Case(
        "mlp", {**_L0, "kasa_config": KasaConfig()}, refused=_both("kasa_config is .*KaSA")
    ),
    "Vanilla MLP 1 LoRA with MiCA": Case("mlp", {**_L0, "init_lora_weights": "mica"}),
    "Vanilla MLP 10 LoRA with VeLoRA random": Case(
        "mlp", {**_L0, "velora_config": _velora("random")}
    ),
    "Vanilla MLP 11 LoRA with VeLoRA batch_average": Case(
        "mlp",
        {**_L01, "velora_config": _velora("batch_average")},
        path="lin1",
    ),
    "Vanilla MLP 12 LoRA with VeLoRA batch_average_once": Case(
        "mlp",
        {**_L0, "velora_config": _velora("batch_average_once")},
    ),
    "Embedding + transformers Conv1D 1 LoRA": Case("embedding", {"target_modules": ["conv1d"]}),
    "Embedding + transformers Conv1D 2 LoRA": Case("embedding", {"target_modules": ["emb"]}),
    "Embedding + transformers Conv1D 3 LoRA": Case(
        "embedding", {"target_modules": ["emb", "conv1d"]}, path="emb"
    ),
    "Embedding + transformers Conv1D 1 DoRA": Case(
        "embedding", {"target_modules": ["conv1d"]} | _DORA, "G"
    ),
    "Embedding + transformers Conv1D 2 DoRA": Case(
        "embedding", {"target_modules": ["emb"]} | _DORA, "G"
    ),
    "Embedding + transformers Conv1D 3 DoRA": Case(
        "embedding", {"target_modules": ["emb", "conv1d"]} | _DORA, "G", "emb"
    ),
    "Embedding + transformers Conv1D 1 LoRA trainable_tokens": Case(
        "embedding",
        {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [0, 10]}},
        path="emb",
    ),
    "Conv1d LoRA": Case("conv1d", {"target_modules": ["conv1d"]}),
    "Conv1d LoRA with DoRA": Case("conv1d", {"target_modules": ["conv1d"]} | _DORA, "G"),
    "Conv2d 1 LoRA": Case("conv2d", {"target_modules": ["conv2d"]}),
    "Conv2d 2 LoRA": Case("conv2d", {"target_modules": ["conv2d", "lin0"]}, path="conv2d"),
    "Conv2d 1 LoRA with DoRA": Case("conv2d", {"target_modules": ["conv2d"]} | _DORA, "G"),
    "Conv2d 2 LoRA with DoRA": Case(
        "conv2d", {"target_modules": ["conv2d", "lin0"]} | _DORA, "G", "conv2d"
    ),
    "Conv2d Groups LoRA": Case("groups", {"target_modules": ["conv2d"]}),
    "Conv2d Groups2 LoRA": Case("groups2", {"target_modules": ["conv2d"]}),
    "Conv2d Groups LoRA with DoRA": Case("groups", {"target_modules": ["conv2d"]} | _DORA, "G"),
    "Conv2d Groups2 LoRA with DoRA": Case("groups2", {"target_modules": ["conv2d"]} | _DORA, "G"),
    "Conv3d 1 LoRA": Case("conv3d", {"target_modules": ["conv3d"]}),
    "Conv3d 2 LoRA": Case("conv3d", {"target_modules": ["conv3d", "lin0"]}, path="conv3d"),
    "Conv3d 1 LoRA with DoRA": Case("conv3d", {"target_modules": ["conv3d"]} | _DORA, "G"),
    "Conv3d 2 LoRA with DoRA": Case(
        "conv3d", {"target_modules": ["conv3d", "lin0"]} | _DORA, "G", "conv3d"
    ),
    "Vanilla MLP 1 LoRA with lora_b bias": Case(
        "mlp", {**_L01, "lora_bias": True, "lora_alpha": 32}, "bias"
    ),
    "Conv2d 1 LoRA with lora_b bias": Case(
        "conv2d", {"target_modules": ["conv2d"], "lora_bias": True, "lora_alpha": 32}, "bias"
    ),
    "Conv3d 1 LoRA with lora_b bias": Case(
        "conv3d", {"target_modules": ["conv3d"], "lora_bias": True, "lora_alpha": 32}, "bias"
    ),
    "MHA 1 LoRA": Case("mha", {"target_modules": ["mha"]}, refused=_MHA),
    "MHA 2 LoRA": Case("mha", {"target_modules": ["mha", "lin0"]}, refused=_MHA),
    "MLP 1 using nn.Parameter LoRA": Case(
        "product", {"target_parameters": ["lin0.weight"]}, refused=_both(_NO_STACK)
    ),
    "MLP 2 using nn.Parameter LoRA": Case(
        "mlp", {**_L0, "target_parameters": ["lin1.weight"]}, path="lin1"
    ),
    "Vanilla MLP 1 LoRA with Monteclora": Case(
        "mlp",
        {**_L0, "monteclora_config": MontecloraConfig(num_samples=2)},
    ),
    "BD-LoRA A only": Case(
        "mlp",
        _bdlora(target_modules_bd_a=["lin0"], nblocks=1),
        refused=_both("use_bdlora is .*block-diagonal"),
    ),
    "BD-LoRA B only": Case(
        "mlp",
        _bdlora(target_modules_bd_b=["lin1"], nblocks=1),
        refused=_both("use_bdlora is .*block-diagonal"),
    ),
    "BD-LoRA both A and B": Case(
        "mlp",
        _bdlora(target_modules_bd_a=["lin0"], target_modules_bd_b=["lin1"], nblocks=1),
        refused=_both("use_bdlora is .*block-diagonal"),
    ),
}

# What PEFT's other tests of these modules configure by themselves, and what lies beside it.
MORE_CASES: dict[str, Case] = {
    "rank pattern": Case("mlp", {**_L01, "rank_pattern": {"lin0": 2}}, path="lin0"),
    "rank and alpha pattern": Case(
        "mlp", {**_L01, "rank_pattern": {"lin.": 3}, "alpha_pattern": {"lin0": 4, "^lin1": 9}}
    ),
    "rsLoRA with patterns": Case(
        "mlp",
        {**_L01, "use_rslora": True, "rank_pattern": {"lin1": 2}, "alpha_pattern": {"lin1": 1}},
    ),
    "pattern without a layer": Case("mlp", {**_L0, "rank_pattern": {"in0": 2}}),
    "regex": Case("mlp", {"target_modules": r".*lin\d"}, path="lin0"),
    "all-linear": Case("embedding", {"target_modules": ["conv1d", "lin0"]}, path="lin0"),
    "exclude_modules": Case("mlp", {"target_modules": r"lin\d", "exclude_modules": ["lin0"]}),
    "bias all": Case("mlp", {**_L0, "bias": "all"}, "bias", "lin1"),
    "bias lora_only": Case("mlp", {**_L0, "bias": "lora_only"}, "bias", "lin0"),
    "lora_b bias without bias": Case("plain", {**_L01, "lora_bias": True}, "bias"),
    "DoRA without bias": Case("plain", _L01 | _DORA, "G"),
    "Conv2d bias all": Case("conv2d", {"target_modules": ["conv2d"], "bias": "all"}, "bias"),
    "Conv2d saved": Case("conv2d", {**_L0, "modules_to_save": ["conv2d"]}, path="conv2d"),
    "Conv1d of kernel 1": Case("conv1d1", {"target_modules": ["conv1d"]}),
    "Embedding saved": Case("embedding", {**_L0, "modules_to_save": ["emb"]}, path="emb"),
    "Conv1D saved": Case(
        "embedding", {"target_modules": ["emb"], "modules_to_save": ["conv1d"]}, path="conv1d"
    ),
    "Conv1D saved beside lin0": Case(
        "embedding", {"target_modules": ["emb", "conv1d"], "modules_to_save": ["lin0"]}, path="lin0"
    ),
    "Embedding by regex": Case("embedding", {"target_modules": "^emb"}),
    "tokens 1": Case(
        "embedding", {**_L0, "trainable_token_indices": {"emb": [0, 1, 2]}}, path="emb"
    ),
    "tokens 2": Case(
        "embedding",
        {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [3, 4, 5, 6]}},
        path="emb",
    ),
    "embedding LoRA with lora_b bias": Case(
        "embedding", {"target_modules": ["conv1d", "lin0"], "lora_bias": True}, "bias", "conv1d"
    ),
    "MHA out_proj alone": Case(
        "mha",
        {"target_modules": ["out_proj", "lin0"]},
        refused=_both(r"changes mha\.out_proj, .*no such site"),
    ),
    "MHA saved": Case(
        "mha", {**_L0, "modules_to_save": ["mha"]}, refused=_both(_SAVED.format("mha"))
    ),
    "beside an MHA": Case("mha", _L0),
    "GRU saved": Case(
        "gru", {**_L0, "modules_to_save": ["gru"]}, refused=_both(_SAVED.format("gru"))
    ),
    "beside a GRU": Case("gru", _L01, path="lin0"),
    "PiSSA": Case(
        "mlp",
        {**_L0, "init_lora_weights": "pissa"},
        refused=_both("init_lora_weights is 'pissa'"),
    ),
    "OLoRA": Case(
        "mlp",
        {**_L0, "init_lora_weights": "olora"},
        refused=_both("init_lora_weights is 'olora'"),
    ),
}  # fmt: skip


def counts(cases: dict[str, Case]) -> tuple[int, int, int]:
    """How many are exact in both modes, in merged mode only, and refused in both."""
    refused = [len(case.refused) for case in cases.values()]
    return refused.count(0), refused.count(1), refused.count(2)


def summary() -> list[str]:
    """What docs/adapters.md says of each table."""
    return [
        "{} {}, {} exact in both modes, {} exact merged and refused switchable, {} refused".format(
            len(cases), title, *counts(cases)
        )
        for title, cases in (("LoRA cases", PEFT_CASES), ("more of ours", MORE_CASES))
    ]


if __name__ == "__main__":
    print("\n".join(summary()))
