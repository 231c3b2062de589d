"""A run of real clients over a network, with NVFlare as the engine; ``docs/deploy.md`` begins it.

`hiso_jax.nvflare.job` writes the job that is submitted, from the options of ``hiso finetune``;
`hiso_jax.nvflare.parties` makes of it what a machine works with: model, algorithm, and at a site
its own data; `hiso_jax.nvflare.engine` is all that a job needs of NVFlare, and
`hiso_jax.nvflare.session` submits it.
"""
