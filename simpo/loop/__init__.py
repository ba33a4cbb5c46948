"""The parts of the training loop: set-up, steps, evaluation, checkpoints, history, results."""
