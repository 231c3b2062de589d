"""Who takes part in a run: simulated clients and their rounds; a server and sites that are real.

Example:
  >>> import numpy as np
  >>> from hiso_jax import federation
  >>> clients = federation.Clients({"a": {"x": np.arange(3)}, "b": {"x": np.arange(10, 15)}})
  >>> clients.sizes
  {'a': 3, 'b': 5}
"""

from hiso_jax.federation.clients import Arrays, Chosen, Clients, draw
from hiso_jax.federation.host import Closed, Host
from hiso_jax.federation.rounds import Report, evaluate, participation, run
from hiso_jax.federation.selecting import Select, Subset
from hiso_jax.federation.server import Server, catch_up
from hiso_jax.federation.site import Site
from hiso_jax.federation.traffic import Traffic

__all__ = [
    "Arrays",
    "Chosen",
    "Clients",
    "Closed",
    "Host",
    "Report",
    "Select",
    "Server",
    "Site",
    "Subset",
    "Traffic",
    "catch_up",
    "draw",
    "evaluate",
    "participation",
    "run",
]
