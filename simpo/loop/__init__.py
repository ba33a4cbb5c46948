"""What train() conducts: set-up, steps, evaluation, checkpoints, history, and what is saved."""
