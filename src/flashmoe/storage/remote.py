"""A file on a web server, read piece by piece with range requests: enough for a model's header."""

from __future__ import annotations

import urllib.error
import urllib.request

from flashmoe.errors import ModelError

_PIECE = 4 << 20
_TIMEOUT = 30


class RemoteFile:
    """Reads forward from the beginning of `url`, `size` bytes long."""

    def __init__(self, url: str, size: int) -> None:
        self.url, self.size, self._at = url, size, 0

    def read(self, n: int) -> bytes:
        """The next bytes: about `n`, b"" at the end. Raises ModelError where the server does not give them."""
        end = min(self.size, self._at + max(n, _PIECE))
        if end == self._at:
            return b""
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={self._at}-{end - 1}"})
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
                if answer.status != 206:  # else the whole file would come
                    raise ModelError(
                        f"{self.url}: the server does not answer range requests; download the file first"
                    )
                data: bytes = answer.read(end - self._at)
        except (OSError, urllib.error.URLError) as error:
            raise ModelError(f"{self.url}: cannot be read ({error}); check the network") from None
        self._at += len(data)
        return data

    def close(self) -> None:
        """Nothing is held open."""
