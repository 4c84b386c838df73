"""What must be known about a family of models before its blocks can share?  A `Family`, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from vitcompress.errors import ModelError


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
    """

    name: str
    model_type: type[nn.Module]
    block: re.Pattern[str]
    weights: re.Pattern[str]
    biases: re.Pattern[str]
    transforms: Mapping[str, BlockTransform]
    convert: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]
    tables: re.Pattern[str] = re.compile(r"(?!)")

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
