"""Codecs that store weights in fewer bits: functions from numbers to codes and scales, and back.

    int8   w[o, i] ≈ scale[o] · code[o, i]            code −127 … 127, scale float32
    int4   w[o, i] ≈ scale[o, i // 32] · code[o, i]   code −8 … 7, two to a byte, scale float16

Only the matrices of `nn.Linear` and `nn.Conv2d` are quantized. Everything else becomes float16:
vectors, norms and position embeddings are a hundredth of the parameters, and act on every token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcompress.families.registry import family_of

GROUP = 32  # columns that share an int4 scale
SCALE = ".scale"  # suffix of a tensor's name; it collides with no other name of a state dict
MIN_INPUTS = 8  # a shorter row saves nothing, because its scale takes what its codes save
# A group's largest number divided by each of these is a candidate for the scale. −8 gives that
# number the last code; with larger divisors it is clipped, and the others are more exact.
_DIVISORS = (-7.0, -7.5, -8.0, -8.5, -9.0, -10.0, -11.0)
_HALF = torch.finfo(torch.float16)

Shape = tuple[int, ...]


def encode_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to 255 levels per row, symmetric about zero.

    Args:
        weight: `[O, …]`.

    Returns:
        Codes of the same shape, and scales `[O]`: 1/127 of the row's largest number. The error of a
        number is at most half the scale. Scales stay float32, because this bound would not hold for
        rows near float16's smallest number.
    """
    rows = weight.detach().float().flatten(1)
    scale = rows.abs().amax(1) / 127
    codes = (rows / _divisor(scale)[:, None]).round().clamp(-127, 127).to(torch.int8)
    return codes.view(weight.shape), scale


def decode_int8(codes: Tensor, scale: Tensor, shape: Shape) -> Tensor:
    """Decode the matrix `[O, …]` that `encode_int8` encoded, in float32."""
    return codes.float() * scale.float().view(-1, *[1] * (len(shape) - 1))


def encode_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to 16 levels per group of 32 columns of a row; the last group may be shorter.

    Args:
        weight: `[O, …]`, with I numbers per row.

    Returns:
        Codes `[O, ⌈I/2⌉]`, two per byte, the even column in the low half; and scales `[O, ⌈I/32⌉]`,
        those of a few candidates with the least squared error of the group. The group's largest
        number becomes about −8, so a scale may be negative.
    """
    rows = weight.detach().float().flatten(1)
    groups = _groups(rows)
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    scale, error = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for divisor in _DIVISORS:
        candidate = (largest / divisor).clamp(_HALF.min, _HALF.max).half().float()
        candidate_error = (_codes(groups, candidate) * candidate - groups).square().sum(2, keepdim=True)
        scale, error = torch.where(candidate_error < error, candidate, scale), torch.minimum(candidate_error, error)
    codes = _codes(groups, scale).flatten(1)[:, : rows.shape[1]]
    return pack(codes), scale.squeeze(2).half()


def decode_int4(codes: Tensor, scale: Tensor, shape: Shape) -> Tensor:
    """Decode the matrix `[O, …]` that `encode_int4` encoded, in float32."""
    num_inputs = int(torch.Size(shape[1:]).numel())
    groups = _groups(unpack(codes)[:, :num_inputs].float())
    rows = (groups * scale.float()[..., None]).flatten(1)
    return rows[:, :num_inputs].reshape(shape)


def pack(codes: Tensor) -> Tensor:
    """Pack codes −8 … 7 `[O, I]` into bytes `[O, ⌈I/2⌉]`."""
    offset = F.pad(codes + 8, (0, codes.shape[1] % 2)).to(torch.uint8)
    return offset[:, 0::2] | (offset[:, 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Unpack bytes from `pack` to int8 codes `[O, 2 · bytes]`; one too many if I was odd."""
    halves = torch.stack([packed & 15, packed >> 4], dim=2)
    return halves.flatten(1).to(torch.int8) - 8


def _groups(rows: Tensor) -> Tensor:
    """Split rows `[O, I]` into groups `[O, ⌈I/32⌉, 32]`; zeros fill the last group."""
    return F.pad(rows, (0, -rows.shape[1] % GROUP)).view(len(rows), -1, GROUP)


def _codes(groups: Tensor, scale: Tensor) -> Tensor:
    return (groups / _divisor(scale)).round().clamp(-8, 7)


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)  # the scale of zeros is 0


