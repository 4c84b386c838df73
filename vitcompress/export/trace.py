"""Trace a student with torch.export, for batches of any size."""

from __future__ import annotations

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export


def trace(student: nn.Module, input_size: tuple[int, int, int]) -> ExportedProgram:
    """Trace a model; a parameter that it shares is one parameter of the program.

    Args:
        student: the model, in eval mode on CPU.
        input_size: channels, rows and columns of an image.
    """
    images = torch.zeros(2, *input_size)  # with one image, torch.export would fix the batch size
    with torch.no_grad():
        return export(student, (images,), dynamic_shapes=({0: Dim("batch")},))
