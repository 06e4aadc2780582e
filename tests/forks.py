"""A process that has imported torch, and becomes each program that it is asked for by a fork: to import torch anew takes seconds.

Run with the path of a socket. A request is a line of JSON, with the program's three files: "imports" names what is imported first, for this
program and all later ones; "code" is run as `python -c` would run it, with "argv", "environment" and "folder". The answers are lines too:
the id of the process, and how it ended.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import random
import signal
import socket
import sys
from typing import Any


def serve(path: str) -> dict[str, Any]:
    """Forks a process for each request, and one that waits for it. Returns in the process that is to become the program."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ends with the socket
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(16)
        _warm()
        waiting: list[int] = []
        while True:
            asking, _ = listening.accept()
            waiting = [each for each in waiting if not os.waitpid(each, os.WNOHANG)[0]]
            data, files, _, _ = socket.recv_fds(asking, 1 << 20, 3)
            if not data:
                sys.exit()
            request = json.loads(data)
            for name in request["imports"]:
                importlib.import_module(name)
            gc.freeze()
            waiting.append(os.fork())
            if not waiting[-1]:
                listening.close()
                program = os.fork()
                if not program:
                    asking.close()
                    _become(request, files)
                    return request
                for file in files:
                    os.close(file)
                asking.sendall(f"{program}\n".encode())
                _, status = os.waitpid(program, 0)
                try:
                    asking.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                finally:
                    os._exit(0)
            asking.close()
            for file in files:
                os.close(file)


def _warm() -> None:
    """Imports what torch itself imports at the first step of an optimizer, too."""
    import torch

    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    optimizer.zero_grad()
    optimizer.step()


def _become(request: dict[str, Any], files: list[int]) -> None:
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv[:] = ["-c", *request["argv"]]
    sys.path[:] = ["", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *sys.path[1:]]
    random.seed()


class Ending:
    """Leaves when everything that a program does at its exit is done: to take the modules apart is a second's work.

    Args:
        status: the exit code; with none the interpreter itself ends.
    """

    status: int | None = 0

    def __call__(self) -> None:
        if self.status is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.status)


if __name__ == "__main__":
    ending = atexit.register(Ending())  # before what others register, so that it is the last
    code = compile(serve(sys.argv[1])["code"], "<string>", "exec")
    try:
        exec(code, {"__name__": "__main__", "__builtins__": __builtins__})
    except SystemExit as error:
        ending.status = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    except KeyboardInterrupt:
        ending.status = None
        raise
    except BaseException:
        ending.status = 1
        raise
