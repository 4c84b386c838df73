"""Limit what an option costs by what leaving its part out costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from vitcompress.search.changes import LayerChanges
from vitcompress.search.evidence import nats_of
from vitcompress.search.moments import layers_of
from vitcompress.search.options import Option, Shapes

_EXACT = {"mlp.hidden", "attn.v", "attn.skip", "mlp.skip"}
"""Scales that only change what is added to the stream; nothing nonlinear lies between."""


@dataclass(frozen=True)
class Limits:
    """Numbers for the cost of leaving out each part of each block, beside those of options.

    Attributes:
        shapes: the teacher's blocks.
        start: the first number.
    """

    shapes: Shapes
    start: int

    @property
    def end(self) -> int:
        """The number after the last."""
        return self.start + 2 * len(self.shapes.blocks)

    def number(self, block: str, part: str) -> int:
        """The number of a block's part."""
        return self.start + 2 * list(self.shapes.blocks).index(block) + (part == "mlp")

    def changes(self, model: nn.Module, block: str) -> dict[str, LayerChanges]:
        """The changes of one block by leaving out each part: of the layer that writes."""
        changes = {}
        for layer in filter(self.shapes.family.writes.fullmatch, layers_of(model, self.shapes.family, block)):
            weight = model.get_parameter(f"{block}.{layer}.weight").detach()
            number = self.number(block, layer.partition(".")[0])
            changes[layer] = LayerChanges.on(weight.device, [number], -weight[None])
        return changes

    def costs(self, options: Iterable[tuple[int, Option]], scores: Tensor) -> list[float]:
        """Return the costs of options, nats per image.

        Changes before something nonlinear are overstated where they are large: no way to change a
        part costs more than leaving it out.

        Args:
            options: options and their numbers.
            scores: of all numbers, `[N, numbers]`.
        """
        return [self._cost(number, option, scores) for number, option in options]

    def _cost(self, number: int, option: Option, scores: Tensor) -> float:
        nats = nats_of(scores[:, number])
        if option.scale in _EXACT:
            return nats
        limit = sum(nats_of(scores[:, self.number(block, option.part)]) for block in option.group.blocks)
        return nats / (1 + nats / limit) if limit > 0 else nats
