"""PPO learns to stay on the road in the driving world, and is tried in the real game.

    pip install -e '.[data]' stable-baselines3
    python examples/ppo_carracing.py train world --out runs/ppo/world
    python examples/ppo_carracing.py train game --out runs/ppo/game
    python examples/ppo_carracing.py compare runs/ppo/world runs/ppo/game

The game is CarRacing-v3 as recorded for the world (`matrix_jax.data.carracing`), on other tracks in
training than in the comparison. A policy sees the newest frame, in grey and reduced, and its last
keys. World and game pay what the trained reward reads from their frames, and end where it says so.
The table is from the telemetry of the game, over episodes that do not end.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import gymnasium
import numpy as np
from einops import reduce
from gymnasium.vector import AutoresetMode
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from matrix_jax.controls.driving import SYMBOLS
from matrix_jax.data import carracing
from matrix_jax.envs import WorldVectorEnv
from matrix_jax.rewards import model

REWARD = 'carracing_reward'
THEME = 'meadow'
KEYS = ('D', 'NL', 'NR')  # a policy chooses from these: gas, or steer without it
MEMORY = 4  # keys that a policy remembers
ROWS, SHRINK = 52, 4  # rows of the frame that show the road ahead, pixels per side of a cell
EPISODE = 120  # steps, 30 s
SETTINGS = {
    'n_steps': 32,
    'batch_size': 64,
    'n_epochs': 15,
    'target_kl': 0.03,
    'gamma': 0.95,
    'gae_lambda': 0.9,
    'learning_rate': 1e-3,
    'ent_coef': 0.01,
    'policy_kwargs': {'net_arch': [64, 64]},
}


class View:
    """What a policy sees: brightness of cells of the newest frame, and its last keys."""

    cells = (ROWS // SHRINK) * (carracing.WIDTH // SHRINK)
    space = gymnasium.spaces.Box(-5, 5, (cells + MEMORY * len(KEYS),), np.float32)

    def __init__(self):
        self.keys = np.zeros((MEMORY, len(KEYS)), np.float32)

    def press(self, action: int):
        """Remembers a key."""
        self.keys = np.roll(self.keys, 1, axis=0)
        self.keys[0] = np.eye(len(KEYS))[action]

    def of(self, frame: np.ndarray) -> np.ndarray:
        """Observation of a frame uint8 [H W 3]."""
        grey = frame[:ROWS].astype(np.float32).mean(axis=-1)
        grey = reduce(grey, '(h a) (w b) -> (h w)', 'mean', a=SHRINK, b=SHRINK)
        grey = (grey - grey.mean()) / (grey.std() + 5)
        return np.concatenate([grey, self.keys.ravel()]).clip(-5, 5).astype(np.float32)


class WorldAgents(VecEnv):
    """Agents in the world, for stable-baselines3: an agent whose episode ends starts again."""

    def __init__(self, count: int, seed: int):
        self.envs = WorldVectorEnv(
            count,
            'carracing',
            start=THEME,
            reward=REWARD,
            max_episode_steps=EPISODE,
            autoreset_mode=AutoresetMode.DISABLED,
        )
        self.actions = [SYMBOLS.index(key) for key in KEYS]
        self._seed = seed
        super().__init__(count, View.space, gymnasium.spaces.Discrete(len(KEYS)))

    def reset(self):
        frames, _ = self.envs.reset(seed=self._seed)
        self.views = [View() for _ in frames]
        self.totals = np.zeros((2, self.num_envs))
        return np.stack([view.of(frame) for view, frame in zip(self.views, frames, strict=True)])

    def step_async(self, actions):
        self.chosen = actions

    def step_wait(self):
        for view, action in zip(self.views, self.chosen, strict=True):
            view.press(action)
        frames, rewards, ended, late, _ = self.envs.step(np.take(self.actions, self.chosen))
        seen = np.stack([view.of(frame) for view, frame in zip(self.views, frames, strict=True)])
        self.totals += [rewards, np.ones(self.num_envs)]
        infos: list[dict] = [{} for _ in frames]
        done = ended | late
        if done.any():
            frames, _ = self.envs.reset(options={'reset_mask': done})
        for index in np.flatnonzero(done):
            total, steps = self.totals[:, index]
            infos[index] = {
                'terminal_observation': seen[index],
                'TimeLimit.truncated': bool(late[index]),
                'episode': {'r': float(total), 'l': int(steps), 't': time.time()},
            }
            self.totals[:, index] = 0
            self.views[index] = View()
            seen[index] = self.views[index].of(frames[index])
        return seen, rewards.astype(np.float32), done, infos

    def close(self):
        self.envs.close()

    def get_attr(self, name, indices=None):
        return [getattr(self, name, None)] * self.num_envs

    def set_attr(self, name, value, indices=None):
        raise NotImplementedError

    def env_method(self, name, *args, indices=None, **settings):
        raise NotImplementedError

    def env_is_wrapped(self, wrapper, indices=None):
        return [False] * self.num_envs


class GameEnv(gymnasium.Env):
    """The real game with the view and the reward of the world.

    Args:
      parity: tracks of even or odd numbers, 0 or 1.
      lag: steps by which keys come late, as in the world.
    """

    observation_space, action_space = View.space, gymnasium.spaces.Discrete(len(KEYS))

    def __init__(self, parity: int = 0, lag: int = 0):
        self.game, self.reward = carracing.CarRacingGame(), model.load(REWARD)
        self.parity, self.lag = parity, lag

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        track = 2 * int(self.np_random.integers(100000)) + self.parity
        self.game.reset(track, THEME, float(self.np_random.random()))
        guide = carracing.Driver(self.game, self.np_random)
        for _ in range(8):  # into motion
            frames, _ = self.game.hold(guide.key(follow=True))
        self.view, self.steps, self.late = View(), 0, ['D'] * self.lag
        self.state = self.reward.init(frames)
        return self.view.of(frames[-1]), {}

    def step(self, action):
        self.view.press(int(action))
        self.late.append(KEYS[int(action)])
        frames, telemetry = self.game.hold(self.late.pop(0))
        self.state, reward, ended = self.reward.step(self.state, frames)
        self.steps += 1
        info = {'on_road': float(telemetry[-1, 0]), 'speed': float(telemetry[-1, 2])}
        late = self.steps >= EPISODE
        return self.view.of(frames[-1]), float(reward), bool(ended), late, info


def train(where: str, steps: int, agents: int, seed: int, lag: int, out: Path):
    """Trains a policy and writes it to `out`, with the returns of its episodes."""
    if where == 'world':
        envs = WorldAgents(agents, seed)
    else:
        from stable_baselines3.common.monitor import Monitor

        envs = DummyVecEnv([lambda: Monitor(GameEnv(lag=lag))] * agents)
    saved, began = out / 'policy.zip', time.time()
    if saved.exists():  # the same command continues
        ppo = PPO.load(saved, envs, device='cpu', **SETTINGS)
        log = json.loads((out / 'episodes.json').read_text())
    else:
        ppo, log = PPO('MlpPolicy', envs, seed=seed, device='cpu', **SETTINGS), []

    def note(local, _):
        for info in local['infos']:
            if 'episode' in info:
                log.append([ppo.num_timesteps, info['episode']['r'], info['episode']['l']])
        if ppo.num_timesteps % 256 == 0:
            recent = np.mean([entry[1:] for entry in log[-20:]] or [[0, 0]], axis=0)
            print(
                f'{ppo.num_timesteps} steps, {time.time() - began:.0f} s; last episodes: '
                f'return {recent[0]:.1f}, {recent[1] / 4:.1f} s',
                flush=True,
            )
            ppo.save(out / 'policy')
            (out / 'episodes.json').write_text(json.dumps(log))
        return True

    out.mkdir(parents=True, exist_ok=True)
    ppo.learn(steps - ppo.num_timesteps, callback=note, reset_num_timesteps=False)
    ppo.save(out / 'policy')
    (out / 'episodes.json').write_text(json.dumps(log))


def compare(folders: list[Path], episodes: int, lag: int):
    """Prints what each policy does in the game on tracks that none was trained on."""
    env = GameEnv(parity=1, lag=lag)
    policies = {'untrained': PPO('MlpPolicy', env, seed=0, device='cpu', **SETTINGS)}
    policies |= {str(folder): PPO.load(folder / 'policy', device='cpu') for folder in folders}
    print('| policy | seconds until off the road | on the road | units driven on the road |')
    print('|---|---|---|---|')
    for name, policy in policies.items():
        found = []
        for seed in range(episodes):
            seen, _ = env.reset(seed=seed)
            on_road, way = [], 0.0
            for _ in range(EPISODE):
                action, _ = policy.predict(seen, deterministic=name != 'untrained')
                seen, _, _, _, info = env.step(action)
                on_road.append(info['on_road'] >= 0.5)
                way += on_road[-1] * info['speed'] / 4
            lost = np.flatnonzero(~np.array(on_road))
            found.append(((lost[0] if len(lost) else EPISODE) / 4, np.mean(on_road), way))
        until, share, way = np.mean(found, axis=0)
        print(f'| {name} | {until:.1f} | {100 * share:.0f} % | {way:.0f} |', flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest='command', required=True)
    one = commands.add_parser('train')
    one.add_argument('where', choices=['world', 'game'])
    one.add_argument('--out', type=Path, required=True)
    one.add_argument('--steps', type=int, default=20480)
    one.add_argument('--agents', type=int, default=8)
    one.add_argument('--seed', type=int, default=0)
    two = commands.add_parser('compare')
    two.add_argument('folders', type=Path, nargs='+')
    two.add_argument('--episodes', type=int, default=20)
    for command in (one, two):
        command.add_argument('--lag', type=int, default=0, help='steps by which keys are late')
    args = parser.parse_args()
    if args.command == 'train':
        train(args.where, args.steps, args.agents, args.seed, args.lag, args.out)
    else:
        compare(args.folders, args.episodes, args.lag)


if __name__ == '__main__':
    main()
