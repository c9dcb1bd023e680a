"""Tiny, randomly initialised models for export/lowering trials.

Every builder returns ``(module, example_args)``: an eval-mode module whose ``forward`` takes only
positional tensors and returns a tensor or a tuple of tensors, and batch-1 example inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

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


# --------------------------------------------------------------------------- MobileNetV3-small (1905.02244, table 2)
def _divisible(value: float, divisor: int = 8) -> int:
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


class ConvBNAct(nn.Sequential):
    def __init__(
        self,
        cin: int,
        cout: int,
        k: int = 3,
        stride: int = 1,
        groups: int = 1,
        act: type[nn.Module] | None = nn.Hardswish,
    ) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(cin, cout, k, stride, k // 2, groups=groups, bias=False),
            nn.BatchNorm2d(cout, eps=1e-3, momentum=0.01),
        ]
        if act is not None:
            layers.append(act())
        super().__init__(*layers)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        mid = _divisible(channels / 4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, mid, 1), nn.Conv2d(mid, channels, 1)
        self.act, self.gate = nn.ReLU(), nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.fc1(self.pool(x)))))


class InvertedResidualV3(nn.Module):
    def __init__(
        self, cin: int, exp: int, cout: int, k: int, stride: int, use_se: bool, act: type[nn.Module]
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [] if exp == cin else [ConvBNAct(cin, exp, 1, act=act)]
        layers.append(ConvBNAct(exp, exp, k, stride, groups=exp, act=act))
        if use_se:
            layers.append(SqueezeExcite(exp))
        layers.append(ConvBNAct(exp, cout, 1, act=None))
        self.block = nn.Sequential(*layers)
        self.residual = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return x + y if self.residual else y


class MobileNetV3Small(nn.Module):
    """``width=1, num_classes=1000, hidden=1024`` is the paper's model (2 542 856 parameters)."""

    RE, HS = nn.ReLU, nn.Hardswish
    # kernel, expansion, out channels, squeeze-excite, activation, stride
    ROWS = (
        (3, 16, 16, True, RE, 2),
        (3, 72, 24, False, RE, 2),
        (3, 88, 24, False, RE, 1),
        (5, 96, 40, True, HS, 2),
        (5, 240, 40, True, HS, 1),
        (5, 240, 40, True, HS, 1),
        (5, 120, 48, True, HS, 1),
        (5, 144, 48, True, HS, 1),
        (5, 288, 96, True, HS, 2),
        (5, 576, 96, True, HS, 1),
        (5, 576, 96, True, HS, 1),
    )

    def __init__(self, width: float = 1.0, num_classes: int = 1000, hidden: int = 1024) -> None:
        super().__init__()
        cin = _divisible(16 * width)
        layers: list[nn.Module] = [ConvBNAct(3, cin, stride=2)]
        for k, exp, cout, use_se, act, stride in self.ROWS:
            cout = _divisible(cout * width)
            layers.append(
                InvertedResidualV3(cin, _divisible(exp * width), cout, k, stride, use_se, act)
            )
            cin = cout
        layers.append(ConvBNAct(cin, 6 * cin, 1))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(6 * cin, hidden),
            nn.Hardswish(),
            nn.Dropout(0.2),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def mobilenet_v3_small(width: float = 0.25) -> Built:
    torch.manual_seed(0)
    return _finish(MobileNetV3Small(width, num_classes=10, hidden=64), _image())


# --------------------------------------------------------------------------- CenterNet with a ResNet-34 backbone
class BasicBlock(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))
            if stride != 1 or cin != cout
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + shortcut)


class CenterNetResNet34(nn.Module):
    """Objects as points (1904.07850): ResNet-34, three stride-2 deconvolutions, three heads at stride 4.

    ``width=64, head=64, num_classes=80`` is the full-size model; smaller values narrow every layer.
    """

    DEPTHS = (3, 4, 6, 3)

    def __init__(self, width: int = 64, head: int = 64, num_classes: int = 80) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        stages: list[nn.Module] = []
        cin = width
        for i, depth in enumerate(self.DEPTHS):
            cout = width << i
            stages.append(
                nn.Sequential(
                    *[
                        BasicBlock(cin if j == 0 else cout, cout, 2 if i and j == 0 else 1)
                        for j in range(depth)
                    ]
                )
            )
            cin = cout
        self.stages = nn.Sequential(*stages)
        up: list[nn.Module] = []
        for _ in range(3):
            cout = 4 * width
            up += [
                nn.ConvTranspose2d(cin, cout, 4, 2, 1, bias=False),
                nn.BatchNorm2d(cout),
                nn.ReLU(inplace=True),
            ]
            cin = cout
        self.deconv = nn.Sequential(*up)
        self.heatmap, self.wh, self.offset = (self._head(cin, head, n) for n in (num_classes, 2, 2))

    @staticmethod
    def _head(cin: int, mid: int, out: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(cin, mid, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(mid, out, 1)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.deconv(self.stages(self.stem(x)))
        return torch.sigmoid(self.heatmap(x)), self.wh(x), self.offset(x)


def centernet(width: int = 8) -> Built:
    torch.manual_seed(0)
    return _finish(CenterNetResNet34(width, head=8, num_classes=5), _image())


# --------------------------------------------------------------------------- EDSR
class ResBlock(nn.Module):
    def __init__(self, features: int, res_scale: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(features, features, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(features, features, 3, padding=1),
        )
        self.res_scale = res_scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) * self.res_scale


class EDSR(nn.Module):
    """1707.02921 for scale 2 or 4; ``features=64, blocks=16`` is the baseline model."""

    def __init__(
        self, features: int = 64, blocks: int = 16, scale: int = 2, res_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, features, 3, padding=1)
        self.body = nn.Sequential(
            *[ResBlock(features, res_scale) for _ in range(blocks)],
            nn.Conv2d(features, features, 3, padding=1),
        )
        up: list[nn.Module] = []
        for _ in range(scale.bit_length() - 1):
            up += [nn.Conv2d(features, 4 * features, 3, padding=1), nn.PixelShuffle(2)]
        self.tail = nn.Sequential(*up, nn.Conv2d(features, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        return self.tail(x + self.body(x))


def edsr() -> Built:
    torch.manual_seed(0)
    return _finish(EDSR(features=16, blocks=3, scale=4, res_scale=0.1), _image(24))


# --------------------------------------------------------------------------- LSTM classifier
class LSTMClassifier(nn.Module):
    def __init__(
        self,
        vocab: int = 100,
        dim: int = 16,
        hidden: int = 24,
        classes: int = 5,
        layers: int = 1,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.lstm = nn.LSTM(dim, hidden, layers, batch_first=True, bidirectional=bidirectional)
        self.fc = nn.Linear(hidden * (2 if bidirectional else 1), classes)

    def forward(self, ids: Tensor) -> Tensor:
        out, _ = self.lstm(self.embed(ids))
        return self.fc(out[:, -1])


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
