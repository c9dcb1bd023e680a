"""Tiny, randomly initialised models for export/lowering trials.

Every builder returns ``(module, example_args)``: an eval-mode module whose ``forward`` takes only
positional tensors and returns a tensor or a tuple of tensors, and batch-1 example inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from zoo_nets import EDSR, CenterNetResNet34, LSTMClassifier, MobileNetV3Small

Built = tuple[nn.Module, tuple[Tensor, ...]]


# --------------------------------------------------------------------------- helpers
class TakeOutput(nn.Module):
    """Wrap a Hugging Face model: positional tensors in, one named output tensor out."""

    def __init__(
        self, model: nn.Module, field: str, arg_names: tuple[str, ...], **fixed: object
    ) -> None:
        super().__init__()
        self.model = model
        self.field = field
        self.arg_names = arg_names
        self.fixed = fixed

    def forward(self, *args: Tensor) -> Tensor:
        return getattr(
            self.model(**dict(zip(self.arg_names, args, strict=False)), **self.fixed), self.field
        )


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give norms and biases non-trivial values and other weights unit gain.

    With Hugging Face's initial std of 0.02 the deep models' outputs hardly depend on the input, and a
    lowering error in an early layer would not show.
    """
    gen = torch.Generator().manual_seed(seed)

    def uniform_(t: Tensor, lo: float, hi: float) -> None:
        t.copy_(torch.rand(t.shape, generator=gen) * (hi - lo) + lo)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                uniform_(module.running_mean, -0.2, 0.2)
                uniform_(module.running_var, 0.5, 1.5)
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
                std = (1.5 / module.weight[0].numel()) ** 0.5
                module.weight.copy_(torch.randn(module.weight.shape, generator=gen) * std)
            for name, param in module.named_parameters(recurse=False):
                if name == "bias":
                    uniform_(param, -0.1, 0.1)
                elif name == "weight" and param.dim() == 1:  # batch norm, layer norm, RMS norm
                    uniform_(param, 0.7, 1.3)
    return model


def _image(size: int = 64, batch: int = 1, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def _tokens(vocab: int, length: int, batch: int = 1, seed: int = 1) -> Tensor:
    return torch.randint(1, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def _finish(model: nn.Module, *args: Tensor) -> Built:
    return randomize(model).eval(), args


# --------------------------------------------------------------------------- Hugging Face models
def resnet() -> Built:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    cfg = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[32, 64, 96, 128],
        depths=[1, 2, 1, 1],
        layer_type="bottleneck",
        num_labels=10,
    )
    return _finish(
        TakeOutput(ResNetForImageClassification(cfg), "logits", ("pixel_values",)), _image()
    )


def mobilenet_v2(tf_padding: bool = True) -> Built:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    torch.manual_seed(0)
    cfg = MobileNetV2Config(
        depth_multiplier=0.35, image_size=64, num_labels=10, tf_padding=tf_padding
    )
    return _finish(
        TakeOutput(MobileNetV2ForImageClassification(cfg), "logits", ("pixel_values",)), _image()
    )


def convnext() -> Built:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    torch.manual_seed(0)
    cfg = ConvNextConfig(
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 2, 1],
        layer_scale_init_value=0.5,
        image_size=64,
        num_labels=10,
    )
    return _finish(
        TakeOutput(ConvNextForImageClassification(cfg), "logits", ("pixel_values",)), _image()
    )


def vit() -> Built:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    cfg = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=10,
    )
    return _finish(
        TakeOutput(ViTForImageClassification(cfg), "logits", ("pixel_values",)), _image(32)
    )


def bert() -> Built:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    cfg = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=3,
    )
    model = TakeOutput(
        BertForSequenceClassification(cfg), "logits", ("input_ids", "attention_mask")
    )
    mask = torch.ones(1, 12, dtype=torch.int64)
    mask[:, 9:] = 0
    return _finish(model, _tokens(100, 12), mask)


def llama() -> Built:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    cfg = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return _finish(
        TakeOutput(LlamaForCausalLM(cfg), "logits", ("input_ids",), use_cache=False),
        _tokens(100, 12),
    )


def whisper_encoder() -> Built:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    torch.manual_seed(0)
    cfg = WhisperConfig(
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=64,
        num_mel_bins=16,
        max_source_positions=32,
    )
    mel = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(1))
    return _finish(TakeOutput(WhisperEncoder(cfg), "last_hidden_state", ("input_features",)), mel)


def mobilenet_v3_small(width: float = 0.25) -> Built:
    torch.manual_seed(0)
    return _finish(MobileNetV3Small(width, num_classes=10, hidden=64), _image())


def centernet(width: int = 8) -> Built:
    torch.manual_seed(0)
    return _finish(CenterNetResNet34(width, head=8, num_classes=5), _image())


def edsr() -> Built:
    torch.manual_seed(0)
    return _finish(EDSR(features=16, blocks=3, scale=4, res_scale=0.1), _image(24))


def lstm(layers: int = 1, bidirectional: bool = False) -> Built:
    torch.manual_seed(0)
    return _finish(LSTMClassifier(layers=layers, bidirectional=bidirectional), _tokens(100, 10))


MODELS: dict[str, Callable[[], Built]] = {
    "resnet": resnet,
    "mobilenet_v2": mobilenet_v2,
    "mobilenet_v2_notf": partial(mobilenet_v2, tf_padding=False),
    "convnext": convnext,
    "vit": vit,
    "bert": bert,
    "llama": llama,
    "whisper_encoder": whisper_encoder,
    "mobilenet_v3_small": mobilenet_v3_small,
    "centernet": centernet,
    "edsr": edsr,
    "lstm": lstm,
    "lstm_bi2": partial(lstm, layers=2, bidirectional=True),
}
