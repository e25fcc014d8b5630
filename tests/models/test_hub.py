"""Networks on disk, as huggingface_hub writes them."""

import dataclasses
import json

import huggingface_hub
import pytest
import torch

from normfree import create_model, from_pretrained
from normfree.models import NFRegNet, NFResNet
from tests.helpers import assert_equal, assert_same_state, shaken

NETWORKS = {
    "nf_resnet26": {"width": 0.5, "activation": "silu", "se_ratio": 0.25},
    "nf_regnet_b0": {"width": 0.25},
    "nfnet_f0": {"width": 0.25, "group_size": 32},
    "bn_resnet26_postact": {"width": 0.25},
    "skipinit_resnet26": {"width": 0.25},
    "fixup_resnet26": {"width": 0.25},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_saved_network_is_the_same_when_it_is_loaded(name, dtype, tmp_path):
    model = create_model(name, num_classes=5, dtype=torch.float64, **NETWORKS[name])
    model = shaken(model).to(dtype)
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert dataclasses.asdict(again.config) == dataclasses.asdict(model.config)
    assert_same_state(again.state_dict(), model.state_dict())
    x = torch.randn(2, 3, 40, 40, dtype=dtype)
    assert not again.training
    assert_equal(again(x), model(x), "logits")


def test_a_new_classifier_is_kept(tmp_path):
    model = create_model("nf_resnet26", width=0.25)
    model.reset_classifier(3)
    model.save_pretrained(tmp_path)
    assert NFResNet.from_pretrained(tmp_path).get_classifier().out_features == 3


def test_a_folder_of_no_network_of_ours_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        from_pretrained(tmp_path)
    for content in ('{"family": "BertModel"}', "[]", "{}"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"not? .*network that save_pretrained wrote"):
            from_pretrained(tmp_path)
    create_model("nf_resnet26", width=0.25).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is of a NFResNet, not of a NFRegNet"):
        NFRegNet.from_pretrained(tmp_path)


def test_a_file_without_all_parameters_is_refused_with_their_names(tmp_path):
    create_model("nf_resnet26", width=0.25).save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    del described["checksum"]
    (tmp_path / "config.json").write_text(json.dumps(described | {"depths": [3, 2, 2, 2]}))
    with pytest.raises(ValueError, match=r"stages\.0\.2"):
        from_pretrained(tmp_path)


def test_push_to_hub_sends_weights_and_configuration(monkeypatch, tmp_path):
    sent = {}

    class Api:
        def __init__(self, **arguments):
            pass

        def create_repo(self, repo_id, **arguments):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, **arguments):
            sent[repo_id] = sorted(path.name for path in folder_path.iterdir())

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    create_model("nf_resnet26", width=0.25).push_to_hub("someone/nf")
    assert sent == {"someone/nf": ["README.md", "config.json", "model.safetensors"]}


def test_a_class_derived_from_a_family_loads_what_the_family_saved(tmp_path):
    class Mine(NFResNet):
        pass

    model = create_model("nf_resnet26", width=0.25)
    model.save_pretrained(tmp_path)
    assert_same_state(Mine.from_pretrained(tmp_path).state_dict(), model.state_dict())
