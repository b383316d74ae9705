"""Byte order marks, endings in capitals, and folders that links lead to."""

import codecs
import os

import numpy as np
import pytest

from matrix_jax.data import cameras, files, footage, ingest


@pytest.mark.parametrize(
    'data',
    [
        'Café, früh'.encode(),
        codecs.BOM_UTF8 + 'Café, früh'.encode(),
        'Café, früh'.encode('utf-16'),
        codecs.BOM_UTF16_BE + 'Café, früh'.encode('utf-16-be'),
        'Café, früh'.encode('utf-32'),
    ],
)
def test_a_byte_order_mark_tells_the_encoding(tmp_path, data):
    (tmp_path / 'a.txt').write_bytes(data)
    assert files.read_text(tmp_path / 'a.txt') == 'Café, früh'


def test_what_is_no_text_is_named(tmp_path):
    (tmp_path / 'a.json').write_bytes(b'\xff\xfe\x00')
    (tmp_path / 'b.json').write_text('[' * 10**5)
    os.mkfifo(tmp_path / 'c.json')
    for name, said in (('a', 'not UTF-8 text'), ('b', 'not JSON'), ('c', 'is not a file'),
                       ('d', 'No such file')):  # fmt: skip
        with pytest.raises(ingest.IngestError, match=f'{name}.json: {said}'):
            files.read_json(tmp_path / f'{name}.json')
    (tmp_path / 'e.jsonl').write_text('\ufeff{"a": 1}\r\n\r\n[2\n', encoding='utf-8')
    lines = files.read_json_lines(tmp_path / 'e.jsonl')
    assert next(lines)[1] == {'a': 1}
    with pytest.raises(ingest.IngestError, match='e.jsonl line 3: not JSON'):
        next(lines)


def test_links_are_followed_once(tmp_path):
    root, other = tmp_path / 'in', tmp_path / 'elsewhere'
    (root / 'a').mkdir(parents=True)
    (other / 'deep').mkdir(parents=True)
    for path in (root / 'a' / 'one.mp4', other / 'two.mp4', other / 'deep' / 'three.mp4'):
        path.write_text(path.name)
    (root / 'b').symlink_to(other)
    (root / 'c').symlink_to(other)  # the same folder again
    (root / 'a' / 'loop').symlink_to(root)
    (other / 'deep' / 'up').symlink_to(other)
    (root / 'four.mp4').symlink_to(other / 'two.mp4')
    (root / 'broken.mp4').symlink_to(tmp_path / 'gone')
    (root / '0').symlink_to(root / 'a')  # has a name of its own, which comes later
    found = [path.relative_to(root).as_posix() for path in files.walk(root)]
    assert found == ['a/one.mp4', 'b/deep/three.mp4', 'b/two.mp4', 'broken.mp4']


def test_footage_reads_linked_folders_and_files_in_capitals(tmp_path):
    (tmp_path / 'in').mkdir()
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'in' / 'link').symlink_to(tmp_path / 'disk')
    for name in ('a', 'b'):
        (tmp_path / 'disk' / f'{name}.MP4').touch()
    (tmp_path / 'disk' / 'a.TXT').write_bytes('A café\nby day'.encode('utf-16'))
    np.savez(tmp_path / 'disk' / 'b', x=1)
    (tmp_path / 'disk' / 'b.npz').rename(tmp_path / 'disk' / 'b.NPZ')
    one, two = footage.find(tmp_path / 'in')
    assert (one.path, one.caption, one.cameras) == ('link/a.MP4', 'A café by day', '')
    assert (two.path, two.caption) == ('link/b.MP4', '')
    assert two.cameras == cameras.digest(tmp_path / 'disk' / 'b.MP4') != ''
