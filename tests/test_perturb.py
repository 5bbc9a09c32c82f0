"""envs/perturb.py: who is perturbed, how much, how often, and that a block depends on its own generator only."""

import pytest
import torch

import envs
from envs import perturb

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("kind, deviation", [("gaussian", 0.5), ("uniform", 0.5 / 3**0.5)])
def test_noise_moves_live_entries_of_cooperators_only(kind, deviation):
    env = envs.make("simple_crypto_v3", 20_000, DEVICE)
    _, obs = env.reset(generators(0))
    noise = perturb.observation_noise(env, obs, kind, 0.5, generators(1)) - obs
    live = env.obs_mask & env.cooperators[:, None]
    assert 0 < live.sum() < env.obs_mask.sum() < live.numel()
    assert not noise[:, ~live].any()
    sample = noise[:, live]  # [B, live entries]
    assert (sample.mean(0).abs() < 5 * deviation / 20_000**0.5).all()
    torch.testing.assert_close(sample.std(0), torch.full_like(sample[0], deviation), rtol=0.03, atol=0)
    covariance = torch.corrcoef(sample.T) - torch.eye(sample.shape[1], device=DEVICE)
    assert covariance.abs().max() < 0.05
    if kind == "uniform":
        assert 0.499 < sample.abs().max() <= 0.5 + 1e-6


def test_nothing_happens_at_strength_zero():
    env = envs.make("simple_tag_v3", 4, DEVICE)
    _, obs = env.reset(generators(0))
    own = generators(1)
    before = own[0].get_state()
    action, other = torch.zeros(4, 4, 5, device=DEVICE), torch.ones(4, 4, 5, device=DEVICE)
    assert perturb.observation_noise(env, obs, "gaussian", 0.0, own) is obs
    assert perturb.replace_actions(env, action, other, 0.0, own) is action
    assert torch.equal(own[0].get_state(), before)


@pytest.mark.parametrize("continuous", [True, False])
def test_one_cooperating_agent_is_replaced_with_the_given_frequency(continuous):
    env = envs.make("simple_tag_v3", 40_000, DEVICE, continuous_actions=continuous)
    shape = (40_000, 4, 5) if continuous else (40_000, 4)
    action, replacement = torch.zeros(shape, device=DEVICE), torch.ones(shape, device=DEVICE)
    if not continuous:
        action, replacement = action.long(), 3 * replacement.long()
    result = perturb.replace_actions(env, action, replacement, 0.3, generators(2))
    assert result.shape == action.shape and result.dtype == action.dtype
    changed = (result != 0).flatten(2).any(2) if continuous else result != 0  # [B, N]
    assert (changed.sum(1) <= 1).all() and not changed[:, 3].any()
    assert torch.equal(result[changed], replacement[changed])
    assert changed.float().mean(0)[:3].tolist() == pytest.approx([0.1] * 3, abs=0.01)
    always = perturb.replace_actions(env, action, replacement, 1.0, generators(2))
    assert ((always != action).flatten(2).any(2) if continuous else always != action).sum(1).eq(1).all()


@pytest.mark.parametrize("env_id", ["simple_reference_v3", "simple_world_comm_v3", "simple_speaker_listener_v4"])
def test_random_actions_fill_the_action_space(env_id):
    env = envs.make(env_id, 20_000, DEVICE, continuous_actions=False)
    action = perturb.random_actions(env, generators(0))
    assert action.shape == (20_000, env.num_agents) and action.dtype == torch.int64
    for i, size in enumerate(env.action_sizes):
        shares = torch.bincount(action[:, i].cpu(), minlength=size) / 20_000
        assert len(shares) == size and (shares * size - 1).abs().max() < 5 * (size / 20_000) ** 0.5
    env = envs.make(env_id, 20_000, DEVICE, torch.float64)
    action = perturb.random_actions(env, generators(0))
    assert action.dtype == torch.float64 and not action[:, ~env.action_mask].any()
    live = action[:, env.action_mask]
    assert live.min() >= 0 and live.max() <= 1 and (live.mean(0) - 0.5).abs().max() < 0.02
    assert (live.var(0) - 1 / 12).abs().max() < 0.003


def test_blocks_depend_on_their_own_generator_only():
    big, small = envs.make("simple_spread_v3", 12, DEVICE), envs.make("simple_spread_v3", 4, DEVICE)
    obs = torch.zeros(12, 3, 18, device=DEVICE)
    action, other = torch.zeros(12, 3, 5, device=DEVICE), torch.ones(12, 3, 5, device=DEVICE)

    def results(env, rows, *seeds):
        yield perturb.observation_noise(env, obs[rows], "gaussian", 1.0, generators(*seeds))
        yield perturb.observation_noise(env, obs[rows], "uniform", 1.0, generators(*seeds))
        yield perturb.replace_actions(env, action[rows], other[rows], 0.5, generators(*seeds))
        yield perturb.random_actions(env, generators(*seeds))

    everything = list(results(big, slice(None), 7, 8, 9))
    for k, seed in enumerate((7, 8, 9)):
        rows = slice(4 * k, 4 * k + 4)
        for alone, together in zip(results(small, rows, seed), everything):
            assert torch.equal(alone, together[rows])


def test_wrong_settings():
    env = envs.make("simple_spread_v3", 4, DEVICE)
    obs, action = torch.zeros(4, 3, 18, device=DEVICE), torch.zeros(4, 3, 5, device=DEVICE)
    for kind, strength, message in (("salt", 1.0, "kind must be"), ("gaussian", -1.0, "strength must be")):
        with pytest.raises(ValueError, match=message):
            perturb.observation_noise(env, obs, kind, strength, generators(0))
    with pytest.raises(ValueError, match="probability must be between 0 and 1, got 1.5"):
        perturb.replace_actions(env, action, action, 1.5, generators(0))
    with pytest.raises(ValueError, match="multiple of the 3 generators"):
        perturb.random_actions(env, generators(0, 1, 2))


def test_mean_over_the_team():
    env = envs.make("simple_tag_v3", 2, DEVICE)
    x = torch.randn(5, env.num_agents, device=DEVICE)
    assert not env.cooperators.all()
    torch.testing.assert_close(envs.team_mean(x, env), x[:, env.cooperators].mean(1))


def test_the_reach_of_a_ball_is_the_length_of_its_longest_perturbation():
    live = torch.tensor([[1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    assert perturb.reach(0.5, live, "l2") == 0.5
    torch.testing.assert_close(perturb.reach(0.5, live, "linf"), torch.tensor([[0.5 * 3**0.5], [0.5]]))
