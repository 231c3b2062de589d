"""How much a run gives away about a client: scalars on a grid, noise, and what it adds up to.

Example:
  >>> from hiso_jax import privacy
  >>> z = privacy.calibrate(8.0, rounds=300, clients=1000, asked=50)
  >>> terms = privacy.Terms.of(privacy.central(2.0, z, clients=50), epsilon=8.0)
  >>> mine = terms.contribute([[3.0, 4.0]], client="ann", round=0)
  >>> secret = bytes(range(32))  # of the server: privacy.secret("path of a file")
  >>> shown = terms.release(mine, round=0, secret=secret)
  >>> (shown == terms.release(mine, round=0, secret=secret)).all()  # again the same
  np.True_
"""

from hiso_jax._engine import renamed
from hiso_jax.privacy.accounting import Accountant, BudgetSpent, calibrate, epsilon_of
from hiso_jax.privacy.fixed import Grid, clip
from hiso_jax.privacy.gaussian import epsilon, privatize
from hiso_jax.privacy.mechanisms import Mechanism, Terms, central, distributed, draw, local
from hiso_jax.privacy.noise import Bits, discrete_gaussian, of_run, secret

__all__ = ["Accountant", "Bits", "BudgetSpent", "Grid", "Mechanism", "Terms", "calibrate",
           "central", "clip", "discrete_gaussian", "distributed", "draw", "epsilon", "epsilon_of",
           "local", "of_run", "privatize", "secret"]  # fmt: skip

__getattr__ = renamed.functions(globals(), privatise="privatize")
