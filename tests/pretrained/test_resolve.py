"""Where a model's name leads: short names, prefixes, tags and config.json files."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm

from tests.factories import ARGS, save_as_timm_does, tiny
from vitcompress.errors import ModelError
from vitcompress.families.registry import FAMILIES, family_of
from vitcompress.pretrained.build import empty_model
from vitcompress.pretrained.resolve import Source, resolve
from vitcompress.pretrained.short_names import SHORT_NAMES
from vitcompress.recipe import ModelRecipe


@pytest.mark.broad
@pytest.mark.parametrize("short", SHORT_NAMES)
def test_a_short_name_is_a_model_that_can_be_compressed(short: str) -> None:
    source = resolve(ModelRecipe(short))
    assert timm.is_model(source.architecture)
    assert source.name == source.architecture == SHORT_NAMES[short]
    assert family_of(empty_model(source), short) in FAMILIES


@pytest.mark.parametrize(
    ("typed", "architecture"),
    [
        ("deit_base_patch16_224", "deit_base_patch16_224"),
        ("deit_base", "deit_base_patch16_224"),
        ("vit_base", "vit_base_patch16_224"),
        ("deit3_hu", "deit3_huge_patch14_224"),
        ("deit_tiny.fb_in1k", "deit_tiny_patch16_224.fb_in1k"),
        ("vit_base_patch16_224.augreg_in21k", "vit_base_patch16_224.augreg_in21k"),
    ],
    ids=["exact", "short", "short-before-prefix", "prefix", "short-with-tag", "tag"],
)
def test_a_name_means_one_architecture(typed: str, architecture: str) -> None:
    assert resolve(ModelRecipe(typed)) == Source(architecture, architecture)


@pytest.mark.parametrize(
    ("typed", "message", "hint"),
    [
        (
            "deit_smal",
            r"MODEL deit_smal could be any of: deit_small_distilled_patch16_224, deit_small_patch16_224",
            "more",
        ),
        ("vit_", r"could be any of: .* \(\d+ more\)", "Type more"),
        ("diet_base", "MODEL diet_base is unknown. Nearest: .*deit_base", "list_models"),
        ("fashion_vjt", "Nearest: .*fashion_vit", ""),
        ("zzzzzzzz", "MODEL zzzzzzzz is unknown.$", "hf-hub:"),
        ("", "unknown", ""),
        ("*", "MODEL", ""),
        ("[", "MODEL", ""),
        ("deit_base.no_such_tag", "no weights with the tag 'no_such_tag'", "fb_in1k"),
        ("https://example.org/vit", "MODEL https://example.org/vit", ""),
        ("facebook/deit-base", "MODEL facebook/deit-base", ""),
        ("hf-hub:", "MODEL hf-hub:", ""),
        ("local-dir:", "MODEL local-dir:", ""),
        ("./vit_base_patch16_224", "MODEL ./vit", ""),
    ],
)
def test_a_name_that_means_none_or_many_is_refused(typed: str, message: str, hint: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        resolve(ModelRecipe(typed))
    assert hint in caught.value.hint


def test_a_model_argument_wins_over_the_folders_own(tmp_path: Path) -> None:
    folder = save_as_timm_does(tmp_path / "m", tiny().state_dict())
    source = resolve(ModelRecipe(f"local-dir:{folder}", None, {"drop_path_rate": 0.25}))
    assert source.model_args == {**ARGS, "drop_path_rate": 0.25}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"[]", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"{}", "no 'architecture'"),
        (
            b'{"architecture": "no_such_vit", "num_classes": 5, "pretrained_cfg": {}}',
            "'no_such_vit' is not one of timm's",
        ),
        (b'{"architecture": 7, "pretrained_cfg": {}}', "MODEL"),
        (b'{"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}, "model_args": [1]}', "MODEL"),
        (b'{"architecture": "vit_tiny_patch16_224", "pretrained_cfg": 3}', "MODEL"),
        (
            b'{"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}, "model_args": {"depth": 300000}}',
            "its depth cannot be 300000",
        ),
        (
            b'{"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}, "model_args": {"norm_eps": "x"}}',
            "its norm_eps cannot be x",
        ),
        (
            b'{"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"input_size": [3, 32, 32], "mean": "x"}}',
            "its mean",
        ),
        (b"[" * 100_000, "cannot be read"),
    ],
    ids=[
        "missing",
        "empty",
        "cut",
        "list",
        "binary",
        "no-keys",
        "unknown",
        "number",
        "args-list",
        "cfg-number",
        "depth",
        "eps",
        "mean",
        "deep",
    ],
)
def test_a_folder_whose_config_is_no_config_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        resolve(ModelRecipe(f"local-dir:{tmp_path}"))
    assert str(tmp_path) in str(caught.value)
