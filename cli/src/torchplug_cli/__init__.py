"""The commands ``torchplug fit | validate | test | predict | tune | schema``: runs from files, with what the command line adds.

A file says the same as Python does, and builds the same objects: `Trainer` and the plugins check their options themselves; the classes
of module and data are read with jsonargparse, by the types and the documentation of their arguments.
"""

from torchplug_cli.commands import fit, predict, schema, test, tune, validate

__all__ = ["fit", "predict", "schema", "test", "tune", "validate"]
