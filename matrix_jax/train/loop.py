"""The only training loop: step, log, save, resume.

A run is a pure function of (recipe, seed, data): the state and the position in the data are saved
together, so a run that was stopped anywhere goes on to the same parameters.
"""

from __future__ import annotations

import os
import signal
import time
from functools import partial

import jax
import numpy as np

from matrix_jax import convert, saves, sharding
from matrix_jax.train import optim
from matrix_jax.train import state as states

MAX_SKIPPED = 20     # refused updates in a row before the run gives up
STOPPED = 75         # exit code after SIGTERM: state is saved, start again to go on


class Diverged(RuntimeError):
    """The loss stayed non-finite."""


def fit(run, world, params) -> dict:
    """Trains `run.stage` for `run.train.steps` steps and exports to OUT/weights.

    Args:
      run: the recipe (`config.Run`); `run.out` is the folder of the run.
      world: the World whose parts train.
      params: start parameters by component.

    Returns:
      dict with step, loss (mean since the last log line), seconds.

    Raises:
      Diverged: MAX_SKIPPED updates in a row were not finite.
      SystemExit(STOPPED): SIGTERM came; the state was saved first.
    """
    stage, train = run.stage, run.train
    mesh = sharding.make_mesh(run.mesh)
    params = {name: params[name] for name in stage.components}
    loader = stage.loader(world, params, run.data, train.batch, train.seed,
                          os.path.join(run.out, 'cache'))
    axes = {path: leaf for name in stage.components
            for path, leaf in convert.flatten({name: convert.axes(world.tables[name])}).items()}
    tx = optim.make(stage.optimizer, train.steps, axes)
    state = states.init(params, stage.trainable, tx, train.seed)
    state = jax.device_put(state, sharding.replicated(mesh))
    saver = saves.Checkpoints(os.path.join(run.out, 'state'), keep=train.keep)
    restored, loss = saver.restore(state), float('nan')
    if restored is not None:
        _, state, extra = restored
        loader.restore(extra['data'].encode())
        loss = extra.get('loss', loss)
    step = jax.jit(states.make_step(partial(stage.loss, world), tx, stage.ema), donate_argnums=0)
    put = partial(jax.device_put, device=sharding.batch_sharding(mesh))
    try:
        result = _loop(train, state, loader, step, put, saver, run.out, loss)
    finally:
        saver.close()
    state = result.pop('state')
    final = jax.device_get(states.merged(state, 'ema'))
    world, final = stage.finish(world, final, loader)
    world.save(os.path.join(run.out, 'weights'), final, start=run.weights)
    return result


def _loop(train, state, loader, step, put, saver, out, loss) -> dict:
    from tensorboardX import SummaryWriter
    from tqdm import tqdm
    start = int(state.step)
    stop = []
    previous = signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    writer = SummaryWriter(out)
    began, losses = time.time(), []

    def save(index):
        saver.save(index, state, {'data': loader.state().decode(), 'loss': loss})

    try:
        with tqdm(total=train.steps, initial=start, unit='step', dynamic_ncols=True) as bar:
            for index in range(start, train.steps):
                state, metrics = step(state, put(next(loader)))
                losses.append(metrics['loss'])
                bar.update()
                done = index + 1
                if done % train.log_every == 0 or done == train.steps:
                    loss = float(np.nanmean(jax.device_get(losses)))
                    losses = []
                    values = {name: float(value)
                              for name, value in jax.device_get(metrics).items()}
                    if values['skipped'] >= MAX_SKIPPED:
                        raise Diverged(f'step {done}: {int(values["skipped"])} updates in a row '
                                       'were not finite; the last good state is saved')
                    bar.set_postfix(loss=f'{loss:.4f}')
                    for name, value in {**values, 'loss': loss}.items():
                        writer.add_scalar(name, value, done)
                if done % train.save_every == 0 or done == train.steps or stop:
                    save(done)
                if stop:
                    saver.wait()
                    raise SystemExit(STOPPED)
    finally:
        signal.signal(signal.SIGTERM, previous)
        writer.close()
    return {'step': max(start, train.steps), 'loss': loss, 'seconds': time.time() - began,
            'state': state}
