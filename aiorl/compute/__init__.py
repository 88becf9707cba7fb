"""What acting and learning share: distributions, devices and process-wide torch settings, precision."""
