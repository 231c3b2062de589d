"""How it is computed: exact arithmetic, noise, packing, devices, files. Nothing here is public."""
