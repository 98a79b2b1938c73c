"""Sound and time series models of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import batches
from .architecture import (
    CAUSAL,
    WITH_CLS,
    WITHOUT_CLS,
    Architecture,
    Batch,
    channels_last,
    pretrained,
)
from .text import BODY, SEQ2SEQ

# Layer normalisation in the convolutions: group normalisation would average over padding, too.
CONVOLUTIONS = {
    **{"conv_dim": (8, 8), "conv_kernel": (8, 4), "conv_stride": (4, 4)},
    **{"num_feat_extract_layers": 2, "feat_extract_norm": "layer"},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
}
STABLE = {"do_stable_layer_norm": True}
SPECTROGRAM = {
    **{"patch_size": 4, "frequency_stride": 4, "time_stride": 4},
    **{"max_length": 24, "num_mel_bins": 8},
}
WHISPER = SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 15, "max_target_positions": 20}
SPEECH2TEXT = SEQ2SEQ | {
    **{"input_feat_per_channel": 8, "conv_channels": 16, "conv_kernel_sizes": (3, 3)},
    **{"num_conv_layers": 2, "max_source_positions": 80, "max_target_positions": 20},
}
SPEECHT5 = CONVOLUTIONS | {
    **{"vocab_size": 50, "hidden_size": 16},
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32),
}
MOONSHINE = {
    **{"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "pad_token_id": 0},
    **dict.fromkeys(("encoder_num_hidden_layers", "decoder_num_hidden_layers"), 2),
    **dict.fromkeys(("encoder_num_attention_heads", "decoder_num_attention_heads"), 2),
}
FORECAST = {
    **{"prediction_length": 4, "context_length": 10, "lags_sequence": [1, 2]},
    **{"num_time_features": 1, "d_model": 16},
}
PATCHES = {
    **{"num_input_channels": 2, "context_length": 32, "patch_length": 4, "patch_stride": 4},
    **{"num_hidden_layers": 2, "d_model": 16, "num_attention_heads": 2, "ffn_dim": 32},
}
MIXER = {name: PATCHES[name] for name in list(PATCHES)[:4]} | {"num_layers": 2, "d_model": 16}
DECISIONS = {
    **{"state_dim": 3, "act_dim": 2, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    **{"max_ep_len": 20, "bos_token_id": None, "eos_token_id": None},
}


def waves(
    model_type: str,
    layers: str = "encoder.layers.*",
    fields: Mapping[str, Any] | None = None,
    **sizes: Any,
) -> Architecture:
    """An encoder of samples, whose mask is of samples, and whose features are of frames."""
    sizes = BODY | CONVOLUTIONS | {"vocab_size": 50} | sizes
    fields = {"stride": 16} | (fields or {})
    return pretrained(model_type, sizes, batches.sound, layers, CAUSAL, **fields)


def every(stride: int) -> Callable[[Mapping[str, Any]], Tensor]:
    """A mask of tokens from that of the input's steps, which a model shortens within."""
    return lambda call: call["attention_mask"][:, stride - 1 :: stride].bool()


def frames_of_moonshine(call: Mapping[str, Any]) -> Tensor:
    mask = call["attention_mask"].bool()
    length = mask.shape[1]
    for kernel, stride in ((127, 64), (7, 3), (3, 2)):
        length = (length - kernel) // stride + 1
    return mask[:, ::384][:, :length]


def spectrogram_to_labels() -> Batch:
    return batches.features("input_features", 8, 30) | batches.labels()


def series() -> Batch:
    past, future = batches.features("past_values", 12), batches.features("future_values", 4)
    past |= {"past_observed_mask": torch.ones(batches.ROWS, 12)}
    times = batches.features("past_time_features", 12, 1)
    return past | future | times | batches.features("future_time_features", 4, 1)


