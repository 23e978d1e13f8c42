"""The families of transformers that hold batch normalization, each built small, from a configuration."""

from collections import Counter
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.bench.zoo import Member, open_torchvision

__all__ = ["TRANSFORMERS", "transformers_zoo"]

SMALL: dict[str, Any] = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 2, 1, 1]}
NARROW: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 6,
}  # fmt: skip
VIT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 64,
    "patch_size": 16,
}  # fmt: skip
RESNET: dict[str, Any] = {"model_type": "resnet", "embedding_size": 16, **SMALL, "out_features": ["stage4"]}
RT_RESNET = RESNET | {"model_type": "rt_detr_resnet", "out_features": ["stage2", "stage3", "stage4"]}
HGNET: dict[str, Any] = {
    "embedding_size": 16, "hidden_sizes": [16, 32, 32, 32], "stem_channels": [3, 8, 16], "stage_in_channels": [16, 16, 32, 32],
    "stage_mid_channels": [8, 8, 8, 8], "stage_out_channels": [16, 32, 32, 32], "stage_num_blocks": [1, 1, 2, 1],
    "stage_numb_of_layers": [2, 2, 2, 2], "depths": [1, 1, 2, 1],
}  # fmt: skip
RT: dict[str, Any] = {
    "backbone_config": RT_RESNET, "encoder_hidden_dim": 32, "encoder_in_channels": [16, 32, 32], "encoder_ffn_dim": 32,
    "encoder_attention_heads": 2, "d_model": 32, "num_queries": 6, "decoder_in_channels": [32, 32, 32], "decoder_ffn_dim": 32,
    "decoder_layers": 2, "decoder_attention_heads": 2, "num_denoising": 0, "num_labels": 3,
}  # fmt: skip
CONFORMER: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "conv_dim": [32] * 7,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0,
}  # fmt: skip
SPEECH: dict[str, Any] = {
    "hidden_size": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_num_attention_heads": 2, "encoder_linear_units": 32,
    "decoder_num_attention_heads": 2, "decoder_linear_units": 32, "speech_decoder_postnet_units": 16,
    "duration_predictor_channels": 16, "energy_predictor_channels": 16, "pitch_predictor_channels": 16,
}  # fmt: skip
BEIT: dict[str, Any] = {**VIT, "out_indices": [0, 1, 2, 3], "num_labels": 5, "auxiliary_channels": 16}
HEADS: dict[str, Any] = {
    "neck_hidden_sizes": [8, 16, 16, 32],
    "fusion_hidden_size": 16,
    "backbone_out_indices": [0, 1, 2, 3],
}
EFFICIENT: dict[str, Any] = {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640}
BACKBONES: dict[str, Any] = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}

