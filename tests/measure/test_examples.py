"""The images on which student and teacher differ with most confidence."""

from __future__ import annotations

import base64
import io

import torch
from PIL import Image

from vitcompress.measure.examples import Examples


def test_the_surest_differences_are_kept() -> None:
    found = Examples((0.5,) * 3, (0.5,) * 3)
    logits = torch.eye(3)[[0] * 40] * torch.arange(40.0)[:, None]  # surer from image to image
    others = torch.eye(3)[[1] * 39 + [0]] * 60
    found.watch(torch.zeros(40, 3, 8, 8), logits, others, torch.full((40,), 2))
    kept = found.surest()
    assert (found.count, len(kept)) == (39, 12)
    assert (kept[0].student, kept[0].teacher, kept[0].label) == (0, 1, 2)
    sure = [each.student_percent for each in kept]
    assert sure == sorted(sure, reverse=True)
    with Image.open(io.BytesIO(base64.b64decode(kept[0].picture.partition(",")[2]))) as image:
        assert (image.size, image.getpixel((0, 0))) == ((8, 8), (128, 128, 128))
    found.watch(torch.zeros(40, 3, 8, 8), logits, None, torch.full((40,), 2))
    assert found.count == 39
