"""What did the user ask for?  One frozen dataclass per stage: the same recipe as CLI flags, as YAML and as JSON.

A field is declared once, here: its default, its bounds and its help are those of the flag, of the YAML key and of the
reference.  `vitcompress.cli` makes the flags from these classes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import yaml
from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from vitcompress.errors import nearest

DEFAULT_SHARE = 2
DEFAULT_STEPS = 500
TRANSFORMS = ("heads", "mlp")  # the default where blocks share whole matrices
KINDS = ("narrow", "low_rank", "share", "adapter", "basis")
STORES_IN_LOOP = ("int8", "int4")  # those that a training can be told of
LOSSES = ("logits", "hidden", "attention", "hidden_relation", "features", "labels")

_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)


def _words(value: Any) -> Any:
    """`a,b` or `none` as a tuple of words."""
    if isinstance(value, str):
        return () if value.strip() in ("", "none") else tuple(word.strip() for word in value.split(","))
    return value


def _mapping(value: Any) -> Any:
    """`key=value` strings as a mapping; each value is read as YAML (`16`, `0.5`, `true`, `[14, 14]`)."""
    if not isinstance(value, (list, tuple)):
        return value
    pairs = {}
    for item in value:
        key, equals, text = str(item).partition("=")
        if not equals or not key:
            raise ValueError(f"{item!r} is not of the form key=value")
        try:
            pairs[key.strip().replace("-", "_")] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{item!r}: {text!r} cannot be read as YAML") from error
    return pairs


def _bytes(value: Any) -> Any:
    """`40MB` (10⁶), `40MiB` (2²⁰) or a bare number of bytes as an integer."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMG]?)(i?)B?\s*", value)
    if found is None:
        raise ValueError(f"{value!r} is not a size like 40MB or 38MiB")
    power = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3}[found[2]]
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


Words = BeforeValidator(_words)
Pairs = BeforeValidator(_mapping)


@dataclass(frozen=True, config=_CONFIG)
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
        tuple[Annotated[float, Field(gt=0)], ...] | None,
        Words,
        Field(description="Channel deviations, like 0.5,0.5,0.5."),
    ] = None
    interpolation: Annotated[
        Literal["bicubic", "bilinear", "nearest"] | None, Field(description="How images are resized.")
    ] = None
    crop_pct: Annotated[
        float | None, Field(ge=0.1, le=1, description="Share of the resized image that the centre crop keeps.")
    ] = None


@dataclass(frozen=True, config=_CONFIG)
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


@dataclass(frozen=True, config=_CONFIG)
class TargetRecipe:
    """What the plan is searched for, where it is not given."""

    target_ratio: Annotated[
        float | None, Field(gt=1, description="Search the best plan with this many times fewer parameters.")
    ] = None
    target_size: Annotated[
        Annotated[int, Field(gt=0)] | None,
        BeforeValidator(_bytes),
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
        given = [f for f in ("target_ratio", "target_size", "target_drop") if getattr(self, f) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join('--' + f.replace('_', '-') for f in given)} exclude each other")

    @property
    def is_given(self) -> bool:
        """Whether there is a target."""
        return (self.target_ratio, self.target_size, self.target_drop) != (None, None, None)


@dataclass(frozen=True, config=_CONFIG)
class StartRecipe:
    """Which weights the groups start from."""

    start: Annotated[
        Literal["first", "mean", "calibrated"],
        Field(description="Start of the shared weights: the group's first block, its mean, or the least-squares fit."),
    ] = "first"
    calibration_images: Annotated[int, Field(ge=1, description="Images that starts are fitted to.")] = 256


@dataclass(frozen=True, config=_CONFIG)
class DataRecipe:
    """Images, labels and views."""

    data: Annotated[
        Path | None,
        Field(description="Training images: class folders, a flat folder, or a folder with train/ and val/ in it."),
    ] = None
    val_data: Annotated[
        Path | None, Field(description="Images to evaluate on; default: val/ beside train/, else a tenth held out.")
    ] = None
    class_map: Annotated[
        Path | None, Field(description="Text file with a folder name per line, in the order of the model's classes.")
    ] = None
    skip_bad_images: Annotated[bool, Field(description="Count images that cannot be read instead of stopping.")] = False
    batch_size: Annotated[int, Field(ge=1, description="Images per step.")] = 128
    num_workers: Annotated[
        int | None, Field(ge=0, description="Processes that decode images; default: by the number of cores.")
    ] = None
    crop_min: Annotated[
        float, Field(gt=0, le=1, description="Smallest share of the image that a random training crop keeps.")
    ] = 0.6
    hflip: Annotated[float, Field(ge=0, le=1, description="Probability of mirroring a training image.")] = 0.5
    auto_augment: Annotated[
        str | None, Field(description="timm's policy for training images, like rand-m9-mstd0.5-inc1.")
    ] = None
    erase: Annotated[float, Field(ge=0, le=1, description="Probability of erasing a part of a training image.")] = 0.0
    repeats: Annotated[
        int, Field(ge=1, description="Views of an image that follow each other (repeated augmentation).")
    ] = 1
    mixup: Annotated[float, Field(ge=0, description="α of mixup: blends of two images; 0 is none.")] = 0.0
    cutmix: Annotated[float, Field(ge=0, description="α of cutmix: parts pasted from another image; 0 is none.")] = 0.0

    def __post_init__(self) -> None:
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"--batch-size {self.batch_size}: must be even, --mixup and --cutmix take images in pairs")


