"""Tokenizers: those of released folders, and byte tokenizers for the bundled worlds.

transformers is imported when first used, because that takes seconds, and never uses the network.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from matrix_jax.weights import diffusers_layout

CLASSES = {
    'T5Tokenizer': 'T5Tokenizer',
    'T5TokenizerFast': 'T5Tokenizer',
    'ByT5Tokenizer': 'ByT5Tokenizer',
    'CLIPTokenizer': 'CLIPTokenizer',
    'CLIPTokenizerFast': 'CLIPTokenizer',
}
# A folder needs one of these sets of files.
FILES = {
    'T5Tokenizer': (('tokenizer.json',), ('spiece.model',)),
    'ByT5Tokenizer': ((),),
    'CLIPTokenizer': (('tokenizer.json',), ('vocab.json', 'merges.txt')),
}
# A ByT5 tokenizer: its configuration without the longest prompt.
SPECIAL_BYTES = {'pad_token': '<pad>', 'eos_token': '</s>', 'unk_token': '<unk>'}
BYTES = {
    'tokenizer_class': 'ByT5Tokenizer',
    'extra_ids': 0,
    'additional_special_tokens': [],
    **SPECIAL_BYTES,
}
START, END = '<|startoftext|>', '<|endoftext|>'


def load(folder: str | Path, late: bool = False):
    """Loads the tokenizer of a folder with a `tokenizer_config.json`.

    Args:
      folder: the folder.
      late: whether to read the vocabulary only when the tokenizer is used, which may never be.

    Raises:
      FileNotFoundError: the folder or one of its files is missing.
      ValueError: a file is not readable, or the tokenizer class is not supported.
    """
    folder = Path(folder)
    config = folder / 'tokenizer_config.json'
    if not config.is_file():
        raise FileNotFoundError(f'tokenizer: no {config}')
    for path in sorted(folder.iterdir()):
        if not (path.is_file() or path.is_dir()):
            raise ValueError(f'tokenizer: {path} is not a file, or a link to none')
    try:
        found = diffusers_layout.parse_json(config.read_text(encoding='utf-8-sig'))
        name = found.get('tokenizer_class')
    except (ValueError, AttributeError) as error:
        raise ValueError(f'tokenizer: {config} is not a JSON object ({error})') from None
    if not isinstance(name, str) or name not in CLASSES:
        raise ValueError(
            f'tokenizer: {config} names class {name!r}, expected one of {", ".join(CLASSES)}'
        )
    sets = FILES[CLASSES[name]]
    if not any(all((folder / file).is_file() for file in files) for files in sets):
        wanted = ', or '.join(' and '.join(files) for files in sets)
        raise FileNotFoundError(f'tokenizer: {folder} lacks the vocabulary of {name}: {wanted}')
    if found == BYTES | {'model_max_length': found.get('model_max_length')}:
        return ByteTokenizer(found['model_max_length'])
    return LateTokenizer(folder, name) if late else _from_transformers(folder, name)


class LateTokenizer:
    """A tokenizer that is read when it is first called.

    Args:
      folder, name: as of `_from_transformers`.
    """

    def __init__(self, folder: Path, name: str):
        self._given = folder, name

    @functools.cached_property
    def _read(self):
        return _from_transformers(*self._given)

    def __call__(self, prompts: list[str], **options):
        """Prompts -> what the tokenizer returns."""
        return self._read(prompts, **options)


class ByteTokenizer:
    """What transformers' ByT5 tokenizer does, without its seconds of imports.

    An id is a byte + 3, and the last one is the end of text. Prompts that spell a special token are
    left to transformers.

    Args:
      length: tokens of the longest prompt, which only transformers notes.
    """

    def __init__(self, length: int):
        self._length = length

    def __len__(self) -> int:
        return 256 + len(SPECIAL_BYTES)

    @functools.cached_property
    def _slow(self):
        with tempfile.TemporaryDirectory() as folder:
            write_byte_tokenizer(folder, self._length)
            return _from_transformers(Path(folder), 'ByT5Tokenizer')

    def __call__(
        self,
        prompts: list[str],
        padding: str | bool = False,
        truncation: bool = False,
        max_length: int | None = None,
        verbose: bool = True,
    ) -> dict[str, list[list[int]]]:
        """Prompts -> their ids, by the name 'input_ids'."""
        if any('<' in prompt for prompt in prompts):
            given = {'padding': padding, 'truncation': truncation, 'max_length': max_length}
            return self._slow(prompts, verbose=verbose, **given)
        made = [[byte + 3 for byte in prompt.encode()] for prompt in prompts]
        end = 1
        if truncation and max_length is not None:
            made = [ids[: max_length - 1] for ids in made]
        made = [[*ids, end] for ids in made]
        if padding:
            longest = max_length if padding == 'max_length' else max(map(len, made))
            made = [ids + [0] * (longest - len(ids)) for ids in made]
        return {'input_ids': made}

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without bytes of letters that are cut apart."""
        return bytes(one - 3 for one in ids if 3 <= one < 259).decode(errors='ignore')


