"""The paper's networks."""

from normfree.models.nf_resnet import NFResNet, NFResNetConfig
from normfree.models.registry import create_model, list_models
from normfree.models.resnet import ResNet, ResNetConfig

__all__ = ["NFResNet", "NFResNetConfig", "ResNet", "ResNetConfig", "create_model", "list_models"]