@dataclass(frozen=True, config=_CONFIG)
class TeacherRecipe:
    """Whom the student learns from, where it is not the model itself."""

    teacher: Annotated[
        str | None, Field(description="Another model to learn from, named like MODEL, or a file of vitcompress.")
    ] = None
    teacher_checkpoint: Annotated[Path | None, Field(description="Weights of the teacher.")] = None
    teacher_arg: Annotated[
        dict[str, Any], Pairs, Field(description="key=value for the teacher's constructor; repeatable.")
    ] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.teacher is None and (self.teacher_checkpoint is not None or self.teacher_arg):
            flag = "--teacher-arg" if self.teacher_checkpoint is None else "--teacher-checkpoint"
            raise ValueError(f"{flag} needs --teacher")


@dataclass(frozen=True, config=_CONFIG)
class DistillRecipe:
    """How the student learns from the teacher."""

    steps: Annotated[
        int | None,
        Field(ge=0, description=f"Training steps ({DEFAULT_STEPS} if no length is given); 0 converts only."),
    ] = None
    epochs: Annotated[float | None, Field(gt=0, description="Training length in passes over the images.")] = None
    max_minutes: Annotated[float | None, Field(gt=0, description="Training length in minutes.")] = None
    optimizer: Annotated[
        Literal["adamw", "muon"],
        Field(description="adamw; or muon for the blocks' matrices and adamw for the rest (long runs, far starts)."),
    ] = "adamw"
    lr: Annotated[float, Field(gt=0, description="Peak learning rate of AdamW.")] = 5e-4
    matrix_lr: Annotated[float, Field(gt=0, description="Peak learning rate of Muon.")] = 0.02
    weight_decay: Annotated[
        float, Field(ge=0, description="Weight decay of matrices; vectors and transformations have none.")
    ] = 0.05
    fade: Annotated[
        float,
        Field(ge=0, le=0.9, description="Share of the training during which the blocks' own matrices fade out."),
    ] = 0.0
    warmup: Annotated[float, Field(ge=0, lt=1, description="Share of the training spent warming up.")] = 0.1
    clip_norm: Annotated[float, Field(gt=0, description="Largest norm of the gradient.")] = 1.0
    loss: Annotated[
        dict[str, Annotated[float, Field(ge=0)]] | None,
        Pairs,
        Field(
            description="Weight of a loss, name=weight; repeatable. Losses: " + ", ".join(LOSSES) + ". Default: by "
            "model and command; to compress a model with classes, logits=1 hidden=1 attention=1 hidden_relation=0.1."
        ),
    ] = None
    temperature: Annotated[float, Field(gt=0, description="Temperature of the logits loss.")] = 1.0
    label_smoothing: Annotated[
        float, Field(ge=0, lt=1, description="Share of each label spread over all classes (labels loss).")
    ] = 0.0
    layers: Annotated[
        str | None,
        Field(
            description="Compared blocks, student:teacher, like 1:3,3:9 (1 is 1:1; blocks from 0); "
            "default: every block, the teacher's evenly spread."
        ),
    ] = None
    relation_heads: Annotated[
        int, Field(ge=1, description="Parts of the width that attention relations are taken of, as published 1.")
    ] = 1
    max_relation_tokens: Annotated[
        int, Field(ge=2, description="Most tokens that relations are taken of, at random and anew each step.")
    ] = 196
    ema: Annotated[
        float | None, Field(gt=0, lt=1, description="Decay of a running mean of the weights, to be kept instead.")
    ] = None
    drop_path: Annotated[
        float, Field(ge=0, lt=1, description="Probability of skipping the last block's branches; grows with depth.")
    ] = 0.0
    grad_checkpointing: Annotated[
        bool, Field(description="Compute blocks again in the backward pass: less memory, more time.")
    ] = False

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.steps, self.epochs, self.max_minutes)) > 1:
            raise ValueError("--steps, --epochs and --max-minutes exclude each other")
        if self.loss is None:
            return
        for name in self.loss.keys() - set(LOSSES):
            raise ValueError(f"--loss {name}: no such loss{nearest(name, LOSSES)}; there are {', '.join(LOSSES)}")
        if not any(self.loss.values()):
            raise ValueError("--loss: every weight is zero, so there is nothing to learn")
        if self.label_smoothing and not self.loss.get("labels"):
            raise ValueError(f"--label-smoothing {self.label_smoothing:g}: there is no labels loss to smooth")


