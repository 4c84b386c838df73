"""Fit narrow blocks, factors of single blocks and skipped parts in the order in which they run.

    student   x ── block 0' ── block 1' ── x ── [block i ⇒ block i'] ── …    fitted to inputs x
    teacher   t ── block 0  ── block 1  ── t ── [block i] ── …               and targets W x … t

A block that is fitted to the teacher's inputs receives other inputs at run time, and errors
accumulate. The target of a layer that writes to the residual stream is half its original output and
half what brings the stream back to the teacher's: the first alone leaves errors as they are, the
second alone fits noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitcompress.families.base import Family
from vitcompress.families.insertion import layers_called
from vitcompress.families.narrow import narrowed_shapes
from vitcompress.families.registry import family_named
from vitcompress.families.widths import Widths
from vitcompress.initialize.importance import TokenWeights, token_weights
from vitcompress.initialize.inputs import BlockInput, Call, block_outputs, run_block, run_part, run_visiting
from vitcompress.initialize.layer_scale import WRITERS, layer_scale
from vitcompress.initialize.narrow import fit_layer, narrow_heads, narrow_mlp
from vitcompress.initialize.regression import Moments, low_rank, regress, wide
from vitcompress.layers.factored import FactoredLinear
from vitcompress.plans.model import Group, Plan

CORRECTION = 0.5
"""Share of a target that brings the stream back to the teacher's."""

CHUNK_IMAGES = 32


def start_in_order(
    student: nn.Module, teacher: nn.Module, plan: Plan, images: Iterable[Tensor], tell: Callable[[float], None],
    weights: TokenWeights | None = None,
) -> None:  # fmt: skip
    """Set narrow blocks and factors of single blocks, in the order in which they run, in place.

    In a group of several narrow blocks the first block is fitted, and the others start from its
    layers.

    Args:
        student: as `apply_plan` built it, with all other groups started.
        teacher: in eval mode, on the student's device.
        plan: the student's plan.
        images: calibration batches `[B, C, H, W]`. They are held in memory together with five
            states of the residual stream; everything else is computed in chunks of images.
        tell: called with the share of the blocks that are done, 0–1.
        weights: how much each token counts; None computes it.

    Source: ours; the order is that of Frantar and Alistarh 2022, arXiv:2208.11580, Sec. 4.
    """
    groups = {block: group for group in plan.groups for block in _fitted(group)}
    if not groups:
        return
    family, batches = family_named(plan.family), list(images)
    names = family.block_names(teacher)
    counts = weights or token_weights(teacher, family, list(groups), batches)
    stream = TeacherStream()

    def fit_and_run(name: str, given: BlockInput) -> Tensor:
        """Fit a block's layers to the input that it receives, then run it."""
        block, teacher_block = student.get_submodule(name), teacher.get_submodule(name)
        stream.step(teacher_block, given)
        if name in groups:
            fit = BlockFit(block, teacher_block, counts[name], given, stream)
            fit.run(groups[name], family, is_donor=name == groups[name].donor)
        output = block_outputs(block, given, CHUNK_IMAGES)
        tell((names.index(name) + 1) / len(names))
        return output

    with layers_called(student), layers_called(teacher):
        run_visiting(student, names, torch.cat(batches), fit_and_run)
    for group in plan.groups:
        _copy_biases(student, teacher, group)


def _fitted(group: Group) -> tuple[str, ...]:
    """Return the blocks of a group that are fitted: all with constants, else the donor or none."""
    if group.skipped:
        return group.blocks
    return group.blocks[: group.widths != Widths() or (bool(group.ranks) and len(group.blocks) == 1)]


