"""All parties of a masked round on one machine: for simulations, benchmarks and tests."""

from collections.abc import Callable, Mapping

import numpy as np

from hiso_jax.secure.client import Client, Journal
from hiso_jax.secure.server import Server
from hiso_jax.secure.session import Session

Told = Callable[[str, str, bytes], None]
"""Called with every message: who sends, to whom ("" is the server), and its bytes."""


def run(
    session: Session,
    vectors: Mapping[str, np.ndarray],
    site_keys: Mapping[str, bytes],
    directory: Mapping[str, bytes],
    journals: Mapping[str, Journal] | None = None,
    told: Told = lambda sender, receiver, message: None,
) -> tuple[np.ndarray, list[str]]:
    """Run a masked round; a client without a vector is gone after it has dealt its shares.

    Args:
      session: of the round.
      vectors: int64 [length] of each client that answers.
      site_keys: Ed25519 private keys [32] of all that are asked.
      directory: their public keys.
      journals: of the clients.
      told: sees every message.

    Returns:
      The sum int64 [length], and whose vectors are in it.

    Raises:
      TooFew: fewer answer than the threshold or `least` asks for; the round is void.

    Example:
      >>> import numpy as np
      >>> from hiso_jax import secure
      >>> session = secure.Session("run", 0, ("ann", "bob", "cem", "dia"), length=1)
      >>> keys = {name: name.encode().ljust(32) for name in session.names}
      >>> public = {name: secure.site_public(key) for name, key in keys.items()}
      >>> run(session, {n: np.array([5]) for n in ("ann", "bob", "dia")}, keys, public)
      (array([15]), ['ann', 'bob', 'dia'])
    """
    journals = {} if journals is None else journals
    server = Server(session, directory)
    clients = {
        name: Client(session, name, site_keys[name], directory, journals.get(name))
        for name in session.names
    }

    def send(name: str, message: bytes) -> None:
        told(name, "", message)
        server.receive(name, message)

    def closed() -> Mapping[str, bytes]:
        messages = server.close()
        for name, message in messages.items():
            told("", name, message)
        return messages

    for name, client in clients.items():
        send(name, client.advertise())
    for name, message in closed().items():
        send(name, clients[name].share(message))
    for name, message in closed().items():
        if name in vectors:
            send(name, clients[name].mask(message, vectors[name]))
    for name, message in closed().items():
        send(name, clients[name].unmask(message))
    return server.total()
