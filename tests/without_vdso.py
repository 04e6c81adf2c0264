"""without_vdso.py PROGRAM: becomes the program, for which each look at a clock is a system call, as on a host with the clock source acpi_pm.

The C library finds the kernel's code for clocks by an entry that the kernel leaves on the stack of a new program. A child of ours crosses
it out. vdso(7), getauxval(3), ptrace(2)
"""

import ctypes
import os
import signal
import struct
import sys

SEIZE, CONTINUE, DETACH, TRACE_EXEC, EXEC = 0x4206, 7, 17, 1 << 4, 4
ANYBODY_MAY, SET_PTRACER = -1, 0x59616D61
END, IGNORE, VDSO = 0, 1, 33
START_OF_STACK = 28 - 3
"""Field 28 of proc_pid_stat(5), of those behind the name."""
WORD = struct.Struct("@L")

libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]


def cross_out(pid: int) -> None:
    with open(f"/proc/{pid}/stat") as file:
        at = int(file.read().rpartition(")")[2].split()[START_OF_STACK])
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:

        def word() -> int:
            nonlocal at
            at += WORD.size
            memory.seek(at - WORD.size)
            return int(WORD.unpack(memory.read(WORD.size))[0])

        word()  # argc
        for _ in ("argv", "envp"):
            while word():
                pass
        while (kind := word()) != VDSO:
            assert kind != END
            word()
        memory.seek(at - WORD.size)
        memory.write(WORD.pack(IGNORE))


def traced(pid: int, seized: int) -> None:
    if libc.ptrace(SEIZE, pid, None, TRACE_EXEC) < 0:
        raise OSError(ctypes.get_errno(), "ptrace")
    os.write(seized, b"!")
    while (status := os.waitpid(pid, 0)[1]) >> 16 != EXEC:
        libc.ptrace(CONTINUE, pid, None, os.WSTOPSIG(status))  # its own child has ended
    cross_out(pid)
    libc.ptrace(DETACH, pid, None, None)


ours = os.getpid()
heard, told = os.pipe()
libc.prctl(SET_PTRACER, ANYBODY_MAY, 0, 0, 0)
if os.fork() == 0:
    if os.fork() == 0:  # nobody's child, so that the program has none
        os.closerange(0, 2)
        traced(ours, told)
    os._exit(0)
os.close(told)
os.wait()
assert os.read(heard, 1)
for number in (signal.SIGPIPE, signal.SIGXFSZ):
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
