"""The first program inside the sandbox: gives up what it may not have, and becomes the model's program.

    python sandbox_child.py SECONDS MEMORY FILE PROCESSES OPEN_FILES CONFINED PREFIX PROGRAM

Limits are set here and not by the parent, because that on processes counts within the sandbox's own user namespace.
Imports nothing but the standard library: it is run by its path.

Landlock (Linux 5.13 on; https://docs.kernel.org/userspace-api/landlock.html) takes the files away: what is not allowed
here is refused to this process and to all that it starts, for good.
"""

import ctypes
import math
import os
import resource
import sys

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls, of the same numbers on x86-64 and arm64
ASK_VERSION, PATH_BENEATH, NO_NEW_PRIVS = 1, 1, 38
RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}
"""Version of Landlock -> how many of its rights on files there are, one a bit."""
READ = 0b1101  # execute, read a file, list a folder
DEVICE = 0b110  # read and write a file
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/proc")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


class Ruleset(ctypes.Structure):
    """struct landlock_ruleset_attr: rights on files, TCP and other processes that are refused unless allowed."""

    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class Beneath(ctypes.Structure):
    """struct landlock_path_beneath_attr: rights on all below an open folder, or on a file."""

    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def landlock_version() -> int:
    """0 where the kernel has none, or does not let it be used."""
    return max(0, int(_libc().syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(ASK_VERSION))))


def confine(work: str, prefix: str, program: str) -> None:
    """From here on: read the system, Python (in `prefix`) and the program; write in `work` alone. Raises OSError."""
    libc, version = _libc(), landlock_version()
    files = (1 << max(count for least, count in RIGHTS.items() if least <= version)) - 1
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    attributes = Ruleset(files, 0b11, 0b11)
    ruleset = _checked(
        libc.syscall(CREATE_RULESET, ctypes.byref(attributes), ctypes.c_size_t(size), ctypes.c_uint32(0))
    )
    readable = {*SYSTEM, prefix, sys.base_prefix, os.path.realpath(sys.executable), program}
    allowed = dict.fromkeys(readable, READ) | dict.fromkeys(DEVICES, DEVICE) | {work: files}
    for path, rights in allowed.items():
        _allow(libc, ruleset, path, rights & files)
    _checked(libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0))
    _checked(libc.syscall(RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0)))
    os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    """Nothing for a path that is not there."""
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    if not os.path.isdir(path):
        rights &= READ | DEVICE
        rights &= ~0b1000  # a file can't be listed
    rule = Beneath(rights, place)
    _checked(
        libc.syscall(
            ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(PATH_BENEATH), ctypes.byref(rule), ctypes.c_uint32(0)
        )
    )
    os.close(place)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def main() -> None:
    """Raises OSError where a limit can't be set: the program does not run then."""
    seconds, memory, file, processes, open_files, confined, prefix, program = sys.argv[1:]
    if int(confined):
        confine(os.getcwd(), prefix, program)
    limits = {
        resource.RLIMIT_CPU: math.ceil(float(seconds)),
        resource.RLIMIT_AS: int(memory),
        resource.RLIMIT_FSIZE: int(file),
        resource.RLIMIT_NPROC: int(processes),
        resource.RLIMIT_NOFILE: int(open_files),
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))
    os.execv(sys.executable, [sys.executable, "-I", program])


if __name__ == "__main__":
    main()
