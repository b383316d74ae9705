"""A world as static files: page, runtime, programs, weights, start clips and prompts."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from matrix_jax import config, worlds
from matrix_jax.browser import programs, runtime, weights
from matrix_jax.serve.runtime import start_frames
from matrix_jax.serve.web.base_app import PAGE
from matrix_jax.weights import diffusers_layout
from matrix_jax.worlds.protocols import World

INDEX, WEIGHTS, PROMPTS = 'world.json', 'weights.bin', 'prompts.bin'
STATIC = Path(__file__).parent / 'static'
# 64 MB of weights in 8 bits, and a few tens of milliseconds a frame where the bundled worlds, of
# 6 million, take a few. Text encoders do not count: prompts are encoded here.
MAX_PARAMETERS = 64_000_000
# Headers without which browsers give a page no threads.
HEADERS = """/*
  Cross-Origin-Opener-Policy: same-origin
  Cross-Origin-Embedder-Policy: require-corp
"""


def save(run: config.Run, folder: str | Path, bits: int = 16, source: str | None = None) -> str:
    """Writes a world as a static page; returns a line about it.

    Args:
      run: a recipe with weights.
      folder: must not exist.
      bits: of the weights, one of `weights.BITS`.
      source: tarball or folder of onnxruntime-web; None = from npm.

    Raises:
      UsageError: the world makes whole clips or is too large, the folder exists, packages are
        missing, or a program uses what has no ONNX form.
    """
    check_installed()
    if run.world.clip:
        raise config.UsageError(f'{run.name}: makes whole clips, expected a model that streams')
    if Path(folder).exists():
        raise config.UsageError(f'{folder}: is there already, expected a new name')
    if not run.weights:
        raise config.UsageError(f'{run.name}: needs --weights')
    resolved = diffusers_layout.resolve(run.weights)
    _check_size(run.name, worlds.describe(run.world, resolved, whole=True))
    files = runtime.files(source)
    world, params = worlds.open_run(run)
    web = programs.WebWorld(world, params)
    store = weights.Store()
    made = web.export(bits, store, WEIGHTS)
    about = describe(web, run.name, made)
    captions = start_frames.captions(world, resolved)

    def fill(new: Path) -> None:
        for name, one in made.items():
            (new / f'{name}.onnx').write_bytes(one.model.SerializeToString())
        (new / WEIGHTS).write_bytes(store.data())
        _write_prompts(new, web, about, captions)
        _write_starts(new, about, world, resolved)
        (new / 'runtime').mkdir()
        for name, data in files.items():
            (new / 'runtime' / name).write_bytes(data)
        for path in STATIC.iterdir():
            (new / path.name).write_bytes(path.read_bytes())
        (new / 'index.html').write_text(page(), encoding='utf-8')
        (new / '_headers').write_text(HEADERS)
        about['files'] = {
            str(path.relative_to(new)): path.stat().st_size
            for path in sorted(new.rglob('*'))
            if path.is_file()
        }
        (new / INDEX).write_text(json.dumps(about, indent=1) + '\n', encoding='utf-8')

    diffusers_layout.replace_folder(Path(folder), fill)
    size = sum(path.stat().st_size for path in Path(folder).rglob('*') if path.is_file())
    return (
        f'{folder}: {run.name}, weights in {bits} bits ({len(store.data()) / 1e6:.1f} MB), '
        f'{size / 1e6:.1f} MB in all; try it: python -m http.server -d {folder}'
    )


def page() -> str:
    """Returns the player's page with a world in the tab in place of the server."""
    html = PAGE.read_text(encoding='utf-8')
    return html.replace('<script>', '<script src="local.js"></script>\n<script>', 1)


def check_installed() -> None:
    """Checks that onnx is installed.

    Raises:
      UsageError: it is not.
    """
    if not importlib.util.find_spec('onnx'):
        raise config.UsageError("static pages need onnx: pip install 'matrix_jax[web]'")


def _check_size(name: str, world: World) -> None:
    left_out = ('text_encoder', 'control_encoder', 'tokenizer')
    count = sum(
        int(np.prod(leaf.shape))
        for part, tree in world.shapes().items()
        if part not in left_out
        for leaf in jax.tree.leaves(tree)
    )
    if count > MAX_PARAMETERS:
        raise config.UsageError(
            f'{name}: got {count / 1e6:,.0f} million parameters, expected at most '
            f'{MAX_PARAMETERS / 1e6:.0f} million in a browser tab'
        )


def describe(web: programs.WebWorld, name: str, made: dict[str, programs.Exported]) -> dict:
    """Returns what the page needs to know: the fields of `world.json`."""
    cfg, words = web.world.cfg, web.world.vocabulary
    stream = cfg.stream.with_control_binding(programs.CONTROL_BINDING)
    vectors, amounts = control_vectors(words)
    return {
        'format': 1,
        'world': name,
        'width': cfg.width,
        'height': cfg.height,
        'fps': cfg.fps,
        'prompt': cfg.prompt,
        'reads_text': web.world.reads_text,
        'start_frames': web.world.start_frames,
        'step_frames': stream.controls_per_step * words.frames_per_control,
        'controls_per_step': stream.controls_per_step,
        'lag': stream.lag,
        'keys': words.key_layout(),
        'controls': vectors,
        'amounts': amounts,
        'control': {'shape': list(web.idle.shape), 'dtype': web.idle.dtype.name},
        'text': programs.text_leaf(web),
        'weights': WEIGHTS,
        'programs': {
            program: {
                'noise': [dataclasses.asdict(one) for one in exported.noise],
                'carry': [dataclasses.asdict(one) for one in exported.carry],
                'changed': list(exported.changed),
            }
            for program, exported in made.items()
        },
    }


def control_vectors(vocabulary: Any) -> tuple[dict[str, list], dict[str, list]]:
    """Returns (control -> its encoding, word of the mouse -> its encoding for an amount of 1).

    The controls are all that the keys of the page can spell without the mouse.
    """
    layout = vocabulary.key_layout()
    axes = [[axis['none'], *axis['keys'].values()] for axis in layout['axes']]
    found = {layout['idle']}
    for words in itertools.product(*axes):
        found.add(layout['join'].join(filter(None, words)) or layout['idle'])
    vectors = {one: vocabulary.encode([vocabulary.canonical(one)])[0] for one in sorted(found)}
    amounts = {}
    if layout['mouse']:
        speed = layout['mouse']['speed']
        for word in ('up', 'down', 'left', 'right'):
            amounts[word] = vocabulary.encode([f'{word}:{speed:g}'])[0] / speed
    listed = ({name: np.ravel(one).tolist() for name, one in d.items()} for d in (vectors, amounts))
    return tuple(listed)


def _write_prompts(folder: Path, web: programs.WebWorld, about: dict, captions: dict) -> None:
    """Writes the encoded prompts, float32 one after the other."""
    about['prompts'] = []
    if about['text'] is None:
        return
    world: Any = web.world
    prompts = list(dict.fromkeys([world.cfg.prompt, *captions.values()]))
    embed = jax.jit(world.embed_ids)
    encoded = [np.asarray(embed(web.params, world.tokenize([one])), np.float32) for one in prompts]
    (folder / PROMPTS).write_bytes(b''.join(one.tobytes() for one in encoded))
    about['prompts'] = prompts


def _write_starts(folder: Path, about: dict, world: World, weights_folder: Any) -> None:
    """Writes the start clips: PNGs with the frames below each other."""
    from PIL import Image

    about['starts'] = []
    for name, caption in start_frames.captions(world, weights_folder).items():
        (folder / 'starts').mkdir(exist_ok=True)
        frames = start_frames.load_clip(world, weights_folder, name)
        Image.fromarray(frames.reshape(-1, *frames.shape[2:])).save(folder / f'starts/{name}.png')
        about['starts'].append({'name': name, 'caption': caption, 'file': f'starts/{name}.png'})
    source = start_frames.clips_folder(world, weights_folder)
    about['start'] = start_frames.start_clips.match(source, about['prompt']) or ''
