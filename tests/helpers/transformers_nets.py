"""Tiny networks of transformers with random weights of order one, which float16 holds."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import zoo
from helpers.op_sweep import SUFFIXES, Outcome
from torch import Tensor, nn

import graphopt
from graphopt.errors import GraphOptError, VerificationError
from graphopt.ir.program import Program

__all__ = ["FORMS", "NETS", "ZOO", "built", "try_net"]

Inputs = tuple[Tensor, ...]
_TEXT = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_WIDE = {"intermediate_size": 64}
_DECODER = {**_TEXT, **_WIDE, "num_key_value_heads": 2, "use_cache": False}


class _Call(nn.Module):
    """A network called with named inputs, whose first output that is a tensor counts."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], output: str, fixed: Any) -> None:
        super().__init__()
        self.model, self.names, self.output, self.fixed = model, names, output, fixed

    def forward(self, *inputs: Tensor) -> Any:
        named = dict(zip(self.names, inputs, strict=True))
        return getattr(self.model(**named, **self.fixed), self.output)


def _tokens(length: int = 12) -> Tensor:
    return torch.randint(0, 90, (1, length), generator=torch.Generator().manual_seed(1))


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _text(name: str, config: dict[str, Any], output: str = "last_hidden_state") -> Any:
    return name, config, ("input_ids",), lambda: (_tokens(),), output, {}


def _masked(name: str, config: dict[str, Any], output: str = "last_hidden_state") -> Any:
    mask = torch.ones(1, 12, dtype=torch.int64)
    mask[:, 9:] = 0
    names = ("input_ids", "attention_mask")
    return name, config, names, lambda: (_tokens(), mask), output, {}


def _picture(name: str, config: dict[str, Any], output: str, size: int = 32) -> Any:
    return name, config, ("pixel_values",), lambda: (_noise(1, 3, size, size),), output, {}


_VISION = {"image_size": 32, "patch_size": 8, "num_channels": 3}
_BLOCKS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **_WIDE}
_WAVES = {
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
}
_SPEECH = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "vocab_size": 90,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
# name → model, config, names of inputs, inputs, output, fixed arguments
NETS: dict[str, Any] = {
    "bert": _masked("BertModel", {**_TEXT, **_WIDE}),
    "distilbert": _masked(
        "DistilBertModel",
        {"vocab_size": 90, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    ),
    "llama": _masked("LlamaForCausalLM", _DECODER, "logits"),
    "qwen3": _text("Qwen3ForCausalLM", {**_DECODER, "head_dim": 8}, "logits"),
    "gpt2": _text(
        "GPT2LMHeadModel",
        {"vocab_size": 90, "n_embd": 32, "n_layer": 2, "n_head": 4, "use_cache": False},
        "logits",
    ),
    "gemma": _text("GemmaForCausalLM", {**_DECODER, "head_dim": 8}, "logits"),
    "mistral": _text("MistralForCausalLM", {**_DECODER, "sliding_window": 4}, "logits"),
    "mixtral": _text("MixtralForCausalLM", {**_DECODER, "num_local_experts": 4}, "logits"),
    "t5": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": 90,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "use_cache": False,
        },
        ("input_ids", "decoder_input_ids"),
        lambda: (_tokens(), _tokens(7)),
        "logits",
        {},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**_SPEECH, "use_cache": False},
        ("input_features", "decoder_input_ids"),
        lambda: (_noise(1, 8, 40), _tokens(7)),
        "logits",
        {},
    ),
    "wav2vec2": (
        "Wav2Vec2Model",
        {**_BLOCKS, **_WAVES},
        ("input_values",),
        lambda: (_noise(1, 600),),
        "last_hidden_state",
        {},
    ),
    "clip": (
        "CLIPModel",
        {
            "text_config": {**_TEXT, **_WIDE, "eos_token_id": 2},
            "vision_config": {**_VISION, **_BLOCKS},
            "projection_dim": 16,
        },
        ("input_ids", "pixel_values"),
        lambda: (_tokens(), _noise(1, 3, 32, 32)),
        "logits_per_image",
        {},
    ),
    "vit": _picture("ViTModel", {**_VISION, **_BLOCKS}, "last_hidden_state"),
    "dinov2": _picture(
        "Dinov2Model",
        {**_VISION, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        "last_hidden_state",
    ),
    "swin": _picture(
        "SwinModel",
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        },
        "last_hidden_state",
    ),
    "detr": (
        "DetrModel",
        {
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": {
                "model_type": "resnet",
                "embedding_size": 8,
                "hidden_sizes": [8, 16],
                "depths": [1, 1],
                "layer_type": "basic",
                "out_features": ["stage2"],
            },
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "num_queries": 5,
        },
        ("pixel_values",),
        lambda: (_noise(1, 3, 32, 32),),
        "last_hidden_state",
        {},
    ),
    "segformer": _picture(
        "SegformerForSemanticSegmentation",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [16, 32],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 32,
        },
        "logits",
    ),
    "convnext": _picture(
        "ConvNextModel",
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
        "last_hidden_state",
    ),
    "mobilenet_v2": _picture("MobileNetV2Model", {"depth_multiplier": 0.25}, "last_hidden_state"),
    "sam": (
        "SamModel",
        {
            "vision_config": {
                "hidden_size": 32,
                "output_channels": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 32,
                "patch_size": 8,
                "window_size": 2,
                "global_attn_indexes": [1],
                "num_pos_feats": 16,
                "mlp_dim": 64,
            },
            "prompt_encoder_config": {
                "hidden_size": 32,
                "image_size": 32,
                "patch_size": 8,
                "mask_input_channels": 4,
            },
            "mask_decoder_config": {
                "hidden_size": 32,
                "mlp_dim": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "iou_head_hidden_dim": 32,
            },
        },
        ("pixel_values", "input_points"),
        lambda: (_noise(1, 3, 32, 32), torch.tensor([[[[12.0, 9.0]]]])),
        "pred_masks",
        {"multimask_output": False},
    ),
}


