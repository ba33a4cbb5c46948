"""SimPO preference optimisation as a Hydra-composed experiment framework."""

import logging
from pathlib import Path

# `python -m simpo.generate`, annotate, export and member are files of this folder.
__path__.append(str(Path(__file__).parent / "launch" / "commands"))

# It advises when it is imported, which transformers does, and at every product with 8-bit weights.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
