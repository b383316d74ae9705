"""Files to and from players who are hasty, slow, or many."""

import asyncio
import json

import pytest

from matrix_jax.serve.runtime.session_manager import Refused
from matrix_jax.serve.web import transfers
from matrix_jax.serve.web.transfers import Transfers


class Client:
    """Stands for a session."""


@pytest.fixture
def session():
    return Client()


@pytest.fixture
def files(monkeypatch):
    monkeypatch.setattr(transfers, 'BURST', 3)
    return Transfers(100)


async def asked(respond, *chunks, stuck=False):
    """(status, headers, body) of an answer; `stuck`: who asks neither sends on nor reads."""
    waiting = [{'type': 'http.request', 'body': chunk, 'more_body': True} for chunk in chunks]
    waiting += [] if stuck else [{'type': 'http.request', 'body': b'', 'more_body': False}]
    sent = []

    async def receive():
        return waiting.pop(0) if waiting else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)
        if stuck and message.get('more_body'):
            await asyncio.Event().wait()

    await respond({'type': 'http', 'method': 'POST', 'headers': []}, receive, send)
    headers = {key.decode(): value.decode() for key, value in sent[0]['headers']}
    return sent[0]['status'], headers, b''.join(one.get('body', b'') for one in sent[1:])


def refused(answer, status, message):
    return answer[0] == status and message in json.loads(answer[2])['error']


def test_one_file_at_a_time_and_not_too_many(files, session):
    async def drive():
        ready = asyncio.Event()

        async def make(session):
            await ready.wait()
            return b'world'

        download = files.download(session, make, 'video/mp4', 'drive.mp4')
        first = asyncio.create_task(asked(download))
        await asyncio.sleep(0)
        second = await asked(download)
        assert refused(second, 429, 'another file of this session') and second[1]['retry-after']
        ready.set()
        status, headers, body = await first
        assert (status, headers['content-type'], body) == (200, 'video/mp4', b'world')
        assert headers['content-length'] == '5' and 'drive.mp4' in headers['content-disposition']
        answers = [await asked(download) for _ in range(3)]
        assert [answer[0] for answer in answers] == [200, 200, 429]
        assert refused(answers[2], 429, 'too many files') and answers[2][1]['retry-after'] == '1'
        assert not files.limit(session).active

    asyncio.run(drive())


def test_what_cannot_be_made_or_used_is_said(files, session):
    async def no(*_):
        raise Refused('nothing was recorded yet')

    async def drive():
        assert refused(await asked(files.download(session, no, '', '')), 409, 'nothing was')
        assert refused(await asked(files.upload(session, no, 9), b'x'), 422, 'nothing was')
        assert refused(await asked(files.upload(session, no, 9), b'x' * 10), 413, 'at most 9 bytes')

    asyncio.run(drive())
    assert files.held == 0 and not files.limit(session).active


def test_a_slow_end_is_not_waited_for(files, session, monkeypatch):
    monkeypatch.setattr(transfers, 'TIMEOUT_SECONDS', 0.05)

    async def make(_):
        return bytes(2 * transfers.CHUNK_BYTES)

    async def drive():
        upload = await asked(files.upload(session, None, 90), b'x' * 50, stuck=True)
        assert refused(upload, 408, 'too slow') and upload[1]['connection'] == 'close'
        assert files.held == 0 and not files.limit(session).active
        _, _, body = await asked(files.download(session, make, '', ''), stuck=True)
        assert len(body) == transfers.CHUNK_BYTES and not files.limit(session).active

    asyncio.run(drive())


def test_uploads_of_all_players_share_the_memory(files, session):
    used, room = [], asyncio.Event()

    async def use(_, data):
        used.append(len(data))
        await room.wait()

    async def drive():
        first = asyncio.create_task(asked(files.upload(Client(), use, 90), b'x' * 80))
        while not used:
            await asyncio.sleep(0)
        assert refused(await asked(files.upload(session, use, 90), b'x' * 30), 503, 'other files')
        room.set()
        assert (await first)[0] == 200 and files.held == 0
        assert (await asked(files.upload(session, use, 90), b'x' * 30))[0] == 200

    asyncio.run(drive())


def test_videos_are_made_one_after_the_other(files, session, monkeypatch):
    monkeypatch.setattr(transfers, 'QUEUE_SECONDS', 0.05)

    async def drive():
        async def make(_):
            return await files.run_exclusive(session, lambda: b'video')

        await files._encoding.acquire()
        download = files.download(session, make, 'video/mp4', 'drive.mp4')
        busy = await asked(download)
        assert refused(busy, 503, 'making other videos') and int(busy[1]['retry-after']) >= 1
        files._encoding.release()
        level = files.limit(session).bucket.level
        assert (await asked(download))[2] == b'video' and not files._encoding.locked()
        assert files.limit(session).bucket.level < level

    asyncio.run(drive())
