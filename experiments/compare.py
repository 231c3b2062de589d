"""`hiso compare`, from a clone."""

from hiso_jax.train.compare import cli

if __name__ == "__main__":
    cli()
