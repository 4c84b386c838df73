"""What is made of which model?  Teacher, plan or target, start, and how the file holds it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from vitcompress.recipe.values import CONFIG, Bytes, Pairs, Words, flag_of

DEFAULT_SHARE = 2
TRANSFORMS = ("heads", "mlp")  # the default where blocks share whole matrices
StoreName = Literal["source", "fp32", "fp16", "bf16", "int8", "int4"]
KINDS = ("narrow", "low_rank", "share", "adapter", "basis")
STORES_IN_LOOP = ("int8", "int4")  # those that a training can be told of


@dataclass(frozen=True, config=CONFIG)
class ModelRecipe:
    """The teacher: which model, which weights, which preprocessing."""

    model: Annotated[
        str, Field(description="timm name, short name (deit_base), hf-hub:…, local-dir:… or fashion_vit (built in).")
    ]
    checkpoint: Annotated[
        Path | None,
        Field(description="Weights: .safetensors, .pth/.pt/.bin (no code in it is run), or a folder of transformers."),
    ] = None
    model_arg: Annotated[
        dict[str, Any], Pairs, Field(description="key=value for timm's constructor (img_size, depth, …); repeatable.")
    ] = dataclasses.field(default_factory=dict)
    mean: Annotated[tuple[float, ...] | None, Words, Field(description="Channel means, like 0.5,0.5,0.5.")] = None
    std: Annotated[
        tuple[Annotated[float, Field(ge=1e-6)], ...] | None,
        Words,
        Field(description="Channel deviations, like 0.5,0.5,0.5."),
    ] = None
    interpolation: Annotated[
        Literal["bicubic", "bilinear", "nearest"] | None, Field(description="How images are resized.")
    ] = None
    crop_pct: Annotated[
        float | None, Field(ge=0.1, le=1, description="Share of the resized image that the centre crop keeps.")
    ] = None


@dataclass(frozen=True, config=CONFIG)
class PlanRecipe:
    """What shares with what, and what each block keeps of its own."""

    share: Annotated[
        int | None, Field(ge=1, description=f"Consecutive blocks per group ({DEFAULT_SHARE} if neither is given).")
    ] = None
    groups: Annotated[
        str | None, Field(description="Explicit groups instead of --share, like 0-3,4-7,8-11 (blocks from 0).")
    ] = None
    pattern: Annotated[
        Literal["sequence", "cycle"], Field(description="Blocks of a group follow each other, or are taken in turn.")
    ] = "sequence"
    matrices: Annotated[
        bool, Field(description="Whether a group shares whole matrices; without, factors or nothing (--no-matrices).")
    ] = True
    adapter_rank: Annotated[
        int | None, Field(ge=1, description="Rank of a residual that each block adds to its layers; alone: low rank.")
    ] = None
    basis: Annotated[
        int | None, Field(ge=1, description="Rank of a residual whose basis in the residual stream the group shares.")
    ] = None
    width: Annotated[
        float | None,
        Field(gt=0, lt=1, description="Share of each block's hidden neurons and head channels that is kept."),
    ] = None
    share_biases: Annotated[bool, Field(description="Share the biases of the shared layers too, as published.")] = False
    share_tables: Annotated[bool, Field(description="Share relative position bias tables too, as published.")] = False
    transforms: Annotated[
        tuple[Literal["heads", "mlp", "rpe"], ...] | None,
        Words,
        Field(
            description="Transformations of each block: heads, mlp, rpe (plain ViTs), or none. "
            f"Default: {','.join(TRANSFORMS)} where blocks share whole matrices, else none."
        ),
    ] = None
    token_kernel: Annotated[int, Field(ge=1, description="k of the k×k token convolution (mlp), odd.")] = 3

    def __post_init__(self) -> None:
        if self.share is not None and self.groups is not None:
            raise ValueError("--share and --groups exclude each other")
        kinds = {"--adapter-rank": self.adapter_rank, "--basis": self.basis, "--width": self.width}
        if len(given := [flag for flag, value in kinds.items() if value is not None]) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other")
        if not self.matrices and self.adapter_rank is None and self.basis is None:
            raise ValueError("--no-matrices needs --adapter-rank or --basis, for something must stand in their place")
        if self.pattern == "cycle" and self.groups is not None:
            raise ValueError("--pattern and --groups exclude each other")
        if self.token_kernel % 2 == 0:
            raise ValueError(f"--token-kernel {self.token_kernel}: must be odd, to be centred on a patch")
        if self.transforms is not None and len(set(self.transforms)) < len(self.transforms):
            raise ValueError("--transforms names a transformation twice")


@dataclass(frozen=True, config=CONFIG)
class TargetRecipe:
    """What the plan is searched for, where it is not given."""

    target_ratio: Annotated[
        float | None, Field(gt=1, description="Search the best plan with this many times fewer parameters.")
    ] = None
    target_size: Annotated[
        Annotated[int, Field(gt=0)] | None,
        Bytes,
        Field(description="Search the best plan, and store, for a file no larger than this, like 20MB."),
    ] = None
    target_drop: Annotated[
        float | None,
        Field(gt=0, description="Search the smallest plan that is no more points worse than this before training."),
    ] = None
    kinds: Annotated[
        tuple[Literal["narrow", "low_rank", "share", "adapter", "basis"], ...],
        Words,
        Field(min_length=1, description="What the search may do: narrow, low_rank, share, adapter, basis."),
    ] = KINDS  # type: ignore[assignment]

    def __post_init__(self) -> None:
        given = [name for name in ("target_ratio", "target_size", "target_drop") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(flag_of(name) for name in given)} exclude each other")

    @property
    def is_given(self) -> bool:
        """Whether there is a target."""
        return (self.target_ratio, self.target_size, self.target_drop) != (None, None, None)


@dataclass(frozen=True, config=CONFIG)
class StartRecipe:
    """Which weights the groups start from."""

    start: Annotated[
        Literal["first", "mean", "calibrated"],
        Field(description="Start of the shared weights: the group's first block, its mean, or the least-squares fit."),
    ] = "calibrated"
    calibration_images: Annotated[int, Field(ge=1, description="Images that starts are fitted to.")] = 512


@dataclass(frozen=True, config=CONFIG)
class StoreRecipe:
    """How the file holds the weights."""

    store: Annotated[
        StoreName | None,
        Field(
            description="How the file holds its numbers: source (float32, as the model computes; the default) or "
            "in fewer bits. With --target-size, the search chooses."
        ),
    ] = None
    qat_fraction: Annotated[
        float,
        Field(ge=0, le=1, description="Last share of the training that computes with int8 or int4 matrices already."),
    ] = 0.0
    baselines: Annotated[
        bool, Field(description="Measure the whole source in fp16, int8 and int4 too, to compare with.")
    ] = True

    @property
    def kind(self) -> str:
        """The store, where nothing else chooses it."""
        return self.store or "source"
