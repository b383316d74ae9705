"""Hooks of the site: cards of the bundled worlds as pages, and links that leave the folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
CARD = re.compile(r'\]\(\.\./matrix_jax/assets/(\w+)/card\.md')
FILE = re.compile(r'\[([^\]]+)\]\(\.\./[^)]*\)')  # no page of the site


def on_files(files: Files, config: Any) -> Files:
    """Adds a page `cards/NAME.md` for each bundled world."""
    for card in sorted(ROOT.glob('matrix_jax/assets/*/card.md')):
        name = f'cards/{card.parent.name}.md'
        files.append(File.generated(config, name, content=card.read_text(encoding='utf-8')))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns links to files of the repository into links to pages, or into their text."""
    if page.file.src_uri.startswith('cards/'):
        markdown = re.sub(r'\]\(\.\./(\w+)/card\.md', r'](\1.md', markdown)
        markdown = re.sub(r'\]\((?:\.\./)+docs/', '](../', markdown)
        return re.sub(r'\[([^\]]+)\]\((?!https?:|\.\./[\w]+\.md|\w+\.md|#)[^)]*\)', r'\1', markdown)
    markdown = CARD.sub(r'](cards/\1.md', markdown).replace('](../README.md', '](index.md')
    return FILE.sub(r'\1', markdown)
