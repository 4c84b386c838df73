"""In which order are blocks converted?  As they run, each fitted to what the converted ones before it give.

    student   x ── block 0' ── block 1' ── x ── [block i ⇒ block i'] ── …        fitted to inputs x
    teacher   t ── block 0  ── block 1  ── t ── [block i] ── …                   and to outputs between W x and t's

A block that is fitted to the teacher's inputs meets others at run time, and errors pile up. What a layer writes to
the stream is fitted half to what it wrote before and half to what brings the stream back to the teacher's: the first
alone lets errors stand, the second alone fits noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitcompress.families.base import Family
from vitcompress.families.find import family_named
from vitcompress.families.insertion import layers_called
from vitcompress.families.narrow import narrowed_shapes
from vitcompress.families.widths import Widths
from vitcompress.initialize.importance import token_weights
from vitcompress.initialize.narrow import fit_layer, narrow_heads, narrow_mlp
from vitcompress.initialize.regression import Moments, low_rank, regress
from vitcompress.layers.factored import FactoredLinear
from vitcompress.plans.model import Group, Plan

BlockInputs = Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
"""Arguments and keyword arguments of a block, per batch."""

CORRECTION = 0.5
CHUNK_IMAGES = 32


def start_in_order(student: nn.Module, teacher: nn.Module, plan: Plan, images: Iterable[Tensor]) -> None:
    """Set narrow blocks, and factors of groups of one block, in the order in which they run, in place.

    Of a group of several narrow blocks the first is fitted, and the others begin with its layers.

    Args:
        student: as `apply_plan` built it; the groups that are started otherwise are started.
        teacher: in eval mode, on the student's device.
        plan: the student's.
        images: calibration batches `[B, C, H, W]`; held together, with four states of the stream; all else is
            computed in chunks of them.

    Source: ours; the order is that of Frantar and Alistarh 2022, arXiv:2208.11580, Sec. 4.
    """
    groups = {group.donor: group for group in plan.groups if _begins_here(group)}
    if not groups:
        return
    family, batches = family_named(plan.family), list(images)
    weights = token_weights(teacher, family, list(groups), batches)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(layers_called(student))
        stack.enter_context(layers_called(teacher))
        stream = _Stream()
        for name in family.block_names(teacher):
            block: Any = student.get_submodule(name)
            own = teacher.get_submodule(name)
            block.forward = partial(
                _convert,
                block,
                own=own,
                group=groups.get(name),
                family=family,
                stream=stream,
                weights=weights.get(name, {}),
            )
            stack.callback(delattr, block, "forward")  # the class's is back
        student(torch.cat(batches))
    for group in groups.values():
        _copy_biases(student, teacher, group)


def _begins_here(group: Group) -> bool:
    return group.widths != Widths() or (bool(group.ranks) and len(group.blocks) == 1)


class _Stream:
    """What the teacher's blocks would take and give, while the student runs; None where blocks are of other kinds."""

    def __init__(self) -> None:
        self.inside: Tensor | None = None  # the stream between attention and MLP
        self.after: Tensor | None = None

    def step(self, own: nn.Module, x: Tensor, given: Sequence[Any], named: Mapping[str, Any]) -> None:
        """Go one block on."""
        if type(own) is not Block:
            self.inside = self.after = None
            return
        before = x if self.after is None else self.after
        found = [run_block(own, chunk, given, named, inputs=("norm2",)) for chunk in before.split(CHUNK_IMAGES)]
        self.inside = torch.cat([inputs["norm2"] for inputs, _, _ in found])
        self.after = torch.cat([output for _, _, output in found])


def _convert(
    block: nn.Module,
    x: Tensor,
    *rest: Any,
    own: nn.Module,
    group: Group | None,
    family: Family,
    stream: _Stream,
    weights: Mapping[str, Tensor],
    **named: Any,
) -> Tensor:
    """Forward pass of the student's block that first sets its layers, for the input that it sees."""
    stream.step(own, x, rest, named)
    if group is not None:
        _Conversion(block, own, x, rest, named, stream, weights, {}).make(group, family)
    return torch.cat([run_block(block, chunk, rest, named)[2] for chunk in x.split(CHUNK_IMAGES)])


