import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.factories import compressed, images, tiny
from vitcompress.distill.ema import running_mean
from vitcompress.distill.state import set_parameters


def test_the_running_mean_by_hand() -> None:
    """The first update copies the model, later ones keep 2/11, 3/12 and at most the decay 0.24."""
    model = nn.Linear(1, 1, bias=False)
    mean: Any = running_mean(model, 0.24)
    found = []
    for value in (5.0, 0.0, 1.0, 1.0):
        nn.init.constant_(model.weight, value)
        mean.update_parameters(model)
        found.append(mean.module.weight.item())
    first = 5.0
    second = first * 2 / 11
    third = second * 0.24 + 0.76
    assert found == pytest.approx([first, second, third, third * 0.24 + 0.76])


def test_the_running_mean_shares_as_the_student_does_and_moves_once_a_step() -> None:
    student, plan = compressed(tiny(), share=4)
    mean: Any = running_mean(student, 0.1)
    start = copy.deepcopy(student.state_dict())
    mean.update_parameters(student)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1.0)
    mean.update_parameters(student)
    assert sum(p.numel() for p in mean.module.parameters()) == plan.size.student_params
    assert mean.module.blocks[0].mlp.fc1.weight is mean.module.blocks[3].mlp.fc1.weight
    for name, value in mean.module.state_dict().items():  # 0.1 of the old and 0.9 of the new
        torch.testing.assert_close(value, start[name] + 0.9, msg=name)
    set_parameters(student, mean.module.parameters())
    assert torch.equal(student(images(student)), mean.module(images(student)))
