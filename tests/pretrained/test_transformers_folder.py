"""Checkpoints of transformers give the same logits in timm; those that timm cannot compute fail."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitcompress.artifact.load import load
from vitcompress.artifact.manifest import Manifest
from vitcompress.artifact.write import write
from vitcompress.errors import CheckpointError, ModelError
from vitcompress.families.outputs import outputs_of
from vitcompress.plans.make import make_plan
from vitcompress.pretrained.build import empty_model
from vitcompress.pretrained.data_config import data_config
from vitcompress.pretrained.load import load_pretrained
from vitcompress.pretrained.resolve import Source, resolve
from vitcompress.pretrained.transformers_config import to_timm_model
from vitcompress.recipe import ModelRecipe, PlanRecipe
from vitcompress.surgery import apply_plan

_PLAIN: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
_DINO: dict[str, Any] = {**_PLAIN, "mlp_ratio": 2}
_SWIN: dict[str, Any] = {
    "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
}  # fmt: skip

# config class, its arguments, model class, a timm model of the same structure
ROWS: dict[str, tuple[str, Mapping[str, Any], str, str]] = {
    "vit": ("ViTConfig", {**_PLAIN, "num_labels": 5}, "ViTForImageClassification", "vit_tiny"),
    "vit two labels": ("ViTConfig", _PLAIN, "ViTForImageClassification", "vit_base"),
    "vit quick gelu": ("ViTConfig", {**_PLAIN, "hidden_act": "quick_gelu"}, "ViTForImageClassification", "vit_base"),
    "vit no qkv bias": ("ViTConfig", {**_PLAIN, "qkv_bias": False}, "ViTForImageClassification", "vit_base"),
    "vit headless": ("ViTConfig", _PLAIN, "ViTModel", "vit_base"),
    "deit": ("DeiTConfig", {**_PLAIN, "num_labels": 5}, "DeiTForImageClassification", "deit_base"),
    "deit teacher": ("DeiTConfig", {**_PLAIN, "num_labels": 5}, "DeiTForImageClassificationWithTeacher", "deit_base"),
    "deit headless": ("DeiTConfig", _PLAIN, "DeiTModel", "deit_base"),
    "dinov2": ("Dinov2Config", _DINO, "Dinov2Model", "dinov2_base"),
    "dinov2 swiglu": ("Dinov2Config", {**_DINO, "use_swiglu_ffn": True}, "Dinov2Model", "dinov2_base"),
    "dinov2 registers": ("Dinov2WithRegistersConfig", _DINO, "Dinov2WithRegistersModel", "dinov2_base"),
    "swin": ("SwinConfig", {**_SWIN, "num_labels": 5}, "SwinForImageClassification", "swin_tiny"),
    "swin headless": ("SwinConfig", _SWIN, "SwinModel", "swin_tiny"),
}

every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())


def save(row: tuple[str, Mapping[str, Any], str, str], folder: Path) -> Any:
    """Save a tiny model of transformers to `folder`, with all parameters random, and return it."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = getattr(transformers, row[2])(getattr(transformers, row[0])(**row[1])).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn_like(p))
    model.save_pretrained(folder)
    return model


def features(model: Any, x: Tensor) -> Tensor:
    """Return the logits of a transformers model or, if headless, the features that timm pools.

    These are the mean of the patches for Swin, and the class token for all others.
    """
    with torch.no_grad():
        out = model(x)
    if "logits" in out:
        return out["logits"]  # type: ignore[no-any-return]
    return out["pooler_output"] if "Swin" in type(model).__name__ else out["last_hidden_state"][:, 0]  # type: ignore[no-any-return]


def same(model: nn.Module, original: Any) -> None:
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = features(original, x)
    with torch.no_grad():
        outputs = model(x)
    assert expected.std() > 1e-2
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.broad
@every_row
def test_a_folder_gives_the_same_logits(row: tuple[str, Mapping[str, Any], str, str], tmp_path: Path) -> None:
    original = save(row, tmp_path)
    for recipe in (ModelRecipe(f"local-dir:{tmp_path}"), ModelRecipe(row[3], checkpoint=tmp_path)):
        source = resolve(recipe)
        assert source.name == recipe.model or recipe.checkpoint
        same(load_pretrained(source), original)


@every_row
def test_a_bare_file_fills_a_model_of_its_sizes(row: tuple[str, Mapping[str, Any], str, str], tmp_path: Path) -> None:
    original = save(row, tmp_path / "folder")
    timm_model = to_timm_model(json.loads((tmp_path / "folder" / "config.json").read_text()))
    bare = tmp_path / "weights.safetensors"
    bare.write_bytes((tmp_path / "folder" / "model.safetensors").read_bytes())
    same(
        load_pretrained(
            resolve(ModelRecipe(timm_model.architecture, checkpoint=bare, model_arg=timm_model.model_args))
        ),
        original,
    )


