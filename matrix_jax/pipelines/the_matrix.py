"""The published call of The Matrix (arXiv 2412.03568): a prompt and controls to a video file.

The stage-2 model denoises the base clip, up to four seconds, as a whole (`base_video.mp4`). The
stage-3 model continues it as a stream (`final_video.mp4`).
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import jax
import numpy as np

from matrix_jax import config, recipes, video
from matrix_jax.controls import driving
from matrix_jax.parallel import compilation
from matrix_jax.stream import base as streams
from matrix_jax.stream import swin
from matrix_jax.vae import cogvideox as vae
from matrix_jax.weights import diffusers_layout
from matrix_jax.worlds import open_run


class TheMatrix:
    """The published class. Weights are read when they are needed.

    Args:
      generation_model_path: weights of stage 2, which makes the base clip; a folder in the
        diffusers layout or a hub repository.
      streaming_model_path: weights of stage 3, which continues it; only needed for videos of more
        than four seconds.

    Raises:
      CheckpointError: a path is no weights folder.
    """

    def __init__(self, generation_model_path: str, streaming_model_path: str | None = None):
        self.paths = {'STAGE2': generation_model_path, 'STAGE3': streaming_model_path}
        for path in filter(None, self.paths.values()):
            diffusers_layout.resolve(path)

    def generate(
        self,
        prompt: str,
        length: int = 4,
        control_signal: str | None = None,
        control_seed: int = 42,
        output_folder: str = './',
        guidance_scale: float = 6.0,
        seed: int = 42,
        gpu_id: int = 0,
    ) -> str:
        """Writes a video and returns its path.

        Args:
          prompt: text.
          length: whole seconds. The video has 16 * length frames, and one more up to four seconds.
          control_signal: comma-separated symbols, one per quarter of a second; random by default.
            A signal that is too short is continued at random.
          control_seed: seed of random controls.
          output_folder: where `base_video.mp4` and `final_video.mp4` are written.
          guidance_scale: guidance by the prompt in both models; 1 or less switches it off.
          seed: seed of all noise.
          gpu_id: index of the device to run on.

        Raises:
          UsageError, ControlError, CheckpointError: an argument cannot be used; nothing is written.
        """
        if not isinstance(length, int) or length < 1:
            raise config.UsageError(f'length: got {length}, expected whole seconds, at least 1')
        signal = driving.base_signal(length, control_signal or None, control_seed)
        driving.parse(signal)
        long = length > driving.BASE_SECONDS
        if long and not self.paths['STAGE3']:
            raise config.UsageError(
                f'length: got {length}, which needs a streaming_model_path '
                f'(more than {driving.BASE_SECONDS} seconds)'
            )
        devices = jax.devices()
        if not 0 <= gpu_id < len(devices):
            raise config.UsageError(f'gpu_id: got {gpu_id}, expected 0 to {len(devices) - 1}')
        folder = Path(output_folder).expanduser()
        with jax.default_device(devices[gpu_id]):
            path = self._base(
                folder / 'base_video.mp4', prompt, signal, length, guidance_scale, seed
            )
            if long:
                path = self._stream(
                    path,
                    folder / 'final_video.mp4',
                    prompt,
                    signal,
                    length,
                    control_seed,
                    guidance_scale,
                    seed,
                )
        return os.fspath(path)

    def _open(self, stage: str):
        run = recipes.load(f'the_matrix:{stage}')
        world, params = open_run(dataclasses.replace(run, weights=self.paths[stage]))
        # The published call takes the frame size from the weights: 480x720 in all released ones.
        cfg = world.cfg.vae
        return world.replace(height=cfg.sample_height, width=cfg.sample_width), params

    def _base(self, path, prompt, signal, length, guidance, seed):
        """Makes the base clip -> its path."""
        world, params = self._open('STAGE2')
        cfg = world.cfg
        latents = (driving.base_frames(length) - 1) // cfg.frames_per_control + 1
        symbols = driving.encode(driving.parse(signal)[:latents])
        world = world.replace(clip=dataclasses.replace(cfg.clip, guidance=guidance))
        make = compilation.jit(world.sample_clip)
        frames = make(params, world.tokenize([prompt]), symbols[None], jax.random.key(seed))
        video.write_video(path, np.asarray(frames)[0], cfg.fps, min_width=1)
        return path

    def _stream(self, base, path, prompt, signal, length, control_seed, guidance, seed):
        """Continues the base clip, one second per shift -> path of the final video."""
        world, params = self._open('STAGE3')
        cfg = world.cfg
        settings = dataclasses.replace(cfg.stream, guidance=guidance)
        window = 1 + cfg.frames_per_control * (settings.frames - 1)
        frames = video.read_video(base, cfg.fps, window)
        frames = video.resize(frames, cfg.height, cfg.width)
        shifts = length * cfg.fps // (cfg.frames_per_control * settings.group_frames)
        symbols = driving.parse(
            driving.streaming_signal(signal, window, settings.groups, shifts, control_seed)
        )
        first, steps = swin.split_controls(settings, driving.encode(symbols)[None], shifts)

        @jax.jit
        def make(params, ids, frames, first, steps, key):
            stream = swin.make(settings, cfg.scheduler, world.denoise)
            cond = world.condition(params, ids, frames, first)
            _, made = streams.rollout(stream, params, stream.init(params, cond, key), steps)
            made = vae.unscaled(cfg.vae, streams.join(made))
            return world.to_uint8(vae.decode_sliced(cfg.vae, params['vae'], made))

        made = make(
            params, world.tokenize([prompt]), frames[None], first, steps, jax.random.key(seed)
        )
        video.write_video(path, np.asarray(made)[0], cfg.fps, min_width=1)
        return path
