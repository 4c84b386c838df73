"""Measure how far the predictions of two models are from each other."""

from __future__ import annotations

from torch import Tensor, nn

from vitcompress.families.outputs import OutputKind, deviation_of, outputs_of, outputs_on

CHUNK_IMAGES = 32


def divergence(student: nn.Module, teacher: nn.Module, images: Tensor) -> float:
    """Return KL(teacher ‖ student) of what the models predict, nats per image.

    The kind of the teacher's outputs says what that is: probabilities of classes, of each label, or
    numbers with the teacher's deviation over these images.

    Args:
        student: in eval mode.
        teacher: in eval mode.
        images: `[B, C, H, W]`.
    """
    return _nats(outputs_of(teacher), _outputs(student, images), _outputs(teacher, images))


def divergence_and_chance(student: nn.Module, teacher: nn.Module, images: Tensor) -> tuple[float, float]:
    """Return the divergence of the student, and that of the teacher's mean prediction.

    Args:
        student: in eval mode.
        teacher: in eval mode.
        images: `[B, C, H, W]`.
    """
    kind, expected = outputs_of(teacher), _outputs(teacher, images)
    mean = kind.mean(expected).expand_as(expected)
    return _nats(kind, _outputs(student, images), expected), _nats(kind, mean, expected)


def shown_nats(value: float) -> str:
    """Format a divergence; one that is small is not shown as zero."""
    return f"{value:.3f} nats" if value == 0 or value >= 0.01 else f"{value:.2g} nats"


def _nats(kind: OutputKind, student: Tensor, teacher: Tensor) -> float:
    """KL(teacher ‖ student) from outputs `[B, K]`, nats per image; never negative by rounding."""
    assert kind.nats is not None  # `check_target` makes sure that a search has such a teacher
    student, teacher = student.double(), teacher.double()  # in float32, small divergences are rounding
    return max(0.0, float(kind.nats(student, teacher, deviation_of(teacher)).mean()))


def _outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Return the outputs `[B, K]` of a model for images `[B, C, H, W]`."""
    return outputs_on(model, images.split(CHUNK_IMAGES))
