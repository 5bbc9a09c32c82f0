import re

import pytest
import torch

SLOW = re.compile(  # tests that train until something is learnt, compile, or start scripts: not for daily work
    r"test_attack|learns?_|as_a_user|compile|macro|renamed_copy|torchrun|killed_or_stopped|overshot|policy_alone"
    r"|stops_in_either_phase|harm_as_epsilon|reaches_the_equilibrium|a_node_dies|full_disk|code_runs|command_line"
    r"|made_longer|foreign_or_old|last_update|every_option|nothing_appears|good_from_bad|depend_on_the_others"
    r"|agents_of_another_run|wandb_that_fails|evaluate_takes|recordings.episode|auction|too_small_for|always_holds"
    r"|simple_controller|reach_their_point|controllers_and_pictures|grid_with_a_failure|other_flags_or_seeds"
)


def pytest_collection_modifyitems(items):
    for item in items:
        if SLOW.search(item.nodeid):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def one_thread_and_torch_as_before():
    """A test leaves torch's settings as it found them. One thread: several wait for each other where a core is busy."""
    threads, exact = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(exact)
    torch.set_default_dtype(torch.float32)
