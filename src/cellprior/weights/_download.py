"""One file from one address: it comes whole, or an error says why not, and either happens in a bounded time."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from cellprior._talk import bar
from cellprior.weights._registry import WeightsError, human_size

if TYPE_CHECKING:
    import requests

CHUNK = 1 << 20  # bytes that are read at a time, at most
TIMEOUT = 30.0  # seconds in which a host must connect, and go on
PATIENCE, SLOWEST = 30.0, 1000.0  # a host must send so many bytes a second, on average over so many seconds
LONGEST = 86_400.0  # seconds of a whole download
UNSTATED = 2**28  # bytes of a file whose size nobody has stated, at most


def download(url: str, target: Path, *, most: int | None, progressbar: bool | None) -> Path:
    """Download a file. What may pass is tried again by pooch; a refusal, a web page or a host without end is not.

    It may have ``most`` bytes, by default as many as the host announces, or `UNSTATED`. Raises WeightsError or
    OSError if it cannot be had.
    """
    import pooch
    import requests

    def downloader(url: str, output_file: str, pup: Any) -> None:
        headers = {"Accept-Encoding": "identity"}
        try:
            with requests.get(url, timeout=TIMEOUT, stream=True, headers=headers) as response:
                response.raise_for_status()
                limit = _limit(response, target.parent, most)
                with Path(output_file).open("wb") as output:
                    _receive(response, output, limit, progressbar)
        except requests.HTTPError as error:
            code = 0 if error.response is None else error.response.status_code
            # 408 and 429 ask for another try.
            if 400 <= code < 500 and code not in (408, 429):
                reason = "asks for a login" if code in (401, 403, 407) else "does not have the file"
                msg = f"the host {reason} (HTTP {code})"
                raise WeightsError(msg) from error
            raise
        except requests.RequestException:
            raise
        except ValueError as error:  # such as a redirection to what is no address
            msg = f"the host's answer is malformed ({error})"
            raise WeightsError(msg) from error
        if is_web_page(Path(output_file)):
            msg = "the host sent a web page instead of the file: it asks for a login or a confirmation"
            raise WeightsError(msg)

    target.unlink(missing_ok=True)
    name = target.name
    pup = pooch.create(target.parent, "", registry={name: None}, urls={name: url}, retry_if_failed=3)
    pup.fetch(name, downloader=downloader)
    # pooch's temporary files are for their owner alone, and a cache may be shared.
    usual = target.with_name(".usual-rights")
    usual.touch()
    shutil.copymode(usual, target)
    return target


def is_web_page(path: Path) -> bool:
    """Whether a file is HTML, whatever its name says."""
    with path.open("rb") as file:
        start = file.read(512).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return start.startswith((b"<!doctype html", b"<html"))


def _limit(response: requests.Response, folder: Path, most: int | None) -> int:
    """Bytes to take at most; refuses a file of which it is known at once that it is too large."""
    announced = response.headers.get("Content-Length")
    if announced is None:
        return UNSTATED if most is None else most
    if not announced.strip().isdecimal():
        msg = f"the host's answer is malformed (Content-Length: {ascii(announced)[1:41]})"
        raise WeightsError(msg)
    size = int(announced)
    if most is not None and size > most:
        msg = f"the host announces {human_size(size)}; the file should have {human_size(most)} at most"
        raise WeightsError(msg)
    if size > (free := shutil.disk_usage(folder).free):
        msg = f"the file has {human_size(size)}, and {folder} has {human_size(free)} free"
        raise WeightsError(msg)
    return size if most is None else most


def _receive(response: requests.Response, output: IO[bytes], limit: int, progressbar: bool | None) -> None:
    """Write what comes, as it comes."""
    import requests
    from urllib3.exceptions import HTTPError

    total = int(response.headers.get("Content-Length", 0)) or None
    n_bytes, recent, began = 0, 0, time.monotonic()
    since = began
    with bar(total, "download", unit="B", progress=progressbar) as drawn:
        while True:
            try:
                # as much as is there, where read() would wait for a slow host until the chunk is full
                chunk = response.raw.read1(CHUNK, decode_content=True)
            except HTTPError as error:
                raise requests.ConnectionError(error) from error
            if not chunk:
                return
            n_bytes, recent, now = n_bytes + len(chunk), recent + len(chunk), time.monotonic()
            if n_bytes > limit:
                msg = f"the host sends more than {human_size(limit)}, which is more than the file should have"
                raise WeightsError(msg)
            output.write(chunk)
            drawn.update(len(chunk))
            if now - since > PATIENCE:
                if recent < SLOWEST * PATIENCE:
                    msg = f"the host is too slow: {recent:,} bytes in {now - since:.0f} seconds"
                    raise WeightsError(msg)
                since, recent = now, 0
            if now - began > LONGEST:
                msg = f"the download has not ended in {LONGEST / 3600:.0f} hours"
                raise WeightsError(msg)
