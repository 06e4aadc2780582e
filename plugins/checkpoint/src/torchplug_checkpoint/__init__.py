"""Writes checkpoints while a run trains, and keeps the best ones and the newest.

`checkpoint.py` says when something is saved, `books.py` which files are kept, `saver.py` how a save is carried out and told,
`store.py` and `remote.py` where files lie, `writer.py` what happens behind training, and `finding.py` where to resume from.
"""

from torchplug_checkpoint.checkpoint import Checkpoint

__all__ = ["Checkpoint"]
