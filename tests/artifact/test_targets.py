"""No command overwrites a file that it reads."""

import shutil
from pathlib import Path

import pytest

from tests.cli.test_bad_input import mistake
from tests.conftest import Vitcompress, listing


@pytest.mark.parametrize("command", ["compress", "finetune"])
def test_an_output_over_its_own_teacher_is_refused(
    command: str, mini: Path, images: Path, vitcompress: Vitcompress, teacher: list[str]
) -> None:
    other = Path(shutil.copy(mini, mini.with_name("other.safetensors")))
    before = listing(mini.parent)
    words = ["--teacher", mini, "--out", mini, "--data", images, "--steps", 1, "--num-workers", 0]
    asked = teacher if command == "compress" else [other]
    mistake(vitcompress(command, *asked, *words), f"--out {mini} would overwrite --teacher")
    assert listing(mini.parent) == before


def test_a_page_over_a_file_is_refused(mini: Path, vitcompress: Vitcompress) -> None:
    link = mini.with_name("page.html")
    link.symlink_to(mini)
    before = listing(mini.parent)
    for page in (mini, link):
        mistake(vitcompress("report", mini, "--html", page), f"--html {page} would overwrite {mini}")
        mistake(vitcompress("compare", "--html", page, mini, mini), f"--html {page} would overwrite {mini}")
    mistake(vitcompress("report", mini, "--html", mini.with_name("new.safetensors")), "hold weights")
    assert listing(mini.parent) == before


def test_an_export_over_its_file_is_refused(mini: Path, vitcompress: Vitcompress) -> None:
    before = listing(mini.parent)
    mistake(vitcompress("export", mini, "--to", "timm", "--out", mini), "would overwrite")
    assert listing(mini.parent) == before


def test_a_log_takes_the_place_of_nothing_but_a_log(mini: Path, vitcompress: Vitcompress) -> None:
    notes = mini.with_name("notes.txt")
    notes.write_text("the user's own\n")
    before = listing(mini.parent)
    for target in (mini, notes, mini.with_name("new.safetensors")):
        mistake(vitcompress("check", mini, "--min-ratio", 1, "--log-json", target), f"--log-json {target}")
    assert listing(mini.parent) == before
    for _ in range(2):
        assert vitcompress("check", mini, "--min-ratio", 1, "--log-json", mini.with_name("log")).code == 0
