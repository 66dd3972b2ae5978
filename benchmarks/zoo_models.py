"""The zoo's members: small random models of many architectures, built from their configurations and never downloaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

VOCABULARY = 99


@dataclass(frozen=True)
class Member:
    """An architecture by the names that transformers gives it.

    auto: the suffix of the Auto class that builds it ("ForCausalLM"; "" for the bare model).
    kind: its `model_type`.
    options: its configuration.
    required: it must be right.
    """

    name: str
    auto: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    required: bool = False

    def build(self) -> nn.Module:
        """The model with seeded weights, larger than the library's own so that attention is not uniform, and no two biases alike."""
        import transformers

        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(self.kind, **self.options)
        model = getattr(transformers, f"AutoModel{self.auto}").from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(3)
                elif parameter.is_floating_point():  # biases that are all zeros would be one stored tensor
                    parameter.add_(0.05 * torch.randn_like(parameter))
        return model


def _text(**options: Any) -> dict[str, Any]:
    small = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    return {**small, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | options


def _grouped(**options: Any) -> dict[str, Any]:
    return _text(num_key_value_heads=2) | options


def _gpt(**options: Any) -> dict[str, Any]:
    return {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128,
            "bos_token_id": 1, "eos_token_id": 2} | options  # fmt: skip


def _image(**options: Any) -> dict[str, Any]:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    return {**small, "image_size": 32, "patch_size": 8} | options


def _seq2seq(**options: Any) -> dict[str, Any]:
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3, "forced_eos_token_id": None}
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    widths = {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 64,
    }
    return {**tokens, **layers, **widths} | options


def _t5(**options: Any) -> dict[str, Any]:
    return {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
            "decoder_start_token_id": 0} | options  # fmt: skip


def _towers(**options: Any) -> dict[str, Any]:
    text = _text(max_position_embeddings=64, projection_dim=16)
    return {"text_config": text, "vision_config": _image(projection_dim=16)} | options


LM, MLM, SEQ = "ForCausalLM", "ForMaskedLM", "ForSeq2SeqLM"

MEMBERS = [
    Member("Llama", LM, "llama", _grouped(), True),
    Member("Mistral", LM, "mistral", _grouped(sliding_window=6), True),
    Member("Qwen2", LM, "qwen2", _grouped(), True),
    Member("Qwen3", LM, "qwen3", _grouped(head_dim=16), True),
    Member("GPT-2", LM, "gpt2", _gpt(), True),
    Member("GPT-NeoX", LM, "gpt_neox", _text(), True),
    Member("BERT", MLM, "bert", _text(), True),
    Member("RoBERTa", MLM, "roberta", _text(max_position_embeddings=66, pad_token_id=1, bos_token_id=0), True),
    Member("ViT", "", "vit", _image(), True),
    Member("DINOv2", "", "dinov2", _image(mlp_ratio=2), True),
    Member("CLIP", "", "clip", _towers(projection_dim=16), True),
    Member("T5", SEQ, "t5", _t5(), True),
    Member("Whisper", "ForSpeechSeq2Seq", "whisper",
           _seq2seq(max_source_positions=16, max_target_positions=32, num_mel_bins=8, suppress_tokens=None,
                    begin_suppress_tokens=None), True),
    # decoders
    Member("Gemma", LM, "gemma", _grouped(head_dim=8)),
    Member("Gemma 2", LM, "gemma2", _grouped(head_dim=8, sliding_window=5)),
    Member("Gemma 3", LM, "gemma3_text", _grouped(head_dim=8, sliding_window=5,
           layer_types=["sliding_attention", "full_attention", "sliding_attention"])),
    Member("Phi", LM, "phi", _text()),
    Member("Phi-3", LM, "phi3", _grouped()),
    Member("OPT", LM, "opt", _text(ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=128)),
    Member("BLOOM", LM, "bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    Member("Falcon", LM, "falcon", _text()),
    Member("MPT", LM, "mpt", {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 128}),
    Member("StarCoder2", LM, "starcoder2", _grouped()),
    Member("OLMo 2", LM, "olmo2", _grouped()),
    Member("Cohere", LM, "cohere", _grouped()),
    Member("StableLM", LM, "stablelm", _grouped()),
    Member("GPT-J", LM, "gptj", _gpt(rotary_dim=8)),
    Member("GPT-Neo", LM, "gpt_neo", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
           "window_size": 5, "attention_types": [[["global", "local"], 1]],
           "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2}),
    Member("GPT-BigCode", LM, "gpt_bigcode", _gpt()),
    Member("Granite", LM, "granite", _grouped()),
    Member("SmolLM3", LM, "smollm3", _grouped(num_hidden_layers=4)),
    Member("GLM", LM, "glm", _grouped(head_dim=8)),
    Member("Mixtral", LM, "mixtral", _grouped(num_local_experts=4)),
    Member("Qwen2-MoE", LM, "qwen2_moe", _grouped(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
           shared_expert_intermediate_size=32)),
    Member("GPT-OSS", LM, "gpt_oss", _grouped(head_dim=8, num_local_experts=4, sliding_window=5)),
    Member("DeepSeek-V3", LM, "deepseek_v3", _text(num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=4, n_group=1,
           topk_group=1, num_experts_per_tok=2, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=4, v_head_dim=8,
           qk_nope_head_dim=8, first_k_dense_replace=1)),
    Member("Mamba", LM, "mamba", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    Member("RWKV", LM, "rwkv", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64}),
    # encoders
    Member("DistilBERT", MLM, "distilbert", {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 64, "n_layers": 3, "n_heads": 4,
           "max_position_embeddings": 64}),
    Member("ALBERT", MLM, "albert", _text(embedding_size=16)),
    Member("ELECTRA", MLM, "electra", _text(embedding_size=16)),
    Member("MPNet", MLM, "mpnet", _text(max_position_embeddings=66)),
    Member("DeBERTa-v2", MLM, "deberta-v2", _text(relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8)),
    Member("ModernBERT", MLM, "modernbert", _text(local_attention=6, global_attn_every_n_layers=2, cls_token_id=1,
           sep_token_id=2)),
    Member("Wav2Vec2", "ForCTC", "wav2vec2", _text(conv_dim=[16, 16], conv_kernel=[10, 3], conv_stride=[5, 2],
           num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)),
    # vision
    Member("DeiT", "", "deit", _image()),
    Member("BEiT", "", "beit", _image()),
    Member("DINOv3", "", "dinov3_vit", _image()),
    Member("SigLIP", "", "siglip", _towers()),
    Member("Swin", "", "swin", {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
           "window_size": 4}),
    Member("SegFormer", "ForSemanticSegmentation", "segformer", {"image_size": 32, "depths": [1, 1, 1, 1],
           "hidden_sizes": [8, 16, 16, 32], "num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 16}),
    Member("ConvNeXt", "", "convnext", {"image_size": 32, "depths": [1, 1, 2, 1], "hidden_sizes": [16, 16, 32, 32]}),
    # encoder-decoders
    Member("BART", SEQ, "bart", _seq2seq()),
    Member("mBART", SEQ, "mbart", _seq2seq()),
    Member("Pegasus", SEQ, "pegasus", _seq2seq()),
    Member("Marian", SEQ, "marian", _seq2seq()),
]  # fmt: skip
