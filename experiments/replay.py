"""`hiso replay`, from a clone."""

from hiso_jax.train.replay import cli

if __name__ == "__main__":
    cli()
