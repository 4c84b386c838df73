"""The comparison of methods: what fits a budget, is chosen, is run again, and is shown."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch

from tests.benchmarks.__main__ import main
from tests.benchmarks.quality.measure import Comparison, Schedule, score, training_recipe
from tests.benchmarks.quality.methods import METHODS, Case, UnfitError, keep_stored, largest, share_for
from tests.benchmarks.quality.record import Record, Results, summarise
from tests.benchmarks.quality.render import figure, replace_section, table
from tests.benchmarks.quality.subjects import Batches, Labelled, Sets, Subject, draw_views, taught
from tests.factories import images, tiny

CONFIG = {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
TINY = Subject("tiny", ("2",), (1e-3, 2e-3), full_steps=2, fast_steps=1, batch_size=4)


@pytest.fixture
def teacher() -> torch.nn.Module:
    return tiny()


@pytest.fixture
def sets(teacher: torch.nn.Module) -> Sets:
    noise = images(teacher, 12)
    labels = torch.arange(12) % 5
    pixels = torch.randint(0, 256, (12, 3, 36, 36), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    held_out = taught(teacher, noise[:4], labels[:4])
    return Sets(pixels, labels, held_out, taught(teacher, noise, labels), noise, CONFIG, crop_min=0.6)


def case(teacher: torch.nn.Module, ratio: str = "2") -> Case:
    share, budget = share_for(teacher, "tiny", ratio)
    return Case(teacher, "tiny", share, budget, images(teacher, 4), (3, 32, 32))


@pytest.mark.thorough
@pytest.mark.parametrize("ratio", ["1.5", "smallest"])
@pytest.mark.parametrize("name", [name for name in METHODS if not METHODS[name].whole])
def test_a_student_is_within_the_budget_and_its_plan_has_counted_it(
    name: str, ratio: str, teacher: torch.nn.Module
) -> None:
    given = case(teacher, ratio)
    try:
        made = METHODS[name].build(given)
    except UnfitError:
        assert (name, ratio) in {("residuals", "smallest"), ("fewer-blocks", "smallest")}
        return
    found = sum(p.numel() for p in made.student.parameters())
    assert found <= given.budget_params
    assert made.plan is None or made.plan.size.student_params == found
    assert made.student(images(teacher)).shape == (2, 5)


def test_fewer_blocks_keep_the_first_and_the_last(teacher: torch.nn.Module) -> None:
    each = sum(p.numel() for p in teacher.blocks[0].parameters())  # type: ignore[index, union-attr]
    whole = sum(p.numel() for p in teacher.parameters())
    given = dataclasses.replace(case(teacher), budget_params=whole - 2 * each)
    student = METHODS["fewer-blocks"].build(given).student
    kept = [block.attn.qkv.weight for block in student.blocks]  # type: ignore[union-attr]
    assert len(kept) == 2
    for mine, number in zip(kept, (0, 3), strict=True):
        assert torch.equal(mine, teacher.blocks[number].attn.qkv.weight)  # type: ignore[index, union-attr]


def test_the_ratio_names_a_number_of_blocks_per_group(teacher: torch.nn.Module) -> None:
    assert share_for(teacher, "tiny", "smallest")[0] == 4
    assert share_for(teacher, "tiny", "1.1")[0] == 2


@pytest.mark.parametrize("best", [0, 1, 5, 9])
def test_the_largest_number_that_fits(best: int) -> None:
    assert largest(lambda number: number <= best, 9) == best


def test_views_are_decided_by_the_seed_and_whole_crops_are_the_pixels(sets: Sets) -> None:
    def first(seed: int) -> torch.Tensor:
        return next(iter(Batches(sets, 4, seed, 1))).images

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))
    plain = dataclasses.replace(
        sets, pixels=torch.full((1, 3, 36, 36), 51, dtype=torch.uint8), config={**CONFIG, "mean": (0.2,) * 3}
    )
    assert draw_views(plain, torch.tensor([0]), torch.Generator()).abs().max() < 1e-5  # 51/255 is the mean


def test_scores_of_known_logits() -> None:
    says = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 0.0]])
    theirs = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 2.0], [2.0, 0.0]])
    found = score(torch.nn.Identity(), Labelled(says, torch.tensor([0, 0, 1, 0]), theirs))
    assert found[:2] == (50.0, 75.0)
    assert found[2] == pytest.approx(2 * torch.tensor(1.0).tanh().item() / 4, abs=1e-5)  # Δ·(p − q) of one in four


def test_a_comparison_runs_once_and_goes_on_where_it_stopped(
    teacher: torch.nn.Module, sets: Sets, tmp_path: Path
) -> None:
    schedule = Schedule(("teacher", "first", "fewer-blocks", "residuals"), ("smallest",), (1e-3, 2e-3), (0, 1), 2, 1)
    path = tmp_path / "deep" / "quality.jsonl"
    Comparison(TINY, lambda: (teacher, sets), Results(path)).run(schedule)
    lines = path.read_text().splitlines()
    keys = [Results(path).records[key] for key in Results(path).records]
    assert [(r.method, r.seed, r.steps) for r in keys if r.method == "first"] == [
        ("first", 0, 1), ("first", 0, 1), ("first", 0, 2), ("first", 1, 2),
    ]  # fmt: skip
    assert next(r for r in keys if r.method == "teacher").agreement == 100.0
    assert next(r for r in keys if r.method == "residuals").unfit

    def refuse() -> tuple[torch.nn.Module, Sets]:
        raise AssertionError("nothing is left to run")

    Comparison(TINY, refuse, Results(path)).run(schedule)
    assert path.read_text().splitlines() == lines
    cut = [*lines[:-1], lines[-1][:20]]
    path.write_text("\n".join(cut))
    Comparison(TINY, lambda: (teacher, sets), Results(path)).run(schedule)
    assert Results(path).records.keys() == {record.key for record in keys}


def test_training_that_is_the_same_is_run_once(
    teacher: torch.nn.Module, sets: Sets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "again", METHODS["first"])
    results = Results(tmp_path / "quality.jsonl")
    Comparison(TINY, lambda: (teacher, sets), results).run(
        Schedule(("first", "again"), ("smallest",), (1e-3,), (0,), 1, 1)
    )
    first, again = results.records.values()
    assert dataclasses.replace(first, method="again") == again


def records() -> list[Record]:
    common = {"model": "tiny", "ratio": "2", "num_params": 1000, "num_bytes": 4_000_000, "macs": 5_000_000}
    trained = [
        (1e-3, 0, 1, None, 50.0), (2e-3, 0, 1, None, 60.0), (1e-3, 0, 9, 99.0, 90.0), (2e-3, 0, 9, 80.0, 70.0),
        (2e-3, 1, 9, 81.0, 0.0), (2e-3, 2, 9, 83.5, 0.0),
    ]  # fmt: skip
    return [
        Record(**{**common, "ratio": "1"}, method="teacher", top1=91.0, agreement=100.0),  # type: ignore[arg-type]
        *(
            Record(**common, method="first", lr=lr, seed=seed, steps=steps, batch_size=4, start_top1=10.0 * (1 + seed),  # type: ignore[arg-type]
                   top1=top1, held_out_top1=held_out, agreement=60.0)
            for lr, seed, steps, top1, held_out in trained
        ),
        Record("tiny", "2", "residuals", unfit="one matrix for all blocks cannot be halved"),
    ]  # fmt: skip


def test_rows_are_of_the_chosen_learning_rate_and_the_longest_training() -> None:
    teacher, row = summarise(records(), "tiny")
    assert (teacher.mean, teacher.spread) == (91.0, 0.0)
    assert row.record.lr == 2e-3  # of more seeds, for it was chosen
    assert (row.mean, row.spread, row.start_top1) == (81.5, 3.5, 20.0)
    assert "| 2× | first | 1,000 | 4.00 | 5.0 | 20.00 % | 81.50 % | 3.50 | 60.00 % | 0.002 |" in table(
        records(), "tiny"
    )
    assert "2×, residuals: none, one matrix for all blocks cannot be halved." in table(records(), "tiny")


def test_the_figure_is_the_same_each_time_and_names_the_methods() -> None:
    drawn = figure(records(), "tiny")
    assert drawn == figure(records(), "tiny")
    assert drawn.startswith("<?xml")


def test_a_section_is_replaced_between_its_markers() -> None:
    page = replace_section("# Measurements\n\ntext\n", "tiny", "one")
    assert replace_section(page + "\nafter\n", "tiny", "two") == page.replace("one", "two") + "\nafter\n"


def test_rendering_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "quality.jsonl"
    lines = [json.dumps({**dataclasses.asdict(record), "model": "fashion_vit"}) for record in records()]
    path.write_text("\n".join(lines) + "\n")
    main(["quality", "--render-only", "--results", str(path), "--methods", "first", "planned"])
    assert "81.50 %" in capsys.readouterr().out
    assert "81.50 %" in (tmp_path / "benchmarks.md").read_text()
    assert (tmp_path / "quality-fashion_vit.svg").is_file()
    assert path.read_text().splitlines() == lines


def test_options_for_shared_matrices_are_left_out_where_there_are_none(teacher: torch.nn.Module) -> None:
    options = {"optimizer": "muon", "fade": 0.6}
    for name, optimizer in (("shared", "muon"), ("narrow", "adamw"), ("bases", "adamw"), ("fewer-blocks", "adamw")):
        start = METHODS[name].build(case(teacher, "1.2"))
        recipe = training_recipe(METHODS[name], start, options, lr=1e-3, steps=1)
        assert (recipe.optimizer, recipe.matrix_lr) == (optimizer, 0.01)


def test_fewer_bits_take_fewer_bytes_and_change_little(teacher: torch.nn.Module) -> None:
    found = {}
    for store in ("source", "int8", "int4"):
        student = copy.deepcopy(teacher)
        size = keep_stored(student, store)
        found[store] = size, (student(images(teacher)) - teacher(images(teacher))).abs().max().item()
    assert found["source"] == (4 * sum(p.numel() for p in teacher.parameters()), 0.0)
    assert found["source"][0] > found["int8"][0] > found["int4"][0]
    assert 0 < found["int8"][1] < found["int4"][1]


def test_a_benchmark_without_options_refuses_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["losses", "--full"])
    assert "unrecognized arguments: --full" in capsys.readouterr().err