def convert_block(
    block: nn.Module,
    own: nn.Module,
    group: Group,
    family: Family,
    inputs: BlockInputs,
    weights: Mapping[str, Tensor],
    seen: dict[Any, Any],
) -> None:
    """Set a narrow or factored block alone, for the inputs that it has in the teacher, in place.

    Args:
        block: the student's.
        own: the teacher's.
        group: of this one block.
        family: of the teacher.
        inputs: of the block.
        weights: what each token counts, by layer inside the block.
        seen: moments of the same inputs, from other ways of making the same part; those that are new are added.
    """
    x = torch.cat([args[0] for args, _ in inputs])
    _Conversion(block, own, x, inputs[0][0][1:], inputs[0][1], _Stream(), weights, seen).make(group, family)


class _Conversion:
    """One block, with the inputs it gets in the student and in the teacher."""

    def __init__(
        self,
        block: Any,
        own: Any,
        x: Tensor,
        rest: Sequence[Any],
        named: Mapping[str, Any],
        stream: _Stream,
        weights: Mapping[str, Tensor],
        seen: dict[Any, Any],
    ) -> None:
        self.block, self.own, self.x, self.rest, self.named, self.stream = block, own, x, rest, named, stream
        self.weights = weights
        self.seen = seen  # moments that do not depend on how wide the part is made

    def make(self, group: Group, family: Family) -> None:
        """Set every layer of the block that is other than the teacher's, in the order in which they run."""
        if group.widths.qk is not None or group.widths.v is not None:
            self.narrow_attention()
        for layer in [name for name in group.ranks if name.startswith("attn")]:
            self.factorise(layer, writes=bool(family.writes.fullmatch(layer)))
        if group.widths.hidden is not None:
            self.narrow_mlp()
        for layer in [name for name in group.ranks if not name.startswith("attn")]:
            self.factorise(layer, writes=bool(family.writes.fullmatch(layer)))

    def narrow_attention(self) -> None:
        q, k, attended = self.seen.get("heads") or self._heads()
        self.seen["heads"] = q, k, attended
        narrow_heads(self.block.attn, self.own.attn, q, k, attended)
        fit_layer(self.block.attn.proj, self._written("attn.proj"), self._scale("attn.proj")[0])

    def _heads(self) -> tuple[Moments, Moments, Moments]:
        """Queries, keys, and values after the attention maps, of the teacher's heads."""
        q, k, attended = Moments(), Moments(), Moments()
        for _, chunk in self._chunks():
            inputs, outputs, _ = self._run(self.own, chunk, inputs=("attn.proj",), outputs=("attn.qkv",))
            parts = outputs["attn.qkv"].chunk(3, dim=-1)
            q.add(parts[0], weight=self.weights["attn.qkv"])
            k.add(parts[1], weight=self.weights["attn.qkv"])
            attended.add(inputs["attn.proj"], weight=self.weights["attn.proj"])
        return q, k, attended

    def narrow_mlp(self) -> None:
        self.seen["hidden"] = moments = self.seen.get("hidden") or self._hidden()
        narrow_mlp(self.block.mlp, self.own.mlp, moments, self._scale("mlp.fc2")[0])

    def _hidden(self) -> Moments:
        """What the teacher's neurons say, with what the MLP should write."""
        mlp, moments = self.own.mlp, Moments()
        for part, chunk in self._chunks():
            inputs, _, _ = self._run(self.block, chunk, inputs=("mlp.fc1", *self._between))
            hidden = mlp.act(mlp.fc1(inputs["mlp.fc1"]))
            wanted = self._wanted("mlp.fc2", part, mlp.fc2(hidden), inputs.get("norm2"))
            moments.add(hidden, wanted, self.weights["mlp.fc2"])
        return moments

    def factorise(self, layer: str, *, writes: bool) -> None:
        moments = self._written(layer) if writes else self._read(layer)
        made: FactoredLinear = self.block.get_submodule(layer)
        own = self.own.get_submodule(layer)
        centred = made.bias is not None  # else nothing takes up the mean
        covariance = moments.covariance() if centred else moments.second()
        weight = own.weight.detach().double()
        scale = self._scale(layer)[0] if writes else torch.ones_like(weight[:, 0])
        if writes:
            weight = regress(covariance, moments.cross() if centred else torch.as_tensor(moments.yx / moments.count))
        up, down = low_rank(weight, covariance, made.rank)
        made.up.copy_(up / scale[:, None])
        made.down.copy_(down)
        if centred:
            mean = moments.mean_target if writes else weight @ moments.mean + own.bias.double()
            made.bias.copy_((mean - up @ (down @ moments.mean)) / scale)

    def _read(self, layer: str) -> Moments:
        """Inputs of a layer that reads the stream."""
        moments = Moments()
        for _, chunk in self._chunks():
            moments.add(self._run(self.block, chunk, inputs=(layer,))[0][layer], weight=self.weights[layer])
        return moments

    def _written(self, layer: str) -> Moments:
        """Inputs of a layer that writes to the stream, with what it should write."""
        moments = Moments()
        for part, chunk in self._chunks():
            inputs, _, _ = self._run(self.block, chunk, inputs=(layer, *self._between))
            if layer.startswith("attn"):
                _, outputs, _ = self._run(self.own, chunk, outputs=(layer,))
                wanted = self._wanted(layer, part, outputs[layer], chunk)
            else:
                mlp = self.own.mlp
                read = self._run(self.block, chunk, inputs=("mlp",))[0]["mlp"]
                wanted = self._wanted(layer, part, mlp(read), inputs.get("norm2"))
            moments.add(inputs[layer], wanted, self.weights[layer])
        return moments

    def _wanted(self, layer: str, part: slice, written: Tensor, before: Tensor | None) -> Tensor:
        """What the stream should get: between what the teacher's layer would write and what brings it to the teacher's.

        Channels that LayerScale keeps from the stream cannot bring it anywhere.
        """
        scale, open_ = self._scale(layer)
        written = written * scale.to(written.dtype)
        goal = self.stream.inside if layer.startswith("attn") else self.stream.after
        if goal is None or before is None:
            return written
        return torch.where(open_, torch.lerp(written, goal[part] - before, CORRECTION), written)

    def _scale(self, layer: str) -> tuple[Tensor, Tensor]:
        """LayerScale after a layer that writes, `[C]`, nowhere zero, and where it lets something through."""
        gamma = None
        if type(self.own) is Block:
            gamma = getattr(self.own.ls1 if layer.startswith("attn") else self.own.ls2, "gamma", None)
        if gamma is None:
            gamma = torch.ones_like(self.own.get_submodule(layer).weight[:, 0])
        gamma = gamma.detach().double()
        floor = 1e-3 * gamma.abs().mean()
        open_ = gamma.abs() > floor
        return torch.where(open_, gamma, torch.where(floor > 0, floor, 1.0)), open_

    @property
    def _between(self) -> tuple[str, ...]:
        return () if self.stream.inside is None else ("norm2",)

    def _chunks(self) -> Iterator[tuple[slice, Tensor]]:
        for first in range(0, len(self.x), CHUNK_IMAGES):
            part = slice(first, first + CHUNK_IMAGES)
            yield part, self.x[part]

    def _run(self, block: nn.Module, x: Tensor, **taps: tuple[str, ...]) -> Any:
        return run_block(block, x, self.rest, self.named, **taps)


