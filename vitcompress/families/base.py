"""What must be known about a family of models before its blocks can share?  A `Family`, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitcompress.errors import ModelError


def read_output(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """What a tapped module returns, which is what most taps are after."""
    return output


@dataclass(frozen=True)
class Tap:
    """One place where a forward pass is read.

    Attributes:
        module: name of the module whose call is watched.
        holder: name of the module that `read` is given, where that is another.
        read: `(holder, inputs, output) -> tensor`; looks, changes nothing.
    """

    module: str
    holder: str | None = None
    read: Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor] = read_output

    def inside(self, block: str) -> Tap:
        """The same tap by full names, in `block`."""
        return replace(self, module=f"{block}.{self.module}", holder=self.holder and f"{block}.{self.holder}")


def read_fused(attn: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """Queries, keys and values side by side, with the bare biases that BEiT, EVA and Swin V2 add after the layer.

    Out of place, for timm adds them in place.
    """
    if getattr(attn, "q_bias", None) is None:
        return output
    return output + torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])


def tap_qkv(block: nn.Module) -> tuple[Tap, ...]:
    """Where q, k and v of a block are read: at its layer `attn.qkv`, or at `attn.q_proj`, `k_proj` and `v_proj`.

    Args:
        block: any block; its attention calls these layers as modules, as `layers_called` sees to.

    Returns:
        One tap that gives q, k and v side by side, `[B, N, 3·C]`; or three, in this order, that give `[B, N, C]` each;
        or none where the block has none, or queries of another width than keys, or narrow heads, whose channels are
        mixtures of the teacher's. For windows, B counts windows.
    """
    attn = getattr(block, "attn", None)
    if getattr(attn, "narrow_heads", False):
        return ()
    if isinstance(getattr(attn, "qkv", None), nn.Linear):
        return (Tap("attn.qkv", holder="attn", read=read_fused),)
    layers = [getattr(attn, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    widths = {layer.out_features for layer in layers if isinstance(layer, nn.Linear)}
    whole = len(widths) == 1 and all(isinstance(layer, nn.Linear) for layer in layers)
    return (Tap("attn.q_proj"), Tap("attn.k_proj"), Tap("attn.v_proj")) if whole else ()


@dataclass(frozen=True)
class BlockTransform:
    """One transformation, as a family builds it into its blocks.

    Attributes:
        fault: `(model, block) -> str`; why the block cannot have it, or an empty string.
        num_params: `(model, block, token_kernel) -> int`; what it adds to the block.
        insert: `(model, block, token_kernel)`; builds it in, in place, started at the identity.
    """

    fault: Callable[[nn.Module, nn.Module], str]
    num_params: Callable[[nn.Module, nn.Module, int], int]
    insert: Callable[[nn.Module, nn.Module, int], None]


@dataclass(frozen=True)
class Family:
    """What compression needs to know about one class of timm models.

    Attributes:
        name: the family's name, as stored in artifacts.
        model_type: timm's class; subclasses belong to the family too.
        block: matches the full name of a transformer block; `group(1)`, where there is one, is the block's stage.
        weights: matches, inside a block, the names of the matrices that a group shares.
        biases: matches, inside a block, the biases of the same layers, shared only on request.
        transforms: the transformations that its blocks can have, by name.
        convert: `(state_dict, model) -> state_dict`; timm's translation of other publishers' checkpoints.
        tables: matches, inside a block, what its relative position bias is made of, shared only on request; the
            default matches nothing.
        qkv: `(block) -> taps`; where q, k and v are read, in the form that `tap_qkv`, the default, gives.
        narrow_attention: makes an attention with narrower heads of timm's; None where the family has none.
        writes: matches, inside a block, the layers that write to the residual stream; the others read it.
    """

    name: str
    model_type: type[nn.Module]
    block: re.Pattern[str]
    weights: re.Pattern[str]
    biases: re.Pattern[str]
    transforms: Mapping[str, BlockTransform]
    convert: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]
    tables: re.Pattern[str] = re.compile(r"(?!)")
    qkv: Callable[[nn.Module], tuple[Tap, ...]] = tap_qkv
    narrow_attention: Callable[[Any], nn.Module] | None = None
    writes: re.Pattern[str] = re.compile(r"attn\.proj|mlp\.fc2")

    def block_names(self, model: nn.Module) -> list[str]:
        """Full names of the model's blocks, in the order in which they run."""
        return [name for name, _ in model.named_modules() if self.block.fullmatch(name)]

    def stage(self, block: str) -> str:
        """The stage a block belongs to; blocks of different stages never share."""
        found = self.block.fullmatch(block)
        if found is None:
            raise ModelError(f"{block} is not a block of the {self.name} family.")
        return found.group(1) if found.re.groups else ""

    def shared_names(self, block: nn.Module, *, share_biases: bool, share_tables: bool) -> tuple[str, ...]:
        """Names, inside `block`, of the parameters that a group shares."""
        return tuple(
            name
            for name, _ in block.named_parameters()
            if self.weights.fullmatch(name)
            or (share_biases and self.biases.fullmatch(name))
            or (share_tables and self.tables.fullmatch(name))
        )
