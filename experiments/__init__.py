"""What only a paper needs, and the commands of `hiso` as modules: ``-m experiments.finetune``."""
