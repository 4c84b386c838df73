"""The stages that define the student: source model, plan or target, start, and store."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from vitcompress.recipe.values import CONFIG, Bytes, Pairs, Words, flag_of

DEFAULT_SHARE = 2
TRANSFORMS = ("heads", "mlp")  # default where blocks share whole matrices
StoreName = Literal["source", "fp32", "fp16", "bf16", "int8", "int4"]
KINDS = ("narrow", "low_rank", "share", "adapter", "basis")
QUANTIZED_STORES = ("int8", "int4")  # stores that quantize; training can simulate them


@dataclass(frozen=True, config=CONFIG)
class ModelRecipe:
    """The source: model, weights and preprocessing."""

    model: Annotated[
        str,
        Field(description="timm model name, short name (deit_base), hf-hub:…, local-dir:… or fashion_vit (built in)."),
    ]
    checkpoint: Annotated[
        Path | None,
        Field(
            description="Weights: .safetensors, .pth, .pt or .bin (code in it never runs), or a transformers folder."
        ),
    ] = None
    model_arg: Annotated[
        dict[str, Any],
        Pairs,
        Field(description="key=value argument of timm's model constructor, like img_size=384; repeatable."),
    ] = dataclasses.field(default_factory=dict)
    mean: Annotated[
        tuple[float, ...] | None,
        Words,
        Field(description="Channel means of the normalization, like 0.5,0.5,0.5. Default: the model's."),
    ] = None
    std: Annotated[
        tuple[Annotated[float, Field(ge=1e-6)], ...] | None,
        Words,
        Field(description="Channel standard deviations of the normalization, like 0.5,0.5,0.5. Default: the model's."),
    ] = None
    interpolation: Annotated[
        Literal["bicubic", "bilinear", "nearest"] | None,
        Field(description="Interpolation for resizing images. Default: the model's."),
    ] = None
    crop_pct: Annotated[
        float | None,
        Field(
            ge=0.1, le=1, description="Fraction of the resized image that the center crop keeps. Default: the model's."
        ),
    ] = None


@dataclass(frozen=True, config=CONFIG)
class PlanRecipe:
    """Which blocks share weights, and what each block keeps for itself."""

    share: Annotated[
        int | None,
        Field(
            ge=1,
            description=f"Number of consecutive blocks that share weights. Default: {DEFAULT_SHARE}, if no --groups.",
        ),
    ] = None
    groups: Annotated[
        str | None,
        Field(description="Blocks that share weights, like 0-3,4-7,8-11 (numbered from 0); instead of --share."),
    ] = None
    pattern: Annotated[
        Literal["sequence", "cycle"],
        Field(description="How --share groups blocks: neighbors (sequence, 0 0 1 1) or in turn (cycle, 0 1 0 1)."),
    ] = "sequence"
    matrices: Annotated[
        bool,
        Field(description="Share whole matrices in a group. --no-matrices: only factors (--adapter-rank, --basis)."),
    ] = True
    adapter_rank: Annotated[
        int | None,
        Field(ge=1, description="Rank of a low-rank residual that each block adds to the matrices it shares."),
    ] = None
    basis: Annotated[
        int | None,
        Field(
            ge=1,
            description="Like --adapter-rank, but the group shares the factor on the residual stream's side.",
        ),
    ] = None
    width: Annotated[
        float | None,
        Field(gt=0, lt=1, description="Fraction of each block's hidden neurons and head channels to keep."),
    ] = None
    share_biases: Annotated[bool, Field(description="Share the biases of shared layers too, as MiniViT does.")] = False
    share_tables: Annotated[bool, Field(description="Share relative position bias tables too, as MiniViT does.")] = (
        False
    )
    transforms: Annotated[
        tuple[Literal["heads", "mlp", "rpe"], ...] | None,
        Words,
        Field(
            description="Transformations added to each block, comma-separated: heads, mlp, rpe (plain ViTs only), "
            f"or none. Default: {','.join(TRANSFORMS)} where blocks share whole matrices, else none."
        ),
    ] = None
    token_kernel: Annotated[
        int, Field(ge=1, description="Kernel size k of the k×k token convolution (the mlp transformation); odd.")
    ] = 3

    def __post_init__(self) -> None:
        if self.share is not None and self.groups is not None:
            raise ValueError("--share and --groups exclude each other")
        kinds = {"--adapter-rank": self.adapter_rank, "--basis": self.basis, "--width": self.width}
        given = [flag for flag, value in kinds.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other")
        if not self.matrices and self.adapter_rank is None and self.basis is None:
            raise ValueError("--no-matrices needs --adapter-rank or --basis to replace the matrices")
        if self.pattern == "cycle" and self.groups is not None:
            raise ValueError("--pattern and --groups exclude each other")
        if self.token_kernel % 2 == 0:
            raise ValueError(f"--token-kernel {self.token_kernel}: must be odd, so that the kernel has a center")
        if self.transforms is not None and len(set(self.transforms)) < len(self.transforms):
            raise ValueError("--transforms names a transformation twice")


@dataclass(frozen=True, config=CONFIG)
class TargetRecipe:
    """What to search a plan for, instead of giving one."""

    target_ratio: Annotated[
        float | None, Field(gt=1, description="Find the best plan with at least this many times fewer parameters.")
    ] = None
    target_size: Annotated[
        Annotated[int, Field(gt=0)] | None,
        Bytes,
        Field(description="Find the best plan and store for a file of at most this size, like 20MB."),
    ] = None
    target_drop: Annotated[
        float | None,
        Field(gt=0, description="Find the smallest plan that loses at most this many points before training."),
    ] = None
    kinds: Annotated[
        tuple[Literal["narrow", "low_rank", "share", "adapter", "basis"], ...],
        Words,
        Field(min_length=1, description="Kinds of compression that the search may use, comma-separated."),
    ] = KINDS  # type: ignore[assignment]

    def __post_init__(self) -> None:
        given = [name for name in ("target_ratio", "target_size", "target_drop") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(flag_of(name) for name in given)} exclude each other")

    @property
    def is_given(self) -> bool:
        """Whether a target is given."""
        return (self.target_ratio, self.target_size, self.target_drop) != (None, None, None)


@dataclass(frozen=True, config=CONFIG)
class StartRecipe:
    """The weights that groups start from."""

    start: Annotated[
        Literal["first", "mean", "calibrated"],
        Field(
            description="Initial weights of a group: of its first block, their mean, or a least-squares fit to images."
        ),
    ] = "calibrated"
    calibration_images: Annotated[
        int, Field(ge=1, description="Number of images for calibrated starts and for the search.")
    ] = 512


@dataclass(frozen=True, config=CONFIG)
class StoreRecipe:
    """How the file stores the weights."""

    store: Annotated[
        StoreName | None,
        Field(
            description="Number format of the file. Default: source (float32, as the model computes); "
            "with --target-size, the search chooses."
        ),
    ] = None
    qat_fraction: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Final fraction of the training that computes with int8 or int4 weights.",
        ),
    ] = 0.0
    baselines: Annotated[
        bool, Field(description="Also measure the source model in fp16, int8 and int4, for comparison.")
    ] = True

    @property
    def kind(self) -> str:
        """The given store, or the default."""
        return self.store or "source"
