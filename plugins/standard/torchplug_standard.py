"""The bundle that ``Trainer()`` takes when no plugins are named: progress, model table, checkpoints, journal, TensorBoard."""

__all__ = ["plugins"]

plugins = ["progress", "summary", "checkpoint", "journal", "tensorboard"]
