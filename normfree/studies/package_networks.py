"""Networks of packages that are converted for docs/packages.md: how each is built, and what it takes."""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normfree.sources import model_factory
from normfree.studies.coverage import NETWORKS as COVERED

_NEED_224 = {
    "timm:levit_128s", "timm:visformer_tiny", "timm:efficientformer_l1", "timm:coatnet_pico_rw_224",
    "timm:efficientvit_m0", "timm:tiny_vit_5m_224", "timm:coatnext_nano_rw_224",
}  # fmt: skip
_TIMM = (
    "resnet10t", "resnet14t", "resnet34", "resnet50", "resnet50d", "resnet101", "wide_resnet50_2", "resnext26ts",
    "seresnet18", "seresnext26d_32x4d", "ecaresnet50t", "bat_resnext26ts", "botnet26t_256", "halonet26t",
    "resnetv2_50d", "resnetrs50", "res2next50", "regnetx_004", "regnety_004", "regnety_008_tv", "regnetz_b16",
    "repvgg_a1", "repvgg_b0", "mobileone_s1", "mobilenetv1_100", "mobilenetv2_140", "mobilenetv3_large_100",
    "mobilenetv4_conv_medium", "efficientnet_b1", "efficientnet_es", "efficientnet_lite0",
    "tf_efficientnetv2_b0", "tf_mixnet_s", "mixnet_m", "spnasnet_100", "semnasnet_100", "tinynet_e", "rexnetr_100",
    "ghostnetv2_100", "dla60", "dla60x", "dla60_res2net", "dpn68", "hrnet_w18_small_v2", "densenet169", "vovnet57a",
    "ese_vovnet39b", "selecsls60", "cspdarknet53", "cspresnext50", "cs3darknet_s", "cs3edgenet_x", "inception_v4",
    "xception41p", "xception65", "hgnetv2_b0", "hgnet_small", "repvit_m1_0", "starnet_s2", "fasternet_t1",
    "pnasnet5large",
    "efficientvit_m0", "tiny_vit_5m_224", "swiftformer_xs", "mobilevitv2_050", "nasnetalarge",
    "gcresnet50t", "eca_resnext26ts", "vgg11_bn", "skresnext50_32x4d",
    "resnest26d", "gernet_m", "ecaresnetlight", "resnet32ts", "resnet33ts",
)  # fmt: skip
_TORCHVISION = (
    "resnet50", "resnext50_32x4d", "wide_resnet50_2", "vgg16_bn", "densenet169", "inception_v3", "mnasnet1_0",
    "mobilenet_v3_large", "regnet_x_400mf", "efficientnet_v2_s", "shufflenet_v2_x0_5", "deeplabv3_resnet50",
)  # fmt: skip
_DETECTORS = (
    "fasterrcnn_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn_v2",
    "fcos_resnet50_fpn", "ssdlite320_mobilenet_v3_large", "maskrcnn_resnet50_fpn_v2",
)  # fmt: skip
_VIDEOS = ("r3d_18", "mc3_18", "r2plus1d_18")
_SMP = (
    ("Unet", "resnet18"), ("Unet", "efficientnet-b0"), ("Unet", "mobilenet_v2"), 
    ("UnetPlusPlus", "resnet18"), ("FPN", "resnet18"), ("FPN", "efficientnet-b0"), ("Linknet", "resnet18"),
    ("MAnet", "resnet18"), ("PSPNet", "resnet18"), ("PAN", "resnet34"), ("DeepLabV3", "resnet18"),
    ("DeepLabV3Plus", "resnet18"), ("UPerNet", "resnet18"), ("Unet", "xception"),
)  # fmt: skip
_YOLO = (
    "yolo11n", "yolo11n-seg", "yolo11n-pose", "yolo11n-obb", "yolov8n", "yolov8n-seg", "yolov9t", "yolov10n", "yolo12n",
    "yolov5n", "yolov6n", "yolov3-tiny",
)  # fmt: skip
_EFFDET = ("tf_efficientdet_lite0",)
_BRAINDECODE = ("EEGNet", "ShallowFBCSPNet", "Deep4Net", "EEGInceptionERP", "EEGSimpleConv", "TIDNet", "ATCNet")
_MONAI: dict[str, dict[str, Any]] = {
    "UNet": {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": (4, 8, 16), "strides": (2, 2),
             "num_res_units": 2, "norm": "batch"},
    "BasicUNet": {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "features": (8, 8, 8, 8, 8, 8),
                  "norm": "batch"},
    "SegResNet": {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "init_filters": 8, "norm": "batch"},
    "AttentionUnet": {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": (4, 8, 16),
                      "strides": (2, 2)},
    "DynUNet": {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "kernel_size": [3, 3, 3], "strides": [1, 2, 2],
                "upsample_kernel_size": [2, 2], "filters": [8, 16, 16], "norm_name": "batch"},
    "DenseNet121": {"spatial_dims": 3, "in_channels": 1, "out_channels": 2},
    "SEResNet50": {"spatial_dims": 3, "in_channels": 1, "num_classes": 2},
    "VNet": {"spatial_dims": 3, "in_channels": 1, "out_channels": 2},
    "HighResNet": {"spatial_dims": 3, "in_channels": 1, "out_channels": 2},
    "resnet18": {"spatial_dims": 3, "n_input_channels": 1, "num_classes": 2},
}  # fmt: skip
_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "ResNet": {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2]},
    "RegNet": {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2], "groups_width": 16},
    "MobileNetV1": {"depth_multiplier": 0.5}, "MobileNetV2": {"depth_multiplier": 0.5},
    "EfficientNet": {"image_size": 64},
    "Levit": {"image_size": 224}, "MobileViT": {"image_size": 64},
}  # fmt: skip


