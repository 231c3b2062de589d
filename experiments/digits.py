"""`hiso digits`, from a clone."""

from hiso_jax.train.digits import cli

if __name__ == "__main__":
    cli()
