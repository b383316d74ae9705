"""The training loop: step, log, save, resume.

A run is a pure function of (recipe, seed, data). State and position in the data are saved together,
so an interrupted run ends with the same parameters as an uninterrupted one. On the CPU, bits also
depend on the number of cores, by which XLA divides its sums.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import jax
import numpy as np

from matrix_jax.train import multihost, program
from matrix_jax.train import state as states
from matrix_jax.train.nan_guard import NaNGuard
from matrix_jax.train.scalars import Scalars
from matrix_jax.weights import training_state

STOPPED = 75  # exit code after SIGTERM: the state is saved, the same command resumes


def fit(run, world, params) -> dict:
    """Trains `run.stage` for `run.train.steps` steps and exports to OUT/weights.

    Args:
      run: the recipe (`config.Run`); `run.out` is the folder of the run.
      world: the world whose components train.
      params: start parameters by component.

    Returns:
      dict with step, loss (mean since the last log line), refused (number of skipped updates that
      were not finite) and seconds.

    Raises:
      UsageError: the stage does not train this kind of world.
      nan_guard.Diverged: several updates in a row were not finite.
      diffusers_layout.SaveError: a save could not be written; the one before it is complete.
      SystemExit(STOPPED): SIGTERM was received; the state was saved first.
    """
    stage, train = run.stage, run.train
    stage.check_world(world)
    params = stage.start(world, params, train.seed, run.allow_non_finite)
    made = program.build(run, world, params)
    with multihost.first_alone():
        loader = stage.loader(
            world, params, run.data, made.examples, train.seed, os.path.join(run.out, 'cache')
        )
    if made.share != (0, 1):
        loader.share(*made.share)
    state = made.init(params)
    saver = training_state.Checkpoints(os.path.join(run.out, 'state'), keep=train.keep)
    restored, extra = saver.restore(state), {}
    if restored is not None:
        _, state, extra = restored
        loader.restore(extra['data'].encode())
        print(f'{run.out}: resumes from step {restored[0]}', file=sys.stderr)
        before, now = extra.get('cpu_cores', cpu_cores()), cpu_cores()
        if before != now and jax.default_backend() == 'cpu':
            print(
                f'note: {run.out} was trained on {before} CPU cores and resumes on {now}, so sums '
                'are rounded differently',
                file=sys.stderr,
            )
    guard = NaNGuard(getattr(loader, 'names', None), extra.get('refused', 0))
    try:
        result = _loop(
            train, state, loader, made, saver, run.out, guard, extra.get('loss', float('nan'))
        )
    finally:
        saver.close()
    state = result.pop('state')
    final = multihost.fetch(states.merged(state, 'ema'))
    if multihost.first():
        world, final = stage.finish(world, final, loader)
        stage.save(world, final, os.path.join(run.out, 'weights'), run)
    multihost.meet('export')
    return result


def cpu_cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _loop(train, state, loader, made, saver, out, guard, loss) -> dict:
    from tqdm import tqdm

    start = int(state.step)
    stop = []
    previous = signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    scalars = Scalars(out, active=multihost.first())
    began, losses = time.time(), []

    def save(index, wait):
        guard.settle()
        extra = {
            'data': loader.state().decode(),
            'loss': loss,
            'refused': guard.refused,
            'cpu_cores': cpu_cores(),
        }
        (saver.save_now if wait else saver.save)(index, state, extra)

    try:
        with tqdm(
            total=train.steps,
            initial=start,
            unit='step',
            dynamic_ncols=True,
            disable=not multihost.first(),
        ) as bar:
            for index in range(start, train.steps):
                batch = dict(next(loader))
                clips = batch.pop('clip', None)
                state, metrics = made.step(state, made.put(batch))
                losses.append(metrics['loss'])
                bar.update()
                done = index + 1
                guard.watch(done, clips, metrics)
                if done % train.log_every == 0 or done == train.steps:
                    guard.settle()
                    finite = [one for one in jax.device_get(losses) if np.isfinite(one)]
                    loss = float(np.mean(finite)) if finite else float('nan')
                    losses = []
                    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
                    bar.set_postfix(loss=f'{loss:.4f}')
                    scalars.write(done, {**values, 'loss': loss, 'refused': guard.refused})
                stopping = multihost.anyone(bool(stop))
                if done % train.save_every == 0 or done == train.steps or stopping:
                    save(done, wait=stopping or done == train.steps)
                if stopping:
                    raise SystemExit(STOPPED)
    finally:
        signal.signal(signal.SIGTERM, previous)
        scalars.close()
    return {
        'step': max(start, train.steps),
        'loss': loss,
        'refused': guard.refused,
        'seconds': time.time() - began,
        'state': state,
    }
