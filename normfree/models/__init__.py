"""The paper's networks."""

from normfree.models.nf_regnet import NFRegNet, NFRegNetConfig
from normfree.models.nf_resnet import NFResNet, NFResNetConfig
from normfree.models.nfnet import NFNet, NFNetConfig
from normfree.models.registry import create_model, list_models
from normfree.models.resnet import ResNet, ResNetConfig

__all__ = [
    "NFNet",
    "NFNetConfig",
    "NFRegNet",
    "NFRegNetConfig",
    "NFResNet",
    "NFResNetConfig",
    "ResNet",
    "ResNetConfig",
    "create_model",
    "list_models",
]