def decisions() -> Batch:
    batch: Batch = {"timesteps": torch.arange(5).repeat(batches.ROWS, 1)}
    for name, width in (("states", 3), ("actions", 2), ("rewards", 1), ("returns_to_go", 1)):
        batch |= batches.features(name, 5, width)
    return batch


TRANSLATION = "AutoModelForSpeechSeq2Seq"
STACKS = ["model.encoder.layers.*", "model.decoder.layers.*"]
SOUND = {
    "AST": pretrained(
        "audio-spectrogram-transformer",
        BODY | SPECTROGRAM,
        partial(batches.features, "input_values", 24, 8),
        "layers.*",
        WITH_CLS,
    ),
    "Data2VecAudio": waves("data2vec-audio", fields={"reads_padding": "positional convolutions"}),
    "HuBERT": waves("hubert", **STABLE),
    "Moonshine": pretrained(
        "moonshine",
        MOONSHINE,
        partial(batches.sound_to_labels, 384),
        STACKS,
        CAUSAL,
        TRANSLATION,
        stride=384,
        settings={"token_mask": {"model.encoder.*": frames_of_moonshine}},
        reads_padding="normalisation over all samples",
    ),
    "SEW": waves(
        "sew", fields={"stride": 32, "settings": {"token_mask": every(32)}}, squeeze_factor=2
    ),
    "SEW-D": waves(
        "sew-d",
        "encoder.encoder.layer.*",
        {"stride": 32},
        squeeze_factor=2,
        position_buckets=16,
        max_position_embeddings=64,
    ),
    "Speech2Text": pretrained(
        "speech_to_text",
        SPEECH2TEXT,
        batches.frames_to_labels,
        STACKS,
        CAUSAL,
        TRANSLATION,
        stride=4,
        settings={"token_mask": {"model.encoder.layers.*": every(4)}},
    ),
    "SpeechT5": pretrained(
        "speecht5",
        SPEECHT5,
        partial(batches.sound_to_labels, 32),
        ["speecht5.*.wrapped_encoder.layers.*", "speecht5.*.wrapped_decoder.layers.*"],
        CAUSAL,
        "SpeechT5ForSpeechToText",
        stride=16,
        reads_padding="positional convolutions",
    ),
    "UniSpeech-SAT": waves("unispeech-sat", **STABLE),
    "wav2vec 2.0": waves("wav2vec2", **STABLE),
    "Wav2Vec2-BERT": pretrained(
        "wav2vec2-bert",
        BODY | {"feature_projection_input_dim": 8},
        batches.frames,
        "encoder.layers.*",
        CAUSAL,
    ),
    "Wav2Vec2-Conformer": waves("wav2vec2-conformer", fields={"reads_padding": "convolutions"}),
    "WavLM": waves("wavlm", **STABLE),
    "Whisper": pretrained("whisper", WHISPER, spectrogram_to_labels, STACKS, CAUSAL, TRANSLATION),
}
SERIES = {
    "Decision Transformer": pretrained(
        "decision_transformer", DECISIONS, decisions, "encoder.h.*", CAUSAL
    ),
    "Informer": pretrained(
        "informer",
        FORECAST,
        series,
        ["encoder.layers.*", "decoder.layers.*"],
        WITHOUT_CLS,
        "InformerModel",
        settings={"replay_rng": True},
    ),
    "PatchTST": pretrained(
        "patchtst",
        PATCHES,
        partial(batches.features, "past_values", 32, 2),
        "encoder.layers.*",
        (channels_last,),
    ),
    "PatchTSMixer": pretrained(
        "patchtsmixer",
        MIXER,
        partial(batches.features, "past_values", 32, 2),
        "encoder.mlp_mixer_encoder.mixers.*",
        (channels_last,),
    ),
    "Time Series Transformer": pretrained(
        "time_series_transformer",
        FORECAST,
        series,
        ["encoder.layers.*", "decoder.layers.*"],
        WITHOUT_CLS,
        "TimeSeriesTransformerModel",
    ),
}
