"""Jobs: train, resume, replay, compare, and what they show. `hiso --help` lists them."""
