"""Tokenizers: those of released folders, and byte tokenizers for the bundled worlds.

transformers is imported when first used, because that takes seconds, and never uses the network.
"""

from __future__ import annotations

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
START, END = '<|startoftext|>', '<|endoftext|>'


def load(folder: str | Path):
    """Loads the tokenizer of a folder with a `tokenizer_config.json`.

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
    special = {'pad_token': '<pad>', 'eos_token': '</s>', 'unk_token': '<unk>'}
    _write(
        folder,
        tokenizer_config={
            'tokenizer_class': 'ByT5Tokenizer',
            'extra_ids': 0,
            'additional_special_tokens': [],
            'model_max_length': length,
            **special,
        },
    )
    return 256 + len(special)


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
