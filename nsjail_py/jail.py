"""Running things: `run`, `run_python` and `Jail`, which start them. What is started has a handle, process.py.

    policy -> plan -> launch -> inside -> watch -> result

Made for use from any number of threads at once. aio.py has the same for asyncio.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from . import launcher
from ._native import lib
from .coding import as_file
from .compiled import PATH, Compiled, Host, for_program, for_python
from .errors import CLOSED, JailError, PolicyError, SetupError, during
from .plan import OrderFile, compile_order
from .policy import Policy
from .policyfile import resolve
from .process import Process
from .result import Result
from .retry import to_end, until_it_begins
from .streams import DEVNULL, PIPE, STDOUT, Ends, Stream, captured, no_directory, split

if TYPE_CHECKING:
    from .cgroups import Claim
    from .layers.audit import Page
    from .session import Session
    from .warm import Template, Templates

__all__ = ["DEVNULL", "PIPE", "STDOUT", "Jail", "Process", "run", "run_python"]

STOCK = 2
"""How many jails wait for the next runs of one program under one policy, where a Jail does not say."""
MAX_STOCK = 64
Args = Sequence[str | bytes | os.PathLike[str]]


class Jail:
    """One policy, many runs, from any thread.

    policy: a Policy, the name of a shipped one, or the path of a TOML file. changes: fields that differ from it (limits by their names,
    `imports`, `env`, `mounts`, `workdir` ...; numbers or strings with units). Raises PolicyError with everything that is wrong.
    stock: how many jails wait for the next runs, made from the second run of a program on, and gone ten seconds after the last. 0: none.
    preload: modules that a warm interpreter has imported, from which `run_python` forks its runs (docs/how-it-works.md); the distributions
    that they come from are visible inside. Empty for a bare one; None: each run starts an interpreter. Close the Jail to end it.
    """

    def __init__(
        self,
        policy: Policy | str | os.PathLike[str] = "untrusted",
        *,
        stock: int | None = None,
        preload: Sequence[str] | None = None,
        **changes: Any,
    ) -> None:
        stock = STOCK if stock is None else stock
        if not isinstance(stock, int) or not 0 <= stock <= MAX_STOCK:
            raise PolicyError(f"stock = {stock!r}: a whole number from 0 to {MAX_STOCK}")
        self.stock = stock
        self.policy = resolve(policy, **changes)
        self.preload = None if preload is None else modules(preload)
        self._inner: dict[str, Jail] = {}
        """Of its sessions; from the first on."""
        self._templates: Templates | None = None
        self._known_host: tuple[Claim, Host] | None = None
        self._closed = False
        if self.policy.backend != "native":
            from .oci_backend import check

            check(self.policy, preload is not None)
        if self.preload is not None and self.policy.python.audit != "off":
            raise PolicyError('$.python.audit: a warm interpreter tells nothing: audit = "off", or no preload')
        if self.preload is not None:
            from .warm import Templates, with_imports

            if self.policy.apparmor or self.policy.selinux:
                raise PolicyError("preload: a label comes with exec, and the jobs of a warm interpreter have none: leave one of them out")
            self.policy = with_imports(self.policy, self.preload)
            if self.policy.python.aslr == "shared":
                self._templates = Templates(self.policy, self.preload)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the warm interpreter, if there is one, with its jobs and sessions; nothing else is held between runs, and other runs go on
        to their end. From now on every start is a JailError, whatever the policy."""
        self._closed = True
        for jail in self._inner.copy().values():  # another thread may be adding it
            jail.close()
        if self._templates is not None:
            self._templates.close()

    def start(
        self, args: Args, *, stdin: Stream = None, stdout: Stream = None, stderr: Stream = None, pass_fds: Iterable[int] = ()
    ) -> Process:
        """Starts a program. args[0] is looked up as a shell does; FileNotFoundError and PermissionError as from subprocess."""
        argv = listed(args)
        if not argv:
            raise PolicyError("no program: the argument list is empty")
        compiled = self.compiled_for(argv[0])
        return self._start(compiled, argv, (), (stdin, stdout, stderr), tuple(pass_fds))

    def start_python(
        self,
        source: str | bytes,
        *,
        args: Args = (),
        filename: str = "main.py",
        stdin: Stream = None,
        stdout: Stream = None,
        stderr: Stream = None,
        pass_fds: Iterable[int] = (),
    ) -> Process:
        """Starts a Python script. Inside it is /app/FILENAME. Raises ScriptRefused where the policy lets the scan refuse one."""
        data = as_file(source)
        arguments = listed(args)
        if "/" in filename or filename in ("", ".", ".."):
            raise PolicyError(f"filename {filename!r} must be a name without directories")
        if self.policy.python.scan != "off":
            from .layers.scan import before_run

            before_run(self.policy, data, filename)
        streams = (stdin, stdout, stderr)
        if self._templates is not None:
            template = self._templates.take(self._host(), self._probe)
            return self._start_job(template, data, arguments, filename, streams, tuple(pass_fds))
        compiled = for_python(self.policy, self._host())
        argv = [compiled.program, "-s", f"/app/{filename}", *arguments]
        files: tuple[OrderFile, ...] = (OrderFile(filename, data),)
        page = None
        if self.policy.python.audit != "off":
            from .layers.audit import Page

            page = Page(self.policy)
            argv[2:2], files = page.arguments(), files + page.files()
        return self._start(compiled, argv, files, streams, tuple(pass_fds), page=page)

    def _start_job(
        self, template: Template, data: bytes, arguments: list[str], filename: str, streams: Sequence[Stream], pass_fds: tuple[int, ...]
    ) -> Process:
        argv = [template.compiled.program, "-s", f"/app/{filename}", *arguments]
        return self._start(template.compiled, argv, (OrderFile(filename, data),), streams, pass_fds, template)

    def start_own(self, name: str, descriptors: Mapping[int, int], streams: Sequence[Stream], lifetime: float | None = None) -> Process:
        """For JailExecutor and Session: NAME_inside.py. descriptors: by the numbers that it knows them by, rising from 3 on. lifetime: in
        the place of the policy's wall time."""
        if self.policy.python.audit != "off":
            raise PolicyError('$.python.audit: a session tells nothing: audit = "off", or single runs')
        if self.policy.backend != "native":
            raise PolicyError('$.backend: a session or an executor has our own launcher only: backend = "native", or single runs')
        template = None
        if self._templates is not None:
            template = self._templates.take(self._host(), self._probe)
        return self._start_own(template, name, own_script(name), descriptors, streams, lifetime)

    def _start_own(
        self,
        template: Template | None,
        name: str,
        source: bytes,
        descriptors: Mapping[int, int],
        streams: Sequence[Stream],
        lifetime: float | None = None,
    ) -> Process:
        compiled = for_python(self.policy, self._host()) if template is None else template.compiled
        if lifetime is not None:
            compiled = compiled.lasting(lifetime)
        argv = [compiled.program, "-s", f"/app/{name}.py"]
        files = (OrderFile(f"{name}.py", source),)
        order = compile_order(compiled.program, argv, environment(self.policy), files, [0, 1, 2, *descriptors])
        return Process(compiled, order, argv, Ends(*streams), list(descriptors.values()), self.stock, template)

    def session(self, lifetime: float | None = None) -> Session:
        """One interpreter for many cells of code (session.py), forked from the warm one where there is `preload`. The policy's limits of
        time are those of each cell. lifetime: seconds after which the whole session ends; PolicyError for what is none. A session may fork,
        whatever the policy says. Raises SetupError as a run does, and SessionError where its interpreter does not start."""
        from .session import Session, inner_jail

        inner = self._inner.get("session") or self._inner.setdefault("session", inner_jail(self))
        if self._closed:  # after that: `close` may have looked before
            inner.close()
        return until_it_begins(lambda: Session(inner, self.policy, lifetime))

    def _probe(self, template: Template) -> bytes:
        """What a job draws, on a pipe of its own: no limit of output is for it, and nothing that a module says at its end is in it."""
        from .warm import DRAWN_FD, PROBE

        with during("template"):
            read, write = os.pipe2(os.O_CLOEXEC)
        with open(read, "rb", 0) as drawn:
            with (
                open(write, "wb", 0),
                self._start_own(template, "probe", PROBE.encode(), {DRAWN_FD: write}, (DEVNULL, DEVNULL, DEVNULL)) as job,
            ):
                result = job.communicate()
            if not result.ok:
                raise SetupError("template", detail=f"its first job: {result.summary}")
            return drawn.read()

    def run(self, args: Args, *, input: bytes | None = None, timeout: float | None = None, **streams: Any) -> Result:
        """Runs a program to its end and returns its result; output is captured unless stdout and stderr say otherwise."""
        return to_end(lambda: self.start(args, **captured(input, streams)), input, timeout)

    def run_python(
        self,
        source: str | bytes,
        *,
        args: Args = (),
        filename: str = "main.py",
        input: bytes | None = None,
        timeout: float | None = None,
        **streams: Any,
    ) -> Result:
        """Runs a Python script to its end and returns its result."""
        return to_end(lambda: self.start_python(source, args=args, filename=filename, **captured(input, streams)), input, timeout)

    def compiled_for(self, program: str) -> Compiled:
        """What the policy comes to on this host for a program. Raises FileNotFoundError and PermissionError."""
        return for_program(self.policy, self._host(), program)

    def _host(self) -> Host:
        """What each start begins with."""
        if self._closed:
            raise JailError(CLOSED)
        claim = launcher.current().claim
        if self._known_host is None or self._known_host[0] is not claim:
            self._known_host = claim, Host.of(claim)
        return self._known_host[1]

    def _start(
        self,
        compiled: Compiled,
        argv: list[str],
        files: Sequence[OrderFile],
        streams: Sequence[Stream],
        pass_fds: tuple[int, ...],
        template: Template | None = None,
        page: Page | None = None,
    ) -> Process:
        extra = page.passed if page else ()
        numbers = sorted(set(pass_fds))
        if numbers:
            highest = (extra[0][0] if extra else lib.MAX_FD_NUMBER) - 1
            if numbers[0] < 3 or numbers[-1] > highest or len(numbers) > lib.MAX_FDS - 3 - len(extra):
                raise PolicyError(f"pass_fds: at most {lib.MAX_FDS - 3} descriptors with numbers from 3 to {lib.MAX_FD_NUMBER - 1}")
            for number in numbers:
                no_directory(number)
        if compiled.policy.backend != "native":
            from .oci_backend import OciProcess

            return OciProcess(compiled, argv, files, Ends(*streams, only_pipes=True), numbers)
        inside = [0, 1, 2, *numbers, *(number for number, _ in extra)]
        order = compile_order(compiled.program, argv, environment(compiled.policy), files, inside)
        passed = [*numbers, *(descriptor for _, descriptor in extra)]
        return Process(compiled, order, argv, Ends(*streams), passed, self.stock, template, page)