class TeacherStream:
    """Residual stream of the teacher while the student runs.

    None where a block is not timm's plain `Block`.

    Attributes:
        before_mlp: the stream between attention and MLP of the current block.
        after_block: the stream after the current block.
    """

    def __init__(self) -> None:
        self.before_mlp: Tensor | None = None
        self.after_block: Tensor | None = None

    def step(self, block: nn.Module, given: BlockInput) -> None:
        """Run the teacher's next block.

        Args:
            block: of the teacher.
            given: arguments of the student's block; its `x` is used where the teacher's stream is
                unknown.
        """
        if type(block) is not Block:
            self.before_mlp = self.after_block = None
            return
        x = given.x if self.after_block is None else self.after_block
        chunks = [run_block(block, given._replace(x=chunk), ["norm2"]) for chunk in x.split(CHUNK_IMAGES)]
        self.before_mlp = torch.cat([calls["norm2"].input for calls, _ in chunks])
        self.after_block = torch.cat([output for _, output in chunks])


@dataclass(frozen=True)
class BlockFit:
    """A narrow, factored or partly skipped block and what it is fitted to.

    Attributes:
        block: of the student.
        teacher_block: the teacher's block in its place.
        weights: how much each token counts, by layer inside the block.
        given: arguments of the student's block, for all images.
        stream: of the teacher.
    """

    block: Any
    teacher_block: Any
    weights: Mapping[str, Tensor]
    given: BlockInput
    stream: TeacherStream

    def run(self, group: Group, family: Family, *, is_donor: bool) -> None:
        """Set every layer that differs from the teacher's, in the order of running, in place.

        Args:
            group: of the student's plan; the block belongs to it.
            family: of the teacher.
            is_donor: whether the block is its donor; of others only the constants are set.
        """
        for part in ("attn", "mlp"):
            if part in group.skipped:
                self._skip(part)
            if part in group.skipped or not is_donor:
                continue
            if part == "attn" and (group.widths.qk is not None or group.widths.v is not None):
                self._narrow_attention()
            elif part == "mlp" and group.widths.hidden is not None:
                scale = layer_scale(self.teacher_block, "mlp")[0]
                narrow_mlp(self.block.mlp, self.teacher_block.mlp, self._hidden_moments(), scale)
            for layer in group.ranks if len(group.blocks) == 1 else ():
                if layer.split(".")[0] == part:
                    self._factorize(layer, writes=bool(family.writes.fullmatch(layer)))

    def _skip(self, part: str) -> None:
        """Set the constant in place of a part to the mean of what should be added there."""
        targets = Moments()
        layer = WRITERS[part]
        for images, chunk in self._chunks():
            if part == "attn":
                written = run_part(self.teacher_block, chunk, [layer])[layer].output
                target = self._targets(part, images, written, chunk.x)
            else:
                x = run_part(self.block, chunk, ["mlp"])["mlp"].input  # no norm is left before the constant
                written = self.teacher_block.mlp(self.teacher_block.norm2(x))
                target = self._targets(part, images, written, x)
            targets.add(target, weight=self.weights[layer])
        getattr(self.block, part).bias.copy_(targets.mean)

    def _narrow_attention(self) -> None:
        """Set narrow heads: the maps of the teacher's, then the projection."""
        q, k, attended = Moments(), Moments(), Moments()
        written = []
        for _, chunk in self._chunks():
            calls = run_part(self.teacher_block, chunk, ["attn.qkv", "attn.proj"])
            queries, keys, _ = calls["attn.qkv"].output.chunk(3, dim=-1)
            q.add(queries, weight=self.weights["attn.qkv"])
            k.add(keys, weight=self.weights["attn.qkv"])
            attended.add(calls["attn.proj"].input, weight=self.weights["attn.proj"])
            written.append(calls["attn.proj"].output)
        narrow_heads(self.block.attn, self.teacher_block.attn, q, k, attended)
        inputs = Moments()
        for (images, chunk), output in zip(self._chunks(), written, strict=True):
            x = run_part(self.block, chunk, ["attn.proj"])["attn.proj"].input
            inputs.add(x, self._targets("attn", images, output, chunk.x), self.weights["attn.proj"])
        fit_layer(self.block.attn.proj, inputs, layer_scale(self.teacher_block, "attn")[0])

    def _hidden_moments(self) -> Moments:
        """Moments of the activations of the teacher's neurons, with the targets of the MLP."""
        mlp, moments = self.teacher_block.mlp, Moments()
        for images, chunk in self._chunks():
            calls = run_part(self.block, chunk, [*self._norm, "mlp.fc1"])
            hidden = mlp.act(mlp.fc1(calls["mlp.fc1"].input))
            targets = self._targets("mlp", images, mlp.fc2(hidden), self._before_mlp(calls))
            moments.add(hidden, targets, self.weights["mlp.fc2"])
        return moments

    def _factorize(self, layer: str, *, writes: bool) -> None:
        moments = self._moments_of(layer, writes=writes)
        factored: FactoredLinear = self.block.get_submodule(layer)
        linear = self.teacher_block.get_submodule(layer)
        centered = factored.bias is not None  # without a bias, nothing takes up the mean
        covariance = moments.covariance() if centered else moments.second()
        weight = wide(linear.weight.detach())
        scale = layer_scale(self.teacher_block, layer.split(".")[0])[0] if writes else torch.ones_like(weight[:, 0])
        if writes:
            weight = regress(covariance, moments.cross() if centered else moments.cross_uncentered())
        up, down = low_rank(weight, covariance, factored.rank)
        factored.up.copy_(up / scale[:, None])
        factored.down.copy_(down)
        if centered:
            mean = moments.mean_target if writes else weight @ moments.mean + wide(linear.bias)
            factored.bias.copy_((mean - up @ (down @ moments.mean)) / scale)

    def _moments_of(self, layer: str, *, writes: bool) -> Moments:
        """Return the moments of a layer's inputs, with its targets if it writes to the stream."""
        moments, in_attention = Moments(), layer.startswith("attn")
        for images, chunk in self._chunks():
            calls = run_part(self.block, chunk, [layer] if in_attention else [*self._norm, layer])
            targets = None
            if writes and in_attention:
                written = run_part(self.teacher_block, chunk, [layer])[layer].output
                targets = self._targets("attn", images, written, chunk.x)
            elif writes:
                inputs = run_part(self.block, chunk, ["mlp"])["mlp"].input
                targets = self._targets("mlp", images, self.teacher_block.mlp(inputs), self._before_mlp(calls))
            moments.add(calls[layer].input, targets, self.weights[layer])
        return moments

    def _targets(self, part: str, images: slice, written: Tensor, before: Tensor | None) -> Tensor:
        """Compute the targets of a layer that writes to the stream.

        They lie between what the teacher's layer adds and what leads to the teacher's stream.
        Channels that LayerScale closes keep what the teacher's layer adds.

        Args:
            part: `attn` or `mlp`.
            images: which of all images.
            written: output of the teacher's layer for the student's inputs.
            before: the student's stream before this addition; None where it is unknown.
        """
        scale, is_open = layer_scale(self.teacher_block, part)
        written = written * scale.to(written)
        goal = self.stream.before_mlp if part == "attn" else self.stream.after_block
        if goal is None or before is None:
            return written
        return torch.where(is_open.to(written.device), torch.lerp(written, goal[images] - before, CORRECTION), written)

    @property
    def _norm(self) -> list[str]:
        """The layer whose input is the stream before the MLP, where the teacher's is known."""
        return [] if self.stream.before_mlp is None else ["norm2"]

    def _before_mlp(self, calls: Mapping[str, Call]) -> Tensor | None:
        return calls["norm2"].input if "norm2" in calls else None

    def _chunks(self) -> Iterator[tuple[slice, BlockInput]]:
        for first in range(0, len(self.given.x), CHUNK_IMAGES):
            images = slice(first, first + CHUNK_IMAGES)
            yield images, self.given._replace(x=self.given.x[images])


def _copy_biases(student: nn.Module, teacher: nn.Module, group: Group) -> None:
    """Copy the fitted biases of a narrow group's first block to its other blocks, in place."""
    donor = student.get_submodule(group.donor)
    with torch.no_grad():
        for block in group.blocks[1:]:
            for layer in narrowed_shapes(teacher.get_submodule(block), group.widths):
                bias = getattr(student.get_submodule(f"{block}.{layer}"), "bias", None)
                if bias is not None:
                    bias.copy_(donor.get_submodule(layer).bias)
