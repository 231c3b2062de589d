"""`hiso images`, from a clone."""

from hiso_jax.train.images import cli

if __name__ == "__main__":
    cli()
