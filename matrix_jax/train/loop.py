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

from matrix_jax import saves, sharding
from matrix_jax.train import optim
from matrix_jax.train import state as states
from matrix_jax.train.guard import Guard

STOPPED = 75         # exit code after SIGTERM: state is saved, start again to go on


def fit(run, world, params) -> dict:
    """Trains `run.stage` for `run.train.steps` steps and exports to OUT/weights.

    Args:
      run: the recipe (`config.Run`); `run.out` is the folder of the run.
      world: the World whose parts train.
      params: start parameters by component.

    Returns:
      dict with step, loss (mean since the last log line), refused (updates that were left out,
      being not finite), seconds.

    Raises:
      guard.Diverged: several updates in a row were not finite.
      saves.SaveError: a save could not be written; the one before it is whole.
      SystemExit(STOPPED): SIGTERM came; the state was saved first.
    """
    stage, train = run.stage, run.train
    mesh = sharding.make_mesh(run.mesh)
    params = stage.start(world, params, train.seed)
    loader = stage.loader(world, params, run.data, train.batch, train.seed,
                          os.path.join(run.out, 'cache'))
    tx = optim.make(stage.optimizer, train.steps, stage.axes(world))
    state = states.init(params, stage.trainable, tx, train.seed)
    state = jax.device_put(state, sharding.replicated(mesh))
    saver = saves.Checkpoints(os.path.join(run.out, 'state'), keep=train.keep)
    restored, extra = saver.restore(state), {}
    if restored is not None:
        _, state, extra = restored
        loader.restore(extra['data'].encode())
    guard = Guard(getattr(loader, 'names', None), extra.get('refused', 0))
    step = jax.jit(states.make_step(partial(stage.loss, world), tx, stage.ema), donate_argnums=0)
    put = partial(jax.device_put, device=sharding.batch_sharding(mesh))
    try:
        result = _loop(train, state, loader, step, put, saver, run.out, guard,
                       extra.get('loss', float('nan')))
    finally:
        saver.close()
    state = result.pop('state')
    final = jax.device_get(states.merged(state, 'ema'))
    world, final = stage.finish(world, final, loader)
    folder = os.path.join(run.out, 'weights')
    world.save(folder, final, start=run.weights, dtype=stage.export)
    stage.add_files(world, final, folder)
    return result


def _loop(train, state, loader, step, put, saver, out, guard, loss) -> dict:
    from tensorboardX import SummaryWriter
    from tqdm import tqdm
    start = int(state.step)
    stop = []
    previous = signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    writer = SummaryWriter(out)
    began, losses = time.time(), []

    def save(index):
        guard.settle()
        saver.save(index, state, {'data': loader.state().decode(), 'loss': loss,
                                  'refused': guard.refused})

    try:
        with tqdm(total=train.steps, initial=start, unit='step', dynamic_ncols=True) as bar:
            for index in range(start, train.steps):
                batch = dict(next(loader))
                clips = batch.pop('clip', None)
                state, metrics = step(state, put(batch))
                losses.append(metrics['loss'])
                bar.update()
                done = index + 1
                guard.watch(done, clips, metrics)
                if done % train.log_every == 0 or done == train.steps:
                    guard.settle()
                    finite = [one for one in jax.device_get(losses) if np.isfinite(one)]
                    loss = float(np.mean(finite)) if finite else float('nan')
                    losses = []
                    values = {name: float(value)
                              for name, value in jax.device_get(metrics).items()}
                    bar.set_postfix(loss=f'{loss:.4f}')
                    for name, value in {**values, 'loss': loss, 'refused': guard.refused}.items():
                        writer.add_scalar(name, value, done)
                if done % train.save_every == 0 or done == train.steps or stop:
                    save(done)
                if stop:
                    saver.wait()
                    raise SystemExit(STOPPED)
    finally:
        signal.signal(signal.SIGTERM, previous)
        writer.close()
    return {'step': max(start, train.steps), 'loss': loss, 'refused': guard.refused,
            'seconds': time.time() - began, 'state': state}
