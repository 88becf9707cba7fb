"""Networks, built by name or from ``module:Name``."""
