"""Text models of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from . import batches
from .architecture import (
    BIDIRECTIONAL,
    CAUSAL,
    WITHOUT_CLS,
    Architecture,
    pretrained,
    sequence_first,
)

BODY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
TEXT = BODY | {"vocab_size": 50, "max_position_embeddings": 64, "pad_token_id": 0}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
SEQ2SEQ = {
    **{"vocab_size": 50, "d_model": 16, "max_position_embeddings": 64},
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32),
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}
T5 = {
    **{"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2},
    **{"num_layers": 2, "num_decoder_layers": 2, "decoder_start_token_id": 0},
}
FUNNEL = {
    **{"vocab_size": 50, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32},
    **{"block_sizes": [1, 1], "block_repeats": [1, 1], "num_decoder_layers": 2},
}
PERCEIVER = {
    **{"vocab_size": 50, "d_model": 16, "d_latents": 16, "num_latents": 5},
    **{"num_self_attends_per_block": 2, "qk_channels": 16, "v_channels": 16},
    **{"num_self_attention_heads": 2, "num_cross_attention_heads": 2},
    "max_position_embeddings": 64,
}
REFORMER = {
    **{"vocab_size": 50, "hidden_size": 16, "attn_layers": ["local", "local"]},
    **{"num_attention_heads": 2, "attention_head_size": 8, "feed_forward_size": 32},
    **{"axial_pos_embds": False, "max_position_embeddings": 64, "local_attn_chunk_length": 4},
}
XLM = {"n_words": 50, "emb_dim": 16, "n_layers": 2, "n_heads": 2}
XLNET = {"vocab_size": 50, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}
DEEPSEEK = {
    **{"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 16, "first_k_dense_replace": 1},
    **{"q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 8},
    **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 4},
}
MAMBA2 = {"num_heads": 4, "head_dim": 8, "state_size": 4, "n_groups": 1}
WINDOW = 4
XGLM = {"d_model": 16, "num_layers": 2, "attention_heads": 2, "ffn_dim": 32}


def encoder(
    model_type: str,
    layers: str = "encoder.layer.*",
    reads_padding: str = "",
    settings: Mapping[str, Any] | None = None,
    **sizes: Any,
) -> Architecture:
    return pretrained(
        model_type,
        TEXT | sizes,
        batches.text,
        layers,
        BIDIRECTIONAL,
        reads_padding=reads_padding,
        settings=settings or {},
    )


def decoder(
    model_type: str, layers: str = "model.layers.*", left: bool = False, **sizes: Any
) -> Architecture:
    """Its first token sees only itself, so it is the same in all rows of many a batch."""
    batch, head = batches.text_with_labels, "AutoModelForCausalLM"
    return pretrained(model_type, TEXT | sizes, batch, layers, CAUSAL, head, left=left)


def rotary(model_type: str, layers: str = "model.layers.*", **sizes: Any) -> Architecture:
    return decoder(model_type, layers, True, **sizes)


def seq2seq(
    model_type: str,
    prefix: str = "model",
    settings: Mapping[str, Any] | None = None,
    **sizes: Any,
) -> Architecture:
    layers = [f"{prefix}.encoder.layers.*", f"{prefix}.decoder.layers.*"]
    return pretrained(
        model_type,
        SEQ2SEQ | sizes,
        batches.text_to_labels,
        layers,
        CAUSAL,
        "AutoModelForSeq2SeqLM",
        settings=settings or {},
    )


def to_windows(call: Mapping[str, Any]) -> Tensor:
    """The mask as Longformer and LED pad it: to a multiple of their attention's window."""
    mask = call["attention_mask"].bool()
    return nn.functional.pad(mask, (0, -mask.shape[1] % WINDOW))


def t5(model_type: str, **sizes: Any) -> Architecture:
    layers, head = ["encoder.block.*", "decoder.block.*"], "AutoModelForSeq2SeqLM"
    return pretrained(model_type, T5 | sizes, batches.text_to_labels, layers, CAUSAL, head)