@every_row
def test_an_artifact_made_from_a_folder_loads_without_it(
    row: tuple[str, Mapping[str, Any], str, str], tmp_path: Path
) -> None:
    original = save(row, tmp_path / "folder")
    source = resolve(ModelRecipe(f"local-dir:{tmp_path / 'folder'}"))
    plan = make_plan(empty_model(source), PlanRecipe(share=1), name=source.name)
    student = load_pretrained(source)
    apply_plan(student, plan)
    config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    manifest = Manifest(
        source={
            "name": source.name, "architecture": source.architecture, "model_args": source.model_args,
            "pretrained_cfg": source.pretrained_cfg,
        },
        source_sha256="", plan=plan, data_config=config, recipe={}, report={}, versions={},
    )  # fmt: skip
    write(tmp_path / "mini.safetensors", student, manifest, torch.randn(1, 3, 32, 32))
    same(load(tmp_path / "mini.safetensors"), original)


def test_preprocessing_and_labels_come_along(tmp_path: Path) -> None:
    save(ROWS["vit"], tmp_path)
    recipe = ModelRecipe(f"local-dir:{tmp_path}")
    config = data_config(empty_model(resolve(recipe)), recipe)
    assert config["mean"] == (0.5, 0.5, 0.5)
    assert config["input_size"] == (3, 32, 32)
    assert resolve(recipe).pretrained_cfg["label_names"] == tuple(f"LABEL_{i}" for i in range(5))
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({
            "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3, "do_center_crop": True,
            "size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32},
        })
    )  # fmt: skip
    config = data_config(empty_model(resolve(recipe)), recipe)
    assert (config["mean"], config["std"]) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (config["interpolation"], config["crop_pct"]) == ("bicubic", 0.8)


@pytest.mark.parametrize(
    ("problem", "num_labels", "kind"),
    [
        ("regression", 3, "regression"),
        ("multi_label_classification", 3, "multi_label"),
        ("single_label_classification", 3, "classes"),
        (None, 3, "classes"),
        (None, 1, "regression"),
        ("multi_label_classification", 1, "multi_label"),
    ],
)
def test_the_problem_type_tells_what_the_outputs_are(problem: str | None, num_labels: int, kind: str) -> None:
    labels = {"id2label": {str(number): f"l{number}" for number in range(num_labels)}}
    config = {"model_type": "vit", "architectures": ["ViTForImageClassification"], **_PLAIN, **labels}
    model = to_timm_model({**config, "problem_type": problem})
    source = Source("folder", model.architecture, model.model_args, model.pretrained_cfg, outputs=model.outputs)
    assert outputs_of(empty_model(source)).name == kind
    assert to_timm_model({**config, "problem_type": problem}, headless=True).outputs is None


def test_an_unknown_problem_type_is_refused() -> None:
    config = {"model_type": "vit", "architectures": ["ViTForImageClassification"], **_PLAIN, "problem_type": "ranking"}
    with pytest.raises(ModelError, match="problem_type 'ranking'"):
        to_timm_model(config)


def test_dinov2_classifier_is_left_out_only_on_request(tmp_path: Path) -> None:
    original = save(("Dinov2Config", {**_DINO, "num_labels": 4}, "Dinov2ForImageClassification", ""), tmp_path)
    with pytest.raises(ModelError, match="class token and the mean of the patches") as caught:
        resolve(ModelRecipe(f"local-dir:{tmp_path}"))
    assert "--model-arg num_classes=0" in caught.value.hint
    model = load_pretrained(resolve(ModelRecipe(f"local-dir:{tmp_path}", model_arg={"num_classes": 0})))
    same(model, original.dinov2)


def test_unusable_folders_are_refused(tmp_path: Path) -> None:
    save(ROWS["swin"], tmp_path)
    with pytest.raises(CheckpointError, match="vit_tiny_patch16_224 is built differently"):
        resolve(ModelRecipe("vit_tiny", checkpoint=tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"model_type": "bert"}, "models of type 'bert' are not supported"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"patch_size": 0}, "timm cannot build"),
        ({"depths": 3}, "its config.json is incomplete or malformed"),
        ({"depths": [300_000, 2]}, "its depths cannot be 300000"),
        ({"depths": [300, 300]}, "its depths add up to more than 512"),
        ({"embed_dim": 0}, "its embed_dim cannot be 0"),
        ({"embed_dim": 1e400}, "its embed_dim cannot be inf"),
        ({"embed_dim": 10**30}, "its embed_dim cannot be 1000"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ModelError, match=message):
            empty_model(resolve(ModelRecipe(f"local-dir:{tmp_path}")))
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match="cannot be read"):
        resolve(ModelRecipe(f"local-dir:{tmp_path}"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": "x"}')
    with pytest.raises(ModelError, match="image_mean is 'x', no plausible number"):
        resolve(ModelRecipe(f"local-dir:{tmp_path}"))
    (tmp_path / "preprocessor_config.json").unlink()
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("classifier.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: head\.fc\.weight"):
        load_pretrained(resolve(ModelRecipe(f"local-dir:{tmp_path}")))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        resolve(ModelRecipe(f"local-dir:{tmp_path}"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"not one of timm's: it has no 'architecture'"):
        resolve(ModelRecipe(f"local-dir:{tmp_path}"))
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="should hold one file of weights and has none"):
        resolve(ModelRecipe("swin_tiny", checkpoint=tmp_path))
