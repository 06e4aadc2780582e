"""``python -m torchplug`` is the command ``torchplug``."""

import sys

from torchplug.cli import main

sys.exit(main())
