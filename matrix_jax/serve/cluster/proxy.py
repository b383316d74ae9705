"""What the front passes on between its callers and a world by HTTP: files, and counters."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request

PIECE = 2**18  # bytes of a file that are in memory
PIECE_SECONDS = 30  # for a piece to come
FILE_SECONDS = 120  # for a world to answer


class TooLarge(Exception):
    """More bytes than the world takes."""


class Unreachable(Exception):
    """The world did not answer, or the sender stalled."""


def ask(address: str, path: str, secret: str, data=None, seconds: float = FILE_SECONDS):
    """The open answer of a world, also where it refuses; `data` are pieces to post, or None.

    Raises:
      Unreachable: there is none.
    """
    asked = urllib.request.Request(
        f'http://{address}{path}', data, {'Authorization': f'Bearer {secret}'}
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return direct.open(asked, timeout=seconds)
    except urllib.error.HTTPError as error:
        return error
    except OSError as error:
        raise Unreachable from error


def sent(loop: asyncio.AbstractEventLoop, stream, limit: int):
    """For a thread: the pieces of an asynchronous stream, as they come.

    Raises:
      TooLarge: there are more bytes than the limit.
    """

    async def following():
        return await anext(stream, None)

    size = 0
    while (
        piece := asyncio.run_coroutine_threadsafe(following(), loop).result(PIECE_SECONDS)
    ) is not None:
        size += len(piece)
        if size > limit:
            raise TooLarge
        if piece:
            yield piece


def pieces(answer):
    """The body of an open answer."""
    with answer:
        while piece := answer.read(PIECE):
            yield piece


def counters(address: str, secret: str) -> str:
    """/metrics of a world, '' if it is gone."""
    try:
        with ask(address, '/metrics', secret, seconds=3) as answer:
            return answer.read().decode() if answer.status == 200 else ''
    except (OSError, Unreachable):
        return ''


class Labelled:
    """Collector of what several worlds count, each sample with the label `world`.

    Args:
      texts: /metrics by address.
    """

    def __init__(self, texts: dict[str, str]):
        self.texts = texts

    def collect(self):
        from prometheus_client.core import Metric
        from prometheus_client.parser import text_string_to_metric_families

        found: dict[str, Metric] = {}
        for world, text in self.texts.items():
            for family in text_string_to_metric_families(text):
                into = found.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for one in family.samples:
                    into.add_sample(one.name, one.labels | {'world': world}, one.value)
        return found.values()
