"""Links that lead out of a weights folder are named; those of the hub's cache are its own files."""

import pytest

from matrix_jax.weights import diffusers_layout, links


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / 'world'
    (made / 'vae').mkdir(parents=True)
    (made / 'vae' / 'config.json').write_text('{}')
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'model.safetensors').touch()
    links.note.cache_clear()
    return made


def test_links_out_of_a_folder_are_named_in_one_line(folder, caplog):
    assert diffusers_layout.resolve(folder) == folder and not caplog.records
    (folder / 'vae' / 'again.json').symlink_to('config.json')  # stays inside
    (folder / 'vae' / 'model.safetensors').symlink_to(folder.parent / 'other' / 'model.safetensors')
    (folder / 'text_encoder').symlink_to('../other')
    links.note.cache_clear()
    for _ in range(2):
        assert diffusers_layout.resolve(folder) == folder
    (record,) = caplog.records
    assert record.getMessage() == (
        f'note: weights: text_encoder leads out of {folder}, to {folder.parent / "other"} '
        '(and 1 more)'
    )


def test_the_cache_of_the_hub_is_one_place(folder):
    cache = folder.parent / 'models--owner--name'
    (cache / 'blobs').mkdir(parents=True)
    (cache / 'blobs' / '0123').touch()
    snapshot = cache / 'snapshots' / 'abcd' / 'stage4'
    (snapshot / 'vae').mkdir(parents=True)
    (snapshot / 'vae' / 'model.safetensors').symlink_to('../../../../blobs/0123')
    assert (snapshot / 'vae' / 'model.safetensors').exists() and links.leaving(snapshot) == []
    (snapshot / 'vae' / 'config.json').symlink_to(folder / 'vae' / 'config.json')
    assert links.leaving(snapshot) == [snapshot / 'vae' / 'config.json']
