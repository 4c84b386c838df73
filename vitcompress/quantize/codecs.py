"""How is a weight stored in fewer bits?  Pure functions: numbers to codes and scales, and back.

    int8   w[o, i] ≈ scale[o] · code[o, i]            code −127 … 127, scale float32
    int4   w[o, i] ≈ scale[o, i // 32] · code[o, i]   code −8 … 7, two to a byte, scale float16

Only matrices are quantised: what `nn.Linear` and `nn.Conv2d` multiply by. All else stays float16: vectors, norms and
positions are a hundredth of the numbers, and each of them acts on every token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcompress.families.find import family_of

GROUP = 32
SCALE = ".scale"  # after a tensor's name: no state dict has names below that of a tensor, so it collides with none
MIN_INPUTS = 8  # a shorter row saves nothing: its scale takes what its codes save
# what a group's largest number is divided by: −8 gives it the last code, more clips it for the sake of the others
_DIVISORS = (-7.0, -7.5, -8.0, -8.5, -9.0, -10.0, -11.0)
_HALF = torch.finfo(torch.float16)

Shape = tuple[int, ...]


def encode_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to 255 levels per row, symmetric about zero.

    Args:
        weight: `[O, …]`.

    Returns:
        Codes of the same shape, and `[O]` scales, a 127th of the row's largest number: no number is off by more than
        half of it. Scales stay float32, since that bound would not hold for rows near float16's smallest number.
    """
    rows = weight.detach().float().flatten(1)
    scale = rows.abs().amax(1) / 127
    codes = (rows / _divisor(scale)[:, None]).round().clamp(-127, 127).to(torch.int8)
    return codes.view(weight.shape), scale


def decode_int8(codes: Tensor, scale: Tensor, shape: Shape) -> Tensor:
    """The matrix `[O, …]` that `encode_int8` stored, in float32."""
    return codes.float() * scale.float().view(-1, *[1] * (len(shape) - 1))


def encode_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to 16 levels per group of 32 neighbours in a row; the last group may be shorter.

    Args:
        weight: `[O, …]`, of I numbers per row.

    Returns:
        Codes `[O, ⌈I/2⌉]`, two to a byte, the even column in the low half; and scales `[O, ⌈I/32⌉]`, whichever of a few
        gives the group the least squared error. The group's largest number goes to −8, so a scale may be negative.
    """
    rows = weight.detach().float().flatten(1)
    groups = _groups(rows)
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    scale, error = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for divisor in _DIVISORS:
        tried = (largest / divisor).clamp(_HALF.min, _HALF.max).half().float()
        off = (_codes(groups, tried) * tried - groups).square().sum(2, keepdim=True)
        scale, error = torch.where(off < error, tried, scale), torch.minimum(off, error)
    codes = _codes(groups, scale).flatten(1)[:, : rows.shape[1]]
    return pack(codes), scale.squeeze(2).half()


def decode_int4(codes: Tensor, scale: Tensor, shape: Shape) -> Tensor:
    """The matrix `[O, …]` that `encode_int4` stored, in float32."""
    num_inputs = int(torch.Size(shape[1:]).numel())
    groups = _groups(unpack(codes)[:, :num_inputs].float())
    rows = (groups * scale.float()[..., None]).flatten(1)
    return rows[:, :num_inputs].reshape(shape)


def pack(codes: Tensor) -> Tensor:
    """Numbers −8 … 7 `[O, I]` as bytes `[O, ⌈I/2⌉]`."""
    offset = F.pad(codes + 8, (0, codes.shape[1] % 2)).to(torch.uint8)
    return offset[:, 0::2] | (offset[:, 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """The numbers that `pack` packed, as int8 `[O, 2 · bytes]`: where I was odd, one too many."""
    halves = torch.stack([packed & 15, packed >> 4], dim=2)
    return halves.flatten(1).to(torch.int8) - 8


def _groups(rows: Tensor) -> Tensor:
    """`[O, I]` as `[O, ⌈I/32⌉, 32]`, the last group filled up with zeros."""
    filled = F.pad(rows, (0, -rows.shape[1] % GROUP))
    return filled.view(len(rows), -1, GROUP)


def _codes(groups: Tensor, scale: Tensor) -> Tensor:
    return (groups / _divisor(scale)).round().clamp(-8, 7)


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)  # a row of zeros has the scale zero


@dataclass(frozen=True)
class Codec:
    """How matrices become codes and scales, and back.

    Attributes:
        encode: `[O, …]` to codes and scales, both first along O.
        decode: codes, scales and the shape `[O, …]` to float32.
    """

    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor, Tensor, Shape], Tensor]

    def round_trip(self, weight: Tensor) -> Tensor:
        """What is left of a matrix once it is stored, in its own type."""
        return self.decode(*self.encode(weight), tuple(weight.shape)).to(weight.dtype)


@dataclass(frozen=True)
class Store:
    """How the tensors of a file are held.

    Attributes:
        dtype: of parameters that are not quantised; None: as they are.
        codec: of matrices; None where they are not quantised.
    """

    dtype: torch.dtype | None = None
    codec: Codec | None = None


STORES: Mapping[str, Store] = {
    "source": Store(),
    "fp32": Store(torch.float32),
    "fp16": Store(torch.float16),
    "bf16": Store(torch.bfloat16),
    "int8": Store(torch.float16, Codec(encode_int8, decode_int8)),
    "int4": Store(torch.float16, Codec(encode_int4, decode_int4)),
}


def cast(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor in another floating type; float32 where its largest number is beyond float16.

    Its smallest may be: below 6e-5 float16 loses digits, but is never off by more than 3e-8. Tensors without values
    are taken to fit, as all but broken ones do.
    """
    if dtype is None or not t.is_floating_point():
        return t
    beyond = dtype == torch.float16 and not t.is_meta and bool((t.detach().abs() > _HALF.max).any())
    return t.to(torch.float32 if beyond else dtype)