ENCODERS = {
    "ALBERT": encoder("albert", "encoder.albert_layer_groups.0", embedding_size=8),
    "BERT": encoder("bert"),
    "BigBird": encoder("big_bird", attention_type="original_full"),
    "CamemBERT": encoder("camembert"),
    "CANINE": encoder("canine", "final_char_encoder.layer.*", "downsampling"),
    "ConvBERT": encoder("convbert", reads_padding="convolutions"),
    "DeBERTa": encoder("deberta"),
    "DeBERTa-v2": encoder("deberta-v2", relative_attention=True, position_buckets=16),
    "DistilBERT": encoder("distilbert", "transformer.layer.*"),
    "ELECTRA": encoder("electra", embedding_size=8),
    "ESM": encoder("esm"),
    "EuroBERT": encoder("eurobert", "layers.*"),
    "FNet": encoder("fnet", reads_padding="Fourier transform without a mask"),
    "Funnel": pretrained(
        "funnel",
        FUNNEL,
        batches.text,
        "decoder.layers.*",
        BIDIRECTIONAL,
        "FunnelModel",
        reads_padding="pooling",
    ),
    "Longformer": encoder(
        "longformer", settings={"token_mask": to_windows}, attention_window=[WINDOW] * 2
    ),
    "ModernBERT": encoder("modernbert", "layers.*"),
    "MPNet": encoder("mpnet"),
    "NomicBERT": encoder("nomic_bert", "layers.*"),
    "Nyströmformer": encoder("nystromformer", reads_padding="landmarks"),
    "Perceiver": pretrained(
        "perceiver",
        PERCEIVER,
        batches.text,
        "perceiver.encoder.self_attends.*",
        WITHOUT_CLS,
        "PerceiverForMaskedLM",
        settings={"token_mask": None},
    ),
    "Reformer": pretrained(
        "reformer",
        REFORMER,
        batches.text,
        "encoder",
        BIDIRECTIONAL,
        stride=4,
        reads_padding="chunks that wrap around",
    ),
    "RemBERT": encoder("rembert", input_embedding_size=8),
    "RoBERTa": encoder("roberta"),
    "RoFormer": encoder("roformer"),
    "SqueezeBERT": encoder("squeezebert", "encoder", embedding_size=16),
    "T5 encoder": pretrained(
        "t5", T5, batches.text, "encoder.block.*", BIDIRECTIONAL, "T5EncoderModel"
    ),
    "XLM": pretrained("xlm", XLM, batches.text, "layer_norm2.*", BIDIRECTIONAL),
    "XLM-RoBERTa": encoder("xlm-roberta"),
    "XLNet": pretrained(
        "xlnet",
        XLNET,
        batches.text,
        "layer.*",
        (sequence_first,),
        settings={"token_mask": "attention_mask"},
    ),
}
DECODERS = {
    "BioGPT": decoder("biogpt", "biogpt.layers.*"),
    "BLOOM": rotary("bloom", "transformer.h.*"),
    "Cohere": rotary("cohere"),
    "DeepSeek-V3": rotary("deepseek_v3", **DEEPSEEK),
    "Falcon": rotary("falcon", "transformer.h.*"),
    "Gemma": rotary("gemma", **GROUPED),
    "Gemma 2": rotary("gemma2", **GROUPED),
    "Gemma 3": rotary("gemma3_text", **GROUPED),
    "GPT-2": decoder("gpt2", "transformer.h.*"),
    "GPT-BigCode": decoder("gpt_bigcode", "transformer.h.*"),
    "GPT-J": rotary("gptj", "transformer.h.*", rotary_dim=4),
    "GPT-Neo": decoder("gpt_neo", "transformer.h.*", attention_types=[[["global", "local"], 1]]),
    "GPT-NeoX": rotary("gpt_neox", "gpt_neox.layers.*"),
    "gpt-oss": rotary("gpt_oss", **GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "Granite": rotary("granite"),
    "Llama": rotary("llama"),
    "Mamba": decoder("mamba", "backbone.layers.*", state_size=4),
    "Mamba 2": decoder("mamba2", "backbone.layers.*", **MAMBA2),
    "Mistral": rotary("mistral", **GROUPED),
    "Mixtral": rotary("mixtral", **GROUPED, num_local_experts=4),
    "OLMo 2": rotary("olmo2"),
    "OPT": decoder("opt", "model.decoder.layers.*", word_embed_proj_dim=16, ffn_dim=32),
    "Phi": rotary("phi"),
    "Phi-3": rotary("phi3"),
    "Qwen2": rotary("qwen2", **GROUPED),
    "Qwen3": rotary("qwen3", **GROUPED),
    "RWKV": decoder("rwkv", "rwkv.blocks.*", attention_hidden_size=16),
    "SmolLM3": rotary("smollm3", **GROUPED),
    "StableLM": rotary("stablelm", **GROUPED),
    "StarCoder2": rotary("starcoder2"),
    "XGLM": decoder("xglm", **XGLM),
}
ENCODER_DECODERS = {
    "BART": seq2seq("bart"),
    "BART with decoder inputs": pretrained(
        "bart", SEQ2SEQ, batches.text_to_text, ["encoder.layers.*", "decoder.layers.*"], CAUSAL
    ),
    "BERT to BERT": pretrained(
        "encoder-decoder",
        {
            "encoder": TEXT | {"model_type": "bert"},
            "decoder": TEXT
            | {"model_type": "bert", "is_decoder": True, "add_cross_attention": True},
            **{"decoder_start_token_id": 1, "pad_token_id": 0},
        },
        batches.text_to_labels,
        ["encoder.encoder.layer.*", "decoder.bert.encoder.layer.*"],
        CAUSAL,
        "EncoderDecoderModel",
    ),
    "BigBird-Pegasus": seq2seq("bigbird_pegasus", attention_type="original_full"),
    "Blenderbot": seq2seq("blenderbot"),
    "LED": seq2seq(
        "led", "led", {"token_mask": {"led.encoder.*": to_windows}}, attention_window=[WINDOW] * 2
    ),
    "LongT5": t5("longt5", local_radius=3),
    "M2M-100": seq2seq("m2m_100"),
    "Marian": seq2seq("marian"),
    "mBART": seq2seq("mbart"),
    "mT5": t5("mt5"),
    "Pegasus": seq2seq("pegasus"),
    "PLBart": seq2seq("plbart"),
    "Switch Transformers": t5("switch_transformers", num_experts=2, expert_capacity=64),
    "T5": t5("t5"),
    "UMT5": t5("umt5"),
}
