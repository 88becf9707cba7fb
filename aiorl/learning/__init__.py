"""From trajectories to better weights: the learner, its optimizers and schedules, and checkpoints."""
