"""SimPO preference optimisation as a Hydra-composed experiment framework."""

import logging

# It advises when it is imported, which transformers does, and at every product with 8-bit weights.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