_SEVERAL_WEIGHTS = "The layer computes with several weights at once, which is no layer of torch's."
_NOT_IN_EVAL_MODE = "Auxiliary heads do not run in eval mode."
_POSITIONS = "The normalizer behind an attention stays, whose relative positions are multiplied by a parameter."
_BOXES = "The number of boxes depends on values, which torch.export does not know, of the original either."
_NOT_USED = "The decoder does not use what the encoder's last layers give."
EXPLAINED: dict[str, str] = {
    "timm:lambda_resnet26t": (
        "Content and position, the parts of a lambda layer, come from one convolution, whose scale cannot serve both."
    ),
    "timm:efficientvit_m0": (
        "The output of an attention is added to the next part of the channels; queries, keys and values come from one "
        "layer, whose scale cannot serve all three."
    ),
    **dict.fromkeys(("timm:botnet26t_256", "timm:halonet26t"), _POSITIONS),
    **dict.fromkeys((f"torchvision:{name}" for name in _DETECTORS), _BOXES),
    "torchvision:maskrcnn_resnet50_fpn_v2": "A new one finds no box, and BatchNorm refuses an empty batch.",
    "torchvision:googlenet": _NOT_IN_EVAL_MODE,
    "torchvision:inception_v3": _NOT_IN_EVAL_MODE,
    "smp:Unet/efficientnet-b0": _NOT_USED,
    "smp:FPN/efficientnet-b0": _NOT_USED,
    "smp:PSPNet/resnet18": _NOT_USED,
    "braindecode:ShallowFBCSPNet": _SEVERAL_WEIGHTS,
    "braindecode:Deep4Net": _SEVERAL_WEIGHTS,
    "torch_geometric:TAGConv": _SEVERAL_WEIGHTS,
    "braindecode:TIDNet": "Its weights are normalized themselves (weight_norm).",
    "ultralytics:yolov9t": "Some branches are added to each other first, and their outputs are correlated.",
}
"""Why a network is not as it should be."""


@dataclass(frozen=True)
class Network:
    """A network, as package:name, and the inputs that it takes: a function of the batch size."""

    name: str
    distribution: str  # as pip knows its package
    module: str  # to be imported
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    train: Callable[[nn.Module], list[Tensor]] | None = None  # losses of one example, where there are own ones

    def is_installed(self) -> bool:
        """Tell whether the package is there."""
        return importlib.util.find_spec(self.module) is not None


def _attribute(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _noise(*shape: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))


def _images(name: str) -> Callable[[int], Tensor]:
    sides = {
        "torchvision:inception_v3": 160, "timm:pnasnet5large": 128, "timm:nasnetalarge": 128, "timm:inception_v4": 128,
        "timm:bat_resnext26ts": 256, "timm:botnet26t_256": 256, "timm:halonet26t": 256,
    }  # fmt: skip
    return _noise(3, *[224 if name in _NEED_224 else sides.get(name, 96)] * 2)


def _list_of_images(batch: int) -> list[Tensor]:
    return list(_noise(3, 128, 128)(min(batch, 2)))


def _detector(name: str) -> Network:
    def build() -> nn.Module:
        sizes = {} if "320" in name else {"min_size": 128, "max_size": 128}
        model: nn.Module = _attribute("torchvision.models", "get_model")(
            name, weights=None, weights_backbone=None, **sizes
        )
        return model

    def train(model: nn.Module) -> list[Tensor]:
        target = {"boxes": torch.tensor([[20.0, 20.0, 90.0, 90.0]]), "labels": torch.tensor([1])}
        target["masks"] = torch.ones(1, 128, 128, dtype=torch.uint8)
        return list(model(_list_of_images(1), [target]).values())

    return Network(f"torchvision:{name}", "torchvision", "torchvision", build, _list_of_images, train)


