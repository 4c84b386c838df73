"""Define `Family`, all that compression needs to know about one class of timm models."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitcompress.errors import ModelError


def read_output(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """Return the output of the tapped module, the default of `Tap.read`."""
    return output


@dataclass(frozen=True)
class Tap:
    """One place where a forward pass is read.

    Attributes:
        module: name of the module whose calls are observed.
        holder: name of the module that is passed to `read`; None passes `module` itself.
        read: `(holder, inputs, output) -> tensor`; must not modify its arguments.
    """

    module: str
    holder: str | None = None
    read: Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor] = read_output

    def inside(self, block: str) -> Tap:
        """Return this tap with full module names, inside `block`."""
        return replace(self, module=f"{block}.{self.module}", holder=self.holder and f"{block}.{self.holder}")


def read_fused(attn: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """Return queries, keys and values side by side, with their bare biases added.

    BEiT, EVA and Swin V2 keep `q_bias`, `k_bias` and `v_bias` outside the layer `qkv`. The sum is
    out of place, because timm may add the biases to `output` in place afterwards.

    Args:
        attn: the attention that holds `qkv` and, in these families, the bare biases.
        inputs: unused.
        output: output of `attn.qkv`, `[B, N, 3·C]`.
    """
    if getattr(attn, "q_bias", None) is None:
        return output
    return output + torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])


def tap_qkv(block: nn.Module) -> tuple[Tap, ...]:
    """Return the taps that read q, k and v of a block.

    They sit at the layer `attn.qkv`, or at `attn.q_proj`, `attn.k_proj` and `attn.v_proj`.

    Args:
        block: any block whose attention calls these layers as modules; `layers_called` ensures it.

    Returns:
        One tap that gives q, k and v side by side, `[B, N, 3·C]`, or three taps, in this order,
        that give `[B, N, C]` each. Empty if the block has no such layers, if queries and keys
        differ in width, or if its heads are narrow: their channels are then mixtures of the
        source's. In windowed attention, B counts windows.
    """
    attn = getattr(block, "attn", None)
    if getattr(attn, "narrow_heads", False):
        return ()
    if isinstance(getattr(attn, "qkv", None), nn.Linear):
        return (Tap("attn.qkv", holder="attn", read=read_fused),)
    layers = [getattr(attn, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    widths = {layer.out_features for layer in layers if isinstance(layer, nn.Linear)}
    if len(widths) > 1 or not all(isinstance(layer, nn.Linear) for layer in layers):
        return ()
    return (Tap("attn.q_proj"), Tap("attn.k_proj"), Tap("attn.v_proj"))


@dataclass(frozen=True)
class BlockTransform:
    """One transformation and how a family inserts it into its blocks.

    Attributes:
        fault: `(model, block) -> str`; why the block cannot have it, or an empty string.
        num_params: `(model, block, token_kernel) -> int`; number of parameters it adds.
        insert: `(model, block, token_kernel)`; inserts it in place, initialized to the identity.
    """

    fault: Callable[[nn.Module, nn.Module], str]
    num_params: Callable[[nn.Module, nn.Module, int], int]
    insert: Callable[[nn.Module, nn.Module, int], None]


@dataclass(frozen=True)
class Family:
    """Facts about one class of timm models.

    Patterns must match a full name (`fullmatch`); all but `block` match names inside a block.

    Attributes:
        name: name of the family in artifacts.
        model_type: timm's class; subclasses belong to the family too.
        block: matches the full name of a block; `group(1)`, if there is one, is the block's stage.
        weights: matches the matrices that a group shares.
        biases: matches the biases of the same layers, shared only on request.
        transforms: transformations that the blocks can have, by name, in order of insertion.
        convert: `(state_dict, model) -> state_dict`; timm's conversion of other publishers'
            checkpoints.
        tables: matches the parameters of the relative position bias, shared only on request; the
            default matches nothing.
        qkv: `(block) -> taps`; where q, k and v are read, in the form that `tap_qkv` returns.
        narrow_attention: `(attention) -> attention`; replaces timm's attention by one that allows
            narrower heads; None if the family has none.
        writes: matches the layers that write to the residual stream; all other layers read from it.
        any_view_size: whether timm computes positions for the size of the images that it is given.
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
    any_view_size: bool = False

    def block_names(self, model: nn.Module) -> list[str]:
        """Return the full names of the model's blocks, in the order in which they run."""
        return [name for name, _ in model.named_modules() if self.block.fullmatch(name)]

    def stage(self, block: str) -> str:
        """Return the stage of a block; blocks of different stages never share.

        Args:
            block: full name of the block.

        Returns:
            Name of the stage; empty if the family has no stages.

        Raises:
            ModelError: the name is not that of a block.
        """
        match = self.block.fullmatch(block)
        if match is None:
            raise ModelError(f"{block} is not a block of the {self.name} family.")
        return match.group(1) if match.re.groups else ""

    def shared_names(self, block: nn.Module, *, share_biases: bool, share_tables: bool) -> tuple[str, ...]:
        """Return the names, inside `block`, of the parameters that a group shares.

        Args:
            block: any block of the family.
            share_biases: whether biases are shared too.
            share_tables: whether the parameters of the relative position bias are shared too.
        """
        return tuple(
            name
            for name, _ in block.named_parameters()
            if self.weights.fullmatch(name)
            or (share_biases and self.biases.fullmatch(name))
            or (share_tables and self.tables.fullmatch(name))
        )
