"""Networks of the zoo that no package has: MobileNetV3-small, CenterNet, EDSR, an LSTM classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