def _convnet(name: str) -> Network:
    package = name.partition(":")[0]
    inputs = _images(name)
    inputs = _noise(3, 4, 32, 32) if name.removeprefix("torchvision:") in _VIDEOS else inputs
    return Network(name, package, package, lambda: model_factory(name)(), inputs)


def _smp(architecture: str, encoder: str) -> Network:
    def build() -> nn.Module:
        module: nn.Module = _attribute("segmentation_models_pytorch", architecture)(encoder, encoder_weights=None)
        return module

    name, module = f"smp:{architecture}/{encoder}", "segmentation_models_pytorch"
    return Network(name, "segmentation-models-pytorch", module, build, _noise(3, 128, 128))


def _yolo(name: str) -> Network:
    kinds = {"-seg": "SegmentationModel", "-pose": "PoseModel", "-obb": "OBBModel"}
    kind = next((kind for suffix, kind in kinds.items() if name.endswith(suffix)), "DetectionModel")

    def build() -> nn.Module:
        model: nn.Module = _attribute("ultralytics.nn.tasks", kind)(f"{name}.yaml", verbose=False)
        return model

    return Network(f"ultralytics:{name}", "ultralytics", "ultralytics", build, _noise(3, 64, 64))


def _effdet(name: str) -> Network:
    def build() -> nn.Module:
        model: nn.Module = _attribute("effdet", "create_model")(name, pretrained=False, pretrained_backbone=False)
        return model

    return Network(f"effdet:{name}", "effdet", "effdet", build, _noise(3, 320, 320))


def _braindecode(name: str) -> Network:
    def build() -> nn.Module:
        model: nn.Module = _attribute("braindecode.models", name)(n_chans=8, n_outputs=3, n_times=500, sfreq=125)
        return model

    return Network(f"braindecode:{name}", "braindecode", "braindecode", build, _noise(8, 500))


def _monai(name: str) -> Network:
    def build() -> nn.Module:
        model: nn.Module = _attribute("monai.networks.nets", name)(**_MONAI[name])
        return model

    return Network(f"monai:{name}", "monai", "monai", build, _noise(1, 32, 32, 32))


def _transformers(name: str) -> Network:
    def build() -> nn.Module:
        config = _attribute("transformers", f"{name}Config")(**_TRANSFORMERS[name])
        model: nn.Module = _attribute("transformers", f"{name}Model")(config)
        return model

    side = _TRANSFORMERS[name].get("image_size", 64)
    return Network(f"transformers:{name}", "transformers", "transformers", build, _noise(3, side, side))


class _Graph(nn.Module):
    """Two graph convolutions with a BatchNorm between them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        layer = _attribute("torch_geometric.nn", kind)
        self.first, self.norm, self.second = layer(8, 16), nn.BatchNorm1d(16), layer(16, 3)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out: Tensor = self.second(torch.relu(self.norm(self.first(x, edge_index))), edge_index)
        return out


def _ring(batch: int) -> tuple[Tensor, Tensor]:
    nodes = torch.arange(32 * batch)
    return _noise(8)(32 * batch), torch.stack([nodes, nodes.roll(1)])


def _graphs() -> Iterator[Network]:
    for kind in ("GCNConv", "SAGEConv", "GraphConv", "GATConv", "TAGConv"):
        build = functools.partial(_Graph, kind)
        yield Network(f"torch_geometric:{kind}", "torch-geometric", "torch_geometric", build, _ring)
    for name, more in (
        ("GIN", {"norm": "batch_norm"}),
        ("GraphSAGE", {"norm": "batch_norm"}),
        ("GCN", {"norm": "batch_norm"}),
    ):
        yield Network(
            f"torch_geometric:{name}", "torch-geometric", "torch_geometric",
            functools.partial(_model_of_graphs, name, more), _ring,
        )  # fmt: skip
    yield Network(
        "torch_geometric:MLP", "torch-geometric", "torch_geometric",
        lambda: _attribute("torch_geometric.nn", "MLP")([8, 16, 16, 3]), _noise(8),
    )  # fmt: skip


def _model_of_graphs(name: str, more: dict[str, Any]) -> nn.Module:
    model: nn.Module = _attribute("torch_geometric.nn.models", name)(8, 16, 3, 3, **more)
    return model


NETWORKS: tuple[Network, ...] = (
    *map(_convnet, COVERED),
    *(_convnet(f"timm:{name}") for name in _TIMM),
    *(_convnet(f"torchvision:{name}") for name in (*_TORCHVISION, *_VIDEOS)),
    *map(_detector, _DETECTORS),
    *(_smp(*pair) for pair in _SMP),
    *map(_yolo, _YOLO),
    *map(_effdet, _EFFDET),
    *map(_braindecode, _BRAINDECODE),
    *map(_monai, _MONAI),
    *map(_transformers, _TRANSFORMERS),
    *_graphs(),
)
