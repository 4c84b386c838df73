"""The stages that define the student: source model, plan or target, start, and store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from vitcompress.recipe.values import CONFIG, Bytes, Pairs, Words, flag_of, option

DEFAULT_SHARE = 2
TRANSFORMS = ("heads", "mlp")  # default where blocks share whole matrices
OutputName = Literal["classes", "multi_label", "regression"]
StoreName = Literal["source", "fp32", "fp16", "bf16", "int8", "int4"]
DEFAULT_REFINE = 480
MAX_CALIBRATION_IMAGES, MAX_REFINE_IMAGES = (
    1024,
    4096,
)  # that starts are fitted to, by default: in closed form, by steps
KINDS = ("narrow", "low_rank", "skip", "share", "adapter", "basis")
QUANTIZED_STORES = ("int8", "int4")  # stores that quantize; training can simulate them


@dataclass(frozen=True, config=CONFIG)
class ModelRecipe:
    """The source: model, weights and preprocessing."""

    model: Annotated[
        str,
        Field(
            description="timm model name, short name (deit_base), hf-hub:…, local-dir:…, fashion_vit (built in), or an "
            "uncompressed vitcompress file (of finetune)."
        ),
    ]
    checkpoint: Path | None = option(
        None,
        "Weights: .safetensors, .pth, .pt, .bin or .npz (code in it never runs), an index of shards, or a folder with "
        "one of these.",
    )
    model_arg: Annotated[dict[str, Any], Pairs] = option(
        {}, "key=value argument of timm's model constructor, like img_size=384 or depths=2,2,6,2; repeatable."
    )
    outputs: OutputName | None = option(
        None,
        "What the outputs are, of the model and of --teacher: classes (softmax), multi_label (a sigmoid for each "
        "label) or regression (numbers). Default: problem_type of transformers' config.json; without it, regression "
        "for a single output, else classes.",
    )
    mean: Annotated[tuple[float, ...] | None, Words] = option(
        None, "Channel means of the normalization, 0–1, like 0.5,0.5,0.5. Default: the model's."
    )
    std: Annotated[tuple[Annotated[float, Field(ge=1e-6)], ...] | None, Words] = option(
        None, "Channel standard deviations of the normalization, up to 1, like 0.5,0.5,0.5. Default: the model's."
    )
    interpolation: Literal["bicubic", "bilinear", "nearest", "box", "hamming", "lanczos"] | None = option(
        None, "Interpolation for resizing images. Default: the model's."
    )
    crop_pct: float | None = option(
        None, "Fraction of the resized image that the center crop keeps. Default: the model's.", ge=0.1, le=1
    )
    crop_mode: Literal["center", "squash", "border"] | None = option(
        None,
        "How images are made to fit: cut off what is too long (center), change their shape (squash), or add borders "
        "(border). Default: the model's.",
    )
    checkpoint_key: str | None = option(
        None,
        "Key of the weights in the checkpoint, like model_ema or teacher.backbone, where it holds several models. "
        "Default: detected.",
    )

    def __post_init__(self) -> None:
        if self.checkpoint_key is not None and self.checkpoint is None:
            raise ValueError("--checkpoint-key needs --checkpoint")


@dataclass(frozen=True, config=CONFIG)
class PlanRecipe:
    """Which blocks share weights, and what each block keeps for itself."""

    share: int | None = option(
        None,
        f"Number of consecutive blocks that share weights. Default, without --groups: {DEFAULT_SHARE}; with --width, 1 "
        "(no sharing).",
        ge=1,
    )
    groups: str | None = option(
        None, "Blocks that share weights, like 0-3,4-7,8-11 (numbered from 0); instead of --share."
    )
    pattern: Literal["sequence", "cycle"] = option(
        "sequence", "How --share groups blocks: neighbors (sequence, 0 0 1 1) or in turn (cycle, 0 1 0 1)."
    )
    matrices: bool = option(
        True,
        "Share whole weight matrices in a group. --no-matrices replaces them by low-rank factors "
        "(needs --adapter-rank or --basis).",
    )
    adapter_rank: int | None = option(
        None, "Rank of the low-rank (LoRA-style) adapter that each block adds to the matrices it shares.", ge=1
    )
    basis: int | None = option(
        None,
        "Rank of a low-rank factorization of which the group shares one factor, the one that reads from or writes to "
        "the residual stream; each block keeps the other.",
        ge=1,
    )
    width: float | None = option(None, "Fraction of each block's hidden neurons and head channels to keep.", gt=0, lt=1)
    share_biases: bool = option(
        False, "Also share the biases of shared layers. MiniViT does this; the default does not."
    )
    share_tables: bool = option(
        False, "Also share relative position bias tables. MiniViT does this; the default does not."
    )
    transforms: Annotated[tuple[Literal["heads", "mlp", "rpe"], ...] | None, Words] = option(
        None,
        "Transformations added to each block, comma-separated: heads, mlp, rpe (plain ViTs only), "
        f"or none. Default: {','.join(TRANSFORMS)} where blocks share whole matrices, else none.",
    )
    token_kernel: int = option(3, "Kernel size k of the k×k token convolution (the mlp transformation); odd.", ge=1)

    def __post_init__(self) -> None:
        if self.share is not None and self.groups is not None:
            raise ValueError("--share and --groups cannot be used together. Give only one of them")
        kinds = {"--adapter-rank": self.adapter_rank, "--basis": self.basis, "--width": self.width}
        given = [flag for flag, value in kinds.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} cannot be used together. Give only one of them")
        if not self.matrices and self.adapter_rank is None and self.basis is None:
            raise ValueError("--no-matrices needs --adapter-rank or --basis to replace the matrices")
        if self.pattern == "cycle" and self.groups is not None:
            raise ValueError("--pattern and --groups cannot be used together. Give only one of them")
        if self.token_kernel % 2 == 0:
            raise ValueError(f"--token-kernel {self.token_kernel}: must be odd, so that the kernel has a center")
        if self.transforms is not None and len(set(self.transforms)) < len(self.transforms):
            raise ValueError("--transforms names a transformation twice")


@dataclass(frozen=True, config=CONFIG)
class TargetRecipe:
    """What to search a plan for, instead of giving one."""

    target_ratio: float | None = option(
        None, "Search for the best plan that divides the number of parameters by at least this.", gt=1
    )
    target_size: Annotated[Annotated[int, Field(gt=0)] | None, Bytes] = option(
        None, "Search for the best plan and store for a file of at most this size, like 20MB."
    )
    target_drop: float | None = option(
        None,
        "Search for the smallest plan that loses at most this many percentage points of top-1, measured before "
        "training.",
        gt=0,
    )
    kinds: Annotated[tuple[Literal["narrow", "low_rank", "skip", "share", "adapter", "basis"], ...], Words] = option(
        KINDS,
        "Kinds of compression that the search may use, comma-separated. narrow: fewer neurons and head channels; "
        "low_rank: factors instead of matrices; skip: an attention or MLP left out; share: shared blocks; "
        "adapter: shared matrix plus own factors; basis: one factor shared.",
        min_length=1,
    )

    width_multiple: int = option(
        8,
        "The search makes widths of heads and ranks multiples of this, and numbers of neurons multiples of twice "
        "this: odd sizes save parameters but no time. 1 allows any size.",
        ge=1,
    )
    options: Path | None = option(
        None,
        "File of options that plan --calibrate --save has measured; the search chooses from it instead of measuring.",
    )
    max_memory: Annotated[Annotated[int, Field(gt=0)] | None, Bytes] = option(
        None, "Memory for what the search measures, like 8GB. Default: half of what is free."
    )

    def __post_init__(self) -> None:
        given = [name for name in ("target_ratio", "target_size", "target_drop") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(flag_of(name) for name in given)} cannot be used together. Give only one of them"
            )

    @property
    def is_given(self) -> bool:
        """Whether a target is given."""
        return (self.target_ratio, self.target_size, self.target_drop) != (None, None, None)


@dataclass(frozen=True, config=CONFIG)
class StartRecipe:
    """The weights that groups start from."""

    start: Literal["first", "mean", "calibrated"] = option(
        "calibrated",
        "Initial weights that a group shares: those of its first block (first), the mean of its blocks (mean), or a "
        "least-squares fit on calibration images (calibrated).",
    )
    calibration_images: int | None = option(
        None,
        "Number of training images that the initial weights are fitted to, and that a search measures on. Up to 128 "
        "others are held out to judge them. More images are better and take longer. Default: as many as there are, at "
        f"most {MAX_CALIBRATION_IMAGES:,}, or {MAX_REFINE_IMAGES:,} where blocks are trained.",
        ge=1,
    )
    refine: int | None = option(
        None,
        "Steps that blocks are trained for on training images, each to give what the source's block gives, "
        "before the whole student is trained. With --fade, blocks that share weights are left out. "
        f"Default: {DEFAULT_REFINE}; fewer before short trainings, 0 without a training.",
        ge=0,
    )


@dataclass(frozen=True, config=CONFIG)
class StoreRecipe:
    """How the file stores the weights."""

    store: StoreName | None = option(
        None,
        "Number format of the file. Default: source (the data type of the model's weights, usually float32); "
        "with --target-size, the search chooses.",
    )
    qat_fraction: float = option(
        0.0, "Final fraction of the training that computes with int8 or int4 weights.", ge=0, le=1
    )
    baselines: bool = option(True, "Also measure the source model in fp16, int8 and int4, for comparison.")

    @property
    def kind(self) -> str:
        """The given store, or the default."""
        return self.store or "source"
