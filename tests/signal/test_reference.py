"""Signal propagation at initialisation against the authors' own, block by block."""

import functools
import math

import pytest
import torch

from normfree import characterize, create_model
from tests.helpers import reference_json

SEEDS = 12
NETWORKS = {
    "NF_ResNet50-w4-relu": ("nf_resnet50", {}),
    "NF_ResNet50-w4-silu": ("nf_resnet50", {"activation": "silu"}),
    "NF_ResNet50-se-w4-relu": ("nf_resnet50", {"se_ratio": 0.25}),
    "NF_ResNet101-w4-relu": ("nf_resnet101", {}),
    "ResNet50-BN-preact-w4": ("bn_resnet50", {"init": "reference"}),
    "NF_RegNet-B0-w0.75-silu": ("nf_regnet_b0", {}),
    "SkipInit_ResNet50-w4-gain1": ("skipinit_resnet50", {}),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_every_block(case):
    name, arguments = NETWORKS[case]
    expected = reference_json("spp_reference.json")[case]
    shape = expected["input_shape"]
    report = characterize(
        functools.partial(create_model, name, **arguments),
        lambda model: torch.randn(shape[0], 3, *shape[1:3]),
        seeds=SEEDS,
    )
    assert len(report) == expected["n_blocks"]
    worst = ("", 0.0)
    for k, record in enumerate(report):
        for statistic, value in (
            ("squared_mean", expected["avg_sq_mean_mean"][k + 1]),
            ("variance", expected["avg_var_mean"][k + 1]),
            ("residual_variance", expected["res_avg_var_mean"][k]),
        ):
            ours, spread = getattr(record, statistic), record.std(statistic)
            bound = 0.01 * value + 4 * spread * math.sqrt(1 / 3 + 1 / SEEDS)
            assert abs(ours - value) <= bound, (
                f"{case}, block {k} ({record.name}): {statistic}={ours:.5g}, expected {value:.5g} ± {bound:.2g}"
            )
            if value == 0:
                assert ours == 0
            else:
                worst = max(worst, (f"{statistic} of block {k}", abs(ours - value) / bound), key=lambda item: item[1])
    print(f"{case}: the largest departure is {worst[1]:.2f} of its bound, {worst[0]}")