def run_block(
    block: nn.Module,
    x: Tensor,
    rest: Sequence[Any],
    named: Mapping[str, Any],
    inputs: tuple[str, ...] = (),
    outputs: tuple[str, ...] = (),
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Run a block as its class does, and keep inputs and outputs of the named modules inside it."""
    taken: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name in inputs:
            hook = block.get_submodule(name).register_forward_pre_hook(lambda m, i, n=name: taken.__setitem__(n, i[0]))
            stack.callback(hook.remove)
        for name in outputs:
            hook = block.get_submodule(name).register_forward_hook(lambda m, i, o, n=name: given.__setitem__(n, o))
            stack.callback(hook.remove)
        result = type(block).forward(block, x, *rest, **named)
    return taken, given, result


def _copy_biases(student: nn.Module, teacher: nn.Module, group: Group) -> None:
    """Let the other blocks of a narrow group begin with the biases that were fitted to its first, in place."""
    donor = student.get_submodule(group.donor)
    with torch.no_grad():
        for block in group.blocks[1:]:
            for layer in narrowed_shapes(teacher.get_submodule(block), group.widths):
                bias = getattr(student.get_submodule(f"{block}.{layer}"), "bias", None)
                if bias is not None:
                    bias.copy_(donor.get_submodule(layer).bias)
