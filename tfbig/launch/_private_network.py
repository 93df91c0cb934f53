"""A network namespace that only the workers of a job are in.

TensorFlow's server binds its port on all addresses (`GrpcServer::Init` has 0.0.0.0 fixed) and does
not ask who connects. In a network namespace of their own, which has a loopback interface only, the
workers reach one another and nobody else does. Root makes one directly, other users by way of a
user namespace, in which they keep their id.

As a program, this module makes the namespaces, says so, and keeps them until its input ends. That
needs a process of its own: one that has threads, which start when TensorFlow is imported, cannot
enter a user namespace.
"""

import ctypes
import errno
import os
import struct
import subprocess
import sys

__all__ = ("PrivateNetwork", "PrivateNetworkError")

# From <sched.h>, <linux/sockios.h> and <linux/if.h>.
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1

_READY = "ready"


class PrivateNetworkError(Exception):
    """This machine does not allow a private network."""


class PrivateNetwork:
    """A network without any other machine, which processes can join.

    Raises:
        PrivateNetworkError: If the system has no namespaces, or does not let this user make one.
    """

    def __init__(self) -> None:
        if sys.platform != "linux":
            raise PrivateNetworkError("only Linux has network namespaces")
        # Each a descriptor and its kind, in the order in which a process must join them.
        self._namespaces: list[tuple[int, int]] = []
        # -I: this file's directory must not be searched for modules of the standard library.
        command = [sys.executable, "-I", __file__]
        # The process leaves when its input is closed, at the end of the block.
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as made:
            assert made.stdout is not None  # A pipe was asked for.
            answer = made.stdout.readline().strip()
            if answer != _READY:
                raise PrivateNetworkError(answer or "the process that makes it ended")
            for name, kind in (("user", _CLONE_NEWUSER), ("net", _CLONE_NEWNET)):
                path = f"/proc/{made.pid}/ns/{name}"
                if not os.path.samefile(path, f"/proc/self/ns/{name}"):
                    self._namespaces.append((os.open(path, os.O_RDONLY | os.O_CLOEXEC), kind))

    def join(self) -> None:
        """Moves this process, which must have one thread, into the network."""
        for descriptor, kind in self._namespaces:
            _call("setns", descriptor, kind)

    def close(self) -> None:
        """Gives the network up: it ends with the last process that is in it."""
        while self._namespaces:
            os.close(self._namespaces.pop()[0])


def _call(function: str, *arguments: int) -> None:
    """Calls a function of the C library. Python has these two since version 3.12."""
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, function)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")


def _isolate() -> None:
    """Moves this process into a network namespace of its own."""
    try:
        _call("unshare", _CLONE_NEWNET)
    except OSError as e:
        if e.errno != errno.EPERM:
            raise
        _enter_user_namespace()


def _enter_user_namespace() -> None:
    user, group = os.geteuid(), os.getegid()
    _call("unshare", _CLONE_NEWUSER | _CLONE_NEWNET)
    # Without the first, Linux does not let a user map a group.
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _bring_loopback_up() -> None:
    # Here, because only the program needs them.
    import fcntl
    import socket

    request = struct.pack("16sH22x", b"lo", _IFF_UP)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        fcntl.ioctl(s, _SIOCSIFFLAGS, request)


def _main() -> None:
    try:
        _isolate()
        _bring_loopback_up()
    except (OSError, AttributeError) as e:
        print(getattr(e, "strerror", None) or e, flush=True)
        return
    print(_READY, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _main()
