import os

import pytest
import torch

# read where torch first compiles; with more, every process of tests has others, which import torch too
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.fixture(autouse=True)
def one_thread_and_torch_as_before():
    """A test leaves torch's settings as it found them. One thread: several wait for each other where a core is busy."""
    threads, exact = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(exact)
    torch.set_default_dtype(torch.float32)
