"""How many bytes this process has put on the network, everything counted: TLS, envelopes, polling.

The kernel counts them for every TCP connection (``TCP_INFO``, Linux only), so that nothing
needs to know how an engine packs what it is given.
"""

import contextlib
import os
import socket
import struct

_SENT, _RECEIVED = 200, 128  # offsets in struct tcp_info of linux/tcp.h, unsigned 64 bits each


class Wire:
    """Bytes of all TCP connections that this process has had while it was looked at.

    Example:
      >>> wire = Wire()
      >>> a, b = socket.create_server(("127.0.0.1", 0)), socket.socket()
      >>> b.connect(a.getsockname())
      >>> peer, _ = a.accept()
      >>> _ = peer.sendall(bytes(1000)), b.recv(1000, socket.MSG_WAITALL)
      >>> up, down = wire.look()
      >>> up == down == 1000 or (up, down) == (0, 0)  # no Linux
      True
      >>> for each in (a, b, peer):
      ...     each.close()
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, int]] = {}

    def look(self) -> tuple[int, int]:
        """Bytes sent (what was lost, more than once) and received; 0, 0 where nobody counts.

        A connection that came and went between two looks is not in it.
        """
        with contextlib.suppress(OSError):
            for name in os.listdir("/proc/self/fd"):
                with contextlib.suppress(OSError, struct.error):
                    link = os.readlink(f"/proc/self/fd/{name}")
                    if link.startswith("socket:"):
                        self._look(link, int(name))
        up, down = zip(*self._seen.values(), strict=True) if self._seen else ((0,), (0,))
        return sum(up), sum(down)

    def _look(self, link: str, number: int) -> None:
        copy = os.dup(number)
        try:
            found = socket.socket(fileno=copy)
        except OSError:
            os.close(copy)
            raise
        with found:
            if found.family not in (socket.AF_INET, socket.AF_INET6):
                return
            if found.type != socket.SOCK_STREAM:
                return
            info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            (up,) = struct.unpack_from("<Q", info, _SENT)
            (down,) = struct.unpack_from("<Q", info, _RECEIVED)
            self._seen[link] = up, down
