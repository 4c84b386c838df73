"""Convert models to stored tensors and back; each shared tensor once, under its donor's name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vitcompress.errors import ArtifactError, shorten
from vitcompress.quantize.codecs import SCALE, STORES, decode, encode, matrix_names
from vitcompress.quantize.layers import StoredMatrix, keep_quantized

Layout = dict[str, tuple[frozenset[torch.dtype], tuple[int, ...]]]


def donor_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict with each shared parameter once, under its donor's name."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    aliases = parameters.keys() - dict(model.named_parameters()).keys()
    return {name: t for name, t in model.state_dict().items() if name not in aliases}


def stored_tensors(model: nn.Module, store: str) -> dict[str, Tensor]:
    """Return the tensors that a file stores for `model`.

    Args:
        model: the student, on any device; on the meta device, only names, dtypes and shapes matter.
        store: a key of `STORES`.
    """
    return encode(
        donor_tensors(model),
        store,
        matrices=matrix_names(model) if STORES[store].codec else (),
        parameters=dict(model.named_parameters()).keys(),
    )


def round_to(model: nn.Module, stored: Mapping[str, Tensor], store: str) -> None:
    """Round the model's parameters to the stored ones, in place.

    Args:
        model: the model whose tensors were stored.
        stored: tensors from `stored_tensors`.
        store: their store, a key of `STORES`.
    """
    like = dict(model.named_parameters())
    with torch.no_grad():
        for name, t in decode(stored, like, store).items():
            like[name].copy_(t)


def layout(model: nn.Module, store: str) -> Layout:
    """Return the dtypes and the shape that each tensor of a file may have, by name.

    Args:
        model: the model of the file; may be on the meta device.
        store: a key of `STORES`.
    """
    half = STORES[store].dtype == torch.float16  # tensors that overflow float16 are stored as float32
    return {
        name: (frozenset({t.dtype, torch.float32} if half and t.dtype == torch.float16 else {t.dtype}), tuple(t.shape))
        for name, t in stored_tensors(model, store).items()
    }


def fill(model: nn.Module, stored: Mapping[str, Tensor], store: str = "source", *, quantized: bool = False) -> None:
    """Fill a model's parameters and buffers with stored tensors, in place; keeps what is shared.

    Buffers that are not in the state dict (position indices, shift masks) are computed as timm
    does.

    Args:
        model: a model with the student's architecture; may be on the meta device.
        stored: tensors of a file, by donor name.
        store: a key of `STORES`.
        quantized: keep quantized matrices as codes, and decode them at each use.

    Raises:
        ArtifactError: a buffer cannot be computed.
    """
    codec = STORES[store].codec
    params = dict(model.named_parameters())
    kept = {
        id(p): StoredMatrix(stored[name], stored[name + SCALE], tuple(p.shape), codec)
        for name, p in params.items()
        if codec and quantized and name + SCALE in stored
    }
    floating = decode(stored, {name: p for name, p in params.items() if id(p) not in kept}, store)
    new = {id(params[name]): nn.Parameter(t, requires_grad=params[name].requires_grad) for name, t in floating.items()}
    for prefix, module in list(model.named_modules()):
        for leaf, p in list(module._parameters.items()):
            if p is not None and id(p) in kept:
                keep_quantized(module, leaf, kept[id(p)])
            elif p is not None:
                module._parameters[leaf] = new[id(p)]
        for leaf in module._buffers:
            name = f"{prefix}.{leaf}" if prefix else leaf
            if name in stored:
                module._buffers[leaf] = stored[name]
    _compute_buffers(model)


def _compute_buffers(model: nn.Module) -> None:
    """Compute the buffers that are still on the meta device, in place."""
    for module in model.modules():
        empty = {leaf: t for leaf, t in module._buffers.items() if t is not None and t.is_meta}
        module._buffers.update({leaf: torch.empty_like(t, device="cpu") for leaf, t in empty.items()})
        if empty and not hasattr(module, "init_non_persistent_buffers"):
            raise ArtifactError(
                f"{type(module).__name__} cannot compute its buffers {shorten(empty)}.", hint="Upgrade timm."
            )
        if empty:
            module.init_non_persistent_buffers()  # type: ignore[operator]