# class, configuration, what it looks at
TRANSFORMERS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("ResNetForImageClassification", {"embedding_size": 16, **SMALL, "num_labels": 5}, "image 64"),
    ("ResNetForImageClassification", {"embedding_size": 16, **SMALL, "layer_type": "basic", "num_labels": 5}, "image 64"),
    ("ResNetModel", {"embedding_size": 16, **SMALL, "downsample_in_bottleneck": True}, "image 64"),
    ("ResNetBackbone", {"embedding_size": 16, **SMALL, **BACKBONES}, "image 64"),
    ("RTDetrResNetBackbone", {"embedding_size": 16, **SMALL, **BACKBONES}, "image 64"),
    ("RegNetForImageClassification", {"embedding_size": 16, **SMALL, "groups_width": 8}, "image 64"),
    ("RegNetModel", {"embedding_size": 16, **SMALL, "groups_width": 16, "layer_type": "x"}, "image 64"),
    ("MobileNetV1ForImageClassification", {"depth_multiplier": 0.25}, "image 64"),
    ("MobileNetV1Model", {"depth_multiplier": 0.25, "tf_padding": False}, "image 64"),
    ("MobileNetV2ForImageClassification", {"depth_multiplier": 0.35}, "image 64"),
    ("MobileNetV2Model", {"depth_multiplier": 0.35, "tf_padding": False}, "image 64"),
    ("MobileNetV2ForSemanticSegmentation", {"depth_multiplier": 0.35, "output_stride": 8}, "image 64"),
    ("EfficientNetForImageClassification", {**EFFICIENT, "num_labels": 5}, "image 64"),
    ("EfficientNetModel", {**EFFICIENT, "pooling_type": "max"}, "image 64"),
    ("AlignVisionModel", EFFICIENT, "image 64"),
    ("LevitForImageClassification",
     {"hidden_sizes": [16, 32, 48], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1], "key_dim": [8, 8, 8]}, "image 224"),
    ("LevitForImageClassificationWithTeacher",
     {"hidden_sizes": [16, 32, 48], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1], "key_dim": [8, 8, 8]}, "image 224"),
    ("CvtForImageClassification", {"embed_dim": [16, 32, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 3]}, "image 64"),
    ("SegformerForSemanticSegmentation", {"hidden_sizes": [8, 16, 16, 16], "decoder_hidden_size": 16,
                                          "num_attention_heads": [1, 2, 2, 2]}, "image 64"),
    ("MobileViTForImageClassification", {"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8] * 7, "image_size": 64},
     "image 64"),
    ("MobileViTForSemanticSegmentation", {"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8] * 7, "image_size": 64,
                                          "aspp_out_channels": 8, "num_labels": 4}, "image 64"),
    ("MobileViTV2ForImageClassification", {"base_attn_unit_dims": [16, 16, 16], "n_attn_blocks": [1, 1, 1],
                                           "width_multiplier": 0.5, "image_size": 64}, "image 64"),
    ("MobileViTV2ForSemanticSegmentation", {"base_attn_unit_dims": [16, 16, 16], "n_attn_blocks": [1, 1, 1], "num_labels": 4,
                                            "width_multiplier": 0.5, "image_size": 64, "aspp_out_channels": 8}, "image 64"),
    ("SwiftFormerForImageClassification", {"depths": [1, 2, 1, 2], "embed_dims": [8, 16, 16, 16]}, "image 64"),
    ("DPTForDepthEstimation", {**VIT, **HEADS, "use_batch_norm_in_fusion_residual": True}, "image 64"),
    ("DPTForSemanticSegmentation", {**VIT, **HEADS, "num_labels": 5}, "image 64"),
    ("BeitForSemanticSegmentation", BEIT, "image 64"),
    ("Data2VecVisionForSemanticSegmentation", BEIT, "image 64"),
    ("UperNetForSemanticSegmentation", {"backbone_config": RESNET | BACKBONES, "hidden_size": 16, "num_labels": 5,
                                        "auxiliary_in_channels": 32, "auxiliary_channels": 8}, "image 64"),
    ("TextNetForImageClassification", {"hidden_sizes": [8, 8, 16, 16, 16], "stem_out_channels": 8}, "image 64"),
    ("TextNetBackbone", {"hidden_sizes": [8, 8, 16, 16, 16], "stem_out_channels": 8, **BACKBONES}, "image 64"),
    ("HGNetV2ForImageClassification", HGNET, "image 64"),
    ("HGNetV2Backbone", HGNET | BACKBONES | {"use_learnable_affine_block": True}, "image 64"),
    ("PPLCNetForImageClassification", {"scale": 0.25}, "image 64"),
    ("PPLCNetBackbone", {"scale": 0.25}, "image 64"),
    ("PPLCNetV3Backbone", {"scale": 0.25}, "image 64"),
    ("DetrModel", {**NARROW, "backbone_config": RESNET}, "image 64"),
    ("DetrForObjectDetection", {**NARROW, "backbone_config": RESNET}, "image 64"),
    ("DetrForSegmentation", {**NARROW, "encoder_attention_heads": 8, "decoder_attention_heads": 8,
                             "backbone_config": RESNET | BACKBONES}, "image 64"),
    ("ConditionalDetrForObjectDetection", {**NARROW, "backbone_config": RESNET}, "image 64"),
    ("DabDetrForObjectDetection", {"hidden_size": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32,
                                   "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
                                   "num_queries": 6, "backbone_config": RESNET}, "image 64"),
    ("DeformableDetrForObjectDetection",
     {**NARROW, "decoder_layers": 2, "backbone_config": RESNET | {"out_features": ["stage2", "stage3", "stage4"]}},
     "image 128"),
    ("TableTransformerForObjectDetection", {**NARROW, "backbone_config": RESNET}, "image 64"),
    ("TableTransformerModel", {**NARROW, "backbone_config": RESNET}, "image 64"),
    ("RTDetrForObjectDetection", RT, "image 64"),
    ("RTDetrV2ForObjectDetection", RT, "image 64"),
    ("DFineForObjectDetection", RT | {"backbone_config": HGNET | {"model_type": "hgnet_v2", "out_features":
                                                                  ["stage2", "stage3", "stage4"]},
                                      "encoder_in_channels": [32, 32, 32]}, "image 64"),
    ("MaskFormerForInstanceSegmentation", {"backbone_config": RESNET | BACKBONES, "fpn_feature_size": 32,
                                           "mask_feature_size": 32}, "image 64"),
    ("VitMatteForImageMatting", {"backbone_config": {"model_type": "vitdet", **VIT, "num_channels": 4,
                                                     "out_features": ["stage4"]}, "hidden_size": 32,
                                 "convstream_hidden_sizes": [8, 8, 16], "fusion_hidden_sizes": [16, 16, 8, 8]}, "matte 64"),
    ("VitPoseForPoseEstimation", {"backbone_config": {"model_type": "vitpose_backbone", **VIT, "image_size": [64, 64],
                                                      "patch_size": [16, 16], "out_features": ["stage4"]},
                                  "use_simple_decoder": False, "num_labels": 5}, "image 64"),
    ("GLPNForDepthEstimation", {"hidden_sizes": [8, 16, 16, 16], "decoder_hidden_size": 16,
                                "num_attention_heads": [1, 2, 2, 2]}, "image 64"),
    ("EfficientLoFTRModel", {"stage_num_blocks": [1, 1, 1, 1], "out_features": [8, 8, 16, 64], "hidden_size": 64,
                             "num_attention_layers": 1}, "pair 64"),
    ("GroupViTModel", {"projection_dim": 16, "projection_intermediate_dim": 32,
                       "text_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64,
                                       "intermediate_size": 32, "eos_token_id": 63},
                       "vision_config": {"image_size": 64, "hidden_size": 32, "depths": [1, 1, 1], "num_attention_heads": 2,
                                         "intermediate_size": 32}}, "caption 64"),
    ("ClapAudioModelWithProjection", {"hidden_size": 128, "patch_embeds_hidden_size": 16, "depths": [1, 1, 1, 1],
                                      "num_attention_heads": [2, 2, 2, 2], "enable_fusion": False}, "clap"),
    ("SpeechT5ForTextToSpeech", {"hidden_size": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32,
                                 "encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32,
                                 "speech_decoder_prenet_units": 16, "speech_decoder_postnet_units": 16}, "speech"),
    ("FastSpeech2ConformerModel", SPEECH, "ids 78"),
    ("Wav2Vec2ConformerModel", CONFORMER, "wave"),
    ("Wav2Vec2ConformerForCTC", CONFORMER | {"position_embeddings_type": "rotary", "vocab_size": 12}, "wave"),
    ("HubertModel", CONFORMER | {"conv_pos_batch_norm": True}, "wave"),
    ("models.seamless_m4t.modeling_seamless_m4t.SeamlessM4TSpeechEncoder", {
        "hidden_size": 32, "speech_encoder_layers": 1, "speech_encoder_attention_heads": 2,
        "speech_encoder_intermediate_size": 32, "num_conv_pos_embedding_groups": 2}, "frames 160"),
    ("ParakeetForCTC", {"vocab_size": 20, "pad_token_id": 0, "encoder_config": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "subsampling_conv_channels": 8, "num_mel_bins": 32}}, "frames 32"),
    ("models.granite_speech.modeling_granite_speech.GraniteSpeechCTCEncoder",
     {"hidden_dim": 32, "num_layers": 2, "num_heads": 2, "dim_head": 16, "context_size": 20, "max_pos_emb": 32}, "states 160"),
    ("InformerModel", {"prediction_length": 4, "context_length": 12, "d_model": 16, "lags_sequence": [1, 2]}, "series"),
    ("PatchTSTModel", {"d_model": 16, "ffn_dim": 16, "num_attention_heads": 2, "num_hidden_layers": 2}, "past 32"),
    ("PatchTSTForPrediction", {"d_model": 16, "ffn_dim": 16, "num_attention_heads": 2, "num_hidden_layers": 2}, "past 32"),
    ("PatchTSMixerModel", {"norm_mlp": "BatchNorm"}, "past 32"),
    ("PatchTSMixerForPrediction", {"norm_mlp": "BatchNorm"}, "past 32"),
    ("PerceiverForImageClassificationConvProcessing", {
        "num_latents": 8, "d_latents": 32, "num_blocks": 1, "num_self_attends_per_block": 1, "num_labels": 5,
        "num_self_attention_heads": 2, "num_cross_attention_heads": 1}, "inputs 64"),
    ("TimmBackbone", {"backbone": "resnet18"}, "image 64"),
    ("TimmWrapperModel", {"architecture": "mobilenetv3_small_050"}, "image 64"),
)  # fmt: skip


