"""From observation to learned epoch: batching, rollout, the epoch ledger, trajectories, and the acting policy."""
