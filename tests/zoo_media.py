"""Models of transformers and torchvision for images, sound, time series and several of these at once, and torch's own
sequence models. Tiny, and without dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import BATCH_SIZE, VOCABULARY, Entry, classification_loss, images, tokens, vectors
from zoo_text import make

_SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_VIT = {**_SIZES, **_NO_DROPOUT, "image_size": 8, "patch_size": 4, "num_labels": 4}
_NO_SPEECH_DROPOUT = {
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0,
    "final_dropout": 0.0, "layerdrop": 0.0, "mask_time_prob": 0.0,
}  # fmt: skip
_SPEECH = {
    **_SIZES, **_NO_SPEECH_DROPOUT, "conv_dim": [8, 8], "conv_stride": [4, 4], "conv_kernel": [8, 4],
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2,
    "vocab_size": VOCABULARY,
}  # fmt: skip
_SPEECH_REMARK = (
    "sets `requires_grad` on its own input; "
    "`mask_time_prob=0`: the masks of SpecAugment come from numpy's global generator"
)


def _wide_images(side: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda seed: images(seed, side=side)


def _image_loss(model: Any, pixels: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(pixel_values=pixels).logits.reshape(len(pixels), -1)[:, :4], labels)


def _vision(name: str, remarks: str = "", side: int = 8, body: Any = _image_loss, **config: Any) -> Entry:
    return Entry(name, "vision", make(name, **config), _wide_images(side), body, remarks)


def _segmentation_loss(model: Any, pixels: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(pixel_values=pixels).logits.mean(dim=(2, 3)), labels)


def _detection_loss(model: Any, pixels: Tensor, labels: Tensor) -> Tensor:
    output = model(pixel_values=pixels)
    return F.cross_entropy(output.logits[:, 0, :4], labels) + output.pred_boxes.square().mean()


def _torchvision(name: str, remarks: str = "", side: int = 16, **arguments: Any) -> Entry:
    def build() -> nn.Module:
        import torchvision

        model: nn.Module = getattr(torchvision.models, name)(num_classes=4, **arguments)
        return model

    return Entry(f"torchvision.models.{name}", "vision", build, _wide_images(side), classification_loss, remarks)


# fmt: off
VISION: dict[str, Entry] = {
    "vit": _vision("ViTForImageClassification", **_VIT),
    "deit": _vision("DeiTForImageClassification", **_VIT),
    "dinov2": _vision("Dinov2ForImageClassification", mlp_ratio=2, drop_path_rate=0.0, **_VIT),
    "beit": _vision("BeitForImageClassification", use_relative_position_bias=True, drop_path_rate=0.0, **_VIT),
    "swin": _vision("SwinForImageClassification", "shifted windows; the number of patches falls from stage to stage",
                    16, image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=2,
                    num_labels=4, drop_path_rate=0.0, **_NO_DROPOUT),
    "swinv2": _vision("Swinv2ForImageClassification", "", 16, image_size=16, patch_size=2, embed_dim=8, depths=[2, 2],
                      num_heads=[2, 2], window_size=2, num_labels=4, drop_path_rate=0.0, **_NO_DROPOUT),
    "convnext": _vision("ConvNextForImageClassification", "", 16, depths=[1, 2, 1], hidden_sizes=[8, 8, 16],
                        num_stages=3, patch_size=2, num_labels=4),
    "convnextv2": _vision("ConvNextV2ForImageClassification", "", 16, depths=[1, 2, 1], hidden_sizes=[8, 8, 16],
                          num_stages=3, patch_size=2, num_labels=4),
    "resnet": _vision("ResNetForImageClassification", "BatchNorm", 16, embedding_size=8, hidden_sizes=[8, 8, 16],
                      depths=[1, 1, 1], layer_type="basic", num_labels=4),
    "regnet": _vision("RegNetForImageClassification", "BatchNorm", 32, embedding_size=8, hidden_sizes=[8, 8, 16],
                      depths=[1, 1, 1], groups_width=4, num_labels=4),
    "mobilenet_v1": _vision("MobileNetV1ForImageClassification", "BatchNorm", 32, depth_multiplier=0.25, min_depth=4,
                            classifier_dropout_prob=0.0, num_labels=4),
    "poolformer": _vision("PoolFormerForImageClassification", "", 32, depths=[1, 1, 1], hidden_sizes=[8, 8, 16],
                          patch_sizes=[3, 3, 3], strides=[4, 2, 2], padding=[1, 1, 1], num_encoder_blocks=3,
                          drop_path_rate=0.0, num_labels=4),
    "segformer": _vision("SegformerForSemanticSegmentation", "BatchNorm; returns maps", 32, _segmentation_loss,
                         depths=[1, 1], hidden_sizes=[8, 16], num_encoder_blocks=2, sr_ratios=[2, 1],
                         patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
                         decoder_hidden_size=8, num_labels=4, drop_path_rate=0.0, classifier_dropout_prob=0.0,
                         **_NO_DROPOUT),
    "cvt": _vision("CvtForImageClassification", "BatchNorm inside the attention", 16, embed_dim=[8, 16],
                   num_heads=[1, 2], depth=[1, 2], patch_sizes=[3, 3], patch_stride=[2, 2], patch_padding=[1, 1],
                   mlp_ratio=[2.0, 2.0], attention_drop_rate=[0.0, 0.0], drop_rate=[0.0, 0.0],
                   drop_path_rate=[0.0, 0.0], qkv_bias=[True, True],
                   cls_token=[False, True], qkv_projection_method=["dw_bn", "dw_bn"],
                   kernel_qkv=[3, 3], padding_kv=[1, 1], stride_kv=[2, 2], padding_q=[1, 1], stride_q=[1, 1],
                   num_labels=4),
    "levit": _vision("LevitForImageClassification", "BatchNorm", 32, image_size=32, hidden_sizes=[8, 8, 8],
                     num_attention_heads=[1, 1, 1], depths=[1, 1, 1], key_dim=[8, 8, 8], drop_path_rate=0,
                     mlp_ratio=[2, 2, 2], attention_ratio=[2, 2, 2], num_labels=4,
                     down_ops=[["Subsample", 8, 1, 2, 2, 2], ["Subsample", 8, 1, 2, 2, 2]]),
    "hiera": _vision("HieraForImageClassification", "", 32, image_size=[32, 32], patch_size=[7, 7],
                     patch_stride=[4, 4], patch_padding=[3, 3], embed_dim=8, depths=[1, 1], num_heads=[1, 2],
                     query_stride=[2, 2], num_query_pool=1, masked_unit_size=[4, 4], drop_path_rate=0.0,
                     masked_unit_attention=[True, False], mlp_ratio=2.0, num_labels=4),
    "yolos": _vision("YolosForObjectDetection", "detection tokens; two heads", 8, _detection_loss,
                     **(_VIT | {"image_size": [8, 8]}), num_detection_tokens=3),
    "dpt": _vision("DPTForSemanticSegmentation", "fuses the outputs of four layers; BatchNorm", 8, _segmentation_loss,
                   **(_VIT | {"num_hidden_layers": 4}), backbone_out_indices=[0, 1, 2, 3],
                   neck_hidden_sizes=[4, 4, 4, 4], fusion_hidden_size=8, reassemble_factors=[4, 2, 1, 0.5],
                   use_auxiliary_head=False, semantic_classifier_dropout=0.0),
    "focalnet": _vision("FocalNetForImageClassification", "", 16, image_size=16, patch_size=2, embed_dim=8,
                        hidden_sizes=[8, 16], depths=[1, 2], focal_levels=[1, 1], focal_windows=[3, 3],
                        hidden_dropout_prob=0.0, drop_path_rate=0.0, num_labels=4),
    "convnext_drop_path": Entry(
        "ConvNextForImageClassification", "vision",
        make("ConvNextForImageClassification", depths=[1, 2, 1], hidden_sizes=[8, 8, 16], num_stages=3, patch_size=2,
             num_labels=4, drop_path_rate=0.3),
        _wide_images(16), _image_loss, "with stochastic depth (`drop_path_rate=0.3`)", draws=True,
    ),
    "torchvision_densenet": _torchvision(
        "DenseNet", "BatchNorm; every layer reads all before it", growth_rate=4, block_config=(2, 2),
        num_init_features=8, bn_size=2, side=32,
    ),
    "torchvision_squeezenet": _torchvision("squeezenet1_1", "dropout of 0 (`dropout=0.0`)", 32, dropout=0.0),
}
# fmt: on


def _waves(seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    waves = torch.randn(BATCH_SIZE, 400, generator=generator, dtype=torch.float64)
    return waves, torch.randint(0, VOCABULARY, (BATCH_SIZE,), generator=generator)


def _frame_loss(model: Any, waves: Tensor, labels: Tensor) -> Tensor:
    logits = model(input_values=waves).logits
    return F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(logits.shape[1]))


def _spectra(length: int, bins: int) -> Callable[[int], tuple[Tensor, ...]]:
    def make_batch(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        ids, _ = tokens(seed)
        return torch.randn(BATCH_SIZE, bins, length, generator=generator, dtype=torch.float64), ids

    return make_batch


def _speech_to_text_loss(model: Any, spectra: Tensor, ids: Tensor) -> Tensor:
    logits = model(input_features=spectra, decoder_input_ids=ids.roll(1, 1)).logits
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def _audio(name: str, remarks: str = _SPEECH_REMARK, **config: Any) -> Entry:
    return Entry(name, "audio", make(name, **(_SPEECH | config)), _waves, _frame_loss, remarks)


_SPEECH_DECODER = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": VOCABULARY,
    "max_source_positions": 16, "max_target_positions": 16, "dropout": 0.0, "pad_token_id": 1,
    "bos_token_id": 2, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip

# fmt: off
AUDIO: dict[str, Entry] = {
    "wav2vec2": _audio("Wav2Vec2ForCTC", f"a parametrized (weight-normed) convolution; {_SPEECH_REMARK}"),
    "hubert": _audio("HubertForCTC"),
    "wavlm": _audio("WavLMForCTC", f"position bias made by the first layer, read by all; {_SPEECH_REMARK}"),
    "unispeech_sat": _audio("UniSpeechSatForCTC"),
    "sew": _audio("SEWForCTC", squeeze_factor=2),
    "data2vec_audio": _audio("Data2VecAudioForCTC", conv_pos_kernel_size=3, num_conv_pos_embeddings=2),
    "whisper": Entry(
        "WhisperForConditionalGeneration", "audio",
        make("WhisperForConditionalGeneration", **_SPEECH_DECODER, num_mel_bins=8, suppress_tokens=None,
             begin_suppress_tokens=None),
        _spectra(32, 8), _speech_to_text_loss, "tied weights; `apply_spec_augment=False` (the default)",
    ),
    "speech_to_text": Entry(
        "Speech2TextForConditionalGeneration", "audio",
        make("Speech2TextForConditionalGeneration", **_SPEECH_DECODER, num_conv_layers=2, conv_channels=16,
             input_feat_per_channel=8, conv_kernel_sizes=[3, 3]),
        lambda seed: tuple([part.transpose(1, 2) if part.ndim == 3 else part for part in _spectra(32, 8)(seed)]),
        _speech_to_text_loss, "tied weights", default_dtype=torch.float64,
    ),
    "ast": Entry(
        "ASTForAudioClassification", "audio",
        make("ASTForAudioClassification", **_SIZES, **_NO_DROPOUT, num_mel_bins=8, max_length=16, patch_size=4,
             frequency_stride=4, time_stride=4, num_labels=VOCABULARY),
        lambda seed: (_spectra(8, 16)(seed)[0], _waves(seed)[1]),
        lambda model, spectra, labels: F.cross_entropy(model(input_values=spectra).logits, labels),
    ),
}
# fmt: on


def _series(seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(BATCH_SIZE, 16, 2, generator=generator, dtype=torch.float64)
    return values, torch.randn(BATCH_SIZE, 4, 2, generator=generator, dtype=torch.float64)


def _forecast_loss(model: Any, past: Tensor, future: Tensor) -> Tensor:
    return F.mse_loss(model(past_values=past).prediction_outputs, future)


def _texts_and_images(seed: int) -> tuple[Tensor, ...]:
    return (*tokens(seed), images(seed)[0])


def _contrastive_loss(model: Any, ids: Tensor, mask: Tensor, pixels: Tensor) -> Tensor:
    logits = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits_per_text
    target = torch.arange(len(ids))
    return F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)


def _trajectories(seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(BATCH_SIZE, *shape, generator=generator, dtype=torch.float64)

    return numbers(5, 6), numbers(5, 3), numbers(5, 1), numbers(5, 1), torch.arange(5).repeat(BATCH_SIZE, 1)


def _decision_loss(model: Any, states: Tensor, actions: Tensor, rewards: Tensor, returns: Tensor, steps: Tensor) -> Any:
    output = model(states=states, actions=actions, rewards=rewards, returns_to_go=returns, timesteps=steps,
                   attention_mask=torch.ones_like(steps))  # fmt: skip
    return F.mse_loss(output.action_preds, actions) + F.mse_loss(output.state_preds, states)


def _texts_with_images(seed: int) -> tuple[Tensor, ...]:
    """Each text begins with the places of an image's four patches."""
    return torch.cat([torch.full((BATCH_SIZE, 4), 2), tokens(seed)[0]], dim=1), images(seed)[0]