def transformers_zoo() -> list[Member]:
    """Return small models of the families of transformers with batch normalization; a second one of a class is ``-2``."""
    found, taken = [], Counter[str]()
    for case in TRANSFORMERS:
        short = case[0].rpartition(".")[2]
        taken[short] += 1
        name = short if taken[short] == 1 else f"{short}-{taken[short]}"
        found.append(Member("transformers", name, partial(_build, *case)))
    return found


def _build(name: str, config: dict[str, Any], kind: str) -> tuple[nn.Module, Any]:
    open_torchvision()
    path, _, short = f"transformers.{name}".rpartition(".")
    cls = getattr(import_module(path), short)
    model = cls(cls.config_class(**config))
    return model, _example(*kind.split())


def _example(kind: str, size: str = "0") -> Any:
    n = int(size)
    examples: dict[str, Any] = {
        "image": lambda: {"pixel_values": torch.randn(1, 3, n, n)},
        "matte": lambda: {"pixel_values": torch.randn(1, 4, n, n)},
        "pair": lambda: {"pixel_values": torch.rand(1, 2, 3, n, n)},
        "inputs": lambda: {"inputs": torch.randn(1, 3, n, n)},
        "clap": lambda: {"input_features": torch.randn(1, 1, 1001, 64)},
        "ids": lambda: {"input_ids": torch.randint(1, n, (1, 9))},
        "wave": lambda: {"input_values": torch.randn(1, 2000)},
        "frames": lambda: {"input_features": torch.randn(1, 48, n)},
        "past": lambda: {"past_values": torch.randn(2, n, 1)},
        "speech": lambda: {"input_ids": torch.randint(3, 80, (1, 7)), "decoder_input_values": torch.randn(1, 6, 80)},
        "states": lambda: torch.randn(1, 40, n),
        "caption": lambda: {"input_ids": torch.randint(1, 62, (1, 7)), "pixel_values": torch.randn(1, 3, n, n)},
        "series": _series,
    }
    return examples[kind]()


def _series() -> dict[str, Tensor]:
    return {
        "past_values": torch.randn(2, 14),
        "past_time_features": torch.zeros(2, 14, 0),
        "past_observed_mask": torch.ones(2, 14),
        "future_values": torch.randn(2, 4),
        "future_time_features": torch.zeros(2, 4, 0),
    }