# names of the networks that the tests of targets share, beside those of transformers
ZOO = {f"zoo {name}": build for name, build in zoo.MODELS.items()}


def built(name: str) -> tuple[nn.Module, Inputs]:
    """A network in evaluation mode and the inputs of one call: of `NETS` or `ZOO`."""
    if name in ZOO:
        return ZOO[name]()
    import transformers

    kind, config, names, inputs, output, fixed = NETS[name]
    model_type: Any = getattr(transformers, kind)
    torch.manual_seed(0)
    model = model_type(model_type.config_class(**config)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                fan = parameter[0].numel()
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * max(fan, 1) ** -0.5)
    call: Callable[..., Any] = _Call(model, names, output, fixed).eval()
    return call, inputs()  # type: ignore[return-value]


BLOCKS = {
    "op_state_spec": {
        "weight": {
            "dtype": "int4",
            "granularity": {"type": "per_block", "block_size": 8, "axis": 1},
        }
    },
    "op_input_spec": None,
    "op_output_spec": None,
}
FORMS: dict[str, dict[str, Any]] = {
    "tables": {"palettization": {}},
    "W8A8": {"quantization": {}},
    "int4 blocks": {"quantization": {"global_config": BLOCKS}},
}


@functools.lru_cache(maxsize=1)
def _compressed(name: str, form: str) -> Program:
    model, args = built(name)
    return graphopt.compress(model, args, FORMS[form], calibration_data=[args], progress=False)


def try_net(name: str, form: str, target: str) -> Outcome:
    """What becomes of a compressed network on a target, in the target's own float type.

    "refused" is what the target refuses without compression, too; other refusals are "lacking".
    """
    call = f"{name}, {form}"
    try:
        program = _compressed(name, form)
        artifact = graphopt.lower(program, target)
        with tempfile.TemporaryDirectory() as folder:
            artifact.save(Path(folder) / f"net{SUFFIXES[target]}")
    except VerificationError as error:
        return Outcome(call, "wrong", str(error))
    except GraphOptError as error:
        return Outcome(call, _refusal(name, target), f"{type(error).__name__}: {error}")
    except Exception as error:
        return Outcome(call, "raw", f"{type(error).__name__}: {error}")
    found = artifact.verification
    assert found is not None
    if not found.complete:
        return Outcome(call, "unknown", "; ".join(found.notes))
    return Outcome(call, "right", f"{found.max_error:.2g}")


def _refusal(name: str, target: str) -> str:
    model, args = built(name)
    try:
        graphopt.lower(graphopt.capture(model, args), target)
    except GraphOptError:
        return "refused"
    return "lacking"
