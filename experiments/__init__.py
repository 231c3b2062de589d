"""Jobs to run: ``python -m experiments.finetune --help``."""