def _from_transformers(folder: Path, name: str):
    """The tokenizer of a class name, read by transformers."""
    cls = getattr(_transformers(), CLASSES[name])
    try:
        return cls.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the parsers of three formats raise various errors
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f'tokenizer: {folder} could not be read as {name}: {first}') from error


def byte_pair():
    """(text tokenizer, control tokenizer) of the bundled worlds, without files."""
    with tempfile.TemporaryDirectory() as folder:
        text, control = Path(folder, 'text'), Path(folder, 'control')
        write_byte_tokenizer(text)
        write_clip_byte_tokenizer(control)
        return load(text), load(control)


def encode(
    tokenizer, prompts: Sequence[str], length: int | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Encodes prompts.

    Args:
      tokenizer: the tokenizer.
      prompts: B prompts.
      length: tokens L; shorter prompts are padded, longer ones cut before the end-of-text token.
        None pads to the longest prompt.

    Returns:
      ids int32 [B L], and the text of each prompt that was cut off.
    """

    def ids(**options):
        return tokenizer(list(prompts), verbose=False, **options)['input_ids']

    if length is None:
        return np.asarray(ids(padding='longest'), np.int32), ('',) * len(prompts)
    kept = ids(padding='max_length', truncation=True, max_length=length)
    # The last id of a prompt is its end of text, which is kept.
    cut = tuple(
        tokenizer.decode(whole[length - 1 : -1]) if len(whole) > length else '' for whole in ids()
    )
    return np.asarray(kept, np.int32), cut


def write_byte_tokenizer(folder: str | Path, length: int = 226) -> int:
    """Writes a ByT5 tokenizer, which has no vocabulary file; returns its number of ids, 259."""
    _write(folder, tokenizer_config=BYTES | {'model_max_length': length})
    return 256 + len(SPECIAL_BYTES)


def write_clip_byte_tokenizer(folder: str | Path, length: int = 77) -> int:
    """Writes a CLIP tokenizer of bytes, without merges; returns its number of ids, 514.

    The end of text has the largest id, which the pooling of the encoder needs.
    """
    letters = _byte_letters()
    words = [*letters, *(letter + '</w>' for letter in letters), START, END]
    special = {'bos_token': START, 'eos_token': END, 'unk_token': END, 'pad_token': END}
    _write(
        folder,
        tokenizer_config={
            'tokenizer_class': 'CLIPTokenizer',
            'model_max_length': length,
            'do_lower_case': True,
            **special,
        },
        special_tokens_map=special,
        vocab={word: i for i, word in enumerate(words)},
    )
    Path(folder, 'merges.txt').write_text('#version: 0.2\n', encoding='utf-8')
    return len(words)


def _write(folder: str | Path, **files) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + '\n'
        Path(folder, f'{name}.json').write_text(text, encoding='utf-8')


def _byte_letters() -> list[str]:
    """The printable letters of byte-level vocabularies, for each of the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(hidden))]


def _transformers():
    """Imports transformers without its warning that torch is missing."""
    name = 'TRANSFORMERS_NO_ADVISORY_WARNINGS'
    before = os.environ.get(name)
    os.environ[name] = '1'
    try:
        import transformers
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
    return transformers
