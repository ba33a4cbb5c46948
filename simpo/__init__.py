"""SimPO preference optimisation as a Hydra-composed experiment framework."""
