"""The data of examples/config.yaml: scikit-learn's handwritten digits."""

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split


def loaders(batch_size: int = 32) -> dict[str, DataLoader]:
    """Loaders to train, validate and test on.

    Args:
        batch_size: images in a training batch.
    """
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # (1797, 1, 8, 8), from 0 to 1
    train, val, test = random_split(TensorDataset(images, torch.tensor(digits.target)), [1197, 300, 300])
    return {
        "train": DataLoader(train, batch_size=batch_size, shuffle=True),
        "val": DataLoader(val, batch_size=300),
        "test": DataLoader(test, batch_size=300),
    }
