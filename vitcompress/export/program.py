"""What is the student as a graph?  A program of torch.export, for batches of any size."""

from __future__ import annotations

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export


def trace(student: nn.Module, input_size: tuple[int, int, int]) -> ExportedProgram:
    """Trace a model; parameters that it shares are one in the program.

    Args:
        student: in eval mode on CPU.
        input_size: (channels, rows, columns).
    """
    images = torch.zeros(2, *input_size)  # of one, torch.export would take the batch for fixed
    with torch.no_grad():
        return export(student, (images,), dynamic_shapes=({0: Dim("batch")},))