def _llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(**(_SIZES | {"num_hidden_layers": 2}), image_size=8, patch_size=4)
    text = LlamaConfig(**_SIZES, vocab_size=VOCABULARY, max_position_embeddings=32)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=2, vision_feature_layer=-1, image_seq_length=4
        )
    )


def _vision_encoder_decoder() -> nn.Module:
    from transformers import (
        BertConfig,
        VisionEncoderDecoderConfig,
        VisionEncoderDecoderModel,
        ViTConfig,
    )

    decoder = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **_SIZES, **_NO_DROPOUT)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**_VIT), decoder)
    return VisionEncoderDecoderModel(config=config)


_TOWERS = {
    "text_config": {**_SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 16, "eos_token_id": 2,
                    "bos_token_id": 1, "pad_token_id": 0},
    "vision_config": {**_SIZES, "image_size": 8, "patch_size": 4},
}  # fmt: skip

# fmt: off
MIXED: dict[str, Entry] = {
    "clip": Entry("CLIPModel", "several inputs", make("CLIPModel", **_TOWERS, projection_dim=8), _texts_and_images,
                  _contrastive_loss, "two towers; the loss compares the samples of a microbatch",
                  default_dtype=torch.float64),
    "siglip": Entry("SiglipModel", "several inputs", make("SiglipModel", **_TOWERS), _texts_and_images,
                    _contrastive_loss, "two towers; pooling by `nn.MultiheadAttention`"),
    "vision_encoder_decoder": Entry(
        "VisionEncoderDecoderModel", "several inputs", _vision_encoder_decoder, _texts_and_images,
        lambda model, ids, mask, pixels: F.cross_entropy(
            model(pixel_values=pixels, decoder_input_ids=ids, decoder_attention_mask=mask).logits.flatten(0, 1),
            ids.flatten(),
        ), "ViT and BERT", default_dtype=torch.float64,
    ),
    "llava": Entry(
        "LlavaForConditionalGeneration", "several inputs", _llava, _texts_with_images,
        lambda model, ids, pixels: F.cross_entropy(
            model(input_ids=ids, pixel_values=pixels).logits.flatten(0, 1), ids.flatten()
        ), "CLIP and Llama; the image's features are written into the text's",
    ),
    "vilt": Entry(
        "ViltForMaskedLM", "several inputs",
        make("ViltForMaskedLM", **_VIT, vocab_size=VOCABULARY, max_position_embeddings=16, max_image_length=-1),
        _texts_and_images,
        lambda model, ids, mask, pixels: F.cross_entropy(
            model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits.flatten(0, 1), ids.flatten()
        ), "draws the order of the patches; tied weights", draws=True,
    ),
    "patch_tst": Entry(
        "PatchTSTForPrediction", "several inputs",
        make("PatchTSTForPrediction", num_input_channels=2, context_length=16, patch_length=4, patch_stride=4,
             prediction_length=4, num_hidden_layers=3, d_model=16, num_attention_heads=2, ffn_dim=32, loss="mse",
             attention_dropout=0.0, ff_dropout=0.0, head_dropout=0.0, path_dropout=0.0, positional_dropout=0.0),
        _series, _forecast_loss, "time series; BatchNorm",
    ),
    "patch_tsmixer": Entry(
        "PatchTSMixerForPrediction", "several inputs",
        make("PatchTSMixerForPrediction", num_input_channels=2, context_length=16, patch_length=4, patch_stride=4,
             prediction_length=4, num_layers=3, d_model=8, dropout=0.0, head_dropout=0.0, loss="mse"),
        _series, _forecast_loss, "time series",
    ),
    "decision_transformer": Entry(
        "DecisionTransformerModel", "several inputs",
        make("DecisionTransformerModel", state_dim=6, act_dim=3, hidden_size=16, max_ep_len=16, n_layer=3, n_head=2,
             n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        _trajectories, _decision_loss, "states, actions and returns",
    ),
}
# fmt: on


# torch's own


class _Embedded(nn.Module):
    """A sequence model of torch.nn between an embedding and a head; ``run(model, x)`` calls it."""

    def __init__(self, inner: nn.Module, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.inner = inner
        self.head = nn.Linear(16, VOCABULARY)
        self.run = run

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.run(self.inner, self.embed(ids)))


def _causal(length: int) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length, dtype=torch.float64)


