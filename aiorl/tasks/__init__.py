"""What is learned: the task interface, PPO, and the return estimators as pure functions."""
