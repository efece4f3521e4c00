"""In serial mode, A3C is a plain transcription of the paper's Algorithm 3, parameter for parameter."""

from copy import deepcopy

import numpy as np
import pytest
import torch as th
from stable_baselines3 import A2C
from torch.distributions import Categorical, Normal

from sb3_async1step import A3C
from sb3_async1step.vec_envs.split import group_lanes
from sb3_async1step.workers.lanes import Lanes
from sb3_async1step.workers.rollout import Rollout
from tests.envs import BoxWalkEnv, RandomWalkEnv, make_env

GAMMA, BETA, VF_COEF = 0.9, 0.02, 0.5
SEED = 7


class Net(th.nn.Module):
    """The policy and the value function of SB3's policy, without SB3."""

    def __init__(self, policy):
        super().__init__()
        self.policy_net, self.value_hidden = policy.mlp_extractor.policy_net, policy.mlp_extractor.value_net
        self.action_net, self.value_net = policy.action_net, policy.value_net
        self.log_std = getattr(policy, "log_std", None)

    def pi(self, s):
        output = self.action_net(self.policy_net(th.as_tensor(s)[None]))[0]
        if self.log_std is None:
            return Categorical(logits=output, validate_args=False)
        return Normal(output, self.log_std.exp(), validate_args=False)

    def v(self, s):
        return self.value_net(self.value_hidden(th.as_tensor(s)[None]))[0, 0]


class Thread:
    """State of one of the paper's actor-learner threads; it may have several lanes, which act in one batch."""

    def __init__(self, envs, rng, net):
        self.envs = envs
        self.rng = rng
        self.local = deepcopy(net)
        self.segments = [[] for _ in envs]
        self.t = 0

    def sample(self):
        """One draw for all lanes, from the generator that the worker seeds."""
        generator_state = th.get_rng_state()
        th.manual_seed(int(self.rng.integers(2**63)))
        with th.no_grad():
            distributions = [self.local.pi(env.s) for env in self.envs]
            if self.local.log_std is None:
                actions = Categorical(logits=th.stack([d.logits for d in distributions])).sample()
            else:
                means = th.stack([d.mean for d in distributions])
                actions = Normal(means, self.local.log_std.exp().expand_as(means)).sample()
        th.set_rng_state(generator_state)
        return actions.numpy()


def algorithm_3(net, threads, *, total, t_max, lr, gae_lambda, alpha=0.99, rms_eps=0.1):
    """Mnih et al. 2016, Algorithm 3, with shared RMSProp (equations 8 and 9); returns the number of updates."""
    theta = list(net.parameters())
    square_avg = [th.zeros_like(p) for p in theta]
    T = n_updates = 0

    def d_theta(thread):
        theta_local = list(thread.local.parameters())
        total_loss = 0.0
        for segment in thread.segments:
            advantage, goes_on = 0.0, False
            for s, a, r, s_next, terminated, truncated in reversed(segment):
                # R <- r_i + gamma * R is advantage + V(s) with lambda = 1
                v = thread.local.v(s)
                next_v = 0.0 if terminated else thread.local.v(s_next).item()
                td_error = r + GAMMA * next_v - v.item()
                advantage = td_error + (
                    GAMMA * gae_lambda * advantage if goes_on and not truncated and not terminated else 0.0
                )
                goes_on = True
                R = advantage + v.item()
                pi = thread.local.pi(s)
                log_prob, entropy = pi.log_prob(th.as_tensor(a)).sum(), pi.entropy().sum()
                total_loss += -log_prob * (R - v.item()) - BETA * entropy + VF_COEF * (R - v) ** 2
            segment.clear()
        return th.autograd.grad(total_loss / len(thread.envs), theta_local)

    while T < total:  # noqa: SIM300 (not a constant)
        learning_rate = lr * (1 - T / total)
        for thread in threads:
            n = len(thread.envs)
            if thread.t == 0:
                # Synchronize thread-specific parameters theta' = theta and theta'_v = theta_v
                thread.local.load_state_dict(net.state_dict())
            # Perform a_t according to policy pi(a_t | s_t; theta')
            done = False
            for env, segment, a in zip(thread.envs, thread.segments, thread.sample(), strict=True):
                s_next, r, terminated, truncated, _ = env.step(np.clip(a, -1, 1) if net.log_std is not None else a)
                segment.append((env.s, a, r, s_next, terminated, truncated and not terminated))
                done = terminated or truncated
                env.s = env.reset()[0] if done else s_next
            T += n
            thread.t += 1
            if thread.t == t_max or (n == 1 and done):
                gradient = d_theta(thread)
                with th.no_grad():
                    for p, g, d in zip(theta, square_avg, gradient, strict=True):
                        g.mul_(alpha).add_((1 - alpha) * d**2)
                        p.sub_(learning_rate * d / (g + rms_eps).sqrt())
                thread.t = 0
                n_updates += 1
    return n_updates


