"""`hiso results`, from a clone."""

from hiso_jax.train.results import cli

if __name__ == "__main__":
    cli()