@dataclass(frozen=True)
class Codec:
    """Functions that encode matrices as codes and scales, and decode them.

    Attributes:
        encode: matrix `[O, …]` to codes and scales, both with O as first dimension.
        decode: codes, scales and shape `[O, …]` to the matrix in float32.
    """

    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor, Tensor, Shape], Tensor]

    def round_trip(self, weight: Tensor) -> Tensor:
        """Encode and decode a matrix; the result has its dtype."""
        return self.decode(*self.encode(weight), tuple(weight.shape)).to(weight.dtype)


@dataclass(frozen=True)
class Store:
    """How a file stores tensors.

    Attributes:
        dtype: dtype of parameters that are not quantized; None to keep that of the model.
        codec: codec of matrices; None if they are not quantized.
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
    """Convert a floating tensor to a dtype; to float32 instead if it overflows float16.

    Underflow is accepted: below 6e-5, float16 loses digits, but its error is at most 3e-8. Tensors
    on the meta device are taken to fit.
    """
    if dtype is None or not t.is_floating_point():
        return t
    overflows = dtype == torch.float16 and not t.is_meta and bool((t.detach().abs() > _HALF.max).any())
    return t.to(torch.float32 if overflows else dtype)


def matrix_names(model: nn.Module) -> frozenset[str]:
    """Return the full names of the parameters that are quantized, aliases included.

    These are the parameters with two or more dimensions of `nn.Linear`, `nn.Conv2d` and any module
    with a class attribute `holds_matrices = True`; except relative position tables and the small
    networks that compute them.

    Args:
        model: a model of a known family; may be on the meta device.
    """
    family = family_of(model, type(model).__name__)
    tables = {
        f"{block}.{name}"
        for block in family.block_names(model)
        for name, _ in model.get_submodule(block).named_parameters(remove_duplicate=False)
        if family.tables.fullmatch(name)
    }
    matrices = frozenset(
        f"{path}.{leaf}"
        for path, owner in model.named_modules()
        if isinstance(owner, nn.Linear | nn.Conv2d) or getattr(owner, "holds_matrices", False)
        for leaf, p in owner.named_parameters(recurse=False)
        if is_matrix(p)
    )
    return matrices - tables


def is_matrix(t: Tensor) -> bool:
    """Return whether a parameter is large enough to quantize: two dimensions, rows of 8 or more."""
    return t.ndim >= 2 and t.shape[1:].numel() >= MIN_INPUTS


def encode(
    tensors: Mapping[str, Tensor], store: str, *, matrices: Collection[str], parameters: Collection[str]
) -> dict[str, Tensor]:
    """Encode tensors as a file stores them; works on the meta device too.

    Args:
        tensors: tensors by name, each shared one once.
        store: a key of `STORES`.
        matrices: names of the tensors to quantize, if the store does.
        parameters: names of the parameters; other tensors are kept as they are.

    Returns:
        The stored tensors by name; scales have the suffix `.scale`.
    """
    dtype, codec = STORES[store].dtype, STORES[store].codec
    stored: dict[str, Tensor] = {}
    for name, t in tensors.items():
        if codec and name in matrices:
            stored[name], stored[name + SCALE] = codec.encode(t)
        else:
            stored[name] = cast(t, dtype) if name in parameters else t
    return stored


def decode(stored: Mapping[str, Tensor], like: Mapping[str, Tensor], store: str) -> dict[str, Tensor]:
    """Decode stored tensors to the dtypes and shapes of `like`, which may be on the meta device."""
    codec = STORES[store].codec
    return {
        name: codec.decode(stored[name], stored[name + SCALE], tuple(t.shape)).to(t.dtype)
        if codec and name + SCALE in stored
        else stored[name].to(t.dtype)
        for name, t in like.items()
    }


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of all tensors, which may be on the meta device."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def stored_bytes(model: nn.Module, store: str) -> dict[str, int]:
    """Return the bytes of each state dict entry in a file, with its scales; reads no values."""
    matrices = matrix_names(model) if STORES[store].codec else frozenset()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {
        name: bytes_of(tuple(t.shape), t.dtype, store, matrix=name in matrices, learned=name in parameters)
        for name, t in model.state_dict().items()
    }


@functools.cache
def bytes_of(shape: tuple[int, ...], dtype: torch.dtype, store: str, *, matrix: bool, learned: bool) -> int:
    """Return the bytes of a tensor in a file, with its scales.

    Cached, because a search asks for the same ones many times.

    Args:
        shape: shape of the tensor.
        dtype: dtype of the tensor.
        store: a key of `STORES`.
        matrix: whether it is quantized, if the store does.
        learned: whether it is a parameter; other tensors are kept as they are.
    """
    tensors = {"t": torch.empty(shape, dtype=dtype, device="meta")}
    return num_bytes(encode(tensors, store, matrices=tensors if matrix else (), parameters=tensors if learned else ()))
