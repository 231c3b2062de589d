"""What `benchmarks.accelerator` is made of; nothing here imports rich, tyro or datasets."""
