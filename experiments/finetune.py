"""`hiso finetune`, from a clone."""

from hiso_jax.train.finetune import cli

if __name__ == "__main__":
    cli()
