"""Scalars reach the disk, and a full disk does not hold the run up."""

import resource
import struct

from matrix_jax.train.scalars import Scalars


def read(folder):
    """(step, {name: value}) of every event with scalars."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = folder.glob('events*')
    data, found = path.read_bytes(), []
    while data:
        size = struct.unpack('Q', data[:8])[0]
        event = Event.FromString(data[12 : 12 + size])
        found.append((event.step, {one.tag: one.simple_value for one in event.summary.value}))
        data = data[12 + size + 4 :]
    return found[1:]


def test_scalars_are_on_disk_at_once(tmp_path):
    scalars = Scalars(str(tmp_path / 'run'))
    scalars.write(5, {'loss': 0.5, 'skipped': 0.0})
    scalars.write(10, {'loss': 0.25})
    assert read(tmp_path / 'run') == [(5, {'loss': 0.5, 'skipped': 0.0}), (10, {'loss': 0.25})]
    scalars.close()


def test_a_full_disk_is_told_once_and_not_waited_for(tmp_path, capsys):
    scalars = Scalars(str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        for step in range(30):
            scalars.write(step, {'loss': 1.0})
        scalars.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capsys.readouterr().err == f'{tmp_path}: scalars could not be written (File too large)\n'
