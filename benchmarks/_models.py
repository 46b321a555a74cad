"""The networks that claims are measured on, with inputs for a number of rows."""

import torch
from torch import Tensor, nn

import funcbayes as fb


def mlp_small(rate: float = 0.0) -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(rate)),
        *(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(rate)),
        nn.Linear(64, 10),
    )


def mlp(rate: float = 0.0) -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(784, 512), nn.ReLU(), nn.Dropout(rate)),
        *(nn.Linear(512, 256), nn.ReLU(), nn.Dropout(rate)),
        nn.Linear(256, 10),
    )


def lenet(rate: float = 0.0) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(rate)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(rate)),
        *(nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Dropout(rate)),
        *(nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, rate: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
            nn.Dropout2d(rate),
            *(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet(rate: float = 0.0, head_rate: float = 0.0) -> nn.Module:
    """Residual network for 32x32 images: a stem and three stages of two blocks, 16 to 64 channels."""
    blocks = [Block(i, o, s, rate) for i, o, s in ((16, 16, 1),) * 2 + ((16, 32, 2), (32, 32, 1))]
    blocks += [Block(32, 64, 2, rate), Block(64, 64, 1, rate)]
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(head_rate), nn.Linear(64, 10))
    return nn.Sequential(stem, *blocks, head)


class Transformer(nn.Module):
    """Classifier of 32 tokens: two encoder layers of width 64 with 4 heads."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=rate, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


class Recurrent(nn.Module):
    """Classifier of 20 steps: an LSTM of width 64."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.cell, self.drop = nn.LSTM(32, 64, batch_first=True), nn.Dropout(rate)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.cell(x)[0][:, -1]))


MODELS = {
    "mlp-small": mlp_small,
    "mlp": mlp,
    "lenet": lenet,
    "resnet": resnet,
    "transformer": Transformer,
    "lstm": Recurrent,
}


def around(params: dict[str, Tensor], variance: float = 1e-4) -> fb.Gaussian:
    """A narrow Gaussian over parameters."""
    variances = {name: torch.full_like(leaf, variance) for name, leaf in params.items()}
    return fb.Gaussian(params, fb.covariances.Diagonal(variances))


def inputs(model: str, rows: int, device: str = "cpu") -> Tensor:
    """Inputs of a model, the same on every device."""
    return _inputs(model, rows).to(device)


def labels(rows: int, device: str = "cpu") -> Tensor:
    """One of ten classes for each row, the same on every device."""
    return torch.randint(0, 10, (rows,), generator=torch.Generator().manual_seed(1)).to(device)


def _inputs(model: str, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        **{"mlp-small": (64,), "mlp": (784,), "lstm": (20, 32)},
        **{"lenet": (1, 28, 28), "resnet": (3, 32, 32)},
    }
    if model == "transformer":
        return torch.randint(0, 100, (rows, 32), generator=generator)
    return torch.randn(rows, *shapes[model], generator=generator)