@pytest.mark.parametrize(
    ("n_lanes", "n_workers", "t_max", "gae_lambda", "env_class"),
    [
        (1, 1, 4, 1.0, RandomWalkEnv),
        (3, 3, 2, 1.0, RandomWalkEnv),
        (4, 2, 2, 1.0, RandomWalkEnv),
        (3, 2, 3, 0.8, RandomWalkEnv),
        (4, 1, 2, 1.0, RandomWalkEnv),
        (1, 1, 3, 1.0, BoxWalkEnv),
        (3, 2, 3, 0.8, BoxWalkEnv),
    ],
)
def test_serial_mode_equals_algorithm_3(env_class, n_lanes, n_workers, t_max, gae_lambda):
    total, lr = 220 * t_max * n_lanes // n_workers, 1e-2
    model = A3C(
        "MlpPolicy",
        make_env(n_lanes, env_class),
        learning_rate=lambda progress_remaining: lr * progress_remaining,
        gamma=GAMMA,
        n_workers=n_workers,
        update_interval=t_max,
        ent_coef=BETA,
        vf_coef=VF_COEF,
        gae_lambda=gae_lambda,
        rms_prop_eps=0.1,
        max_grad_norm=1e6,
        backend="serial",
        policy_kwargs={"net_arch": [16]},
        seed=SEED,
    )
    net = Net(deepcopy(model.policy))
    before = deepcopy(net.state_dict())
    model.learn(total)

    seeds = np.random.SeedSequence(SEED).spawn(n_workers)
    envs = [env_class() for _ in range(n_lanes)]
    for i, env in enumerate(envs):
        env.s, _ = env.reset(seed=SEED + i)
    threads = [
        Thread([envs[lane] for lane in lanes], np.random.default_rng(seed), net)
        for lanes, seed in zip(group_lanes(n_lanes, n_workers), seeds, strict=True)
    ]
    n_updates = algorithm_3(net, threads, total=total, t_max=t_max, lr=lr, gae_lambda=gae_lambda)

    # The same actions in the same episodes
    tapes = [env.unwrapped.tape for env in model.get_env().envs]
    for tape, expected_tape in zip(tapes, [env.tape for env in envs], strict=True):
        if env_class is RandomWalkEnv:
            assert tape == expected_tape
        else:
            assert [a == "reset" for a in tape] == [a == "reset" for a in expected_tape]
            actions, expected = ([a for a in t if a != "reset"] for t in (tape, expected_tape))
            np.testing.assert_allclose(actions, expected, rtol=1e-2, atol=1e-3)
    assert model._n_updates == n_updates
    assert n_updates >= 200
    learned = Net(model.policy).state_dict()
    for name, parameter in learned.items():
        th.testing.assert_close(parameter, net.state_dict()[name], rtol=1e-2, atol=1e-4)
        assert not th.allclose(parameter, before[name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("env_class", [RandomWalkEnv, BoxWalkEnv])
@pytest.mark.parametrize("normalize_advantage", [False, True])
@pytest.mark.parametrize("gae_lambda", [1.0, 0.9])
def test_the_gradient_is_a2cs(env_class, normalize_advantage, gae_lambda):
    """The sum over the time steps of what A2C computes on the same rollout, which takes the mean over them."""
    n_steps, n_lanes = 16, 6
    parameters = {
        "gamma": GAMMA, "ent_coef": BETA, "vf_coef": VF_COEF, "gae_lambda": gae_lambda,
        "normalize_advantage": normalize_advantage, "max_grad_norm": 1e6, "seed": SEED,
    }  # fmt: skip
    a2c = A2C("MlpPolicy", make_env(n_lanes, env_class), n_steps=n_steps, learning_rate=0.0, device="cpu", **parameters)
    steps = []

    def remember(locals_, globals_):
        steps.append(
            {name: locals_[name] for name in ("obs_tensor", "actions", "rewards", "dones", "infos", "new_obs")}
        )
        steps[-1]["rewards"] = locals_["rewards"].copy()
        return True

    a2c.learn(n_steps * n_lanes, callback=remember)
    truncated = np.array([[info["TimeLimit.truncated"] for info in step["infos"]] for step in steps])
    dones = np.array([step["dones"] for step in steps])
    next_obs = np.array([step["new_obs"] for step in steps])
    for i in zip(*np.nonzero(dones), strict=True):
        next_obs[i] = steps[i[0]]["infos"][i[1]]["terminal_observation"]
    rollout = Rollout(
        np.array([step["obs_tensor"].numpy() for step in steps]),
        np.array([step["actions"] for step in steps]),
        np.array([step["rewards"] for step in steps]),
        next_obs,
        dones & ~truncated,
        truncated & dones,
    )
    assert rollout.terminated.any() and rollout.truncated.any()

    model = A3C("MlpPolicy", make_env(n_lanes, env_class), n_workers=1, update_interval=n_steps, **parameters)
    model.policy.load_state_dict(a2c.policy.state_dict())
    (worker,) = model._make_workers([Lanes(model.env)], [range(n_lanes)], model.env.reset())
    for i in range(n_steps):
        worker.rollout.add(Rollout(**{name: values[i] for name, values in vars(rollout).items()}))
    worker.accumulate_gradient()
    expected = [parameter.grad for parameter in a2c.policy.parameters()]
    assert any(gradient.abs().max() > 1e-3 for gradient in expected)
    for gradient, a2cs in zip(worker.local.get_gradients(), expected, strict=True):
        th.testing.assert_close(gradient, n_steps * a2cs, rtol=1e-4, atol=1e-5)
