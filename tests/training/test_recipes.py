"""Recipes: the paper's numbers, files, and what cannot be."""

import dataclasses
import math

import pytest

from normfree.training import RECIPES, Recipe, recipe


def test_the_recipes_for_imagenet_have_the_paper_s_numbers():
    resnet = RECIPES["nf_resnet50"]
    assert (resnet.epochs, resnet.optimizer, resnet.momentum, resnet.warmup_epochs) == (90, "sgd", 0.9, 5)
    assert (resnet.label_smoothing, resnet.weight_decay) == (0.1, None)  # the variant's 5e-5
    assert dataclasses.replace(resnet, batch=1024).peak_lr == pytest.approx(0.4)
    assert RECIPES["nf_resnet288"].drop_rate == 0.25
    for level in range(6):
        regnet = RECIPES[f"nf_regnet_b{level}"]
        assert (regnet.epochs, regnet.batch, regnet.ema) == (360, 1024, 0.99999)
        assert regnet.peak_lr == pytest.approx(0.4)
        assert (regnet.mixup, regnet.cutmix, regnet.auto_augment) == (0.2, 1.0, "rand-m9-mstd0.5")
        assert regnet.image_size is None  # the variant's
    assert RECIPES["nfnet_f0"].clip_adaptive == 0.01


def test_every_recipe_survives_its_file(tmp_path):
    for name, one in RECIPES.items():
        (tmp_path / "config.json").write_text(one.to_json())
        assert Recipe.from_json(tmp_path / "config.json") == one, name


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"model": "a", "data": "b", "modle": 1}', '{"model": "a", "data": "b", "batch": "x"}']
)
def test_a_file_that_is_no_recipe_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="is no recipe"):
        Recipe.from_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0), ("batch", 0), ("lr", float("nan")), ("lr", -1.0), ("label_smoothing", 1.0), ("ema", 1.0),
        ("crop_scale", 0.0), ("model_args", ("width",)), ("accumulate", 0), ("keep", 0),
        ("precision", "float64"), ("on_nonfinite", "ignore"), ("epochs", 1.5), ("flip", "no"), ("model", 5),
        ("seed", None), ("seed", 2**64), ("model_args", "width=1"),
        ("log", ("tensorbord",)), ("warmup_epochs", math.inf),
    ],
)  # fmt: skip
def test_errors_name_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(RECIPES["digits"], **{field: value})


def test_clipping_twice_and_names_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="choose one"):
        dataclasses.replace(RECIPES["digits"], clip_norm=1.0, clip_adaptive=0.01)
    with pytest.raises(ValueError, match="did you mean digits"):
        recipe("digit")
