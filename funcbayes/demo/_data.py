"""Two data sets that come with scikit-learn, each with inputs from outside of it.

Inputs and targets keep their units; networks standardise them (:class:`Standardize`, :class:`Rescale`).
Splits are fixed: a demo's seed changes networks, not data.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

GAP = (1.9, 3.0)  # cm: no iris in the data has a petal length between these


@dataclass(frozen=True)
class Split:
    """A data set for training and testing, and inputs that are not like it.

    Attributes:
        train: Inputs ``(N, D)`` and targets, for training.
        test: The same, held out.
        outside: Inputs ``(M, D)`` from where there are no data.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    outside: Tensor


class Standardize(nn.Module):
    """Subtract the mean of the training inputs and divide by their standard deviation."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        # Not persistent, so that a state dict has the same names as the parameters.
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Standardise a batch."""
        return (x - self.mean) / self.std


class Rescale(nn.Module):
    """Give a standardised mean and log variance, the outputs, the location and unit of the targets."""

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", torch.stack([std, torch.ones(())]), persistent=False)
        self.register_buffer("shift", torch.stack([mean, 2 * std.log()]), persistent=False)

    def forward(self, outputs: Tensor) -> Tensor:
        """Rescale a batch ``(B, 2)``."""
        return outputs * self.scale + self.shift


def load_digits() -> Split:
    """Handwritten digits, 8 by 8 pixels of 0 to 16; outside, patches of photographs on the same scale.

    The digits are the test part of the UCI set "Optical Recognition of Handwritten Digits", the
    photographs the two sample images, both bundled with scikit-learn. There are as many patches as
    test rows, evenly spread over both photographs.
    """
    from sklearn import datasets

    pixels, labels = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32), torch.tensor(labels)
    split = _split(x, y, y)
    patches = torch.cat([_patches(torch.tensor(image)) for image in datasets.load_sample_images().images])
    chosen = torch.linspace(0, len(patches) - 1, len(split.test[0])).long()
    return Split(split.train, split.test, patches[chosen])


def load_iris() -> Split:
    """Iris petals: width from length, both in cm; outside, lengths in the gap that the data have.

    No petal is between 1.9 and 3.0 cm long, because no species is: 50 setosa lie below, 100 others
    above. Of the one-column regressions that scikit-learn bundles this one has the widest gap for its
    spread with many rows on both sides, so that nothing has to be cut out. Widths vary more above the
    gap than below, so the noise depends on the input.
    """
    from sklearn import datasets

    flowers, species = (torch.tensor(values) for values in datasets.load_iris(return_X_y=True))
    petals = flowers[:, 2:].float()
    split = _split(petals[:, :1], petals[:, 1:], species)
    return Split(split.train, split.test, torch.linspace(*GAP, 12)[1:-1, None])


def _split(x: Tensor, y: Tensor, classes: Tensor) -> Split:
    """Hold out a quarter of the rows, of each class alike; nothing is outside yet."""
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(torch.arange(len(x)), test_size=0.25, stratify=classes, random_state=0)
    return Split((x[train], y[train]), (x[test], y[test]), x[:0])


def _patches(image: Tensor) -> Tensor:
    """Grey 8 by 8 patches ``(M, 64)``, side by side, of an RGB image ``(H, W, 3)`` of bytes."""
    grey = image.float() @ torch.tensor([0.299, 0.587, 0.114]) * (16 / 255)
    return grey.unfold(0, 8, 8).unfold(1, 8, 8).reshape(-1, 64)