def listed(args: Args) -> list[str]:
    """Raises PolicyError for one text, which would be taken for a list of letters."""
    if isinstance(args, str | bytes | os.PathLike):
        raise PolicyError(f"args = {args!r}: a list of arguments, not one text")
    return [os.fsdecode(arg) for arg in args]


def modules(preload: Sequence[str]) -> tuple[str, ...]:
    """Raises PolicyError for one text, as `listed` does."""
    if isinstance(preload, str):
        raise PolicyError(f"preload = {preload!r}: a list of modules, not one text")
    return tuple(preload)


@functools.cache
def own_script(name: str) -> bytes:
    return Path(__file__).with_name(f"{name}_inside.py").read_bytes()


def environment(policy: Policy) -> dict[str, str]:
    """The whole environment inside. Nothing of the caller's is in it but what the policy names."""
    variables = {"PATH": PATH, "HOME": "/work", "LANG": "C.UTF-8", "USER": "jail", "TMPDIR": "/tmp"}
    if policy.python.project:
        variables["PYTHONPATH"] = "/project"
    variables |= {name: os.environ[name] for name in policy.env_pass if name in os.environ}
    return variables | policy.env


def run(args: Args, *, policy: Policy | str | os.PathLike[str] = "untrusted", **options: Any) -> Result:
    """Runs a program in a jail, like subprocess.run. options: streams, input and timeout as there; everything else changes the policy."""
    streams, changes = split(options)
    return Jail(policy, **changes).run(args, **streams)


def run_python(
    source: str | bytes,
    *,
    policy: Policy | str | os.PathLike[str] = "untrusted",
    args: Args = (),
    filename: str = "main.py",
    **options: Any,
) -> Result:
    """Runs Python source in a jail. options as for `run`."""
    streams, changes = split(options)
    return Jail(policy, **changes).run_python(source, args=args, filename=filename, **streams)
