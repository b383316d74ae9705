"""Kills a training run again and again and checks that it still ends with exactly the same bits.

    python -m matrix_jax.benchmark.scripts.kill_test --kills 20

Trains the_matrix:TINY_SWIN on generated clips, kills it (SIGKILL) at random points of its start,
steps and saves, starts the same command again, and compares the final training state with that of
an undisturbed run. Exit code 0 if every restart resumed from the newest committed step and all bits
agree.
"""

import argparse
import os
import random
import re
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

from matrix_jax.benchmark.scripts import small_training
from matrix_jax.weights import conversion, training_state

STEPS, SAVE_EVERY = 40, 2
KINDS = ('start', 'steps', 'save', 'save')  # half of the kills hit a save


class Training:
    """One process of the training command."""

    def __init__(self, work: Path, out: Path):
        self.state, self.log = out / 'state', work / 'log.txt'
        environment = small_training.environment(
            JAX_COMPILATION_CACHE_DIR=str(work / 'compiled'),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0',
        )
        command = small_training.command(
            work / 'clips',
            out,
            steps=STEPS,
            save_every=SAVE_EVERY,
            log_every=7,
            **{'stage.optimizer.learning_rate': 1e-3},
        )
        self.began, self.clock = time.monotonic(), time.time()
        with self.log.open('w') as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def committed(self) -> list[int]:
        """The steps whose saves are complete."""
        return sorted(int(path.name) for path in self.state.glob('*') if path.name.isdigit())

    def saving(self) -> bool:
        """Whether this process has a half-written save."""
        try:
            return any(path.stat().st_mtime >= self.clock for path in self.state.glob('*tmp*'))
        except FileNotFoundError:  # it was committed meanwhile
            return False

    def wait(self, until, seconds: float = 240) -> bool:
        """Whether `until()` came true before the training ended."""
        while self.process.poll() is None:
            if until():
                return True
            if time.monotonic() - self.began > seconds:
                self.process.kill()
                raise TimeoutError(f'{self.log.read_text()}\nno end after {seconds} s')
            time.sleep(0.001)
        return False

    def resumed(self) -> int | None:
        """The step that this process resumed from; None if it was killed before."""
        found = re.search(r'resumes from step (\d+)', self.log.read_text())
        return int(found[1]) if found else None


def kill(training: Training, kind: str, chance: random.Random, start: float) -> float | None:
    """Kills the training at a random point of that kind.

    Returns:
      seconds that it ran, or None if it ended by itself.
    """
    first = training.committed()
    if kind == 'start':
        point = chance.uniform(0, start)
        alive = training.wait(lambda: time.monotonic() - training.began > point)
    else:
        saves = chance.randint(1, 2)
        alive = training.wait(lambda: len(set(training.committed()) - set(first)) >= saves)
        if kind == 'save':
            alive = alive and training.wait(training.saving)
        time.sleep(chance.uniform(0, 0.01 if kind == 'save' else 0.2))
    training.process.kill()
    training.process.wait()
    return time.monotonic() - training.began if alive else None


def final(out: Path) -> dict[str, np.ndarray]:
    """All leaves of the training state at the last step."""
    saver = training_state.Checkpoints(out / 'state')
    step, state, _ = saver.restore()
    saver.close()
    assert step == STEPS, f'{out}: ended at step {step}, expected {STEPS}'
    return conversion.flatten(state)


def finish(training: Training) -> bool:
    code = training.process.wait()
    if code:
        print(f'{training.log.read_text()}\nthe training ended with exit code {code}')
    return not code


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    os.environ['JAX_PLATFORMS'] = 'cpu'
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        small_training.make_clips(work / 'clips')
        good = finish(Training(work, work / 'whole'))
        warm = Training(work, work / 'warm')  # measures a start with a filled compilation cache
        warm.wait(warm.committed)
        start = time.monotonic() - warm.began
        warm.process.kill()
        warm.process.wait()
        wanted = final(work / 'whole')
        print(f'{STEPS} steps, a save every {SAVE_EVERY}; first save {start:.1f} s after the start')
        print('kill  kind   after s  half-written  committed  resumed from')

        done, in_save, runs, ends = 0, 0, 0, []
        while good and (done < args.kills or not ends):
            runs += 1
            out, before = work / f'cut{runs}', None
            while True:
                training = Training(work, out)
                lived = None
                if done < args.kills:
                    kind = chance.choice(KINDS)
                    lived = kill(training, kind, chance, start)
                ended = lived is None
                if ended:
                    good = good and finish(training)
                resumed = training.resumed()
                good = good and resumed in (None, before)
                if ended:
                    break
                done += 1
                half, steps = training.saving(), training.committed()
                in_save += half
                before = steps[-1] if steps else None
                print(
                    f'{done:4}  {kind:6} {lived:7.2f}  {"yes" if half else "-":12}  '
                    f'{before or "-":>9}  {resumed or "-":>12}',
                    flush=True,
                )
            found = final(out)
            same = set(found) == set(wanted) and all(
                found[name].tobytes() == wanted[name].tobytes() for name in wanted
            )
            ends.append(same)
        size = sum(leaf.nbytes for leaf in wanted.values())
        print(f'{done} kills in {runs} trainings, {in_save} of them with a save half-written')
        print('every restart resumed from the newest committed step: ' + ('yes' if good else 'NO'))
        print(
            f'training state at step {STEPS} ({len(wanted)} arrays, {size / 2**20:.1f} MiB), '
            f'{sum(ends)} of {len(ends)} runs end bit for bit as the undisturbed one'
        )
    return 0 if good and all(ends) else 1


if __name__ == '__main__':
    raise SystemExit(main())