@dataclass(frozen=True, config=_CONFIG)
class StoreRecipe:
    """How the file holds the weights."""

    store: Annotated[
        Literal["source", "fp32", "fp16", "bf16", "int8", "int4"] | None,
        Field(
            description="How the file holds its numbers: source (as the source does; the default) or in fewer bits. "
            "With --target-size, the search chooses."
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


@dataclass(frozen=True, config=_CONFIG)
class RunRecipe:
    """Where and how reproducibly it runs."""

    seed: Annotated[int, Field(ge=0, lt=2**32, description="Seed of data order, views and drop path.")] = 0
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], Field(description="Device to train on.")] = "auto"


@dataclass(frozen=True, config=_CONFIG)
class GateRecipe:
    """What the result must reach; a missed gate ends with exit code 3."""

    max_drop: Annotated[float | None, Field(description="Largest drop of top-1, in points.")] = None
    min_ratio: Annotated[float | None, Field(gt=0, description="Smallest ratio of parameters, before to after.")] = None
    max_size: Annotated[
        Annotated[int, Field(gt=0)] | None,
        BeforeValidator(_bytes),
        Field(description="Largest file, like 40MB or 38MiB."),
    ] = None


@dataclass(frozen=True, config=_CONFIG)
class Recipe:
    """Everything that decides what comes out."""

    model: ModelRecipe
    plan: PlanRecipe = dataclasses.field(default_factory=PlanRecipe)
    target: TargetRecipe = dataclasses.field(default_factory=TargetRecipe)
    start: StartRecipe = dataclasses.field(default_factory=StartRecipe)
    data: DataRecipe = dataclasses.field(default_factory=DataRecipe)
    teacher: TeacherRecipe = dataclasses.field(default_factory=TeacherRecipe)
    distill: DistillRecipe = dataclasses.field(default_factory=DistillRecipe)
    store: StoreRecipe = dataclasses.field(default_factory=StoreRecipe)
    run: RunRecipe = dataclasses.field(default_factory=RunRecipe)
    gates: GateRecipe = dataclasses.field(default_factory=GateRecipe)


STAGES: Mapping[str, Any] = get_type_hints(Recipe)


@dataclasses.dataclass(frozen=True)
class Option:
    """One field of a stage, as the command line needs it.

    Attributes:
        stage: name of the stage.
        name: name of the field.
        cli_type: what the command line collects; the recipe checks and converts it.
        shown_default: what stands in its place where it is not given; empty where the help says it.
        help: one sentence.
    """

    stage: str
    name: str
    cli_type: Any
    shown_default: str
    help: str


def options(*stages: str) -> Iterator[Option]:
    """Every field of the named stages, in order of declaration."""
    for stage in stages:
        hints = get_type_hints(STAGES[stage], include_extras=True)
        for field in dataclasses.fields(STAGES[stage]):
            kind, *metadata = get_args(hints[field.name])
            help_text = next(m.description for m in metadata if getattr(m, "description", None))
            parsed = any(isinstance(m, BeforeValidator) for m in metadata)
            yield Option(stage, field.name, _cli_type(kind, parsed=parsed), _shown_default(field), help_text)


def _cli_type(kind: Any, *, parsed: bool) -> Any:
    """What the command line collects for a field of type `kind`: text where the recipe parses it."""
    plain = next((k for k in get_args(kind) if k is not type(None)), kind) if type(None) in get_args(kind) else kind
    if get_origin(plain) is dict:
        return list[str]
    return plain if plain in (bool, int, float, Path) and not parsed else str


def _shown_default(field: Any) -> str:
    default = field.default_factory() if callable(field.default_factory) else field.default
    if default in (None, False, {}) or default is dataclasses.MISSING or isinstance(default, FieldInfo):
        return ""
    if isinstance(default, dict):
        return " ".join(f"{key}={value:g}" for key, value in default.items())
    return ",".join(default) if isinstance(default, tuple) else str(default)
