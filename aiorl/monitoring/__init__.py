"""What a run tells: metrics and where they go, the run's folder, progress on a terminal, system figures, the console."""
