"""A program that runs cold jails, jails from stock and warm jobs from several threads, and says of each what it came to.

Each run has an output that only it can have. An outcome that is neither that, nor the death that was given to it, nor an error of ours
begins with WRONG. It goes on until its standard input is closed; then it says whether anything is left of it.
"""

from __future__ import annotations

import faulthandler
import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable

from conftest import changes, settled, traces

from nsjail_py import Jail, JailError, LauncherDied, Result, SetupError, launcher

WALL, TOO_LONG = 3.0, 25.0
SCRIPT = "import sys, time\ntime.sleep({0})\nprint(sys.stdin.read(), '{1}', flush=True)\ntime.sleep({0})"
stopping = threading.Event()
speak = threading.Lock()


def say(*words: object) -> None:
    with speak:
        os.write(1, (" ".join(map(str, words)) + "\n").encode())


def outcome(run: Callable[[], Result], wanted: bytes) -> str:
    started = time.monotonic()
    try:
        result = run()
    except SetupError as error:
        said = f"error:{error.step.replace(' ', '-')}"
    except LauncherDied:
        said = "error:launcher-died"
    except JailError as error:
        said = f"WRONG {error!r}"
    except Exception:
        said = "WRONG " + traceback.format_exc().replace("\n", " | ")
    else:
        said = judge(result, wanted)
    took = time.monotonic() - started
    return said if took < TOO_LONG else f"WRONG took {took:.1f} s: {said}"


def judge(result: Result, wanted: bytes) -> str:
    if result.ok:
        return "ok" if result.stdout == wanted and not result.stderr else f"WRONG ok with {result.stdout!r}, {result.stderr!r}"
    if result.verdict == "signal" and result.signal == 9:
        return "killed"
    return "wall_time" if result.verdict == "wall_time" else f"WRONG {result.summary} {result.stderr!r}"


def worker(name: str, jail: Jail, chance: random.Random) -> None:
    while not stopping.is_set():
        text = b"%016x" % chance.getrandbits(64)
        if name == "stock":
            said = outcome(lambda text=text: jail.run(["/bin/cat"], input=text), text)
        else:
            script = SCRIPT.format(chance.choice((0, 0.001, 0.01)), text.decode()[::-1])
            wanted = text + b" " + text[::-1] + b"\n"
            said = outcome(lambda text=text, script=script: jail.run_python(script, input=text), wanted)
        say(name, said)


def main(seed: int) -> None:
    faulthandler.enable()
    before = settled()
    cold, stock = Jail("untrusted", wall_time=WALL, stock=0), Jail("untrusted", wall_time=WALL, stock=4)
    warm = Jail("untrusted", wall_time=WALL, stock=2, preload=["json"])
    work = [("cold", cold), ("stock", stock), ("stock", stock), ("warm", warm), ("warm", warm)]
    threads = [
        threading.Thread(target=worker, args=(name, jail, random.Random(f"{seed} {number}"))) for number, (name, jail) in enumerate(work)
    ]
    for thread in threads:
        thread.start()
    say("started")
    sys.stdin.read()
    stopping.set()
    faulthandler.dump_traceback_later(60, exit=True)
    for thread in threads:
        thread.join()
    del thread, threads, work
    for jail, kind in ((cold, "cold"), (stock, "stock"), (warm, "warm")):
        result = jail.run_python("print(42)")
        say("next", kind, "ok" if result.ok and result.stdout == b"42\n" else f"WRONG {result}")
    warm.close()
    deadline = time.monotonic() + 5
    launcher.shutdown()
    more = changes(before, settled())
    while more and time.monotonic() < deadline:
        time.sleep(0.01)
        more = changes(before, traces())
    say("left", f"WRONG (before, after) {more}" if more else "nothing")
    launcher.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]))
