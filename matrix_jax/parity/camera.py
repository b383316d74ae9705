"""Replays of cameras: poses of actions, ray maps, retrieval of memory frames, benchmark actions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax.controls.keyboard_mouse import KeyboardMouseVocabulary
from matrix_jax.nn import camera
from matrix_jax.parity.record import Record, fast_jit
from matrix_jax.stream import memory


def poses(record: Record) -> dict:
    """Actions to poses and cameras."""
    inputs = record.inputs
    made, last = jax.jit(camera.poses)(inputs['first_pose'], inputs['keyboard'], inputs['mouse'])
    return {'poses': made, 'last_pose': last, 'extrinsics': camera.extrinsics(made)}


def plucker(record: Record) -> dict:
    """Ray maps of the clips of a trajectory and of memory frames."""
    config, inputs = record.config, record.inputs
    cameras = jnp.asarray(inputs['extrinsics'])
    size = config['target_h'], config['target_w'], config['target_h'] // config['lat_h']
    outputs = {'intrinsics': camera.intrinsics(*size[:2])}
    for clip in range(config['num_clips']):
        times = memory.latent_times(memory.Config(), clip)
        between = camera.interpolate(cameras, np.arange(len(cameras)), times)
        relative = camera.relative_poses(between)
        outputs |= {f'clip{clip}.interp_c2w': between, f'clip{clip}.relative_pose': relative}
        # A recording may have the maps of some frames only.
        frames = record.outputs.get(f'clip{clip}.plucker_frame_ids', np.arange(len(relative)))
        outputs[f'clip{clip}.plucker_frame_ids'] = frames
        outputs[f'clip{clip}.plucker'] = _maps(relative[np.asarray(frames, int)], size)
    memories = _block_ends(inputs['memory_frame_idx'].astype(int))
    relative = camera.memory_poses(
        cameras[inputs['reference_frame_idx'].astype(int)], cameras[memories]
    )
    return outputs | {'memory.relative_pose': relative, 'memory.plucker': _maps(relative, size)}


def _maps(relative, size):
    """Ray maps as the reference has them, [1 C T h w]."""
    return np.moveaxis(camera.plucker(relative, *size), -1, 0)[None]


def _block_ends(frames):
    """The last pixel frame of each one's latent frame."""
    return 4 * ((frames - 1) // 4) + 4


def memory_selection(record: Record) -> dict:
    """Retrieval for every clip of a trajectory but the first."""
    outputs = {}
    for clip in range(1, record.config['num_clips']):
        start, stop = record.config['segments'][clip]
        outputs |= _selection(record.inputs['extrinsics'], clip, start, stop)
    return outputs


def _selection(cameras, clip: int, start: int, stop: int) -> dict:
    cfg = memory.Config()
    references = stop - 1 - np.asarray(cfg.reference_offsets)
    frames = np.arange(1, start)
    overlap = fast_jit(camera.view_overlap)(cameras[references], cameras[frames])
    chosen, confidence = camera.best_views(overlap, frames, np.ones(len(frames), bool))
    raw = frames[np.asarray(chosen)]
    final = np.append(raw[:-1], cfg.fixed_memory)
    # The two best of every reference, of float64 rounded as the recording has it.
    first, second = np.sort(np.asarray(overlap, np.float64), axis=-1)[:, :-3:-1].T
    made = {
        'reference_idx': references,
        'ratios_f64': overlap,
        'selected_raw': raw,
        'confidence': confidence,
        'margin_f64': first - second,
        'selected_final': final,
        'latent_idx': (final - 1) // 4 + 1,
        'aligned_start': 4 * ((final - 1) // 4) + 1,
    }
    return {f'clip{clip}.{name}': value for name, value in made.items()}


def bench_actions(record: Record) -> dict:
    """Benchmark actions, their poses, and retrieval among those."""
    config = record.config
    vocabulary = KeyboardMouseVocabulary('matrix_game_3')
    vectors = vocabulary.encode(vocabulary.random(config['num_frames'], config['seed']))
    keys = len(vocabulary.mode.keys)
    keyboard, mouse = vectors[:, :keys], vectors[:, keys:]
    made, _ = jax.jit(camera.poses)(np.zeros(5, np.float32), keyboard, mouse)
    cameras = np.asarray(camera.extrinsics(made))
    outputs = {'keyboard': keyboard, 'mouse': mouse, 'poses': made, 'extrinsics': cameras}
    for clip in range(1, config['num_clips']):
        stop = 57 + 40 * clip
        outputs |= _selection(cameras, clip, stop - 56, stop)
    return outputs


REPLAYS = {
    'poses': poses,
    'plucker': plucker,
    'memory_selection': memory_selection,
    'bench_actions': bench_actions,
}
