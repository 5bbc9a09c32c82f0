"""Forks processes that start a script as `python SCRIPT FLAGS` does, less the seconds that it takes to import torch.

commands.Fork talks to it. It has imported packages that the scripts import, none of our modules; it has run no kernel
and has one thread, so that a child finds torch as it is after an import.
"""

import contextlib
import gc
import json
import os
import random
import runpy
import signal
import socket
import sys

import matplotlib.backends.backend_agg  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import pydantic.dataclasses  # noqa: F401
import scipy.special  # noqa: F401
import torch._inductor.config  # noqa: F401, and with it torch._dynamo: the first optimizer imports them
import tqdm  # noqa: F401
import tyro  # noqa: F401

with contextlib.suppress(ImportError):
    import pandas  # noqa: F401, as wandb does for a table
    import wandb  # noqa: F401


def serve(channel: socket.socket) -> dict:
    """What a child is asked to start; in the server it does not return."""
    while True:
        _, fds, _, _ = socket.recv_fds(channel, 1, 4)
        if not fds:  # the tests are over
            with contextlib.suppress(ChildProcessError):
                while True:
                    os.wait()
            os._exit(0)
        request, out, err, status = fds
        if os.fork() == 0:  # this process tells how the child ends
            child = os.fork()
            if child == 0:
                channel.close()
                os.close(status)
                os.dup2(out, 1)
                os.dup2(err, 2)
                os.close(out)
                os.close(err)
                with open(request) as file:
                    return json.load(file)
            os.write(status, f"{child}\n".encode())
            _, code = os.waitpid(child, 0)
            os.write(status, f"{os.waitstatus_to_exitcode(code)}\n".encode())
            os._exit(0)
        for fd in fds:
            os.close(fd)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


if __name__ == "__main__":
    gc.freeze()  # children need not look at what is imported
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest
    asked = serve(socket.socket(fileno=int(sys.argv[1])))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    random.seed()
    sys.argv = asked["words"]
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:1] = [os.path.dirname(sys.argv[0]), *filter(None, paths)]
    runpy.run_path(sys.argv[0], run_name="__main__")