def matrix_names(model: nn.Module) -> frozenset[str]:
    """Full names of the parameters that are quantised, under every name they have.

    They are those of two or more dimensions in an `nn.Linear`, an `nn.Conv2d`, or any module with a class attribute
    `holds_matrices = True`. The small networks that make up tables of relative positions are left out, like the tables.

    Args:
        model: of a known family; meta will do.
    """
    family = family_of(model, type(model).__name__)
    tables = {
        f"{block}.{name}"
        for block in family.block_names(model)
        for name, _ in model.get_submodule(block).named_parameters(remove_duplicate=False)
        if family.tables.fullmatch(name)
    }
    found = frozenset(
        f"{path}.{leaf}"
        for path, owner in model.named_modules()
        if isinstance(owner, nn.Linear | nn.Conv2d) or getattr(owner, "holds_matrices", False)
        for leaf, p in owner.named_parameters(recurse=False)
        if is_matrix(p)
    )
    return found - tables


def is_matrix(t: Tensor) -> bool:
    """Whether a parameter of a linear layer is large enough to be quantised: two dimensions, rows of 8 or more."""
    return t.ndim >= 2 and t.shape[1:].numel() >= MIN_INPUTS


def encode(
    tensors: Mapping[str, Tensor], store: str, *, matrices: Collection[str], parameters: Collection[str]
) -> dict[str, Tensor]:
    """What a file holds of `tensors`; on the meta device, its names, types and shapes.

    Args:
        tensors: by name, each shared one once.
        store: a key of `STORES`.
        matrices: names of those that are quantised where the store does that.
        parameters: names of those that were learned: all others stay as they are.
    """
    how = STORES[store]
    found: dict[str, Tensor] = {}
    for name, t in tensors.items():
        if how.codec and name in matrices:
            found[name], found[name + SCALE] = how.codec.encode(t)
        else:
            found[name] = cast(t, how.dtype) if name in parameters else t
    return found


def decode(stored: Mapping[str, Tensor], like: Mapping[str, Tensor], store: str) -> dict[str, Tensor]:
    """The tensors that `encode` stored, in the types and shapes of `like`, which may be on the meta device."""
    codec = STORES[store].codec
    return {
        name: codec.decode(stored[name], stored[name + SCALE], tuple(t.shape)).to(t.dtype)
        if codec and name + SCALE in stored
        else stored[name].to(t.dtype)
        for name, t in like.items()
    }


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors; meta will do."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def stored_bytes(model: nn.Module, store: str) -> dict[str, int]:
    """Bytes that each entry of the model's state dict takes in a file, its scales with it; reads no values."""
    matrices = matrix_names(model) if STORES[store].codec else frozenset()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {
        name: bytes_of(tuple(t.shape), t.dtype, store, matrix=name in matrices, learned=name in parameters)
        for name, t in model.state_dict().items()
    }


@functools.cache
def bytes_of(shape: tuple[int, ...], dtype: torch.dtype, store: str, *, matrix: bool, learned: bool) -> int:
    """Bytes that a tensor takes in a file, its scales with it; kept, for a search asks for the same ones many times.

    Args:
        shape: of the tensor.
        dtype: its own.
        store: a key of `STORES`.
        matrix: it is quantised where the store does that.
        learned: it is a parameter: what is none stays as it is.
    """
    names = {"t": torch.empty(shape, dtype=dtype, device="meta")}
    return num_bytes(encode(names, store, matrices=names if matrix else (), parameters=names if learned else ()))
