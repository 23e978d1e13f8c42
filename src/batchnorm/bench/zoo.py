"""The models that folding is measured on: every torchvision builder with batch normalization, and the styles of timm.

Nothing is downloaded: weights are random, statistics and parameters of the norms are drawn so that a mistake shows.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["TIMM", "TORCHVISION", "Member", "norms_of", "open_torchvision", "randomized", "timm_zoo", "torchvision_zoo"]

TORCHVISION = (
    "deeplabv3_mobilenet_v3_large", "deeplabv3_resnet101", "deeplabv3_resnet50", "densenet121", "densenet161",
    "densenet169", "densenet201", "efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3",
    "efficientnet_b4", "efficientnet_b5", "efficientnet_b6", "efficientnet_b7", "efficientnet_v2_l",
    "efficientnet_v2_m", "efficientnet_v2_s", "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fasterrcnn_mobilenet_v3_large_fpn", "fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "fcn_resnet101",
    "fcn_resnet50", "fcos_resnet50_fpn", "googlenet", "inception_v3", "keypointrcnn_resnet50_fpn",
    "lraspp_mobilenet_v3_large", "maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2", "maxvit_t", "mc3_18",
    "mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3", "mobilenet_v2", "mobilenet_v3_large",
    "mobilenet_v3_small", "r2plus1d_18", "r3d_18", "regnet_x_16gf", "regnet_x_1_6gf", "regnet_x_32gf",
    "regnet_x_3_2gf", "regnet_x_400mf", "regnet_x_800mf", "regnet_x_8gf", "regnet_y_128gf", "regnet_y_16gf",
    "regnet_y_1_6gf", "regnet_y_32gf", "regnet_y_3_2gf", "regnet_y_400mf", "regnet_y_800mf", "regnet_y_8gf",
    "resnet101", "resnet152", "resnet18", "resnet34", "resnet50", "resnext101_32x8d", "resnext101_64x4d",
    "resnext50_32x4d", "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2", "s3d", "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0", "ssdlite320_mobilenet_v3_large", "vgg11_bn",
    "vgg13_bn", "vgg16_bn", "vgg19_bn", "wide_resnet101_2", "wide_resnet50_2",
)  # fmt: skip

TIMM = (
    "botnet26t_256", "coatnet_nano_rw_224", "convmixer_768_32", "cs3darknet_focus_s",
    "cspdarknet53", "cspresnext50", "darknetaa53", "densenetblur121d", "dla34", "dla60_res2net", "dpn68",
    "eca_botnext26ts_256", "ecaresnet26t", "efficientformer_l1", "efficientformerv2_s0",
    "efficientnet_es", "efficientnetv2_rw_t", "efficientvit_b0", "efficientvit_m0", "ese_vovnet19b_dw",
    "fasternet_t0", "fastvit_t8", "fbnetc_100", "fbnetv3_b", "gernet_s", "ghostnet_100", "ghostnetv2_100",
    "halonet26t", "hardcorenas_a", "hgnet_tiny", "hgnetv2_b0", "hrnet_w18_small", "inception_resnet_v2",
    "inception_v4", "lambda_resnet26t", "lcnet_050", "legacy_seresnext26_32x4d", "levit_128s", "levit_conv_128s",
    "maxvit_rmlp_pico_rw_256", "mixnet_s", "mobilenetv1_100", "mobilenetv3_small_050", "mobilenetv4_conv_small",
    "mobilenetv4_hybrid_medium", "mobileone_s0", "mobilevit_xxs", "mobilevitv2_050", "nasnetalarge", "nextvit_small",
    "pnasnet5large", "regnetv_040", "regnetx_002", "regnety_002", "regnetz_005",
    "repghostnet_050", "repvgg_a0", "repvit_m0_9", "res2net50_14w_8s", "resnest14d", "resnet10t", "resnet50c",
    "resnetaa34d", "resnetblur18", "resnetrs50", "resnetv2_18", "resnext26ts", "rexnet_100", "rexnetr_100",
    "selecsls42", "semnasnet_050", "seresnet33ts", "shvit_s1", "skresnet18", "spnasnet_100", "starnet_s1",
    "swiftformer_xs", "tf_efficientnetv2_b0", "tf_mixnet_s", "tiny_vit_5m_224", "tinynet_e", "tresnet_m",
    "vgg11_bn", "visformer_tiny", "vovnet39a", "xception41", "xception41p", "xcit_nano_12_p16_224",
)  # fmt: skip

_DETECTORS = ("rcnn", "fcos", "retinanet", "ssdlite")
_WITH_BACKBONE = (*_DETECTORS, "fcn", "deeplab", "lraspp")
# detectors that let every box pass, so that something is compared
_GENEROUS = {
    "rcnn": {"box_score_thresh": -1.0, "box_detections_per_img": 8, "rpn_post_nms_top_n_test": 16},
    "fcos": {"score_thresh": -1.0, "detections_per_img": 8, "topk_candidates": 16},
    "retinanet": {"score_thresh": -1.0, "detections_per_img": 8, "topk_candidates": 16},
    "ssdlite": {"score_thresh": -1.0, "detections_per_img": 8, "topk_candidates": 16},
}
_SIZES = {"inception_v3": 80, "maxvit_t": 224}
_STUBBED: list[Any] = []


@dataclass(frozen=True)
class Member:
    """A model of a zoo, built when it is wanted.

    Args:
        zoo: where it comes from.
        name: its name there.
        build: makes the model, with random weights, and an example.
    """

    zoo: str
    name: str
    build: Callable[[], tuple[nn.Module, Any]]

    def __call__(self) -> tuple[str, nn.Module, Any]:
        """Return name, model in evaluation with randomized norms, and example, the same on every call."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            model, example = self.build()
            return self.name, randomized(model), example