def _layer(cls: Any, **more: Any) -> Any:
    return cls(16, 2, 32, dropout=0.0, batch_first=True, **more)


def _torch(name: str, build: Callable[[], nn.Module], run: Any, remarks: str = "") -> Entry:
    def loss(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())

    return Entry(f"torch.nn.{name}", "torch.nn", lambda: _Embedded(build(), run), tokens, loss, remarks)


# fmt: off
TORCH: dict[str, Entry] = {
    "torch_transformer": _torch(
        "Transformer",
        lambda: nn.Transformer(16, 2, 2, 2, 32, dropout=0.0, batch_first=True),
        lambda model, x: model(x, x.roll(1, 1), tgt_mask=_causal(x.shape[1])),
    ),
    "torch_encoder": _torch(
        "TransformerEncoder",
        lambda: nn.TransformerEncoder(_layer(nn.TransformerEncoderLayer), 4, norm=nn.LayerNorm(16)),
        lambda model, x: model(x, mask=_causal(x.shape[1])),
    ),
    "torch_encoder_norm_first": _torch(
        "TransformerEncoderLayer",
        lambda: nn.Sequential(*(_layer(nn.TransformerEncoderLayer, norm_first=True) for _ in range(3))),
        lambda model, x: model(x), "`norm_first=True`, in an `nn.Sequential`",
    ),
    "torch_decoder": _torch(
        "TransformerDecoder",
        lambda: nn.TransformerDecoder(_layer(nn.TransformerDecoderLayer), 3),
        lambda model, x: model(x, x.flip(1), tgt_mask=_causal(x.shape[1])),
    ),
    "torch_lstm": _torch(
        "LSTM",
        lambda: nn.ModuleList([nn.LSTM(16, 16, batch_first=True, bidirectional=index == 0, proj_size=8 * (index == 0))
                               for index in range(3)]),
        lambda layers, x: layers[2](layers[1](layers[0](x)[0])[0])[0], "one of them bidirectional with a projection",
    ),
    "torch_gru": _torch(
        "GRU",
        lambda: nn.ModuleList([nn.GRU(16, 16, batch_first=True) for _ in range(3)]),
        lambda layers, x: layers[2](*layers[1](*layers[0](x)))[0], "the state goes from layer to layer",
    ),
    "torch_attention": _torch(
        "MultiheadAttention",
        lambda: nn.ModuleList([nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(4)]),
        lambda layers, x: _attend(layers, x), "returns its weights, too",
    ),
    "torch_sequential": Entry(
        "nn.Sequential", "torch.nn",
        lambda: nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 16), nn.ReLU(inplace=True),
                              nn.BatchNorm1d(16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)),
        vectors, classification_loss, "BatchNorm, in-place activations",
    ),
}
# fmt: on


def _attend(layers: Any, x: Tensor) -> Tensor:
    for layer in layers:
        y, weights = layer(x, x, x)
        x = x + y + weights.mean()
    return x
