"""The paper's networks."""

import sys

from normfree.models.baseline_resnet import ResNet, ResNetConfig
from normfree.models.fixup_resnet import FixUpResNet, FixUpResNetConfig
from normfree.models.haiku import load_haiku
from normfree.models.network import ResidualNetwork
from normfree.models.nf_resnet import NFResNet, NFResNetConfig
from normfree.models.nfnet import NFNet, NFNetConfig
from normfree.models.registry import create_model, from_pretrained, list_models
from normfree.models.regnet import NFRegNet, NFRegNetConfig
from normfree.models.timm_networks import from_timm
from normfree.models.timm_registry import register_with_timm

__all__ = [
    "FixUpResNet",
    "FixUpResNetConfig",
    "NFNet",
    "NFNetConfig",
    "NFRegNet",
    "NFRegNetConfig",
    "NFResNet",
    "NFResNetConfig",
    "ResNet",
    "ResNetConfig",
    "ResidualNetwork",
    "create_model",
    "from_pretrained",
    "from_timm",
    "list_models",
    "load_haiku",
    "register_with_timm",
]

if sys.modules.get("timm") is not None:
    register_with_timm()
