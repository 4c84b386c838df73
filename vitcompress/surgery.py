"""Turn a source into a student: narrow, skip, tie and factorize, then insert transformations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from vitcompress.errors import PlanError, shorten
from vitcompress.families.base import Family
from vitcompress.families.narrow import full_widths, narrow_block
from vitcompress.families.registry import family_named
from vitcompress.families.skip import skip_parts, skippable
from vitcompress.layers.factored import FactoredLinear
from vitcompress.plans.make import layer_shapes
from vitcompress.plans.model import Group, Plan


def apply_plan(model: nn.Module, plan: Plan) -> None:
    """Make `model` the student that `plan` describes, in place.

    Compression applies it to a copy of the source; loading applies it to an empty model. Both get
    the same student.

    Args:
        model: a model of the plan's architecture, without sharing, on any device, including meta.
        plan: the plan to carry out.

    Raises:
        PlanError: the plan does not fit the model.
    """
    family = family_named(plan.family)
    check_fits(model, plan, family)
    apply_groups(model, plan.groups, family)  # before transformations, which may rename the paths used here
    for group in plan.groups:
        for name in group.blocks:
            for transform_name, transform in family.transforms.items():  # in order: one may build on another
                if transform_name in group.transforms(plan.transforms):
                    transform.insert(model, model.get_submodule(name), plan.token_kernel)


def check_fits(model: nn.Module, plan: Plan, family: Family) -> None:
    """Check that a plan, which may come from a file, names only parts that the model has.

    Args:
        model: a model without sharing, on any device, including meta.
        plan: any plan.
        family: the family that the plan names.

    Raises:
        PlanError: the plan does not fit the model.
    """
    blocks = [block for group in plan.groups for block in group.blocks]
    if not isinstance(model, family.model_type) or sorted(blocks) != sorted(family.block_names(model)):
        raise PlanError("The plan's blocks are not the model's blocks.")
    unknown = [name for name in plan.transforms if name not in family.transforms]
    for group in plan.groups:
        donor = model.get_submodule(group.donor)
        layers, full = layer_shapes(family, donor), full_widths(donor, family.narrow_attention)
        shareable = family.shared_names(donor, share_biases=True, share_tables=True)
        unknown += [name for name in group.shared if name not in shareable]
        unknown += [name for name in (*group.ranks, *group.bases) if name not in layers]
        unknown += [name for name in group.bases if name not in group.ranks]
        unknown += [part for part in group.skipped if part not in skippable(donor)]
        unknown += _changed_though_skipped(group)
        if len({family.stage(block) for block in group.blocks}) > 1:
            raise PlanError(f"The group of {group.donor} spans several stages.")
        for name in ("hidden", "qk", "v"):
            width, max_width = getattr(group.widths, name), getattr(full, name) or 0
            if width is not None and width > max_width:
                raise PlanError(
                    f"The plan sets width {name} of the group of {group.donor} to {width}; the model has {max_width}."
                )
    if unknown:
        raise PlanError(f"The plan names parts that the model does not have: {shorten(unknown)}.")


def _changed_though_skipped(group: Group) -> list[str]:
    """Return what a group changes in parts that it leaves out, and parts that it names twice."""
    widths = {"mlp": ("hidden",), "attn": ("qk", "v")}
    twice = group.skipped[1:] if len(set(group.skipped)) < len(group.skipped) else ()
    changed = [f"{part}.{name}" for part in group.skipped for name in widths[part] if getattr(group.widths, name)]
    return [*twice, *changed] + [name for name in (*group.shared, *group.ranks) if name.split(".")[0] in group.skipped]


def apply_groups(model: nn.Module, groups: Iterable[Group], family: Family) -> None:
    """Narrow, skip, tie and factorize what some groups say, in place.

    Args:
        model: a model whose blocks in these groups are the source's.
        groups: groups of the model's blocks.
        family: family of the model.
    """
    for group in groups:
        for name in group.blocks:
            narrow_block(model.get_submodule(name), group.widths, family.narrow_attention)
            skip_parts(model.get_submodule(name), group.skipped)
        tie_group(model, group)
        factorize_group(model, group, family)


def tie_group(model: nn.Module, group: Group) -> None:
    """Make every block of `group` use the donor's shared parameters, in place.

    Args:
        model: a copy of the source.
        group: blocks of one stage; `group.donor` is the first.

    Raises:
        PlanError: a parameter differs in shape from the donor's.

    Source: weight sharing in MiniViT, arXiv:2204.07154, Sec. 3.1.
    """
    donor = dict(model.get_submodule(group.donor).named_parameters())
    for block in group.blocks[1:]:
        for name in group.shared:
            owner_path, _, leaf = f"{block}.{name}".rpartition(".")
            owner = model.get_submodule(owner_path)
            old, new = getattr(owner, leaf), donor[name]
            if old.shape != new.shape:
                raise PlanError(
                    f"{block}.{name} is {tuple(old.shape)}; donor {group.donor} has {tuple(new.shape)}.",
                    hint="Choose other --groups: blocks that share must have the same shapes.",
                )
            setattr(owner, leaf, new)


def factorize_group(model: nn.Module, group: Group, family: Family) -> None:
    """Give every block of `group` its factors, initialized to zero, in place.

    Args:
        model: a model in which the group is tied already.
        group: blocks of the model.
        family: family of the model.
    """
    for layer, rank in group.ranks.items():
        for block in group.blocks:
            owner_path, _, leaf = f"{block}.{layer}".rpartition(".")
            owner = model.get_submodule(owner_path)
            setattr(owner, leaf, FactoredLinear(getattr(owner, leaf), rank, whole=group.whole(layer)))
            if getattr(owner, "qkv_bias_separate", True) is False:
                owner.qkv_bias_separate = True  # type: ignore[assignment]  # otherwise timm reads the whole matrix
        if layer in group.bases:
            donor: Any = model.get_submodule(f"{group.donor}.{layer}")
            basis = "up" if family.writes.fullmatch(layer) else "down"
            for block in group.blocks[1:]:
                setattr(model.get_submodule(f"{block}.{layer}"), basis, getattr(donor, basis))