def torchvision_zoo() -> list[Member]:
    """Return all of torchvision's builders with batch normalization."""
    return [Member("torchvision", name, partial(_torchvision, name)) for name in TORCHVISION]


def timm_zoo() -> list[Member]:
    """Return models of timm, one or more for each of its styles of batch normalization."""
    return [Member("timm", name, partial(_timm, name)) for name in TIMM]


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that hold running statistics, frozen norms of other libraries among them."""
    named = model.named_modules()
    return {name: module for name, module in named if isinstance(getattr(module, "running_mean", None), Tensor)}


def randomized(model: nn.Module) -> nn.Module:
    """Give every norm statistics, γ of both signs with some zeros, and β, and set the model to evaluation."""
    for norm in norms_of(model).values():
        values: Any = norm
        with torch.no_grad():
            values.running_mean.normal_(0, 0.3)
            values.running_var.uniform_(0.5, 1.5)
            if isinstance(values.weight, Tensor):
                gamma = torch.empty_like(values.weight).uniform_(0.5, 1.5)
                gamma[torch.rand(len(gamma)) < 0.2] *= -1
                gamma[torch.rand(len(gamma)) < 0.05] = 0
                values.weight.copy_(gamma)
                values.bias.normal_(0, 0.3)
    return model.eval()


def _torchvision(name: str) -> tuple[nn.Module, Any]:
    open_torchvision()
    options: dict[str, Any] = {"weights": None}
    if any(kind in name for kind in _WITH_BACKBONE):
        options["weights_backbone"] = None
    options |= next((more for kind, more in _GENEROUS.items() if kind in name), {})
    if "rcnn" in name:
        options |= {"rpn_pre_nms_top_n_test": 16}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    model = import_module("torchvision.models").get_model(name, **options)
    if any(kind in name for kind in _DETECTORS):
        return _small(model), [torch.rand(3, 96, 96)]
    return model, _images(name)


def _small(model: Any) -> nn.Module:
    """Let a detector look at images of the size that it is given."""
    transform = model.transform
    transform.min_size, transform.max_size = (96,), 128
    if transform.fixed_size is not None:
        transform.fixed_size = (96, 96)
    # boxes of random weights are wider than the image, and all alike where they are cut
    for name, module in model.named_modules():
        if name.endswith(("bbox_pred", "bbox_reg", "cls_score")):
            for parameter in module.parameters():
                parameter.data *= 0.02
    return model  # type: ignore[no-any-return]


def _images(name: str) -> Any:
    size = _SIZES.get(name, 64)
    if name in ("r3d_18", "mc3_18", "r2plus1d_18"):
        return torch.randn(1, 3, 4, 48, 48)
    if name == "s3d":
        return torch.randn(1, 3, 16, 224, 224)
    return torch.randn(1 if name == "maxvit_t" else 2, 3, size, size)


def _timm(name: str) -> tuple[nn.Module, Any]:
    open_torchvision()
    timm = import_module("timm")
    model = timm.create_model(name, pretrained=False)
    with contextlib.suppress(Exception):
        example = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            model.eval()(example)
        return model, example
    return model, torch.randn(1, *model.default_cfg["input_size"])


# -- torchvision without its compiled operators --------------------------------------------------------------------


def open_torchvision() -> None:
    """Import torchvision; where its compiled operators are missing, declare them, and compute those of detectors in Python.

    Raises:
        ImportError: torchvision is not installed.
    """
    if _STUBBED:
        return
    try:
        vision = import_module("torchvision")
    except RuntimeError:
        # its operators are missing, and it looks for them when it is imported
        _declare()
        vision = import_module("torchvision")
    if not vision.extension._has_ops():
        _patch()
    _STUBBED.append(vision)


def _declare() -> None:
    library: Any = import_module("torch.library").Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    for name in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
        library.define(f"{name}(Tensor a) -> Tensor")
        library.define(f"_{name}_backward(Tensor a) -> Tensor")
    library.impl("nms", _nms, "CPU")
    _STUBBED.append(library)


def _nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Keep the best box, drop those that overlap it, and so on."""
    overlap = import_module("torchvision.ops.boxes").box_iou(boxes, boxes)
    alive, kept = torch.ones(len(boxes), dtype=torch.bool), []
    for i in torch.argsort(scores, descending=True, stable=True).tolist():
        if alive[i]:
            kept.append(i)
            alive &= ~(overlap[i] > threshold)
    return torch.tensor(kept, dtype=torch.int64)


def _pass() -> None:
    """Do nothing; TorchScript, which reads the sources of what it calls, takes no lambda."""


def _patch() -> None:
    """Let torchvision's own Python version of ``roi_align`` be used, which it has for other backends."""
    boxes: Any = import_module("torchvision.ops.boxes")
    poolers: Any = import_module("torchvision.ops.poolers")
    heads: Any = import_module("torchvision.models.detection.roi_heads")
    boxes._assert_has_ops = _pass
    # without its torch.compile, which can't be traced
    align: Any = import_module("torchvision.ops.roi_align")._roi_align.__wrapped__
    to_rois = import_module("torchvision.ops._utils").convert_boxes_to_roi_format

    def roi_align(
        x: Tensor,
        boxes: Any,
        output_size: Any,
        spatial_scale: float = 1.0,
        sampling_ratio: int = -1,
        aligned: bool = False,
    ) -> Any:
        rois = boxes if isinstance(boxes, Tensor) else to_rois(boxes)
        height, width = (output_size, output_size) if isinstance(output_size, int) else output_size
        return align(x, rois, spatial_scale, height, width, sampling_ratio, aligned)

    poolers.roi_align = roi_align
    heads.roi_align = roi_align
