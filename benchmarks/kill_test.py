"""Kill a training again and again: it has to end with the very bits of one that was left alone.

    benchmarks/kill_test.py --kills 20

Trains the_matrix:TINY_SWIN on clips that it makes, kills it (SIGKILL) at random points of its
start, its steps and its saves, starts the same command again, and compares the whole training state
at the end. Exit code 0 if every restart went on from the newest committed step and all bits agree.
"""

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
STEPS, SAVE_EVERY = 40, 2
KINDS = ('start', 'steps', 'save', 'save')  # half of the kills fall into a save


def make_clips(folder):
    """Three clips of a square that moves."""
    from matrix_jax.data import records

    def clip(index):
        frames = np.full((17, 32, 48, 3), 40 * index + 60, np.uint8)
        for moment, frame in enumerate(frames):
            frame[8:20, moment : moment + 10] = 200
        return records.Clip(
            frames=frames,
            controls=np.full(17, index, np.int8),
            caption='A car.',
            theme='meadow',
            seed=index,
            fps=16,
            telemetry=np.zeros((17, len(records.TELEMETRY)), np.float32),
        )

    records.write_shard(folder / f'train-0{records.SUFFIX}', map(clip, range(3)))


class Training:
    """One start of the training command."""

    def __init__(self, work: Path, out: Path):
        self.state, self.log = out / 'state', work / 'log.txt'
        environment = os.environ | {
            'JAX_PLATFORMS': 'cpu',
            'JAX_COMPILATION_CACHE_DIR': str(work / 'compiled'),
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
            'PYTHONPATH': str(ROOT),
        }
        command = [
            sys.executable,
            ROOT / 'tools/train.py',
            'the_matrix:TINY_SWIN',
            '--data',
            work / 'clips',
            '--out',
            out,
            '--steps',
            STEPS,
            '--save_every',
            SAVE_EVERY,
            '--log_every',
            '7',
            '--stage.optimizer.learning_rate',
            '1e-3',
        ]
        self.began, self.clock = time.monotonic(), time.time()
        with self.log.open('w') as log:
            self.process = subprocess.Popen(
                list(map(str, command)), env=environment, stdout=log, stderr=log
            )

    def committed(self) -> list[int]:
        """The steps that are on disk as a whole."""
        return sorted(int(path.name) for path in self.state.glob('*') if path.name.isdigit())

    def saving(self) -> bool:
        """Whether a save of this start is half-written."""
        try:
            return any(path.stat().st_mtime >= self.clock for path in self.state.glob('*tmp*'))
        except FileNotFoundError:  # committed just now
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
        """The step that it went on from; None if it did not come that far."""
        found = re.search(r'goes on from step (\d+)', self.log.read_text())
        return int(found[1]) if found else None


def kill(training: Training, kind: str, chance: random.Random, start: float) -> float | None:
    """Kills the training at a random point of that kind -> seconds it lived, None if it ended."""
    first = training.committed()
    if kind == 'start':
        point = chance.uniform(0, start)
        alive = training.wait(lambda: time.monotonic() - training.began > point)
    else:
        training_state = chance.randint(1, 2)
        alive = training.wait(lambda: len(set(training.committed()) - set(first)) >= training_state)
        if kind == 'save':
            alive = alive and training.wait(training.saving)
        time.sleep(chance.uniform(0, 0.01 if kind == 'save' else 0.2))
    training.process.kill()
    training.process.wait()
    return time.monotonic() - training.began if alive else None


def final(out: Path) -> dict[str, np.ndarray]:
    """Every leaf of the training state at the last step."""
    from matrix_jax.weights import conversion, training_state

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
    options = parser.parse_args()
    chance = random.Random(options.seed)
    os.environ['JAX_PLATFORMS'] = 'cpu'
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        (work / 'clips').mkdir()
        make_clips(work / 'clips')
        good = finish(Training(work, work / 'whole'))
        warm = Training(work, work / 'warm')  # how long a start takes once all is compiled
        warm.wait(warm.committed)
        start = time.monotonic() - warm.began
        warm.process.kill()
        warm.process.wait()
        wanted = final(work / 'whole')
        print(f'{STEPS} steps, a save every {SAVE_EVERY}; first save {start:.1f} s after the start')
        print('kill  kind   after s  half-written  committed  went on from')

        done, in_save, runs, ends = 0, 0, 0, []
        while good and (done < options.kills or not ends):
            runs += 1
            out, before = work / f'cut{runs}', None
            while True:
                training = Training(work, out)
                lived = None
                if done < options.kills:
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
        print('every restart went on from the newest committed step: ' + ('yes' if good else 'NO'))
        print(
            f'training state at step {STEPS} ({len(wanted)} arrays, {size / 2**20:.1f} MiB), '
            f'against the run that nobody killed: {sum(ends)} of {len(ends)} equal to the bit'
        )
    return 0 if good and all(ends) else 1


if __name__ == '__main__':
    raise SystemExit(main())
